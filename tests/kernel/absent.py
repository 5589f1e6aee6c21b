"""A card that is not here: Triton compiles and launches nothing, and all of it is noted.

What the host does in a call can be tested so on any machine.
"""

import importlib
import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile

BF16 = torch.bfloat16
E, H, I, K = 4, 128, 64, 2
LAYERS = ["dense", "trained", "adapters", "4 bit", "4 bit with adapters"]


class Compiler:
    """Stands in for Triton: ``asked``, ``compiled`` and ``launched`` hold kernels' names in order, ``arguments`` what
    each launch was given."""

    utils = None

    def __init__(self):
        self.asked: list[str] = []  # by a rehearsal
        self.compiled: list[str] = []
        self.in_turn: list[str] = []  # of these, by a launch that waited for it
        self.launched: list[str] = []
        self.arguments: list[tuple] = []
        self.stream = 0
        self.launchers: list[tuple[str, threading.Thread]] = []  # of which kernels, and who built them
        self.broken = self.without_launcher = ""
        self.on_compile: Callable[[str], None] = lambda name: None

    def get_current_device(self) -> object:
        return self  # Triton's caches are by device, so those of each test are its own

    def get_current_stream(self, device: object = None) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src, metadata) -> None:
        """Triton's calls the C compiler."""
        if metadata.name == self.without_launcher:
            raise RuntimeError(f"{metadata.name} has no launcher")
        self.launchers.append((metadata.name, threading.current_thread()))

    def compile(self, kernel, key, signature, device, constexprs, options, attrs, warmup):
        """``JITFunction._do_compile``."""
        name, mode, cache = kernel.__name__, _async_compile.active_mode.get(), kernel.device_caches[device][0]

        def work() -> SimpleNamespace:
            self.on_compile(name)
            if name == self.broken:
                raise RuntimeError(f"{name} does not compile")
            self.compiled.append(name)
            return Compiled(name, self)

        if mode is not None:
            self.asked.append(name)
            finalize, clean_up = lambda kernel: cache.__setitem__(key, kernel), lambda kernel: None
            newer = "cleanup_fn" in inspect.signature(mode.submit).parameters  # from Triton 3.9 on
            return mode.submit((name, key), work, finalize, *((clean_up,) if newer else ()))
        cache[key] = work()
        self.in_turn.append(name)
        return cache[key]


class Compiled(SimpleNamespace):
    """A compiled kernel as Triton launches it the first time, and ``launch`` ever after."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, compiler: Compiler):
        super().__init__(name=name, compiler=compiler, src=None, metadata=SimpleNamespace(name=name))

    def launch_metadata(self, *args) -> None:
        return None

    def run(self, *args) -> None:
        self.compiler.launched.append(self.name)
        self.compiler.arguments.append(args)


def module(kernel, name: str):
    return importlib.import_module(f"{kernel.__name__}.kernels.{name}")


class Layer:
    """A layer's arguments, of memory that nobody fills, and its two directions."""

    def __init__(self, kernel, kind: str, tokens: int = 24):
        self.experts = module(kernel, "experts")
        self.projection = importlib.import_module(f"{kernel.__name__}.projection")
        self.trained, self.adapted = kind == "trained", "adapters" in kind
        weight = self._packed if "4 bit" in kind else self._dense
        self.projections = [self._projection(weight, 2 * I, H), self._projection(weight, H, I)]
        hidden = torch.empty(tokens, H, dtype=BF16, requires_grad=True)
        self.seed = None
        self.tokens = hidden, torch.empty(tokens, K, dtype=torch.int64), torch.empty(tokens, K, dtype=BF16)

    def forward(self, save: bool = True, result: bool = True) -> tuple:
        return self.experts.experts_forward(*self.forward_arguments(save, result))

    def backward(self, saved: tuple) -> tuple:
        return self.experts.experts_backward(*self.backward_arguments(saved))

    def forward_arguments(self, save: bool = True, result: bool = True) -> tuple:
        return (*self.tokens, *self.projections, self.seed, "silu", save, result)

    def backward_arguments(self, saved: tuple) -> tuple:
        wanted = self.projection.Gradients(True, True, *[self.trained] * 2, *[self.adapted] * 4)
        gradient = torch.empty_like(self.tokens[0])
        return (gradient, *self.tokens, *self.projections, self.seed, saved, "silu", wanted)

    def step(self) -> None:
        _, *saved = self.forward()
        self.backward(tuple(saved))

    def _projection(self, weight: Callable, n: int, k: int):
        lora = None
        if self.adapted:
            lora = self.projection.Lora(*(torch.empty(E, *shape, requires_grad=True) for shape in ((8, k), (n, 8))))
        return self.projection.Projection.of(weight(n, k), lora)

    def _dense(self, n: int, k: int) -> torch.Tensor:
        return torch.empty(E, n, k, dtype=BF16, requires_grad=self.trained)

    def _packed(self, n: int, k: int):
        data, absmax = torch.empty(E * n * k // 2, dtype=torch.uint8), torch.empty(E * n * k // 64)
        code, nested = torch.empty(16), (None,) * 3
        return self.projection.FourBitWeight(data, absmax, code, *nested, (E, n, k), 64, 0, "nf4", BF16)
