"""How many tokens a second the arithmetic of a LoRA training step of Qwen3-30B-A3B allows. Computed, not measured.

    python benchmarks/roofline.py --tokens 4096 --tflops 790

Counts what the mathematics asks for, and so nothing twice, as checkpointing does: each product in forward and in the
gradient of its input, that of an adapter's factor in the factor's gradient too, and attention's two products, over the
keys before each query, twice more in backward. --tflops is what a large product reaches: 790 on the H200s of
nvidia-h200/, 165 at most on an RTX 4090, in bf16 with sums in fp32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from harness.config import config
from transformers import Qwen3MoeConfig


@dataclass(frozen=True)
class Work:
    """Operations a token in forward, a multiplication and an addition being two; frozen are the products with weights
    that are not trained, scores those of queries with keys, and of these with values."""

    frozen: float
    scores: float
    adapters: float

    @property
    def forward(self) -> float:
        return self.frozen + self.scores + self.adapters

    @property
    def step(self) -> float:
        return 2 * self.frozen + 3 * self.scores + 3 * self.adapters


def work(sizes: Qwen3MoeConfig, tokens: int, rank: int, causal: bool = True) -> Work:
    """Of one sequence of ``tokens``; if not ``causal``, every token attends to all."""
    hidden, width, chosen = sizes.hidden_size, sizes.moe_intermediate_size, sizes.num_experts_per_tok
    query, key = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    experts = [(hidden, 2 * width), (width, hidden)]
    a_layer = sum(k * n for k, n in attention) + chosen * sum(k * n for k, n in experts) + hidden * sizes.num_experts
    factors = rank * (sum(k + n for k, n in attention) + chosen * sum(k + n for k, n in experts))
    keys = (tokens + 1) / 2 if causal else tokens
    layers = sizes.num_hidden_layers
    return Work(
        frozen=2 * (layers * a_layer + hidden * sizes.vocab_size),
        scores=2 * layers * 2 * keys * query,
        adapters=2 * layers * factors,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tflops", type=float, nargs="+", default=[790.0, 165.0], help="10^12 operations a second")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    found = work(config(options.layers), options.tokens, options.rank)
    print(f"{found.step / 1e9:.1f} GFLOP a token, {found.forward / 1e9:.1f} of them in forward")
    for tflops in options.tflops:
        print(f"{tflops:g} TFLOP/s: at most {tflops * 1e12 / found.step:.0f} tokens a second")


if __name__ == "__main__":
    main()
