"""A process that has PEFT and Transformers alone: run as ``python stock_peft.py FOLDER``.

It loads FOLDER/adapter on FOLDER/model, and makes FOLDER/other, an adapter of its own; it leaves the logits of both
for FOLDER/tokens.pt, in FOLDER/logits.pt.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    tokens = torch.load(folder / "tokens.pt")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "adapter")
    own = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["k_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"mlp.experts.down_proj": 5},
            init_lora_weights=False,
        ),
    )
    own.save_pretrained(folder / "other")
    with torch.no_grad():
        torch.save([model.eval()(tokens).logits for model in (loaded, own)], folder / "logits.pt")
    assert not any(name.startswith("qwen3_moe") for name in sys.modules), "the integration was imported"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
