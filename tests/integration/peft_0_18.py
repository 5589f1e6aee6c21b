"""An adapter that PEFT 0.18 has made, in data/peft-0.18, with the logits that PEFT 0.18 computed with it.

To make it again, in an environment of requirements.txt into which ``pip install --no-deps peft==0.18.1`` went:

    python -m tests.integration.peft_0_18
"""

from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

ADAPTER = Path(__file__).parent / "data" / "peft-0.18"
LOGITS = ADAPTER / "logits.safetensors"


def base_model() -> nn.Module:
    """Its weights follow from a formula, so that they need not be stored."""
    config = Qwen3MoeConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_experts=3,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")  # the others want rows of whole 16 bytes
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters()), 1):
            places = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(number * (places + 1)).view_as(parameter))
    return model.eval()


def main() -> None:
    assert peft.__version__ == "0.18.1", peft.__version__
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,  # at random, B too
    )
    adapted = get_peft_model(base_model(), config).eval()
    adapted.save_pretrained(ADAPTER)
    (ADAPTER / "README.md").unlink()  # an empty model card
    input_ids = torch.arange(11).view(1, 11)
    with torch.no_grad():
        save_file({"input_ids": input_ids, "logits": adapted(input_ids).logits}, LOGITS)


if __name__ == "__main__":
    main()
