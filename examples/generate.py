"""Generates text with a Qwen3-MoE whose experts are in 4 bit, on the qwen3-moe-fused kernel.

    python examples/generate.py --model Qwen/Qwen3-30B-A3B --prompt "The capital of France is"
    python examples/generate.py --model Qwen/Qwen3-30B-A3B --adapter outputs/finetune/model      with what was trained
    python examples/generate.py                                 a small model, made on the spot: its text is noise

Prints the text as it comes, tokens a second of the prompt and of what follows, and memory.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from kernelized import DEVICE, load_model
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from tiny_checkpoint import small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, TextStreamer

from qwen3_moe_integration import enable_fused_linear_lora

ON_GPU = DEVICE == "cuda"
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, PyTorch's first choice on Hopper: it prepares for each length, and with every token there is one."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a Qwen3-MoE (default: a small one, made in --output)")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter of that model")
    parser.add_argument("--prompt", default="A grouped product multiplies every row by")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate")
    parser.add_argument("--bits", type=int, choices=[4, 16], default=4, help="of the weights of attention and experts")
    parser.add_argument("--kernel", type=Path, help="folder of a built kernel (default: version 1 of the Hub's)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="on a GPU, decode by a CUDA graph: under a minute to start on an H200, then several times as fast",
    )
    parser.add_argument("--save", type=Path, help="folder to save the model in, to load it faster the next time")
    parser.add_argument("--output", type=Path, default=Path("outputs/generate"))
    options = parser.parse_args(argv)
    if options.adapter and not (options.adapter / "adapter_config.json").is_file():
        parser.error(f"--adapter: {options.adapter} has no adapter_config.json; finetune.py's adapter is in model/")
    return options


class TimedStreamer(TextStreamer):
    """Prints text as it comes, and keeps when each token came: ``times[0]`` is the start."""

    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)  # the prompt comes first, before the model sees it
        self.times.append(time.perf_counter())


def with_adapter(model: torch.nn.Module, folder: Path) -> PeftModel:
    """The model with an adapter in its dtype; PEFT would make that fp32. Linear layers in 4 bit add the adapter within
    their own products."""
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    has_linear = any(isinstance(module, Linear4bit) for module in model.modules())
    return enable_fused_linear_lora(model) if has_linear else model


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    path = options.model or small_model(options.output)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = load_model(path, options.bits, dtype, "inference", options.kernel)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if options.save:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
    if options.adapter:
        model = with_adapter(model, options.adapter)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(DEVICE)
    settings = {"do_sample": False, "max_new_tokens": options.tokens}
    warm_up = settings | {"min_new_tokens": 2, "max_new_tokens": 2}
    if options.compile:
        settings["cache_implementation"] = "static"  # with which Transformers compiles what a token takes
        warm_up = settings  # a cache of another length would have something else compiled
    streamer = TimedStreamer(tokenizer)
    with sdpa_kernel(ATTENTION):
        model.generate(**inputs, **warm_up)  # compiles what is to be compiled
        print()
        model.generate(**inputs, **settings, streamer=streamer)
    start, first, *rest = streamer.times

    weights = sum({x.data_ptr(): x.nbytes for x in model.state_dict().values()}.values())
    peak = torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [
        ("prompt, tokens a second", f"{inputs.input_ids.numel() / (first - start):.1f}"),
        ("then, tokens a second", f"{len(rest) / (rest[-1] - first):.1f}" if rest else "no second token"),
        ("memory of the weights", f"{weights / 2**20:.1f} MiB"),
        (f"peak {'GPU' if ON_GPU else 'process'} memory", f"{peak / 2**20:.0f} MiB"),
    ]
    print("\n" + "\n".join(f"{name:28s} {value}" for name, value in rows))


if __name__ == "__main__":
    sys.exit(main())
