"""generate() of a model in 4 bit: a token's experts are multiplied one by one, and no others are read."""

import pytest
import torch
from torch import nn

from qwen3_moe_integration import MoeBitsAndBytesConfig
from tests.integration.models import tokens
from tests.integration.quantized import checkpoint, load

EXPERTS = 128
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 64, "num_experts": EXPERTS}
"""Wide enough for gemv, and for an expert's scales to be whole blocks of nested ones."""

EXPERTS_ONLY = MoeBitsAndBytesConfig(llm_int8_skip_modules=[".*self_attn"])
LAYERS, PROMPT, NEW = 2, 4, 5
GEMV_SLOTS = 24


def choices(model: nn.Module) -> list[torch.Tensor]:
    """(E,) of each layer: whether a token has chosen the expert from now on."""
    chosen = [torch.zeros(EXPERTS, dtype=torch.bool, device=model.device) for _ in range(LAYERS)]

    def noted_in(seen: torch.Tensor):
        def note(router: nn.Module, arguments: tuple, out: tuple) -> None:
            seen[out[2]] = True

        return note

    for layer, seen in zip(model.model.layers, chosen):
        layer.mlp.gate.register_forward_hook(noted_in(seen))
    return chosen


def spoil(model: nn.Module, chosen: list[torch.Tensor]) -> None:
    """Makes NaN of the scales of those experts, so that what reads one of their weights is NaN."""
    for layer, experts in zip(model.model.layers, chosen):
        for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            stack.quant_state.state2.absmax.view(EXPERTS, -1)[experts] = torch.nan


def generate(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """(tokens, batch, vocabulary): the logits of all that is generated."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(prompt, **settings).logits)


@pytest.fixture
def model_of(registered, tmp_path, device):
    def make(k: int) -> nn.Module:
        checkpoint(tmp_path, **WIDE, num_experts_per_tok=k)
        return load(tmp_path, EXPERTS_ONLY, device_map=device).eval()

    return make


@pytest.mark.parametrize(("batch", "k"), [(1, 8), (3, 8), (12, 2), (16, 1), (16, 8)])
def test_generating_reads_the_chosen_experts_alone(model_of, device, batch, k):
    """One by one where there are at most 24 slots; 16 tokens of 8 experts are sorted, all rows of one prompt."""
    model = model_of(k)
    few = batch * k <= GEMV_SLOTS
    prompt = tokens(batch, PROMPT, device) if few else tokens(1, PROMPT, device).expand(batch, -1)
    assert prompt.numel() * k > GEMV_SLOTS, "what is computed for the prompt is no such case"
    chosen = choices(model)
    expected = generate(model, prompt)
    assert expected.isfinite().all()
    assert all(experts.any() and not experts.all() for experts in chosen)

    spoil(model, [~experts for experts in chosen])
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, device.upper())]) as recorded:
        logits = generate(model, prompt)
    assert torch.equal(logits, expected)
    if device == "cuda":
        launches = sum(event.count for event in recorded.key_averages() if event.key == "_gemv_kernel")
        assert launches == few * 2 * LAYERS * (NEW - 1)

    spoil(model, chosen)
    assert model(prompt).logits.isnan().any(), "the scales of chosen experts are read"
