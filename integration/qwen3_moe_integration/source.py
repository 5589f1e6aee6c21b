"""Where the kernel comes from: the Hub, a lock file, or a folder. It is always loaded by ``kernels``."""

import functools
import sys
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Optional, Union

from kernels import LockedLayerRepository, get_kernel, get_local_kernel


@dataclass(frozen=True)
class KernelSource:
    """A kernel package, not loaded yet.

    Args:
        repo_id: the kernel's repository on the Hub.
        version: the version to take, unless one of the next three says it more precisely.
        revision: a branch, a tag or a commit.
        lockfile: a ``kernels.lock``, as ``kernels lock`` writes it; gives the commit of ``repo_id``.
        path: a folder that holds ``build/``, for a kernel that was built or downloaded before.
        trust_remote_code: load the kernel although its publisher is not a trusted one.

    Raises:
        ValueError: more than one of ``revision``, ``lockfile`` and ``path`` is given.
    """

    repo_id: str = "org/qwen3-moe-fused"
    version: int = 1
    revision: Optional[str] = None
    lockfile: Optional[Union[str, PathLike]] = None
    path: Optional[Union[str, PathLike]] = None
    trust_remote_code: bool = False

    def __post_init__(self):
        given = [name for name in ("revision", "lockfile", "path") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of revision, lockfile and path can say which kernel to take, got {given}")

    def load(self) -> ModuleType:
        """The kernel's module, which ``kernels`` downloads if need be; later calls return the same module.

        Raises:
            FileNotFoundError, ValueError: as ``kernels`` raises them, when it finds no such kernel or may not trust it.
        """
        return _load(self)


@functools.cache
def _load(source: KernelSource) -> ModuleType:
    if source.path is not None:
        return get_local_kernel(Path(source.path))
    if source.lockfile is not None:
        return _load_locked(source)
    pin = {"version": source.version} if source.revision is None else {"revision": source.revision}
    return get_kernel(source.repo_id, trust_remote_code=source.trust_remote_code, **pin)


def _load_locked(source: KernelSource) -> ModuleType:
    # Of a lock file at a path, kernels 0.16 gives a layer only; the package that the layer is in is the kernel.
    layer = LockedLayerRepository(
        source.repo_id,
        lockfile=Path(source.lockfile),
        layer_name="Qwen3MoeExperts",
        trust_remote_code=source.trust_remote_code,
    ).load()
    return sys.modules[layer.__module__.rpartition(".")[0]]


@dataclass(frozen=True)
class KernelLayer:
    """One layer of a kernel, in the form that a layer mapping of ``kernels`` takes: hashable, with a ``load``.

    Unlike ``kernels.LayerRepository`` it does not ask the Hub which commit a version is before it looks at
    ``LOCAL_KERNELS``, so that works without a network.
    """

    source: KernelSource
    layer_name: str

    def load(self) -> type:
        return getattr(self.source.load().layers, self.layer_name)
