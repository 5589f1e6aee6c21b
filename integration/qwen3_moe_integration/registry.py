"""Makes the kernel known to Transformers and to ``kernels``, for models that are loaded later."""

from collections.abc import Callable
from types import ModuleType

from kernels import Mode, register_kernel_mapping, replace_kernel_forward_from_hub
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

from .experts import EXPERTS_IMPLEMENTATION, experts_function
from .source import KernelLayer, KernelSource

LAYERS = (Qwen3MoeSparseMoeBlock, Qwen3MoeExperts)
FROM_HUB = KernelSource()


def register(kernel: KernelSource = FROM_HUB) -> None:
    """Makes the kernel known to Transformers, for models that are loaded after this call.

    ``from_pretrained(..., use_kernels=True)`` then swaps it into Qwen3-MoE, and
    ``from_pretrained(..., experts_implementation="qwen3_moe_fused")`` runs on it the experts of every model whose
    experts follow Transformers' interface. The kernel is loaded here, since later Transformers would say nothing of
    a kernel that it could not load.
    """
    function = experts_function(load_kernel(kernel))
    for layer in LAYERS:
        make_extensible(layer, layer.__name__)
    register_kernel_mapping(mapping(kernel))
    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, function)


def registered_experts() -> Callable:
    """The experts function that Transformers knows: of the Hub's kernel, unless :func:`register` was called before."""
    if EXPERTS_IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        register()
    return ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION]


def load_kernel(kernel: KernelSource) -> ModuleType:
    if not isinstance(kernel, KernelSource):
        raise TypeError(f"kernel must be a KernelSource, got {kernel!r}")
    return kernel.load()


def make_extensible(layer: type, name: str) -> None:
    """Transformers names no kernel layer for these classes; without a name ``kernelize`` passes them by."""
    replace_kernel_forward_from_hub(layer, name)


def mapping(kernel: KernelSource) -> dict:
    """The layers can train and be compiled, and every lesser mode falls back to such a layer."""
    return {
        layer.__name__: {
            device: {Mode.TRAINING | Mode.TORCH_COMPILE: KernelLayer(kernel, layer.__name__)}
            for device in ("cuda", "cpu")
        }
        for layer in LAYERS
    }
