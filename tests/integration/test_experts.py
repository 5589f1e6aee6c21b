"""``experts_implementation="qwen3_moe_fused"``: every model with Transformers' experts interface runs on the kernel, or
runs as before and says why."""

import copy

import pytest
import torch
from torch import nn

from qwen3_moe_integration import kernelize_model
from tests.integration.models import (
    QWEN3,
    RATIO,
    ExpertsCalls,
    Tiny,
    assert_same_training,
    generated,
    random_routing,
    stock_twin,
    tokens,
)
from tests.kernel.oracle import assert_close

OURS = "qwen3_moe_fused"
HYBRID = {
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LOCAL = {"num_local_experts": 8, "intermediate_size": 24}
GROUPED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}

FUSED = [
    QWEN3,
    Tiny("qwen2_moe", {"shared_expert_intermediate_size": 24}),
    Tiny("qwen3_next", HYBRID),
    Tiny("qwen3_5_moe_text", HYBRID),
    Tiny("mixtral", LOCAL),
    Tiny("olmoe", {"intermediate_size": 24}),
    Tiny("deepseek_v3", {**LATENT, **GROUPED, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}, moe_layers=1),
    Tiny("glm4_moe", {**GROUPED, "n_group": 1, "topk_group": 1}, moe_layers=1),
    Tiny("granitemoe", LOCAL),
    Tiny("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0}),  # gelu_tanh
    Tiny("lfm2_moe", {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}, moe_layers=1),
]
ARIA = Tiny("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1})
"""Its weights are transposed. The oldest supported Transformers does not give it the interface yet."""

ILL_CONDITIONED = ("qwen3_next", "qwen3_5_moe_text", "gemma4_text")
"""With Transformers' own experts too, some of their gradients in fp32 are 1e-5 to 7e-5 off those in fp64: in the first
two those of linear attention and of what feeds it, in Gemma 4 those of norms and of the router."""

STOCK = [
    (Tiny("gpt_oss", LOCAL), "GptOssExperts", "it joins its gate and up projections in a way of its own"),
    (Tiny("nemotron_h", {**GROUPED, "layers_block_type": ["moe", "attention"]}), "NemotronHExperts", "it has no gate"),
    (Tiny("mixtral", {**LOCAL, "hidden_act": "relu"}), "MixtralExperts", "its activation is ReLU"),
]


@pytest.mark.parametrize("tiny", [*(pytest.param(tiny, marks=pytest.mark.compat) for tiny in FUSED), ARIA], ids=repr)
def test_the_kernel_computes_the_experts_of(tiny, registered, warnings):
    """In fp32; only ill-conditioned gradients, where round-off would pass for a mistake, in fp64."""
    model = tiny.build()
    stock = stock_twin(model)
    model.set_experts_implementation(OURS)
    assert model.dtype == torch.float32
    prompt = tokens()
    with torch.no_grad():
        want, got = (each(input_ids=prompt, use_cache=False).logits for each in (stock, model))
    assert_close("logits", want, got, RATIO)
    wide = tiny.model_type in ILL_CONDITIONED
    with ExpertsCalls() as calls:
        assert_same_training(*(copy.deepcopy(each).double() if wide else each for each in (model, stock)))
    assert (calls.forward, calls.backward) == (tiny.moe_layers, tiny.moe_layers)
    assert torch.equal(generated(model), generated(stock))
    assert warnings == []


@pytest.mark.compat
@pytest.mark.parametrize(("tiny", "experts", "reason"), STOCK, ids=repr)
def test_experts_that_the_kernel_cannot_compute_stay_stock_with_one_warning(
    tiny, experts, reason, registered, warnings
):
    model = tiny.build()
    stock = stock_twin(model)
    model.set_experts_implementation(OURS)
    with ExpertsCalls() as calls:
        assert_same_training(model, stock)
    assert torch.equal(generated(model), generated(stock))
    assert calls.forward == 0
    assert warnings == [f"{experts} runs on Transformers' grouped_mm instead of qwen3_moe_fused: {reason}"]


def test_ids_equal_to_num_experts_are_skipped_as_under_expert_parallelism(registered):
    """The router of a rank marks the slots of other ranks' experts so, and gives them weight zero."""
    experts = QWEN3.build().model.layers[0].mlp.experts
    stock = copy.deepcopy(experts)
    experts.config._experts_implementation, stock.config._experts_implementation = OURS, "grouped_mm"
    stock._is_expert_parallel = True
    index, weights = random_routing(33)
    elsewhere = torch.rand(33, 2) < 0.5
    elsewhere[:5] = True
    index = index.masked_fill(elsewhere, experts.num_experts)
    results = []
    for each in (stock, experts):
        inputs = torch.randn(33, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = weights.masked_fill(elsewhere, 0.0).requires_grad_()
        out = each(inputs, index, scores)
        out.square().sum().backward()
        results.append((out, inputs.grad, scores.grad, each.gate_up_proj.grad, each.down_proj.grad))
    for name, want, got in zip(("output", "hidden", "weights", "gate_up", "down"), *results):
        assert_close(name, want, got, 1e-5)
    assert not results[1][0][:5].any() and not results[1][2][elsewhere].any()


def test_sharded_weights_are_an_error_that_says_so(source, tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    model = QWEN3.build()
    experts = model.model.layers[0].mlp.experts
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for name, weight in list(experts.named_parameters()):
            experts.register_parameter(name, nn.Parameter(distribute_tensor(weight.data, mesh, [Shard(0)])))
        with pytest.raises(ValueError, match=r"cannot compute: its gate_up_proj is sharded \(a DTensor\)"):
            kernelize_model(model, kernel=source)
    finally:
        distributed.destroy_process_group()
