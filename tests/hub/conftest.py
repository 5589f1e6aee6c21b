"""One Hub for all these tests, with version 1 of the kernel on it, put there by scripts/publish_kernel.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.hub.server import TOKEN, Hub
from tests.hub.user import User

REPO, BOTH = "org/qwen3-moe-fused", "org/qwen3-moe-both"
VARIANT = "torch-cuda" if torch.version.cuda else "torch-cpu"  # the one kernels takes: PyTorch's build decides
IDENTITY = ["-c", "user.name=Maintainer", "-c", "user.email=maintainer@localhost"]
DATE = "2026-01-01T00:00:00+0000"


class Maintainer:
    """Has checkouts of the sources and publishes them, always with the project's own pinned set of packages."""

    def __init__(self, home: Path, endpoint: str):
        self.home, self.endpoint = home, endpoint

    def checkout(self, name: str) -> Path:
        """A clean commit of this tree's sources, with a hash that depends on them alone."""
        source = self.home / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "torch-ext", source / "torch-ext", ignore=ignore)
        (source / "benchmarks").mkdir()
        for path in (ROOT / "build.toml", ROOT / "CARD.md", *(ROOT / "benchmarks").glob("*.py")):
            shutil.copyfile(path, source / path.relative_to(ROOT))
        subprocess.run(["git", "init", "--quiet", str(source)], check=True)
        self.commit(source)
        return source

    def commit(self, source: Path) -> str:
        """Commits every change in ``source`` and returns the commit's hash."""
        git = ["git", "-C", str(source), *IDENTITY]
        dates = {"GIT_AUTHOR_DATE": DATE, "GIT_COMMITTER_DATE": DATE}
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message=Release"], check=True, env=os.environ | dates)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    def run(self, source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """scripts/publish_kernel.py on ``source``."""
        own = {"PYTHONPATH": str(ROOT / ".publish"), "HF_HOME": str(self.home / "hf")}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN}
        script = [sys.executable, str(ROOT / "scripts/publish_kernel.py"), "--source", str(source), *arguments]
        return subprocess.run(script, env=os.environ | own | hub | environment, capture_output=True, text=True)

    def publish(self, source: Path, repo_id: str = REPO) -> dict[str, str]:
        """Publishes ``source`` and returns {branch: commit} as the script reports it."""
        run = self.run(source, "--repo-id", repo_id)
        assert run.returncode == 0, run.stderr
        return dict(line.removeprefix(f"{repo_id} ").split(": ") for line in run.stdout.splitlines())


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"), trusted={"org"})
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def maintainer(hub, tmp_path_factory) -> Maintainer:
    return Maintainer(tmp_path_factory.mktemp("maintainer"), hub.endpoint)


@pytest.fixture(scope="session")
def v1(maintainer) -> str:
    """Version 1 is on the Hub; the commit of its branch."""
    return maintainer.publish(maintainer.checkout("v1"))["v1"]


@pytest.fixture(scope="session")
def both(maintainer, v1) -> dict[str, str]:
    """{branch: commit} of BOTH, which has versions 1 and 2; version 2 is a later commit of the same sources."""
    first = maintainer.publish(maintainer.home / "v1", BOTH)
    source = maintainer.checkout("v2")
    build = source / "build.toml"
    build.write_text(build.read_text().replace("version = 1\n", "version = 2\n"))
    maintainer.commit(source)
    return first | maintainer.publish(source, BOTH)


@pytest.fixture
def user(hub, tmp_path) -> User:
    return User(tmp_path, hub.endpoint)
