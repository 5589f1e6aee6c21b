"""Tensor and expert parallelism as Transformers does them: the experts interface gets each rank's own weights.

Tokens reach their experts in two ways. All ranks have the same tokens, and choices that are not for a rank's experts
are masked: their id is that of one expert more than the rank has. Or tokens travel to the rank that has their expert.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from qwen3_moe_integration import kernelize_model, register
from tests.integration.distributed import training
from tests.integration.models import SIZES, ExpertsCalls, assert_same_training, tokens

MASK = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
SAME_TOKENS = {
    "tensor": {"tp_size": 2},
    "expert, masked": {"tp_size": 2, "ep_size": 2, "ep_plan": MASK},
    "expert, dispatched": {"tp_size": 2, "ep_size": 2},
    "expert alone, masked": {"tp_size": 2, "ep_size": 2, "tp_plan": {}, "ep_plan": MASK},
}
SHARES = {"data": {"fsdp_size": 2}, "data, expert": {"fsdp_size": 2, "ep_size": 2}}
PLANS = SAME_TOKENS | SHARES


def load(checkpoint, implementation: str, plan: str = "") -> nn.Module:
    parallel = {"distributed_config": DistributedConfig(**PLANS[plan])} if plan else {}
    settings = {"experts_implementation": implementation, "dtype": torch.float32, **parallel}
    return AutoModelForCausalLM.from_pretrained(checkpoint, **settings)


def train_together(source, checkpoint, plan: str) -> None:
    register(source)
    stock, model = load(checkpoint, "eager"), load(checkpoint, "qwen3_moe_fused", plan)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.to_local().numel() == experts.gate_up_proj.numel() / 2
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert (calls.forward, calls.backward) == (2, 2)
    assert_same_training(model, stock)  # where nobody counts, another way leads to the kernel


@pytest.mark.parametrize("plan", SAME_TOKENS)
def test_ranks_with_the_same_tokens_train_as_stock(on_two_ranks, source, checkpoint, plan):
    on_two_ranks(train_together, source, checkpoint, plan)


def run_masked(source, checkpoint) -> None:
    """Looks at what one rank's experts get and give, before the results of the ranks are added up."""
    register(source)
    calls = []

    def recorded(experts, hidden_states, top_k_index, top_k_weights):
        out = ALL_EXPERTS_FUNCTIONS["qwen3_moe_fused"](experts, hidden_states, top_k_index, top_k_weights)
        calls.append((top_k_index, out.clone()))
        return out

    ExpertsInterface.register("recorded", recorded)
    load(checkpoint, "recorded", "expert alone, masked")(tokens(8, 20))
    assert len(calls) == 2
    elsewhere = torch.cat([(top_k_index == SIZES["num_experts"] // 2).all(1) for top_k_index, _ in calls])
    assert elsewhere.any() and not elsewhere.all()
    assert torch.equal(torch.cat([out for _, out in calls]).any(1), ~elsewhere)


def test_tokens_whose_experts_are_all_masked_come_out_zero(on_two_ranks, source, checkpoint):
    on_two_ranks(run_masked, source, checkpoint)


def train_shares(source, checkpoint, folder, plan: str) -> None:
    """Beside stock under the same plan: how Transformers averages the experts' gradients is its own."""
    register(source)
    stock, model = load(checkpoint, "eager", plan), load(checkpoint, "qwen3_moe_fused", plan)
    for _ in range(2):
        _, share = training.batch_and_share()
        with ExpertsCalls() as calls:
            want, got = training.step(stock, share), training.step(model, share)
        assert (calls.forward, calls.backward) == (2, 2)
        training.assert_all_close({"loss": want}, {"loss": got})
    stock.save_pretrained(folder / "stock")
    model.save_pretrained(folder / "trained")


@pytest.mark.parametrize("plan", SHARES)
def test_ranks_with_a_share_of_the_batch_train_and_save_as_stock(on_two_ranks, source, checkpoint, tmp_path, plan):
    on_two_ranks(train_shares, source, checkpoint, tmp_path, plan)
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "trained"))
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in got
    training.assert_all_close(want, got)


def refuse(source, checkpoint, plan: str) -> None:
    stock, model = load(checkpoint, "eager"), load(checkpoint, "eager", plan)
    with pytest.raises(ValueError, match=r"its gate_up_proj is sharded \(a DTensor\)"):
        kernelize_model(model, kernel=source)
    assert_same_training(model, stock)


@pytest.mark.parametrize("plan", ["tensor", "expert, masked"])
def test_kernelize_model_refuses_what_is_sharded_and_leaves_it(on_two_ranks, source, checkpoint, plan):
    on_two_ranks(refuse, source, checkpoint, plan)


def refuse_4_bit(source, checkpoint, plan: str) -> None:
    register(source)
    with pytest.raises(ValueError, match="distributed_config must not share out a model that loads in 4 bit"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=training.FOUR_BIT, distributed_config=DistributedConfig(**PLANS[plan])
        )


@pytest.mark.parametrize("plan", ["expert, dispatched", "data"])
def test_a_plan_for_a_model_in_4_bit_is_refused(on_two_ranks, source, checkpoint, plan):
    on_two_ranks(refuse_4_bit, source, checkpoint, plan)
