"""Checkpoints that others quantized with bitsandbytes."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .config import MoeBitsAndBytesConfig


def legacy_config(name_or_path: str, **kwargs: Any) -> PreTrainedConfig:
    """The config with which a 4-bit checkpoint of bitsandbytes loads with its experts in 4 bit.

    ``from_pretrained(path, config=legacy_config(path))`` reads checkpoints that Transformers 4 saved, where each
    expert's matrices were quantized alone; those of transformers-qwen3-moe-fused; and those of Transformers 5, where
    experts are in full precision and are quantized now. The first two keep every weight: the packed bytes are put
    together as they are, and where the scales of parts were quantized, they are decoded to fp32 and stay so; a single
    stack stays as it is. ``save_pretrained`` then writes the format of this package.

    Args:
        name_or_path: a folder or a repository on the Hub.
        kwargs: for ``AutoConfig.from_pretrained``.

    Raises:
        ValueError: the checkpoint is not one of bitsandbytes in 4 bit.
    """
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    stored = getattr(config, "quantization_config", None) or {}
    if not stored.get("load_in_4bit"):
        raise ValueError(
            f"name_or_path must be a 4-bit checkpoint of bitsandbytes, got {name_or_path} with quantization_config "
            f"{stored or None}"
        )
    config.quantization_config = MoeBitsAndBytesConfig.from_dict(stored).to_dict()
    return config
