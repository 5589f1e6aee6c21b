"""Loads a checkpoint as a user does and saves it if asked to: the process that loading.py watches."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen3_moe_integration import KernelSource, MoeBitsAndBytesConfig, register

from .measure import synchronize

WAYS = {
    "ours": lambda: {"quantization_config": MoeBitsAndBytesConfig()},
    "stock": lambda: {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    },
    "saved": lambda: {},
}
"""What ``from_pretrained`` is given: "saved" is a checkpoint that says itself what it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--kernel", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.way != "stock":
        register(KernelSource(path=options.kernel) if options.kernel else KernelSource())
    torch.zeros(1, device=options.device)
    say(phase="start")

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, device_map=options.device, **WAYS[options.way]()
    )
    synchronize(options.device)
    say(phase="load", seconds=time.perf_counter() - start, **device_memory(options.device))

    if options.save:
        start = time.perf_counter()
        model.save_pretrained(options.save)
        say(phase="save", seconds=time.perf_counter() - start)


def device_memory(device: str) -> dict[str, int]:
    """Bytes allocated now and at the worst moment, and reserved then."""
    if device != "cuda":
        return {}
    return {
        "device_final": torch.cuda.memory_allocated(),
        "device_peak": torch.cuda.max_memory_allocated(),
        "device_reserved": torch.cuda.max_memory_reserved(),
    }


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
