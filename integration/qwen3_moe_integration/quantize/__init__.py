"""Experts in 4 bit: quantized while a model loads, saved, and read from the formats that are about."""

from .config import MoeBitsAndBytesConfig
from .legacy import legacy_config
from .quantizer import MoeBitsAndBytesQuantizer

__all__ = ["MoeBitsAndBytesConfig", "MoeBitsAndBytesQuantizer", "legacy_config"]
