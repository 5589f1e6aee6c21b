"""What 4 bit and the fused path do to a model's loss, on a small Qwen3-MoE and real English text.

    python benchmarks/quality.py --kernel . --out benchmarks/results/cpu

The small model of examples/ is trained whole first, so that its weights are not noise. Then

    perplexity   on held-out text: in full precision, in 4 bit on the kernel, and in 4 bit decoded by bitsandbytes and
                 multiplied by Transformers' own experts. The last two must agree to rounding.
    loss curves  LoRA on attention and all experts over the 4-bit weights: on the kernel, and as PEFT does it by itself,
                 W + BA over decoded weights, from the same adapter on the same batches. The kernel once more, from
                 another adapter and in another order, shows how far apart two runs are anyway.

Writes quality.json and quality.png into --out, and fails if the paths are further apart than they may be.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from harness.environment import environment, kernel_identity
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_moe_integration import KernelSource, MoeBitsAndBytesConfig, expert_lora_config, kernelize_model, register

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from tiny_checkpoint import make_checkpoint, texts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PERPLEXITIES_AGREE = 1e-4
"""Relative. Less than what quantizing changes, or a wrong decoding could hide in it: 2e-4 in bf16 on an H200, where the
paths are 5e-5 apart; in fp32 on a CPU it changes 6e-3."""
CURVES_AGREE = {"cpu": 1e-4, "cuda": 1e-3}
"""Relative, of smoothed losses, in fp32 and bf16. Rounding adds up over the steps, to 4e-4 in 300 of them on an H200;
another seed differs by 5e-2."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="a local build instead of the Hub's")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--steps", type=int, default=300, help="steps of each LoRA run")
    parser.add_argument("--whole-steps", type=int, default=150, help="steps of training the model whole before")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = KernelSource(path=options.kernel) if options.kernel else KernelSource()
    register(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        make_checkpoint(path)
        sequences = tokenized(AutoTokenizer.from_pretrained(path), options.seq_len).to(device)
        held_out, kept = sequences[::20], sequences[torch.arange(len(sequences)) % 20 != 0]
        model = load(path, device)
        kernelize_model(model, "training", source)
        train(model, kept, options.whole_steps, options, 3e-3, seed=0)
        perplexities = {"full precision": perplexity(model, held_out)}
        model.save_pretrained(path)

        perplexities["4 bit, kernel"] = perplexity(load_4_bit(path, device), held_out)
        perplexities["4 bit, decoded by bitsandbytes"] = perplexity(decoded(path, device), held_out)
        curves = {
            "kernel": adapted(load_4_bit(path, device), kept, options, seed=1),
            "PEFT's W + BA": adapted(decoded(path, device), kept, options, seed=1),
            "kernel, another seed": adapted(load_4_bit(path, device), kept, options, seed=2),
        }
    result = {
        "command": shlex.join(["python", "benchmarks/quality.py", *argv]),
        "environment": environment(device),
        "kernel": kernel_identity(source.load()),
        "perplexity": perplexities,
        "worst_difference": worst_difference(curves["kernel"], curves["PEFT's W + BA"]),
        "difference_between_seeds": worst_difference(curves["kernel"], curves["kernel, another seed"]),
        "losses": curves,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(curves, options.out / "quality.png")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))
    fused, by_bnb = perplexities["4 bit, kernel"], perplexities["4 bit, decoded by bitsandbytes"]
    if abs(fused / by_bnb - 1) > PERPLEXITIES_AGREE:
        raise SystemExit(f"perplexities in 4 bit differ: {fused} on the kernel, {by_bnb} decoded by bitsandbytes")
    if result["worst_difference"] > CURVES_AGREE[device]:
        raise SystemExit(f"the loss curves of the two paths differ by {result['worst_difference']} of the loss")


def tokenized(tokenizer, seq_len: int) -> torch.Tensor:
    """(sequences, seq_len) of all text end to end."""
    tokens = [token for text in texts() for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    return torch.tensor(tokens[: len(tokens) // seq_len * seq_len]).view(-1, seq_len)


def load(path: Path, device: str, **settings) -> nn.Module:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device, **settings)
    model.config.use_cache = False
    return model


def load_4_bit(path: Path, device: str) -> nn.Module:
    """Attention and experts in 4 bit, the experts on the kernel."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load(path, device, quantization_config=MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=dtype))


def decoded(path: Path, device: str) -> nn.Module:
    """The same weights, decoded by bitsandbytes, on Transformers' own experts."""
    model = load_4_bit(path, device).dequantize()
    model.set_experts_implementation("eager")
    return model


def adapted(model: nn.Module, sequences: torch.Tensor, options: argparse.Namespace, seed: int) -> list[float]:
    """Losses of training adapters on all experts and attention; equal seeds give equal adapters and batches."""
    torch.manual_seed(seed)
    lora = expert_lora_config(options.rank, target_modules=ATTENTION)
    model = get_peft_model(model, lora)
    return train(model, sequences, options.steps, options, 2e-3, seed)


def train(
    model: nn.Module, sequences: torch.Tensor, steps: int, options: argparse.Namespace, lr: float, seed: int
) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    draws = torch.Generator().manual_seed(seed)
    losses = []
    for _ in tqdm(range(steps), desc=f"seed {seed}"):
        batch = sequences[torch.randint(len(sequences), (options.batch_size,), generator=draws)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def perplexity(model: nn.Module, sequences: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.double() * len(batch) for batch in sequences.split(16)]
    return math.exp(sum(losses).item() / len(sequences))


def worst_difference(ours: list[float], theirs: list[float], window: int = 10) -> float:
    """The largest relative difference of the two curves, each smoothed over ``window`` steps."""

    def smooth(losses: list[float]) -> torch.Tensor:
        return torch.tensor(losses).unfold(0, min(window, len(losses)), 1).mean(1)

    return ((smooth(ours) - smooth(theirs)).abs() / smooth(theirs)).max().item()


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, PEFT's dashed on the kernel's; below, how far the other two are from the kernel's at each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    styles = (("C0", "-", 3), ("black", "--", 0.8), ("C1", "-", 0.8))
    kernel = torch.tensor(curves["kernel"])
    for (name, losses), (color, style, width) in zip(curves.items(), styles):
        above.plot(losses, style, color=color, label=name, linewidth=width)
        if name != "kernel":
            below.semilogy((torch.tensor(losses) / kernel - 1).abs(), style, color=color, linewidth=width)
    above.set(ylabel="loss (nats a token)", title="LoRA on attention and all experts over 4-bit weights")
    above.legend()
    below.set(xlabel="step", ylabel="relative difference\nfrom the kernel's")
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
