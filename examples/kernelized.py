"""A model with its experts on the kernel, in 4 bit or as the checkpoint has it."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qwen3_moe_integration import KernelSource, MoeBitsAndBytesConfig, kernelize_model, legacy_config, register

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_model(path: str | Path, bits: int, dtype: torch.dtype, mode: str, kernel: Path | None) -> nn.Module:
    """Loads a checkpoint to the GPU, if there is one, and kernelizes it.

    Args:
        path: folder or Hub id of a Qwen3-MoE in full precision, or in 4 bit, which it then stays.
        bits: 4 or 16, of the weights of attention and experts.
        dtype: of what is not in 4 bit, and of products.
        mode: "training" or "inference".
        kernel: folder of a built kernel; None for version 1 of the Hub's.
    """
    source = KernelSource(path=kernel)
    try:
        register(source)
        stored = getattr(AutoConfig.from_pretrained(path), "quantization_config", None)
        settings = {}
        if stored and stored.get("load_in_4bit"):
            settings["config"] = legacy_config(path)
        elif not stored and bits == 4:
            # Stored as a float, what is in 4 bit can be sharded by FSDP.
            settings["quantization_config"] = MoeBitsAndBytesConfig(
                bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype
            )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=DEVICE, **settings)
        kernelize_model(model, mode, source)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise SystemExit(
            f"The model or its kernel could not be loaded: {error}\n"
            "Build the kernel with `python scripts/build_kernel.py` and give --kernel . for a local one."
        ) from error
    layers = sum(type(module).__name__ == "Qwen3MoeSparseMoeBlock" for module in model.modules())
    print(f"Kernel: {layers} Mixture-of-Experts layers of {path} now run on it.")
    return model
