"""What a process may still pin of the host is the least of what the host has and what its container may have."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.conftest import ROOT

MIB = 2**20


@pytest.fixture
def host_memory(tmp_path, monkeypatch) -> ModuleType:
    """The module, on a host with 100 MiB left and without containers."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import host_memory

    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * MIB))
    return host_memory


def limit(folder: Path, version: int, of: str, used: int, cached: int) -> None:
    kind, prefix = ("inactive_file", "memory.") if version == 2 else ("total_inactive_file", "memory/memory.")
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    folder.joinpath("memory").mkdir(exist_ok=True)
    (folder / f"{prefix}{names[0]}").write_text(f"{of}\n")
    (folder / f"{prefix}{names[1]}").write_text(f"{used}\n")
    (folder / f"{prefix}stat").write_text(f"anon 5\n{kind} {cached}\nactive_file 7\n")


def test_without_a_container_it_is_what_the_host_has(host_memory):
    assert host_memory.pinnable() == 100 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_may_have_less(host_memory, tmp_path, version):
    limit(tmp_path, version, str(50 * MIB), used=30 * MIB, cached=4 * MIB)
    assert host_memory.pinnable() == 24 * MIB
    limit(tmp_path, version, str(500 * MIB), used=30 * MIB, cached=4 * MIB)
    assert host_memory.pinnable() == 100 * MIB
    limit(tmp_path, version, str(50 * MIB), used=51 * MIB, cached=0)
    assert host_memory.pinnable() == 0


def test_a_container_without_a_limit_has_what_the_host_has(host_memory, tmp_path):
    limit(tmp_path, 2, "max", used=30 * MIB, cached=4 * MIB)
    assert host_memory.pinnable() == 100 * MIB


@pytest.mark.parametrize(
    ("what", "value"), [("platform.release", "5.15.167.4-microsoft-standard-WSL2"), ("platform.system", "Windows")]
)
def test_under_wsl_and_on_other_systems_there_is_none(host_memory, monkeypatch, what, value):
    monkeypatch.setattr(what, lambda: value)
    assert host_memory.pinnable() == 0
