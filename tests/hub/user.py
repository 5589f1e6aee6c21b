"""A user of the Hub: a machine of their own (a fresh cache, no settings but the endpoint) where they run Python or a
command. Programs are functions: the test shows what the user writes, and a new interpreter runs its source."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Callable

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

    def __init__(self, home: Path, endpoint: str, **environment: str):
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.home, self.environment = home, own | hub | environment

    def call(self, program: Callable, *arguments, **environment: str):
        """What ``program(*arguments)`` returns in an interpreter of its own; values travel as JSON."""
        return self._python(program, arguments, "value", environment)["value"]

    def error(self, program: Callable, *arguments, **environment: str) -> tuple[str, str]:
        """Type and message of what ``program(*arguments)`` raises there."""
        return tuple(self._python(program, arguments, "error", environment)["error"])

    def command(self, name: str, *arguments: str, **environment: str) -> str:
        """What the command of that name, of this Python's environment, prints; stderr comes first."""
        if name == "python":
            words = [sys.executable, *arguments]
        else:
            modules = {"kernels": "kernels.cli", "hf": "huggingface_hub.cli.hf"}
            words = [sys.executable, "-c", f"from {modules[name]} import main; main()", *arguments]
        run = self.run(words, environment)
        assert run.returncode == 0, f"{name} {' '.join(arguments)}:\n{run.stderr}{run.stdout}"
        return run.stderr + run.stdout

    def run(self, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, env=self.environment | environment, cwd=self.home, capture_output=True, text=True, timeout=240
        )

    def _python(self, program: Callable, arguments: tuple, wanted: str, environment: dict[str, str]) -> dict:
        source = textwrap.dedent(inspect.getsource(program)) + HARNESS.format(name=program.__name__)
        run = self.run([sys.executable, "-c", source, json.dumps(arguments), wanted], environment)
        assert run.returncode == 0, f"{program.__name__}:\n{run.stderr}"
        answer = json.loads(run.stdout.splitlines()[-1])
        assert wanted in answer, f"{program.__name__} returned {answer.get('value')!r} and raised nothing"
        return answer
