"""What a LoRA training step takes of a GPU's memory, worked out from shapes.

The model is built on the meta device, so parameters are counted, not guessed, for any model of Transformers. What a
step needs beside them depends on tokens = batch size * sequence length:

    kept         gradient checkpointing keeps one hidden state a layer; without it, all that a layer's backward reads
    a turn       of a layer in backward: what it reads, computed again, and the worst moment of its experts
    gradients    of an adapter exist from its layer's turn on, while what was kept of that layer is gone
    the loss     logits of a chunk of the tokens with a chunked loss, else of all, and what their gradient needs

The peak is the largest of three moments: the loss, with everything kept and no gradient yet; the first turn; and the
last, with nothing kept but all gradients. Between those two, what is kept shrinks as evenly as gradients grow. Layers
in CUDA graphs have memory of their own, which nothing else may use, so it counts in all three; PyTorch reports it as
reserved, not as allocated. What goes in and comes out of the graphs has a place of its own, and so has, for each layer,
what they are asked to keep from forward to backward; of what is offloaded to the host, two layers have.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

GIB = 2**30
CONTEXT = 0.6 * GIB
"""What a CUDA context and the loaded libraries take beside the allocator; differs by card and driver."""
WORKSPACES = 64 * 2**20
"""What cuBLAS takes for the thread that runs forward and for the one that runs backward: 32 MiB each on Hopper and
newer cards, 8 on others."""
LOSS_CHUNK = 16
"""Liger's chunk_mem_const as the examples set it: logits may take so many times what hidden states take."""
GRAPHS_TURNS = 1.9
"""Memory of the layers' CUDA graphs, in turns: their two passes leave gaps in it. Measured on an H200, as reserved."""
FAST_ROWS, PLAIN_ROWS = 800, 40
SCRATCH, LARGE_SCRATCH, LARGE_SCRATCH_ROWS = 64 * 2**20, 511 * 2**20, 256
"""As in the kernel's regime.py: up to how many rows per expert 4-bit weights are decoded in registers, and how much of
them is decoded at a time where they are not. A card's tuned table may say otherwise, and then what one layer takes for
the time of its forward or backward is more or less by up to half of its slots' rows and SCRATCH."""
WINDOW = 64 * 2**20
"""As there: bytes up to which a product's rows, one a slot, exist whole; above, half of their columns do at a time."""
HALF, SINGLE = 2, 4
FOUR_BIT_BLOCK, NESTED_BLOCK = 64, 256
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST = 256, 4096


@dataclass(frozen=True)
class Step:
    """One training step.

    seq_len, batch_size: tokens of a sequence, sequences at once.
    rank, expert_rank: of the LoRA on attention's projections, and on every expert's; 0 for none.
    bits: 4 for bitsandbytes' NF4 in attention and experts, 16 for bf16.
    double_quant: whether NF4's scales are quantized too.
    optimizer_bits: 8 for bitsandbytes' Adam, 32 for torch's on bf16 factors, whose two states are bf16 as well.
    checkpointing: whether activations are computed again in backward.
    chunked_loss: whether the loss sees the logits of a chunk of the tokens at a time.
    liger: whether norms and rotary embeddings are Liger's; Transformers' keep an fp32 copy of what they normalize.
    graphs: whether decoder layers run in CUDA graphs; the peak is then of what is reserved.
    keep: what graphs keep from forward to backward: any of "attention", "experts", "o_proj", "k_proj", "v_proj" and
        "q_proj"; all but the first are counted for any model, though only layers of Qwen3-MoE keep them.
    offload: what of that waits in host memory.
    byte_permutes: whether the card is an NVIDIA one from sm_80 on, which decodes 4-bit weights in registers.
    """

    seq_len: int = 4096
    batch_size: int = 1
    rank: int = 16
    expert_rank: int = 16
    bits: int = 4
    double_quant: bool = True
    optimizer_bits: int = 8
    checkpointing: bool = True
    chunked_loss: bool = True
    liger: bool = True
    graphs: bool = False
    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    byte_permutes: bool = True

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch_size


@dataclass(frozen=True)
class Shapes:
    """What of a model the estimate depends on; see :func:`shapes`.

    full: parameters that stay in 16 bit (embeddings, norms, routers, lm_head).
    quantized: sizes of the weights that go to 4 bit.
    attention, experts: for each projection that LoRA adapts, the parameters a rank, (in + out) or E * (in + out).
    stack: the number of experts, E.
    heads: of attention's queries.
    query, key: widths of a token's queries and keys, all heads together.
    """

    full: int
    quantized: tuple[int, ...]
    attention: tuple[int, ...]
    experts: tuple[int, ...]
    stack: int
    layers: int
    hidden: int
    intermediate: int
    top_k: int
    heads: int
    query: int
    key: int
    vocabulary: int


def shapes(model: nn.Module) -> Shapes:
    """Reads them off a model, which may be on the meta device.

    Raises:
        ValueError: the model has no experts in stacks (E, N, K).
    """
    config = model.config.get_text_config()
    quantized, attention, experts, stack = [], [], [], 0
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            quantized.append(module.weight.numel())
            if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
                attention.append(module.in_features + module.out_features)
        elif getattr(module, "gate_up_proj", None) is not None and module.gate_up_proj.dim() == 3:
            stack = module.gate_up_proj.shape[0]
            for weight in (module.gate_up_proj, module.down_proj):
                quantized.append(weight.numel())
                experts.append(weight.shape[0] * (weight.shape[1] + weight.shape[2]))
    if not experts:
        raise ValueError(
            f"model must hold its experts in stacks gate_up_proj and down_proj, got {type(model).__name__}"
        )
    parameters = {id(p): p.numel() for p in model.parameters()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        full=sum(parameters.values()) - sum(quantized),
        quantized=tuple(quantized),
        attention=tuple(attention),
        experts=tuple(experts),
        stack=stack,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        top_k=getattr(config, "num_experts_per_tok", None) or config.moe_topk,
        heads=config.num_attention_heads,
        query=config.num_attention_heads * head_dim,
        key=config.num_key_value_heads * head_dim,
        vocabulary=config.vocab_size,
    )


class Moment(NamedTuple):
    """Bytes that come and go within a step."""

    activations: float = 0
    gradients: float = 0
    loss: float = 0
    scratch: float = 0


def estimate(model: Shapes, step: Step) -> dict[str, float]:
    """Bytes by purpose, in the order they come up; their sum is the peak."""
    sizes = [n * step.rank for n in model.attention] + [n * step.expert_rank for n in model.experts]
    adapters = HALF * sum(sizes)
    worst = max(moments(model, step, adapters), key=sum)
    return {
        "weights": weight_bytes(model, step),
        "adapters": adapters,
        "optimizer": sum(optimizer_bytes(n, step) for n in sizes),
        "gradients": worst.gradients,
        "activations": worst.activations,
        **{f"kept {name}": _layers_on_gpu(model, step, name) * KEPT_BYTES[name](model, step) for name in step.keep},
        "loss": worst.loss,
        "kernels' scratch": WORKSPACES + worst.scratch,
        "CUDA context": CONTEXT,
    }


def host_bytes(model: Shapes, step: Step) -> float:
    """Pinned memory of the host, for what is offloaded."""
    return model.layers * sum(KEPT_BYTES[name](model, step) for name in step.offload)


def _layers_on_gpu(model: Shapes, step: Step, name: str) -> int:
    """Of how many layers the GPU has what is kept by this name."""
    return min(2, model.layers) if name in step.offload else model.layers


def moments(model: Shapes, step: Step, adapters: float) -> list[Moment]:
    """The loss, the first layer's turn in backward and the last one's, each turn at the worst moment of its experts.
    What graphs keep is there at all of them, and counted elsewhere.

    ``adapters``: bytes of all adapters, and so of their gradients.
    """
    state, read = HALF * model.hidden * step.tokens, read_bytes(model, step)
    kept = state if step.checkpointing else state + read
    again = read if step.checkpointing else 0
    gradients = adapters / model.layers
    turns = [
        Moment(again + state + working, scratch=scratch) for working, scratch in experts_backward_bytes(model, step)
    ]
    pool, fixed = Moment(), 0
    if step.graphs:
        worst = max(turns, key=sum)  # what is kept is read, too, but lies elsewhere
        elsewhere = sum(read_kept_bytes(name, model, step) for name in set(step.keep))
        turns = [Moment(GRAPHS_TURNS * worst.activations - elsewhere, scratch=worst.scratch)]
        pool, fixed = turns[0], 2 * state + gradients
    all_kept, one_kept = Moment(fixed + model.layers * kept), Moment(fixed + kept)
    found = [_sum(all_kept, pool, Moment(loss=loss_bytes(model, step)))]
    for turn in turns:
        found += [_sum(all_kept, turn, Moment(gradients=gradients)), _sum(one_kept, turn, Moment(gradients=adapters))]
    return found


def _sum(*moments: Moment) -> Moment:
    return Moment(*map(sum, zip(*moments)))


def weight_bytes(model: Shapes, step: Step) -> float:
    """The frozen model."""
    quantized = sum(model.quantized)
    if step.bits == 16:
        return HALF * (model.full + quantized)
    scales = quantized / FOUR_BIT_BLOCK
    scale_bytes = scales * (1 + SINGLE / NESTED_BLOCK if step.double_quant else SINGLE)
    return HALF * model.full + quantized / 2 + scale_bytes


def optimizer_bytes(size: int, step: Step) -> float:
    """Adam's two states of one tensor of ``size`` elements; 8-bit Adam keeps small tensors in fp32."""
    if step.optimizer_bits == 8:
        return 2 * size * (1 + SINGLE / EIGHT_BIT_BLOCK) if size >= EIGHT_BIT_LEAST else 2 * SINGLE * size
    return 2 * HALF * size


def read_bytes(model: Shapes, step: Step) -> float:
    """What a decoder layer's backward reads, less the layer's input."""
    hidden, query, key = model.hidden, model.query, model.key
    # The results of both norms; queries and keys as attention takes them, values, attention's result.
    attention = HALF * (2 * hidden + query + key + key + query)
    # And what the norms took.
    attention += HALF * (hidden + query + key) if step.liger else SINGLE * (2 * hidden + query + key)
    slot = HALF * (2 * model.intermediate + 2 * step.expert_rank)
    return step.tokens * (attention + SINGLE * model.stack + model.top_k * slot)


def attention_bytes(model: Shapes, step: Step) -> float:
    """What a layer's attention computes: its result, and each row's logsumexp."""
    return step.tokens * (HALF * model.query + SINGLE * model.heads)


def experts_bytes(model: Shapes, step: Step) -> float:
    """What the backward of a layer's experts reads beside their input: of each slot the pre-activation, the low-rank
    products of both adapters, and its place among the others."""
    return step.tokens * model.top_k * (HALF * (2 * model.intermediate + 2 * step.expert_rank) + SINGLE)


def projection_bytes(width: int, step: Step) -> float:
    """What a linear layer of attention with ``width`` columns computes: its result, and the low-rank product of its
    adapter, which is added in the same product in 4 bit alone."""
    return step.tokens * HALF * (width + step.rank) if step.rank and step.bits == 4 else 0


KEPT_BYTES = {
    "attention": attention_bytes,
    "experts": experts_bytes,
    "o_proj": lambda model, step: projection_bytes(model.hidden, step),
    "k_proj": lambda model, step: projection_bytes(model.key, step),
    "v_proj": lambda model, step: projection_bytes(model.key, step),
    "q_proj": lambda model, step: projection_bytes(model.query, step),
}
"""Of each name in ``keep``, of one layer."""


def read_kept_bytes(name: str, model: Shapes, step: Step) -> float:
    """What of that is in ``read_bytes``: of linear layers no low-rank products, nothing of o_proj, whose result no
    backward reads, and nothing of queries and keys where norms keep a copy in fp32."""
    kept = KEPT_BYTES[name](model, step)
    if name in ("attention", "experts") or not kept:
        return kept
    read = name == "v_proj" or (name in ("q_proj", "k_proj") and step.liger)
    return kept - step.tokens * HALF * step.rank if read else 0


def experts_backward_bytes(model: Shapes, step: Step) -> list[tuple[float, float]]:
    """What the experts' backward holds beside what it reads, and of the weights decoded, at each of its worst moments.

    The gradient of the pre-activation, and memory for each slot's share of that of the hidden states, exist all along.
    """
    slots, hidden, width = step.tokens * model.top_k, model.hidden, model.intermediate
    gradients = HALF * slots * 2 * width + slot_bytes(model, step)
    weighted = HALF * slots * width if step.expert_rank else 0  # the activation, for down's adapter
    down = decoded_bytes(model, step, width * hidden, spare=slots * hidden)
    gate_up = decoded_bytes(model, step, 2 * width * hidden)
    return [(gradients + weighted, down), (gradients, gate_up), (gradients + HALF * step.tokens * hidden, 0)]


def slot_bytes(model: Shapes, step: Step) -> float:
    """Each slot's share of the gradient of the hidden states, or half of its columns if they are computed in halves."""
    whole = HALF * step.tokens * model.top_k * model.hidden
    return whole if whole <= WINDOW or decodes_to_memory(model, step) else whole / 2


def decodes_to_memory(model: Shapes, step: Step) -> bool:
    """Whether 4-bit weights are, because rows are so many or no whole tiles cover the weights."""
    whole = 128 if step.byte_permutes else 64
    fits = model.hidden % whole == 0 and model.intermediate % whole == 0
    most = FAST_ROWS if step.byte_permutes else PLAIN_ROWS
    return step.bits == 4 and not (fits and rows_per_expert(model, step) <= most)


def rows_per_expert(model: Shapes, step: Step) -> int:
    return -(-step.tokens * model.top_k // model.stack)


def decoded_bytes(model: Shapes, step: Step, matrix: int, spare: int = 0) -> float:
    """What a projection's 4-bit weights take once decoded, as many experts as the kernel decodes at a time.

    matrix: elements of an expert's. spare: elements of memory nobody has written to yet, taken if they suffice.
    """
    if not decodes_to_memory(model, step):
        return 0
    scratch = LARGE_SCRATCH if rows_per_expert(model, step) <= LARGE_SCRATCH_ROWS else SCRATCH
    most = max(1, spare // matrix, scratch // (HALF * matrix))
    run = -(-model.stack // -(-model.stack // most))  # in as few runs, of lengths as even
    return 0 if spare // matrix >= run else HALF * matrix * run


def loss_bytes(model: Shapes, step: Step) -> float:
    """The last hidden states, normed too, and their gradient; and logits.

    Of a chunk in 16 bit, in whose place their gradient comes; without chunks in fp32 too, as log-probabilities, and the
    gradient of those.
    """
    tokens = step.tokens
    states = 3 * HALF * model.hidden * tokens
    if not step.chunked_loss:
        return states + tokens * model.vocabulary * 3 * SINGLE
    chunks = -(-model.vocabulary // (LOSS_CHUNK * model.hidden))
    chunk = 1 << (-(-tokens // chunks) - 1).bit_length()
    return states + min(tokens, chunk) * model.vocabulary * HALF


def longest_sequence(model: Shapes, step: Step, memory: float, multiple: int = 64) -> int:
    """The longest sequence, a multiple of ``multiple``, whose step stays within ``memory`` bytes; 0 if none does."""

    def fits(count: int) -> bool:
        return sum(estimate(model, replace(step, seq_len=count * multiple)).values()) <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * multiple
