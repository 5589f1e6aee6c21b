"""load_adapters_in_place: a file fills the parameters that are there, without a GPU and in the dtype they have."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from qwen3_moe_integration import expert_lora_config, load_adapters_in_place
from tests.integration.models import QWEN3


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def model(request) -> PeftModel:
    config = expert_lora_config(2, target_modules=["q_proj", "o_proj"])
    return get_peft_model(QWEN3.build().bfloat16(), config, autocast_adapter_dtype=request.param == torch.float32)


def adapters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("resumes", [False, True], ids=["the best", "to resume"])
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_the_trainers_call_fills_the_parameters_that_an_optimizer_has(model, tmp_path, monkeypatch, resumes, copied):
    for parameter in adapters(model).values():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    saved = {name: parameter.detach().clone() for name, parameter in adapters(model).items()}
    assert load_adapters_in_place(model) is model
    model = copy.deepcopy(model) if copied else model
    before = adapters(model)
    addresses = {name: parameter.data_ptr() for name, parameter in before.items()}
    for parameter in before.values():
        torch.nn.init.zeros_(parameter)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "a GPU without room")
    model.load_adapter(str(tmp_path), "default", **({"is_trainable": True} if resumes else {}))
    assert len(saved) == 2 * 2 * (2 + 2)
    for name, parameter in adapters(model).items():
        assert torch.equal(parameter, saved[name]) and parameter.dtype == saved[name].dtype
        assert parameter is before[name] and parameter.data_ptr() == addresses[name]


def test_what_a_call_says_itself_counts(model, tmp_path):
    model.save_pretrained(tmp_path)
    load_adapters_in_place(load_adapters_in_place(model))
    model.load_adapter(str(tmp_path), "second")
    model.load_adapter(str(tmp_path), "third", autocast_adapter_dtype=True)
    dtypes = {
        name: {p.dtype for full, p in adapters(model).items() if f".{name}." in full} for name in ("second", "third")
    }
    assert dtypes == {"second": {torch.bfloat16}, "third": {torch.float32}}


def test_a_model_without_adapters_is_refused():
    with pytest.raises(TypeError, match=r"model must be a PeftModel, got a Qwen3MoeForCausalLM; .*get_peft_model"):
        load_adapters_in_place(QWEN3.build())
