"""A small Qwen3-MoE and real English text, both made on the spot: nothing is downloaded.

The checkpoint has the format of the real ones: config.json, a tokenizer, and safetensors shards that hold every
expert's matrices on their own. Its weights are random, from a fixed seed. The text is the language reference that
Python carries with it.
"""

import shutil
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import Qwen2Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 2048


def texts() -> list[str]:
    """The chapters of Python's language reference, about 100,000 words in all."""
    return [topics[name] for name in sorted(topics)]


def train_tokenizer(vocabulary: int) -> Qwen2Tokenizer:
    return Qwen2Tokenizer().train_new_from_iterator(texts(), vocab_size=vocabulary, show_progress=False)


def make_checkpoint(folder: Path) -> None:
    """Writes the checkpoint to ``folder``, which appears only when it is complete."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    tokenizer = train_tokenizer(VOCABULARY)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    # At 1 the logits of random embeddings are so small that adapters, which leave the embeddings alone, learn little.
    torch.nn.init.constant_(model.model.norm.weight, 4.0)
    model.save_pretrained(beside, max_shard_size="4MB")
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def small_model(output: Path) -> Path:
    """The folder of the checkpoint in ``output``; it is made if it is not there."""
    folder = output / "small-qwen3-moe"
    if not folder.exists():
        print(f"Model: making a small Qwen3-MoE in {folder} (random weights, per-expert shards, own tokenizer).")
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_checkpoint(folder)
    return folder
