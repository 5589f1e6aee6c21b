"""How much of the host's memory can be pinned: what is left of it, or of what a container may have."""

import platform
import re
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of cgroups, 2 and 1: the files with the limit, with what is used, with its kinds, and the kind that is given back for
the asking, pages of files that nobody reads."""


def pinnable() -> int:
    """Bytes that this process can still pin without being killed for its container's limit. None but on Linux, and
    none under WSL: the driver sets a limit there that nobody can ask for, and that may be half a GB."""
    if platform.system() != "Linux" or "microsoft" in platform.release().lower():
        return 0
    sizes = [psutil.virtual_memory().available]
    for limit, used, kinds, cache in VERSIONS:
        try:
            limit, used, kinds = ((CGROUPS / name).read_text() for name in (limit, used, kinds))
            cached = re.search(rf"^{cache} (\d+)$", kinds, re.M)
            sizes.append(int(limit) - int(used) + int(cached[1] if cached else 0))
        except (OSError, ValueError):
            continue  # the other version, or "max": no limit
    return max(0, min(sizes))
