"""A project that pins the kernel: ``kernels lock``, ``kernels download``, and loading what the lock names."""

from pathlib import Path

import pytest

from tests.hub.conftest import REPO, VARIANT


def locked_file(repo_id, lockfile):
    from pathlib import Path

    from kernels import get_locked_kernel

    return get_locked_kernel(repo_id, lockfile=Path(lockfile)).__file__


def loaded_file(repo_id, lockfile):
    from pathlib import Path

    from kernels import load_kernel

    return load_kernel(repo_id, lockfile=Path(lockfile)).__file__


def locked_project(user, repo_id: str) -> Path:
    """The lock file of an otherwise empty project that depends on version 1."""
    folder = user.home / "project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(f'[tool.kernels.dependencies]\n"{repo_id}" = 1\n')
    user.shell("kernels lock .", folder)
    return folder / "kernels.lock"


def test_lock_keeps_its_commit_when_the_version_branch_moves_on(user, maintainer):
    repo_id, source = "org/qwen3-moe-moving", maintainer.checkout("moving")
    first = maintainer.publish(source, repo_id)["v1"]
    lock = locked_project(user, repo_id)
    assert first in lock.read_text()

    package = source / "torch-ext/qwen3_moe_fused/__init__.py"
    package.write_text(f"{package.read_text()}\nNEWER = True\n")
    maintainer.commit(source)
    second = maintainer.publish(source, repo_id)["v1"]
    assert second != first

    assert f"/snapshots/{first}/" in user.call(locked_file, repo_id, str(lock))
    user.shell("kernels lock .", lock.parent)
    assert f"/snapshots/{second}/" in user.call(locked_file, repo_id, str(lock))


def test_download_leaves_nothing_to_download_when_the_locked_kernel_is_loaded(user, hub, v1):
    lock = locked_project(user, REPO)
    user.shell("kernels download .", lock.parent)
    asked = len(hub.requests)
    assert f"/snapshots/{v1}/build/{VARIANT}/" in user.call(locked_file, REPO, str(lock))
    assert not any(request.startswith("GET /kernels/") for request in hub.requests[asked:])


@pytest.mark.compat
def test_load_kernel_needs_no_network_after_a_full_snapshot_of_the_locked_commit(user, hub, v1):
    lock = locked_project(user, REPO)
    assert v1 in lock.read_text()
    user.shell(f"hf download {REPO} --repo-type kernel --revision {v1}")
    asked = len(hub.requests)
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        file = user.call(loaded_file, REPO, str(lock), **environment)
        assert file.endswith(f"/snapshots/{v1}/build/{VARIANT}/__init__.py")
    assert len(hub.requests) == asked


def test_a_kernel_that_is_not_in_the_lock_is_refused(user, v1):
    lock = locked_project(user, REPO)
    kind, message = user.error(locked_file, "org/other", str(lock))
    assert kind == "ValueError"
    assert "`org/other` is not locked" in message
