"""What attention computes in forward is kept for backward: a layer that is computed again need not attend again.

``scaled_dot_product_attention`` calls one op, chosen by device, dtype and mask, whose backward reads its results: the
output and each row's logsumexp. Forward copies them into memory that stays. Where the layer is computed again that op
is not called and the copies are taken for its results, and autograd attaches the op's own backward, as ever. So does
the selective checkpointing of torch.utils.checkpoint, by a dispatch mode around all of a layer; here it is around this
call alone, since the experts, and others, take slower ways when a dispatch mode looks on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor


class KeptAttention:
    """Attention that is computed in forward alone, but for that with dropout, and that which PyTorch composes of other
    ops. A ``kept.Part``."""

    def __init__(self):
        self._kept: list[tuple[Callable, tuple]] = []  # ops and their results, as they were called

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        # Of the results that are no floats, such as the random seed, none is read without dropout.
        return tuple(x for _, results in self._kept for x in results if _is_float(x))

    def move(self, like: Callable[[Tensor], Tensor]) -> None:
        self._kept = [(op, tuple(like(x) if _is_float(x) else x for x in results)) for op, results in self._kept]

    @contextmanager
    def forward(self) -> Iterator[None]:
        places = iter(self._kept[:])

        def keep(op: Callable, *args: Any, **kwargs: Any) -> tuple:
            results, place = op(*args, **kwargs), next(places, None)
            if place is None:
                self._kept.append((op, tuple(x.clone() if _is_float(x) else x for x in results)))
            else:
                for x, result in zip(place[1], results):
                    if _is_float(x):
                        x.copy_(result)
            return results

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            # With gradients: without them the op leaves out the logsumexp.
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            with torch.enable_grad(), _AttentionOp(keep):
                return scaled_dot_product_attention(*leaves, **options).detach()

        with _AttentionCall(attend):
            yield

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        left = iter(self._kept)

        def give(op: Callable, *args: Any, **kwargs: Any) -> tuple:
            called, results = next(left, (None, ()))
            if called is not op:
                return op(*args, **kwargs)
            return tuple(x.detach() if isinstance(x, Tensor) else x for x in results)

        def attend(*qkv: Tensor, **options: Any) -> Tensor:
            with _AttentionOp(give):
                return scaled_dot_product_attention(*qkv, **options)

        with _AttentionCall(attend):
            yield


def _is_float(result: Any) -> bool:
    return isinstance(result, Tensor) and result.is_floating_point()


class _AttentionCall(TorchFunctionMode):
    """Calls of ``scaled_dot_product_attention`` without dropout go to ``attend``."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Dropout by keyword, as Transformers gives it.
        if func is scaled_dot_product_attention and len(args) == 3 and not kwargs.get("dropout_p"):
            return self.attend(*args, **kwargs)
        return func(*args, **kwargs)


class _AttentionOp(TorchDispatchMode):
    """The op that is all of attention is called by ``call``."""

    def __init__(self, call: Callable[..., tuple]):
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__.startswith("_scaled_dot_product_"):
            return self.call(func, *args, **kwargs)
        return func(*args, **kwargs)
