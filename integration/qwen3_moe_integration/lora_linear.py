"""LoRA of linear layers in 4 bit, such as attention's, without passes over what they give.

PEFT has bitsandbytes compute x W^T, copies that, multiplies the adapter's part by the scaling and adds it: three passes
over (T, out) in forward, and in backward one over (T, out) and one over (T, in). Here a product adds as it writes:

    out = x W^T (+ bias)      as without an adapter
    low = x A^T               (T, r)
    out += scaling low B^T

and in backward likewise: grad_x = grad W, and then grad_x += scaling (grad B) A. W is in 4 bit; see ``decoding`` for
who decodes it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, Optional

import bitsandbytes
import torch
from peft.tuners.lora import bnb as peft_bnb
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .decoding import can_decode, decoder, product
from .experts import kernel_in

LOCAL = (Tensor, nn.Parameter, bitsandbytes.nn.Params4bit)
"""What is whole and on this device, unlike a DTensor."""


def enable_fused_linear_lora(model: nn.Module) -> nn.Module:
    """Has the adapter of each linear layer in 4 bit add to the layer's result within its own products.

    Call it after ``get_peft_model`` or ``PeftModel.from_pretrained``, and again once an adapter reaches layers that had
    none. Weights, names and files do not change, nor does what PEFT does with adapters. Where there is more to do than
    one adapter's products, PEFT computes the call as before: several active adapters, dropout, DoRA, ``lora_bias``, a
    bias that is trained, factors of another dtype than the input without autocast (PEFT makes them fp32 unless told
    otherwise), a ``compute_dtype`` of bitsandbytes that is not the input's, hooks within the layer, and
    ``torch.compile``, which reads PEFT's own.

    If the model's experts run on the kernel by then, that decodes the layers' weights too, in one launch for
    bitsandbytes' three and to the same numbers. Call this again if they do so only later.

    Args:
        model: a model that PEFT has put adapters in.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: ``model`` has no adapter of a linear layer in 4 bit.
    """
    layers = [module for module in model.modules() if isinstance(module, peft_bnb.Linear4bit)]
    if not layers:
        raise ValueError(
            "model must have LoRA on linear layers in 4 bit, got a "
            f"{type(model).__name__} without; call this after get_peft_model"
        )
    kernel = kernel_in(model)
    decodes = hasattr(kernel, "dequantize")
    for layer in layers:
        if type(layer) is peft_bnb.Linear4bit:
            layer.__class__ = Linear4bit
        if type(layer) is Linear4bit:
            layer.kernel_name = kernel.__name__ if decodes and layer.in_features % 2 == 0 else None
    return model


class Lora(NamedTuple):
    """What to add: A (r, in), B (out, r)."""

    A: Tensor
    B: Tensor
    scaling: float


class Linear4bit(peft_bnb.Linear4bit):
    """PEFT's layer, which it knows by this name, with another way to compute the plain case."""

    kernel_name: Optional[str] = None
    """Of the module that decodes the weight; bitsandbytes if None. A module itself could not be copied with a model."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lora = None if args or kwargs else self._plain_lora(x)
        if lora is None:
            return super().forward(x, *args, **kwargs)
        kernel = sys.modules.get(self.kernel_name) if can_decode(x.device) else None
        out = _AddLora.apply(x.reshape(-1, x.shape[-1]), lora.A, lora.B, self, lora.scaling, kernel)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _plain_lora(self, x: Tensor) -> Optional[Lora]:
        """The adapter to add; None if there is more to it than that, or something has to see how PEFT adds it."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        # A compiler makes one pass of PEFT's three by itself.
        if len(names) != 1 or self.disable_adapters or self.merged or torch.compiler.is_compiling():
            return None
        (name,) = names
        base, A, B, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if (
            name in self.lora_variant
            or (dropout.training and not isinstance(dropout, nn.Identity))
            or not _is_untouched(base, bitsandbytes.nn.Linear4bit)
            or not (_is_untouched(A, nn.Linear) and _is_untouched(B, nn.Linear))
            or not _is_untouched(dropout, type(dropout))
            or B.bias is not None
            or (base.bias is not None and base.bias.requires_grad)
            or any(type(tensor) not in LOCAL for tensor in (x, A.weight, B.weight, base.weight))
            or base.compute_dtype not in (None, x.dtype)
            # On CPUs bitsandbytes may lay weights out for inference, and cannot go back through them then.
            or getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False)
        ):
            return None
        A, B, kind = A.weight, B.weight, x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == x.dtype:
            A, B = A.to(x.dtype), B.to(x.dtype)
        elif torch.is_autocast_enabled(kind) or not A.dtype == B.dtype == x.dtype:
            return None
        return Lora(A, B, self.scaling[name])


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module is ``kind.forward`` and nothing else."""
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


Products = tuple[Tensor, Tensor]
"""Of a call: the result (T, out), and x A^T (T, r)."""

Source = Callable[[tuple, Callable[..., Products]], Products]
"""``source(form, compute)`` gives the products of a layer's call. Calls differ in ``form`` if their sizes do;
``compute(place)`` computes them, in the memory of ``place`` if there is one."""

_sources: ContextVar[Mapping[nn.Module, Source]] = ContextVar("sources", default=MappingProxyType({}))


@contextmanager
def products_from(linear: nn.Module, source: Source) -> Iterator[None]:
    """Inside, on this thread, what ``linear`` computes with its adapter comes from ``source``."""
    before = _sources.set({**_sources.get(), linear: source})
    try:
        yield
    finally:
        _sources.reset(before)


class _AddLora(torch.autograd.Function):
    """x (T, in), A (r, in) and B (out, r) of one dtype, the layer, scaling, kernel: (T, out)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, A: Tensor, B: Tensor, linear: Linear4bit, scaling: float, kernel: Optional[ModuleType]
    ) -> Tensor:
        base, source = linear.base_layer, _sources.get().get(linear)

        def compute(place: Optional[Products] = None) -> Products:
            out, low = place or (None, None)
            out, low = product(base, x, kernel, out), torch.mm(x, A.t(), out=low)
            return out.addmm_(low, B.t(), alpha=scaling), low

        out, low = source((x.shape, x.dtype, A.shape), compute) if source else compute()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, low, A, B)
        ctx.decode, ctx.scaling = decoder(base, kernel), scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        x, low, A, B = ctx.saved_tensors
        wants_x, wants_A, wants_B = ctx.needs_input_grad[:3]
        grad_x = grad_A = grad_B = None
        with torch.autocast(grad.device.type, enabled=False):
            if wants_x or wants_A:
                grad_low = grad @ B
            if wants_x:
                grad_x = grad @ ctx.decode().to(grad.dtype)
                grad_x.addmm_(grad_low, A, alpha=ctx.scaling)
            # With beta=0 nothing is read of what there would be to add to: products that are scaled, then rounded.
            if wants_A:
                grad_A = torch.addmm(A, grad_low.t(), x, beta=0, alpha=ctx.scaling)
            if wants_B:
                grad_B = torch.addmm(B, grad.t(), low, beta=0, alpha=ctx.scaling)
        return grad_x, grad_A, grad_B, None, None, None
