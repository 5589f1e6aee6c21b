"""The host memory of another process, watched from outside: a thread within it would wait while it loads.

Linux tells two kinds apart. *Anonymous* memory is what a process must have. *Resident* memory has mapped files too: of
shards that safetensors maps, whatever was read stays resident while there is room, and goes when there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

INTERVAL_S = 0.005


def watch(module: str, arguments: list[str]) -> list[dict]:
    """Runs ``python -m module`` in a fresh process, which prints a line of JSON after each of its phases.

    Returns:
        What each line said, and the peaks of the phase before it: bytes of ``host_anonymous`` and ``host_resident``.

    Raises:
        RuntimeError: the process failed.
    """
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = SimpleQueue()
    Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    phases, peaks = [], {}
    while True:
        for kind, size in host_memory(process.pid).items():
            peaks[kind] = max(size, peaks.get(kind, 0))
        try:
            line = lines.get(timeout=INTERVAL_S)
        except Empty:
            continue
        if line is None:
            break
        if line.startswith("{"):
            phases.append({**json.loads(line), **peaks})
            peaks = {}
    if process.wait():
        raise RuntimeError(f"python -m {module} ended with {process.returncode}")
    return phases


def host_memory(pid: int) -> dict[str, int]:
    """Bytes of a process as Linux counts them; none of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    rows = (line.split() for line in status.splitlines() if line.startswith("Rss"))
    kinds = {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows}
    if not kinds:
        return {}
    return {"host_anonymous": kinds["RssAnon"], "host_resident": sum(kinds.values())}


def _read(stream, lines: SimpleQueue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
