"""Expert parallelism: each rank keeps its share of every layer's experts, and of their adapters.

The rest of the model, and the tokens, are those of data parallelism: ``exchange.py`` brings tokens to their experts.
Weights that are frozen never travel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import layer as peft_layer
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from . import clipping
from .exchange import Exchange, Lengths, gather, is_shared_out
from .experts import takes_adapters
from .lora import PROJECTIONS, ParamWrapper
from .quantize.stacks import check_parts, place_stack, slice_stack


def share_out_experts(model: nn.Module) -> nn.Module:
    """Keeps on each rank an equal share of all experts, in the order of the ranks, and trains them together.

    Call it on every rank with the same whole model, once its adapters are there and it is kernelized, before DDP wraps
    it and an optimizer is made. DDP leaves the experts alone then, and averages the gradients of the rest. Those of the
    experts' adapters come from the tokens of all ranks and are divided by the number of ranks, so that they are what
    one process would have for the mean of the ranks' losses.

    From then on all ranks have to call the model together, in evaluation as well. Their batches may differ in length.
    Gradients are clipped by ``clip_grad_norm_`` of this package or by Accelerate; files are written within
    :func:`whole_adapters`.

    Args:
        model: a Transformers model on the kernel, or a PEFT model around one. Its experts are in 4 bit or frozen.

    Returns:
        ``model``, changed in place.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: ``model`` has no experts on the kernel, or some that cannot be shared out: by this number of ranks,
            because they are trained themselves, or because FSDP, ``device_map`` or an earlier call has changed them. It
            is unchanged then.
    """
    if not distributed.is_initialized():
        raise RuntimeError("share_out_experts needs the process group that torch.distributed.init_process_group makes")
    layers = {name: module for name, module in model.named_modules() if _has_experts(module)}
    # The innermost that has all of them: the others may be passed by, to get at hidden states.
    bases = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    bases = [base for base in bases if {*layers.values()} <= {*base.modules()}]
    if not bases or not layers:
        raise ValueError(
            f"model must be a Transformers model with experts on the kernel, got a {type(model).__name__} without; "
            "call kernelize_model before"
        )
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    shares = {name: _share(name, experts, ranks) for name, experts in layers.items()}
    lengths = Lengths()
    bases[-1].register_forward_pre_hook(lengths.agree, with_kwargs=True)
    for name, experts in layers.items():
        first = rank * shares[name]
        for projection in PROJECTIONS:
            _keep_part(name, experts, projection, first, shares[name])
        experts.num_experts = shares[name]
        # As Accelerate's hooks do: whoever asks what runs the experts looks behind what stands in front.
        experts._old_forward = experts.forward
        experts.forward = Exchange(experts, first, shares[name], lengths)
        experts.register_state_dict_post_hook(_guard)
    for wrapper in _wrappers(model):
        _share_out_factors(wrapper, rank, ranks)
    _leave_alone(model)
    clipping.install()
    return model


@contextmanager
def whole_adapters(model: nn.Module) -> Iterator[None]:
    """While it is entered, every rank has the adapters of all experts, on the CPU, and ``save_pretrained`` of a PEFT
    model writes what it would for a model that is whole. All ranks enter it together; one of them writes.

    Elsewhere a ``state_dict`` of the model raises an error, for it would look complete. What is changed of the adapters
    while it is entered is lost. A model whose experts are not shared out stays as it is.
    """
    shares = {}
    for wrapper in _wrappers(model):
        for name in wrapper.lora_A:
            A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            shares[wrapper, name] = A.data, B.data
            whole_A = gather(A.data).cpu()
            per_rank = gather(B.data[None])  # (ranks, out, r * share)
            ranks, out, width = per_rank.shape
            per_rank = per_rank.view(ranks, out, -1, wrapper.num_experts)
            A.data, B.data = whole_A, per_rank.permute(1, 2, 0, 3).reshape(out, ranks * width).cpu()
    exchanges = [module.forward for module in model.modules() if is_shared_out(module)]
    for exchange in exchanges:
        exchange.adapters_are_whole = True
    try:
        yield
    finally:
        for exchange in exchanges:
            exchange.adapters_are_whole = False
        for (wrapper, name), (A, B) in shares.items():
            wrapper.lora_A[name].weight.data, wrapper.lora_B[name].weight.data = A, B


def _guard(experts: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Of a state_dict: without the experts' own weights, or not at all."""
    if not experts.forward.adapters_are_whole:
        raise RuntimeError(
            f"{prefix.removesuffix('.')} holds {experts.num_experts} of its experts, the others are on other ranks; "
            "save the adapters within whole_adapters(model)"
        )
    for name in [name for name in state_dict if name.startswith(tuple(f"{prefix}{each}" for each in PROJECTIONS))]:
        del state_dict[name]


def _has_experts(module: nn.Module) -> bool:
    return all(projection in module._parameters for projection in PROJECTIONS) and takes_adapters(module)


def _share(name: str, experts: nn.Module, ranks: int) -> int:
    """How many of the experts each rank gets."""
    parameters = [experts._parameters[projection] for projection in PROJECTIONS]
    number = _shape(parameters[0])[0]
    if is_shared_out(experts):
        raise ValueError(f"{name} is shared out already")
    if isinstance(experts, FSDPModule) or any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(f"{name} is sharded already; share experts out instead of that, or not at all")
    if hasattr(experts, "_hf_hook"):
        raise ValueError(f"{name} has a hook of Accelerate's; load the model without device_map or offloading")
    if any(p.requires_grad for p in parameters):
        raise ValueError(f"{name} is trained itself; only frozen experts are shared out, with their adapters")
    for projection, parameter in zip(PROJECTIONS, parameters):
        if hasattr(parameter, "quant_state"):
            check_parts(f"{name}.{projection}", parameter)
    if number % ranks:
        raise ValueError(f"{name} has {number} experts, which {ranks} ranks cannot share equally")
    return number // ranks


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "quant_state", parameter).shape


def _keep_part(name: str, experts: nn.Module, projection: str, first: int, share: int) -> None:
    stack = experts._parameters[projection]
    if hasattr(stack, "quant_state"):
        place_stack(experts, projection, slice_stack(f"{name}.{projection}", stack, first, share))
    else:
        setattr(experts, projection, nn.Parameter(stack[first : first + share].clone(), requires_grad=False))


def _wrappers(model: nn.Module) -> list[ParamWrapper]:
    """The adapters of experts that are shared out."""
    wrappers = (module for module in model.modules() if isinstance(module, ParamWrapper))
    return [wrapper for wrapper in wrappers if is_shared_out(wrapper.get_base_layer())]


def _factors(wrapper: peft_layer.ParamWrapper) -> list[nn.Parameter]:
    return [factors[name].weight for factors in (wrapper.lora_A, wrapper.lora_B) for name in factors]


def _share_out_factors(wrapper: ParamWrapper, rank: int, ranks: int) -> None:
    share = wrapper.num_experts // ranks
    own = slice(rank * share, (rank + 1) * share)
    for name in wrapper.lora_A:
        A, B = (factor[own] for factor in wrapper.factors(name))
        A, B = A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)
        for factor, part in ((wrapper.lora_A[name], A), (wrapper.lora_B[name], B)):
            factor.weight.data = part.clone()
            factor.out_features, factor.in_features = part.shape
            factor.weight.register_hook(lambda grad: grad / ranks)
            clipping.mark(factor.weight)
    wrapper.num_experts = share


def _leave_alone(model: nn.Module) -> None:
    """Has DDP neither broadcast nor reduce what differs from rank to rank, whichever of the modules it wraps."""
    own = {id(p) for module in model.modules() if is_shared_out(module) for p in module.parameters()}
    own |= {id(p) for wrapper in _wrappers(model) for p in _factors(wrapper)}
    for module in model.modules():
        names = [name for name, p in module.named_parameters() if id(p) in own]
        if names:
            module._ddp_params_and_buffers_to_ignore = names
