"""What stands in front of experts that are some of a layer's, the others being on other ranks.

Tokens are gathered from all ranks, each rank computes what its own experts add to them, and the sums go back to where
the tokens came from:

    gather tokens (ranks * T, H)  ->  own experts  ->  add up and scatter (T, H)

Choices of another rank's experts are given an id of one expert more than there are here, which the kernel skips. So
shapes do not depend on the routing, and nothing waits for the GPU.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

Tensor = torch.Tensor

# PyTorch 2.13 has other names for these two.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

_results_are_read: ContextVar[bool] = ContextVar("results_are_read", default=True)


class Lengths:
    """How many tokens each rank's call of the model has: agreed on once a call, on the host, before its layers run."""

    def __init__(self):
        # Beside a group whose messages go through the GPU, one that the host need not wait for.
        self._group = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
        self._most = 0

    def agree(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model."""
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        shape = next(x for x in inputs if isinstance(x, Tensor)).shape[:2]
        self._most = self._agreed(shape.numel())

    def most(self, mine: int) -> int:
        """Of the ranks' numbers of tokens, one of which is ``mine``.

        In backward, checkpointing repeats a call that others may have followed: the ranks agree on that one again.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        return self._agreed(mine) if in_backward else self._most

    def _agreed(self, mine: int) -> int:
        return max(length for (length,) in self.tell([mine]))

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """What every rank tells the others, each as many numbers; the GPU need not know."""
        mine = torch.tensor(numbers)
        every = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, mine, group=self._group)
        return [each.tolist() for each in every]


class Exchange:
    """The forward of experts that are some of a layer's: ``(hidden_states, top_k_index, top_k_weights) -> (T, H)``.

    Args:
        experts: their forward takes ids from 0 on, and skips that of one more than they are.
        first, share: which experts of the layer they are.
        lengths: how many tokens the ranks have.
    """

    adapters_are_whole = False
    """Whether the adapters are at the moment those of all experts, to be saved."""

    def __init__(self, experts: nn.Module, first: int, share: int, lengths: Lengths):
        self._forward, self._first, self._share, self.lengths = experts.forward, first, share, lengths
        self._stacks = [(weakref.ref(stack), stack._version) for stack in experts.parameters()]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Raises:
        RuntimeError: it cannot be right: the model was not called as a whole, or with the adapters of all experts, or
            other weights were written over those of these experts.
        """
        tokens = hidden_states.shape[0]
        missing = self.lengths.most(tokens) - tokens
        self._check(missing)
        if missing:
            hidden_states, top_k_weights = (pad(x, (0, 0, 0, missing)) for x in (hidden_states, top_k_weights))
            top_k_index = pad(top_k_index, (0, 0, 0, missing), value=-1)
        index = gather(top_k_index) - self._first
        index = index.masked_fill((index < 0) | (index >= self._share), self._share)
        out = self._forward(_Gather.apply(hidden_states), index, _Gather.apply(top_k_weights))
        out = _Scatter.apply(out)
        return out[:tokens] if missing else out

    def _check(self, missing: int) -> None:
        if missing < 0:
            raise RuntimeError("experts that are shared out run in calls of the whole model, on all ranks together")
        if self.adapters_are_whole:
            raise RuntimeError("within whole_adapters a model is saved; call it before or after")
        for stack, version in self._stacks:
            if (parameter := stack()) is not None and parameter._version != version:
                raise RuntimeError(
                    "the experts of this rank were overwritten after they were shared out, as DDP does with those in a "
                    "module that share_out_experts was not given; give it the module that DDP wraps"
                )


def is_shared_out(module: nn.Module) -> bool:
    """Whether a module holds some of a layer's experts, the others being on other ranks."""
    return isinstance(vars(module).get("forward"), Exchange)


@contextmanager
def without_results() -> Iterator[None]:
    """Inside, a layer is computed for its gradients, none of which reads the experts' results: these stay NaN."""
    before = _results_are_read.set(False)
    try:
        yield
    finally:
        _results_are_read.reset(before)


def gather(x: Tensor) -> Tensor:
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
        return gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return _scatter(grad)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if _results_are_read.get():
            return _scatter(x)
        rows = x.shape[0] // distributed.get_world_size()
        return x.new_full((rows, *x.shape[1:]), torch.nan)  # whoever reads it shall notice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return gather(grad)
