"""Expert parallelism: each rank keeps its share of every layer's experts, and of their adapters.

The rest of the model, and the tokens, are those of data parallelism. A layer's tokens are gathered from all ranks, each
rank computes what its own experts add to them, and the sums go back to where the tokens came from:

    gather tokens (ranks * T, H)  ->  own experts  ->  add up and scatter (T, H)

Choices of another rank's experts are given an id of one expert more than there are here, which the kernel skips. So
shapes do not depend on the routing, and nothing waits for the GPU. Weights that are frozen never travel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import layer as peft_layer
from torch import distributed, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .experts import takes_adapters
from .lora import PROJECTIONS, ParamWrapper
from .quantize.stacks import place_stack, slice_stack

Tensor = torch.Tensor

# PyTorch 2.13 has other names for these two.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def share_out_experts(model: nn.Module) -> nn.Module:
    """Keeps on each rank an equal share of all experts, in the order of the ranks, and trains them together.

    Call it on every rank with the same whole model, once its adapters are there and it is kernelized, before DDP wraps
    it and an optimizer is made. DDP leaves the experts alone then, and averages the gradients of the rest. Those of the
    experts' adapters come from the tokens of all ranks and are divided by the number of ranks, so that they are what
    one process would have for the mean of the ranks' losses.

    From then on all ranks have to call the model together, in evaluation as well. Their batches may differ in length.
    Gradients are clipped by :func:`clip_grad_norm_`; files are written within :func:`whole_adapters`.

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
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    layers = {name: module for name, module in model.named_modules() if _has_experts(module)}
    if base is None or not layers:
        raise ValueError(
            f"model must be a Transformers model with experts on the kernel, got a {type(model).__name__} without; "
            "call kernelize_model before"
        )
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    shares = {name: _share(name, experts, ranks) for name, experts in layers.items()}
    stacks = {name: [_part(name, experts, p, rank * shares[name], shares[name]) for p in PROJECTIONS]
              for name, experts in layers.items()}  # fmt: skip
    lengths = Lengths()
    base.register_forward_pre_hook(lengths.agree, with_kwargs=True)
    for name, experts in layers.items():
        first = rank * shares[name]
        for projection, stack in zip(PROJECTIONS, stacks[name]):
            _place(experts, projection, stack)
        experts.num_experts = shares[name]
        # As Accelerate's hooks do: whoever asks what runs the experts looks behind what stands in front.
        experts._old_forward = experts.forward
        experts.forward = Exchange(experts._old_forward, first, shares[name], lengths)
        experts.register_state_dict_post_hook(_guard)
    for wrapper in _wrappers(model):
        _share_out_factors(wrapper, rank, ranks)
    _leave_alone(model)
    return model


class Lengths:
    """How many tokens each rank's call of the model has: agreed on once a call, on the host, before its layers run."""

    def __init__(self):
        # Beside a group whose messages go through the GPU, one that the host need not wait for.
        self._group = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
        self.most = 0

    def agree(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model."""
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        shape = next(x for x in inputs if isinstance(x, Tensor)).shape[:2]
        self.most = max(length for (length,) in self.tell([shape.numel()]))

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """What every rank tells the others, each as many numbers; the GPU need not know."""
        mine = torch.tensor(numbers)
        every = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, mine, group=self._group)
        return [each.tolist() for each in every]


class Exchange:
    """The forward of experts that are some of a layer's: ``(hidden_states, top_k_index, top_k_weights) -> (T, H)``.

    Args:
        forward: that of the experts, which take ids from 0 on and skip that of one more than they are.
        first, share: which experts of the layer they are.
        lengths: how many tokens the ranks have.
    """

    def __init__(self, forward: Callable, first: int, share: int, lengths: Lengths):
        self._forward, self._first, self._share, self.lengths = forward, first, share, lengths

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states.shape[0]
        missing = self.lengths.most - tokens
        if missing:
            hidden_states, top_k_weights = (pad(x, (0, 0, 0, missing)) for x in (hidden_states, top_k_weights))
            top_k_index = pad(top_k_index, (0, 0, 0, missing), value=-1)
        index = _gather(top_k_index) - self._first
        index = index.masked_fill((index < 0) | (index >= self._share), self._share)
        out = self._forward(_Gather.apply(hidden_states), index, _Gather.apply(top_k_weights))
        out = _Scatter.apply(out)
        return out[:tokens] if missing else out


def _gather(x: Tensor) -> Tensor:
    """(T, ...) of every rank, one after the other."""
    x = x.contiguous()
    out = x.new_empty(distributed.get_world_size() * x.shape[0], *x.shape[1:])
    _all_gather(out, x)
    return out


def _scatter(x: Tensor) -> Tensor:
    """This rank's rows of the sum of every rank's x."""
    out = x.new_empty(x.shape[0] // distributed.get_world_size(), *x.shape[1:])
    _reduce_scatter(out, x.contiguous())
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return _scatter(grad)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _scatter(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return _gather(grad)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model whose experts are shared out: all ranks clip by the same norm.

    Args:
        model: the model that :func:`share_out_experts` has changed, or what DDP made of it.
        max_norm: what the 2-norm of all gradients, those of every rank's experts included, is to be at most.

    Returns:
        That norm before, fp32, the same on all ranks.
    """
    shared = {id(parameter) for wrapper in _wrappers(model) for parameter in _factors(wrapper)}
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in trained if (id(p) in shared) is of_experts]).float()
        for of_experts in (True, False)
    ]
    of_experts, others = (norm.to(trained[0].device).square() for norm in norms)
    distributed.all_reduce(of_experts)
    total = (of_experts + others).sqrt()
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, total)
    return total


@contextmanager
def whole_adapters(model: nn.Module) -> Iterator[None]:
    """While it is entered, every rank has the adapters of all experts, on the CPU, and ``save_pretrained`` of a PEFT
    model writes what it would for a model that is whole. All ranks enter it together; one of them writes.

    Elsewhere a ``state_dict`` of the model raises an error, for it would look complete.
    """
    shares = {}
    for wrapper in _wrappers(model):
        for name in wrapper.lora_A:
            A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            shares[wrapper, name] = A.data, B.data
            whole_A = _gather(A.data).cpu()
            per_rank = _gather(B.data[None])  # (ranks, out, r * share)
            ranks, out, width = per_rank.shape
            per_rank = per_rank.view(ranks, out, -1, wrapper.num_experts)
            A.data, B.data = whole_A, per_rank.permute(1, 2, 0, 3).reshape(out, ranks * width).cpu()
    experts = [module for module in model.modules() if _is_shared_out(module)]
    for module in experts:
        module.adapters_are_whole = True
    try:
        yield
    finally:
        for module in experts:
            del module.adapters_are_whole
        for (wrapper, name), (A, B) in shares.items():
            wrapper.lora_A[name].weight.data, wrapper.lora_B[name].weight.data = A, B


def _guard(experts: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Of a state_dict: without the experts' own weights, or not at all."""
    if not getattr(experts, "adapters_are_whole", False):
        raise RuntimeError(
            f"{prefix.removesuffix('.')} holds {experts.num_experts} of its experts, the others are on other ranks; "
            "save the adapters within whole_adapters(model)"
        )
    for name in [name for name in state_dict if name.startswith(tuple(f"{prefix}{each}" for each in PROJECTIONS))]:
        del state_dict[name]


def _has_experts(module: nn.Module) -> bool:
    return all(projection in module._parameters for projection in PROJECTIONS) and takes_adapters(module)


def _is_shared_out(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), Exchange)


def _share(name: str, experts: nn.Module, ranks: int) -> int:
    """How many of the experts each rank gets."""
    parameters = [experts._parameters[projection] for projection in PROJECTIONS]
    number = _shape(parameters[0])[0]
    if _is_shared_out(experts):
        raise ValueError(f"{name} is shared out already")
    if isinstance(experts, FSDPModule) or any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(f"{name} is sharded already; share experts out instead of that, or not at all")
    if hasattr(experts, "_hf_hook"):
        raise ValueError(f"{name} has a hook of Accelerate's; load the model without device_map or offloading")
    if any(p.requires_grad for p in parameters):
        raise ValueError(f"{name} is trained itself; only frozen experts are shared out, with their adapters")
    if number % ranks:
        raise ValueError(f"{name} has {number} experts, which {ranks} ranks cannot share equally")
    return number // ranks


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "quant_state", parameter).shape


def _part(name: str, experts: nn.Module, projection: str, first: int, share: int) -> nn.Parameter:
    parameter = experts._parameters[projection]
    if hasattr(parameter, "quant_state"):
        return slice_stack(f"{name}.{projection}", parameter, first, share)
    return nn.Parameter(parameter[first : first + share].clone(), requires_grad=False)


def _place(experts: nn.Module, projection: str, part: nn.Parameter) -> None:
    if hasattr(part, "quant_state"):
        place_stack(experts, projection, part)
    else:
        setattr(experts, projection, part)


def _wrappers(model: nn.Module) -> list[ParamWrapper]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


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
    wrapper.num_experts = share


def _leave_alone(model: nn.Module) -> None:
    """Has DDP neither broadcast nor reduce what differs from rank to rank, whichever of the modules it wraps."""
    own = {id(p) for module in model.modules() if _is_shared_out(module) for p in module.parameters()}
    own |= {id(p) for wrapper in _wrappers(model) for p in _factors(wrapper)}
    for module in model.modules():
        names = [name for name, p in module.named_parameters() if id(p) in own]
        if names:
            module._ddp_params_and_buffers_to_ignore = names
