"""make demo: fine-tunes a model by LoRA on its attention and all experts, then does with the adapter what one does.

The adapter is saved and loaded into a fresh model, whose outputs are those of the trained one. It is converted to one
adapter an expert, which other tools read, and that is loaded as well. The arguments are those of finetune.py.
"""

import gc
import shutil
import sys
from pathlib import Path

import finetune
import torch
from kernelized import DEVICE
from peft import PeftModel
from torch import nn

from qwen3_moe_integration.convert import convert_adapter

OUTPUT = Path("outputs/demo")
"""Where each demo starts anew; elsewhere nothing is removed."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far outputs may be from each other where the same sums are taken in another order, as a ratio of norms."""


def logits(model: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(sample).logits.float()


def main(argv: list[str]) -> None:
    options = finetune.parse(["--expert-rank", "8", "--output", str(OUTPUT), *argv])
    if options.output == OUTPUT and not options.resume:
        shutil.rmtree(OUTPUT / "checkpoints", ignore_errors=True)
    trainer = finetune.train(options)
    adapter, per_expert = options.output / "model", options.output / "model-per-expert"
    if not (adapter / "adapter_config.json").exists():
        return
    sample = torch.tensor(trainer.eval_dataset["input_ids"][:2], device=DEVICE)
    want = logits(trainer.model, sample)
    del trainer
    gc.collect()  # the trained model: there may be no room for two

    shutil.rmtree(per_expert, ignore_errors=True)
    convert_adapter(adapter, per_expert, "per-expert", check=True)
    print(f"\nConverted the adapter to one adapter an expert: {per_expert} (every product B @ A compared).")
    for name, folder in (("saved and loaded", adapter), ("one adapter an expert", per_expert)):
        model = PeftModel.from_pretrained(finetune.load_base(options), folder)
        distance = ((logits(model, sample) - want).norm() / want.norm()).item()
        print(f"{name}: outputs differ from the trained model's by {distance:.1e} of their norm.")
        if not distance <= TOLERANCE[model.dtype]:
            raise SystemExit(f"The adapter in {folder} does not give the outputs of the trained model.")
        del model
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
