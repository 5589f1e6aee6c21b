"""What one projection of the experts can be: a stack of matrices (E, N, K), dense or in 4 bit, each expert's with a
low-rank addition of its own or without.

The layer's code handles a :class:`Projection` whole. A torch op takes plain tensors and numbers only, so a projection
goes through it as the flat tuple of ``flatten`` and comes out again by ``unflatten``.
"""

from typing import Callable, List, NamedTuple, Optional, Tuple, Union

import torch

from .checks import check_device, check_dims, check_float, check_like, check_size
from .form import form_of

Tensor = torch.Tensor


class FourBitWeight(NamedTuple):
    """A stack of expert matrices (E, N, K), frozen, as bitsandbytes packs it: row-major, flat, in blocks.

    packed: (E*N*K/2,) uint8; of a byte's two weights, the even one is in the high nibble.
    absmax: (blocks,) fp32, the scale of each ``blocksize`` consecutive weights; uint8 when it is quantized itself.
    code: (16,) fp32, the value of each nibble before scaling.
    nested_absmax, nested_code, nested_offset: (nested blocks,), (256,) and () fp32 when absmax is quantized:
        ``nested_code[absmax] * nested_absmax + nested_offset``; None otherwise.
    shape: (E, N, K).
    blocksize, nested_blocksize: weights per scale; scales per nested scale, 0 without nesting.
    quant_type: "nf4" or "fp4".
    dtype: of the weights before they were packed, and by default of ``dequantize``; products are in that of the tokens.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Optional[Tensor]
    nested_code: Optional[Tensor]
    nested_offset: Optional[Tensor]
    shape: Tuple[int, int, int]
    blocksize: int
    nested_blocksize: int
    quant_type: str
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device


class Lora(NamedTuple):
    """Each expert's own low-rank addition ``scaling * B[e] @ A[e]`` to a stack of matrices (E, N, K).

    A: (E, r, K), any strides; or (E, 2r, K), whose first r rows serve the first half of B's rows (the gate) and whose
        last r the other half (the up projection): two adapters side by side.
    B: (E, N, r), any strides.
    scaling: multiplies the product.
    dropout: share of the input that is dropped on the way to A; what is kept is scaled up to make up for it.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def halves(self) -> int:
        """2 if each half of B's rows has an A of its own, else 1."""
        return self.A.shape[1] // self.B.shape[2]


Weight = Union[Tensor, FourBitWeight]
NO_STATISTICS = (None,) * 5
QUANT_TYPES = ("nf4", "fp4")


class Projection(NamedTuple):
    """One projection: its weight (E, N, K), its adapter, and the form of its leaves and of the rest, see ``of``."""

    weight: Weight
    lora: Optional[Lora] = None
    form: Optional[Tuple] = None

    @staticmethod
    def of(weight: Weight, lora: Optional[Lora]) -> "Projection":
        """With the form, which whoever gets it then needs not find again."""
        projection = Projection(weight, lora)
        if not isinstance(lora, (Lora, type(None))):
            return projection  # a mistake, which a check will name
        rest = weight[1:] if projection.four_bit else ()
        return projection._formed(form_of(*projection.leaves()), form_of(*rest, *(lora or ())[2:]))

    @property
    def four_bit(self) -> bool:
        return isinstance(self.weight, FourBitWeight)

    @property
    def low_rank_width(self) -> int:
        """Columns of x A^T: r, 2r if the halves have an A each, 0 without an adapter."""
        return 0 if self.lora is None else self.lora.A.shape[1]

    def leaves(self) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
        """What autograd saves and may differentiate: the weight, packed if it is in 4 bit, A and B; None for what there
        is not. A packed weight has no gradient, but someone may have gathered it for this call alone."""
        weight = self.weight.packed if self.four_bit else self.weight
        return weight, *(self.lora or (None, None))[:2]

    def tensors(self) -> List[Tensor]:
        weight = [x for x in self.weight[:6] if x is not None] if self.four_bit else [self.weight]
        return weight if self.lora is None else [*weight, *self.lora[:2]]

    def without_leaves(self) -> "Projection":
        """The rest, for ``with_leaves`` to make whole again."""
        weight = FourBitWeight(None, *self.weight[1:]) if self.four_bit else None
        return Projection(weight, self.lora and Lora(None, None, *self.lora[2:]), self.form)

    def with_leaves(self, weight: Optional[Tensor], A: Optional[Tensor], B: Optional[Tensor]) -> "Projection":
        """Their form is found anew: whoever keeps saved tensors elsewhere may give them back with other strides."""
        leaves = form_of(weight, A, B)
        if self.four_bit:
            weight = FourBitWeight(weight, *self.weight[1:])
        whole = Projection(weight, self.lora and Lora(A, B, *self.lora[2:]))
        return whole._formed(leaves, self.form and self.form[1])

    def _formed(self, leaves: Optional[Tuple], rest: Optional[Tuple]) -> "Projection":
        return self if leaves is None or rest is None else Projection(self.weight, self.lora, (leaves, rest))

    def flatten(self) -> Tuple:
        """Tensor, five statistics, six numbers (none if dense), A, B, scaling, dropout: what an op takes."""
        if self.four_bit:
            packed, *statistics, shape, blocksize, nested, quant_type, _ = self.weight
            numbers = [*shape, blocksize, nested, QUANT_TYPES.index(quant_type)]
            weight = (packed, *statistics, numbers)
        else:
            weight = (self.weight, *NO_STATISTICS, [])
        return (*weight, *(self.lora or (None, None, 1.0, 0.0)))


FLAT = len(Projection(torch.empty(0)).flatten())


def unflatten(flat: Tuple, dtype: torch.dtype) -> Projection:
    """The projection that ``Projection.flatten`` made ``flat`` of; ``dtype`` is that of the layer's tokens."""
    weight, *statistics, numbers, A, B, scaling, dropout = flat
    if numbers:
        *shape, blocksize, nested, quant_type = numbers
        weight = FourBitWeight(weight, *statistics, tuple(shape), blocksize, nested, QUANT_TYPES[quant_type], dtype)
    return Projection.of(weight, None if A is None else Lora(A, B, scaling, dropout))


class Gradients(NamedTuple):
    """One entry for each input of the layer that can have a gradient: whether it is wanted, or the gradient."""

    hidden_states: Union[bool, Tensor]
    top_k_weights: Union[bool, Tensor]
    gate_up_proj: Union[bool, Tensor]
    down_proj: Union[bool, Tensor]
    gate_up_A: Union[bool, Tensor]
    gate_up_B: Union[bool, Tensor]
    down_A: Union[bool, Tensor]
    down_B: Union[bool, Tensor]


def empty_gradients(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    gate_up: Projection,
    down: Projection,
    wanted: Gradients,
    new: Callable[..., Tensor] = Tensor.new_empty,
) -> Gradients:
    """Tensors for the gradients that are ``wanted``, of size 0 for the others; that of top_k_weights is always there.

    ``new`` is a method that makes a tensor of a given shape in the dtype and on the device of another.
    """
    factors = [f for p in (gate_up, down) for f in (p.lora[:2] if p.lora else (None, None))]
    inputs = (hidden_states, top_k_weights, gate_up.weight, down.weight, *factors)
    wanted = wanted._replace(top_k_weights=True)
    grads = (new(x, x.shape) if asked else new(hidden_states, 0) for x, asked in zip(inputs, wanted))
    return Gradients(*grads)


def check_weight(name: str, weight: Weight, dims: str) -> None:
    """``dims`` is written as in the docstrings, for example ``"(E, 2I, H)"``."""
    if isinstance(weight, FourBitWeight):
        check_four_bit(name, weight)
    elif isinstance(weight, Tensor) and weight.dim() != 3 and getattr(weight, "quant_state", None) is not None:
        raise TypeError(f"{name} is in 4 bit: pass four_bit_weight({name}), got {type(weight).__name__}")
    else:
        check_dims(name, weight, dims)


def check_four_bit(name: str, weight: FourBitWeight) -> None:
    """The packed stack and its statistics fit each other and the shape they say they have."""
    if len(weight.shape) != 3 or min(weight.shape) < 1:
        raise ValueError(f"{name} must have a 3-D shape (E, N, K) of sizes above 0, got {tuple(weight.shape)}")
    if weight.quant_type not in QUANT_TYPES:
        raise ValueError(f"{name}.quant_type must be one of {', '.join(QUANT_TYPES)}, got {weight.quant_type!r}")
    if weight.blocksize < 1 or weight.blocksize % 2:
        raise ValueError(f"{name}.blocksize must be even and positive, got {weight.blocksize}")
    experts, n, k = weight.shape
    if k % 2:
        raise ValueError(f"{name}.shape must have an even last dimension, two weights per byte, got {weight.shape}")
    check_device(f"{name}.packed", weight.packed)
    nested, device = weight.nested_blocksize != 0, weight.packed.device
    blocks = -(-experts * n * k // weight.blocksize)
    wanted = [(torch.uint8, (experts * n * k // 2,)), (torch.uint8 if nested else torch.float32, (blocks,))]
    wanted += [(torch.float32, (16,))]
    if nested:
        wanted += [(torch.float32, (-(-blocks // weight.nested_blocksize),)), (torch.float32, (256,))]
        wanted += [(torch.float32, ())]
    for field, tensor, (dtype, shape) in zip(weight._fields, weight, wanted):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != shape:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(
                f"{name}.{field} must be {dtype} of shape {shape} for a stack of {weight.shape}, got {got}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{field} must be contiguous, got strides {tensor.stride()}")
        if tensor.device != device:
            raise ValueError(f"{name}.{field} must be on {device} like {name}.packed, got {tensor.device}")


def check_lora(name: str, lora: Lora, weight_name: str, weight: Weight) -> None:
    """The factors fit the weight (E, N, K) that they add to, and each other."""
    if not isinstance(lora, Lora):
        raise TypeError(f"{name} must be a Lora, got {type(lora).__name__}")
    experts, n, k = weight.shape
    for field, tensor, dims in (("A", lora.A, "(E, r, K)"), ("B", lora.B, "(E, N, r)")):
        check_dims(f"{name}.{field}", tensor, dims)
        check_float(f"{name}.{field}", tensor)
        check_size(f"{name}.{field}", tensor, 0, experts, f"E of {weight_name}")
        if tensor.device != weight.device:
            raise ValueError(f"{name}.{field} must be on {weight.device} like {weight_name}, got {tensor.device}")
    check_like(f"{name}.B", lora.B, f"{name}.A", lora.A)
    check_size(f"{name}.A", lora.A, 2, k, f"K of {weight_name}")
    check_size(f"{name}.B", lora.B, 1, n, f"N of {weight_name}")
    ranks = lora.B.shape[2], 2 * lora.B.shape[2]
    if lora.B.shape[2] < 1 or lora.A.shape[1] not in ranks:
        raise ValueError(
            f"{name}.A must have size {ranks[0]} or {ranks[1]} (r or 2r of {name}.B) in dimension 1, "
            f"got shape {tuple(lora.A.shape)}"
        )
    if lora.halves == 2 and n % 2:
        raise ValueError(f"{name}.A has two halves, so N of {weight_name} must be even, got {n}")
    if not 0.0 <= lora.dropout < 1.0:
        raise ValueError(f"{name}.dropout must lie in [0, 1), got {lora.dropout}")
