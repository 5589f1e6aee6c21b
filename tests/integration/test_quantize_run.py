"""4-bit models run: on the kernel, whoever puts them there, as the same weights decoded run on stock experts."""

import copy

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qwen3_moe_integration import MoeBitsAndBytesConfig, kernelize_model, register
from tests.integration.models import QWEN3, ExpertsCalls, Tiny, generated, tokens
from tests.integration.quantized import SIZES, checkpoint, decoded, experts_parameters, load
from tests.kernel.oracle import assert_close

EXPERTS_ONLY = {"llm_int8_skip_modules": [".*self_attn", ".*shared_expert"], "bnb_4bit_compute_dtype": torch.float32}
"""On some CPUs, bitsandbytes computes its linear layers in bf16 when nothing is trained."""

CONFIGS = [
    MoeBitsAndBytesConfig(**EXPERTS_ONLY),
    MoeBitsAndBytesConfig(
        **EXPERTS_ONLY,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_storage=torch.bfloat16,
        experts_blocksize=256,
    ),
]


def decoded_twin(model):
    """The same weights in full precision, on stock experts."""
    twin = copy.deepcopy(model)
    for name, parameter in experts_parameters(model).items():
        module, _, projection = name.rpartition(".")
        setattr(twin.get_submodule(module), projection, torch.nn.Parameter(decoded(parameter)))
    twin.set_experts_implementation("eager")
    return twin


CASES = [
    pytest.param(QWEN3, CONFIGS[0], marks=pytest.mark.compat, id="qwen3_moe"),
    pytest.param(QWEN3, CONFIGS[1], marks=pytest.mark.compat, id="qwen3_moe, fp4"),
    pytest.param(Tiny("qwen2_moe", {"shared_expert_intermediate_size": 64}), CONFIGS[0], id="qwen2_moe"),
    pytest.param(Tiny("mixtral", {"num_local_experts": 8}), CONFIGS[1], id="mixtral, fp4"),
]


@pytest.mark.parametrize(("tiny", "config"), CASES)
def test_a_4_bit_model_gives_what_its_weights_decoded_give_on_stock_experts(registered, tmp_path, tiny, config):
    checkpoint(tmp_path, tiny, **SIZES | {"intermediate_size": 64})
    model = load(tmp_path, config, dtype=torch.float32)
    stock = decoded_twin(model)
    input_ids = tokens()
    with ExpertsCalls() as calls:
        got = model(input_ids).logits
    assert calls.forward == 2
    assert_close("logits", stock(input_ids).logits, got, 1e-4)
    assert torch.equal(generated(model), generated(stock))


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_kernelize_model_takes_a_4_bit_model(source, registered, tmp_path, mode):
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, CONFIGS[0], dtype=torch.float32)
    input_ids = tokens()
    want = model(input_ids).logits
    kernelize_model(model, mode, source)
    with ExpertsCalls() as calls:
        assert torch.equal(model(input_ids).logits, want)
    assert calls.forward == 2 and "forward" in vars(model.model.layers[0].mlp)


def test_gradients_reach_the_layers_below_and_no_expert(registered, tmp_path):
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, CONFIGS[0], dtype=torch.float32)
    stock = decoded_twin(model)
    input_ids = tokens()
    with ExpertsCalls() as calls:
        for each in (model, stock):
            each(input_ids=input_ids, labels=input_ids).loss.backward()
    assert calls.backward == 2
    want, got = (each.get_input_embeddings().weight.grad for each in (stock, model))
    assert_close("gradient of the embeddings", want, got, 1e-4)
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad is None


def test_quantizing_registers_the_kernel_of_the_hub_if_nobody_did(source, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("qwen3_moe_integration.registry.register", lambda: calls.append(register(source)))
    monkeypatch.delitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "qwen3_moe_fused", raising=False)
    checkpoint(tmp_path)
    for _ in range(2):
        load(tmp_path, CONFIGS[0])
    assert len(calls) == 1


def test_experts_in_4_bit_that_the_kernel_cannot_compute_say_so(registered, tmp_path):
    checkpoint(tmp_path)
    model = load(tmp_path, CONFIGS[0])
    model.model.layers[0].mlp.experts.act_fn = torch.nn.ReLU()
    with pytest.raises(
        ValueError, match="Qwen3MoeExperts is in 4 bit, so it can run on the kernel alone: its activation"
    ):
        model(tokens())


def test_what_was_evaluated_trains_as_if_it_had_not_been(registered, tmp_path):
    """bitsandbytes packs a linear layer anew when it evaluates on some CPUs, and then has no gradient for it."""
    checkpoint(tmp_path, **SIZES)
    input_ids, grads = tokens(), []
    for evaluated in (True, False):
        model = load(tmp_path, MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32), dtype=torch.float32)
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids)
        model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*grads)
