"""A whole training step of a model that Unsloth loads: on Unsloth's own experts, or on this kernel.

    python benchmarks/train_step_unsloth.py --layers 8 --tokens 1024 4096 8192                    all of it Unsloth's
    python benchmarks/train_step_unsloth.py --layers 8 --tokens 1024 4096 8192 --kernel .         its experts ours

The model, the step and the tables are those of train_step.py. Unsloth loads from files alone, so a checkpoint in bf16
with random weights is made in --checkpoints first, 1.3 GB a layer, and stays there. Adapters are Unsloth's, in fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from harness.files import made
from harness.peers import installed
from harness.step import adam, command, results, training_step, write

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="folder of a built kernel (default: Unsloth's own experts)")
    parser.add_argument("--graphs", action="store_true", help="with --kernel, checkpoint each layer by CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/checkpoints"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps of each length, the first three not counted")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="profile steps of this length too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries this script")
    options = parser.parse_args(argv)
    if options.graphs and not options.kernel:
        parser.error("--graphs wants --kernel")
    return options


def checkpoint(options: argparse.Namespace) -> Path:
    """The folder of the model's files; makes them if they are not there."""
    folder = options.checkpoints / f"qwen3-moe-{options.layers}-layers{'-tiny' if options.tiny else ''}"
    return made(folder, make, options.layers, options.tiny)


def make(folder: Path, layers: int, tiny: bool) -> None:
    from harness.checkpoint import write_checkpoint
    from harness.config import TINY, config
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sizes = config(layers, **TINY if tiny else {})
    write_checkpoint(folder, sizes, "cuda" if torch.cuda.is_available() else "cpu")
    # As many words as the model has embeddings: Unsloth sets those of no word to zero.
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    words = [*special.values(), *(f"w{i}" for i in range(len(special), sizes.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def build(options: argparse.Namespace, folder: Path) -> torch.nn.Module:
    from unsloth import FastModel  # before Transformers and PEFT, which it changes while it is imported

    model, _ = FastModel.from_pretrained(
        str(folder), max_seq_length=max(options.tokens), dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    if options.kernel:
        # Imported before, it would wrap the experts itself, and they could run on nothing but the kernel.
        from qwen3_moe_integration import KernelSource, enable_graphed_checkpointing, kernelize_model

        kernelize_model(model, "training", KernelSource(path=options.kernel))
        if options.graphs:
            enable_graphed_checkpointing(model)
    return model.train()


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = checkpoint(options)
    started = time.perf_counter()
    model = build(options, folder)
    built = time.perf_counter() - started
    step = training_step(model, adam(model, device))
    result = results(model, step, options, device, built)
    result["environment"]["unsloth"] = installed("unsloth")
    result |= {
        "command": command("train_step_unsloth.py", argv or sys.argv[1:]),
        "experts": "this kernel" if options.kernel else "Unsloth",
    }
    kind = ("-kernel" if options.kernel else "") + ("-graphs" if options.graphs else "")
    write(result, options.out, f"train_step-{options.layers}-layers-unsloth{kind}")


if __name__ == "__main__":
    main()
