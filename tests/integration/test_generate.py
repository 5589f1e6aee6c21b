"""generate() with a static cache: what a token takes is compiled, on a GPU into a CUDA graph."""

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from qwen3_moe_integration import MoeBitsAndBytesConfig, enable_fused_linear_lora, expert_lora_config
from tests.integration.models import tokens
from tests.integration.quantized import SIZES, checkpoint, load

IN_FP32 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32)


def compile_config(device: str) -> CompileConfig:
    """generate()'s own on a GPU; on a CPU, where it compiles only if made to, without a C++ compiler."""
    config = CompileConfig(fullgraph=True) if device == "cuda" else CompileConfig(True, mode=None, backend="aot_eager")
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("adapted", [False, True], ids=["without adapters", "with adapters"])
def test_a_static_cache_has_a_token_compiled_whole_and_changes_none(registered, tmp_path, device, adapted):
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, IN_FP32, dtype=torch.float32, device_map=device)
    if adapted:
        model = get_peft_model(model, expert_lora_config(2, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        enable_fused_linear_lora(model)
    prompt, settings = tokens().to(device), {"do_sample": False, "max_new_tokens": 12}
    want = model.eval().generate(prompt, **settings)
    torch._dynamo.reset()
    counters.clear()
    got = model.generate(prompt, **settings, cache_implementation="static", compile_config=compile_config(device))
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    assert torch.equal(got, want)
