"""Adapters of experts on disk are PEFT's own: they go to a process without this package, and come from one."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen3_moe_integration import kernelize_model
from tests import programs
from tests.integration.lora import config
from tests.integration.models import QWEN3, SIZES, ExpertsCalls, tokens
from tests.kernel.oracle import assert_close

STOCK = Path(__file__).with_name("stock_peft.py")
RICH = config(
    use_rslora=True,
    lora_dropout=0.1,
    rank_pattern={"mlp.experts.gate_up_proj": 6, "v_proj": 2},
    alpha_pattern={r"1\.mlp\.experts\.down_proj": 3},
    modules_to_save=["lm_head"],
)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("dtype", "ratio", "k"),
    [(torch.float32, 1e-5, 2), (torch.bfloat16, 2e-2, SIZES["num_experts"])],
    ids=["fp32", "bf16"],
)
def test_adapters_go_to_stock_peft_and_come_from_it(source, tmp_path, dtype, ratio, k):
    """In bf16, a router near a tie might take other experts there than here; so it takes all."""
    base = QWEN3.build(num_experts_per_tok=k).to(dtype)
    base.save_pretrained(tmp_path / "model")
    input_ids = tokens()
    torch.save(input_ids, tmp_path / "tokens.pt")
    model = kernelize_model(get_peft_model(base, RICH), kernel=source)
    model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.save_pretrained(tmp_path / "adapter")

    run = programs.run(STOCK, tmp_path)
    assert run.returncode == 0, run.stderr
    ours, theirs = torch.load(tmp_path / "logits.pt")
    reloaded, other = (_loaded(source, tmp_path, name) for name in ("adapter", "other"))
    for name, want, got in (
        ("an adapter of ours", model.eval(), ours),
        ("reloaded", model, reloaded),
        ("one of theirs", theirs, other),
    ):
        want, got = (x if isinstance(x, torch.Tensor) else _logits(x, input_ids) for x in (want, got))
        assert want.dtype == got.dtype == dtype
        assert_close(name, want, got, ratio)


def test_the_layout_on_disk(source, tmp_path):
    """Expert after expert in A; the experts of one rank side by side in B. On peers' files this was confused."""
    model = kernelize_model(get_peft_model(QWEN3.build(), config(r=3, target_modules=[])), kernel=source)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    experts = model.base_model.model.model.layers[1].mlp.experts
    prefix = "base_model.model.model.layers.1.mlp.experts"
    for wrapper, name in ((experts.base_layer, f"{prefix}.base_layer"), (experts, prefix)):
        A, B = wrapper.factors("default")
        for e in range(8):
            for r in range(3):
                assert torch.equal(A[e, r], tensors[f"{name}.lora_A.weight"][3 * e + r])
                assert torch.equal(B[e, :, r], tensors[f"{name}.lora_B.weight"][:, 8 * r + e])
    assert len(tensors) == 8


def test_dropout_is_saved_as_none_and_kept_in_the_config(tmp_path):
    adapted = config(lora_dropout=0.3, target_modules=[])
    model = get_peft_model(QWEN3.build(), adapted)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert adapted.lora_dropout == model.peft_config["default"].lora_dropout == 0.3
    trained_on = PeftModel.from_pretrained(QWEN3.build(), tmp_path, config=adapted, is_trainable=True)
    rates = [m.p for m in trained_on.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates.count(0.3) == 4


def _loaded(source, folder, name):
    base = kernelize_model(AutoModelForCausalLM.from_pretrained(folder / "model"), kernel=source)
    return PeftModel.from_pretrained(base, folder / name)


def _logits(model, input_ids):
    with torch.no_grad(), ExpertsCalls() as calls:
        logits = model(input_ids).logits
    assert calls.forward == 2
    return logits
