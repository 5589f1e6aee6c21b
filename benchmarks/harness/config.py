"""The sizes of Qwen3-30B-A3B, with any number of layers."""

from __future__ import annotations

from transformers import Qwen3MoeConfig

DEVIATION = 0.02
"""Of random weights."""

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""Sizes to try a script with, on a CPU too."""


def config(layers: int, **changes: int) -> Qwen3MoeConfig:
    """The published config of Qwen/Qwen3-30B-A3B, but for the number of layers."""
    sizes = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
    }
    return Qwen3MoeConfig(
        **sizes | changes,
        num_hidden_layers=layers,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
