"""4-bit loading on a CUDA device: no more memory than the model takes, and the bits that a CPU would give."""

import gc

import pytest
import torch

from qwen3_moe_integration import MoeBitsAndBytesConfig
from tests.integration.models import ExpertsCalls, generated
from tests.integration.quantized import checkpoint, experts_parameters, load, same_bits

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 64, "head_dim": 64, "initializer_range": 0.02}
MIB = 2**20


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_loading_takes_no_more_memory_than_the_model_and_a_few_experts(registered, tmp_path, nested):
    checkpoint(tmp_path / "full", **WIDE)
    config = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=nested)
    on_cpu = experts_parameters(load(tmp_path / "full", config, device_map="cpu"))
    for folder, settings in (("full", {"config": config}), ("quantized", {})):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = load(tmp_path / folder, device_map="cuda", **settings)
        final, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        assert peak < final + 32 * MIB  # a stack of gate and up is 192 MiB in bf16
        for name, parameter in experts_parameters(model).items():
            assert same_bits(parameter.data.cpu(), on_cpu[name].data)
        with ExpertsCalls() as calls:
            assert generated(model).shape == (2, 18)
        assert calls.forward == 2 * 12
        if folder == "full":
            model.save_pretrained(tmp_path / "quantized")
        del model, parameter
