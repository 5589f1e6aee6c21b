"""roofline.py's count, held against PyTorch's own of what a small model does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "moe_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS, RANK = 20, 4


def counted(model: torch.nn.Module, backward: bool) -> int:
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def small() -> Qwen3MoeForCausalLM:
    from harness.config import config

    model = Qwen3MoeForCausalLM._from_config(config(2, **SIZES), attn_implementation="eager").float()
    model.set_experts_implementation("eager")
    return model


def test_forward_is_what_pytorch_counts():
    from roofline import work

    model = small()
    found = work(model.config, TOKENS, 0, causal=False)
    assert found.adapters == 0 and counted(model, backward=False) == TOKENS * found.forward


@pytest.mark.parametrize("rank", [RANK, 2 * RANK])
def test_a_step_of_adapters_is_what_pytorch_counts(rank):
    """Of attention's alone, as PEFT would build the weights of adapted experts; the first layer's input and the
    embeddings want no gradient, and products for those are not made."""
    from roofline import work

    base = small()
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=PROJECTIONS))
    model.enable_input_require_grads()
    found, without = (work(base.config, TOKENS, each, causal=False) for each in (rank, 0))
    experts = 2 * 2 * rank * SIZES["num_experts_per_tok"] * (48 + 2 * 40 + 40 + 48)
    assert counted(model, backward=True) == TOKENS * (without.step + 3 * (found.adapters - experts))


def test_a_causal_token_attends_to_those_before():
    from roofline import work

    sizes = small().config
    masked, full = (work(sizes, TOKENS, RANK, causal) for causal in (True, False))
    assert masked.scores / full.scores == sum(range(1, TOKENS + 1)) / TOKENS**2
    assert (masked.frozen, masked.adapters) == (full.frozen, full.adapters)
