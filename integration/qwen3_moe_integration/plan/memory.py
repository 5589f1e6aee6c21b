"""What a LoRA training step takes of a GPU's memory, worked out from shapes.

The model is built on the meta device, so parameters are counted, not guessed, for any model of Transformers. What a
step needs beside them depends on tokens = batch size * sequence length:

    kept         gradient checkpointing keeps one hidden state a layer
    a layer      at the worst moment of backward, one layer computed again and its gradients
    the loss     logits and their gradient: of a chunk of the tokens with a chunked loss, else of all
    gradients    of an adapter exist from its layer's backward on, while the kept states of that layer are gone

The peak is the larger of two moments: the loss, with every layer's state kept and no gradient yet; and the worst of
the layers' turns in backward, where what is kept shrinks as gradients grow.
"""

from dataclasses import dataclass, replace

from torch import nn

GIB = 2**30
CONTEXT = 0.6 * GIB
"""What a CUDA context and the loaded libraries take beside the allocator; differs by card and driver."""
SCRATCH = 64 * 2**20
"""What the kernels may take beside inputs, outputs and saved activations."""
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

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch_size


@dataclass(frozen=True)
class Shapes:
    """What of a model the estimate depends on; see :func:`shapes`.

    full: parameters that stay in 16 bit (embeddings, norms, routers, lm_head).
    quantized: sizes of the weights that go to 4 bit.
    attention, experts: for each projection that LoRA adapts, the parameters a rank, (in + out) or E * (in + out).
    """

    full: int
    quantized: tuple[int, ...]
    attention: tuple[int, ...]
    experts: tuple[int, ...]
    layers: int
    hidden: int
    intermediate: int
    top_k: int
    query: int
    key: int
    vocabulary: int


def shapes(model: nn.Module) -> Shapes:
    """Reads them off a model, which may be on the meta device.

    Raises:
        ValueError: the model has no experts in stacks (E, N, K).
    """
    config = model.config.get_text_config()
    quantized, attention, experts = [], [], []
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            quantized.append(module.weight.numel())
            if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
                attention.append(module.in_features + module.out_features)
        elif getattr(module, "gate_up_proj", None) is not None and module.gate_up_proj.dim() == 3:
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
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        top_k=getattr(config, "num_experts_per_tok", None) or config.moe_topk,
        query=config.num_attention_heads * head_dim,
        key=config.num_key_value_heads * head_dim,
        vocabulary=config.vocab_size,
    )


def estimate(model: Shapes, step: Step) -> dict[str, float]:
    """Bytes by purpose, in the order they come up; their sum is the peak."""
    sizes = [n * step.rank for n in model.attention] + [n * step.expert_rank for n in model.experts]
    adapters = HALF * sum(sizes)
    kept = HALF * model.hidden * step.tokens * model.layers if step.checkpointing else 0
    layer = layer_bytes(model, step) * (1 if step.checkpointing else model.layers)
    # What is kept shrinks and gradients grow by the same amount each turn, so the worst turn is the first or the last.
    at_loss, first_turn, last_turn = (kept, 0, loss_bytes(model, step)), (kept + layer, 0, 0), (layer, adapters, 0)
    activations, gradients, loss = max(at_loss, first_turn, last_turn, key=sum)
    return {
        "weights": weight_bytes(model, step),
        "adapters": adapters,
        "optimizer": sum(optimizer_bytes(n, step) for n in sizes),
        "gradients": gradients,
        "activations": activations,
        "loss": loss,
        "kernels' scratch": SCRATCH,
        "CUDA context": CONTEXT,
    }


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


def layer_bytes(model: Shapes, step: Step) -> float:
    """One decoder layer at its worst moment: all that its backward reads, and the largest gradients within it."""
    hidden, intermediate = model.hidden, model.intermediate
    norms = 2 * (SINGLE + HALF) * hidden
    projected = HALF * (model.query + 2 * model.key)
    normed_and_rotated = (SINGLE + 2 * HALF) * (model.query + model.key)
    attention = norms + projected + normed_and_rotated + HALF * (model.query + 2 * hidden)
    # A slot's pre-activation, its gradient, the activation between the projections, and the slot's row of the result.
    slot = HALF * (2 * intermediate + 2 * intermediate + intermediate + hidden)
    return step.tokens * (attention + model.top_k * slot)


def loss_bytes(model: Shapes, step: Step) -> float:
    """The last hidden states and their gradient, and logits: in 16 bit, in fp32, and the gradients of both."""
    tokens = step.tokens
    states = tokens * model.hidden * (SINGLE + 2 * HALF)
    at_once = tokens
    if step.chunked_loss:  # chunks so that logits take about as much as hidden states
        at_once = min(tokens, 1 << max(0, -(-tokens * model.hidden // model.vocabulary) - 1).bit_length())
    return states + at_once * model.vocabulary * 2 * (SINGLE + HALF)


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
