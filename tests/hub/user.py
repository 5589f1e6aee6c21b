"""A user of the Hub: a machine of their own (a fresh cache, no settings but the endpoint) where they run Python or a
command. Programs are functions: the test shows what the user writes, and a new interpreter runs its source."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Callable, Optional

FOREIGN = ("HF_", "HUGGING", "KERNELS_", "LOCAL_KERNELS")  # settings of the machine that runs the tests
HARNESS = """

import json, sys
try:
    answer = {{"value": {name}(*json.loads(sys.argv[1]))}}
except Exception as error:
    answer = {{"error": [type(error).__name__, str(error)]}}
    if sys.argv[2] == "value":
        raise
print(json.dumps(answer))
"""


class User:
    """Runs programs and commands against ``endpoint``, with caches and files below ``home``."""

    def __init__(self, home: Path, endpoint: str):
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.home, self.environment = home, own | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "PATH": path}

    def call(self, program: Callable, *arguments, **environment: str):
        """What ``program(*arguments)`` returns in an interpreter of its own; values travel as JSON."""
        return self._python(program, arguments, "value", environment)["value"]

    def error(self, program: Callable, *arguments, **environment: str) -> tuple[str, str]:
        """Type and message of what ``program(*arguments)`` raises there."""
        return tuple(self._python(program, arguments, "error", environment)["error"])

    def shell(self, command: str, folder: Optional[Path] = None, **environment: str) -> str:
        """What a shell command prints, run in ``folder``; ``python``, ``kernels`` and ``hf`` are those of the tests."""
        run = self._run(["bash", "-euc", command], environment, folder or self.home)
        assert run.returncode == 0, f"{command}:\n{run.stderr}{run.stdout}"
        return run.stdout

    def _run(self, words: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
        everything = self.environment | environment
        return subprocess.run(words, env=everything, cwd=folder, capture_output=True, text=True, timeout=240)

    def _python(self, program: Callable, arguments: tuple, wanted: str, environment: dict[str, str]) -> dict:
        source = textwrap.dedent(inspect.getsource(program)) + HARNESS.format(name=program.__name__)
        words = [sys.executable, "-c", source, json.dumps(arguments), wanted]
        run = self._run(words, environment, self.home)
        assert run.returncode == 0, f"{program.__name__}:\n{run.stderr}"
        answer = json.loads(run.stdout.splitlines()[-1])
        assert wanted in answer, f"{program.__name__} returned {answer.get('value')!r} and raised nothing"
        return answer
