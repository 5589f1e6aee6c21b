"""The quantization config that Transformers takes in ``from_pretrained`` and writes into config.json."""

import inspect
from typing import Any, Optional, Union

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import register_quantization_config

from .stacks import BLOCKSIZES, FLOATS, QUANT_TYPES

METHOD = "bitsandbytes_moe"


@register_quantization_config(METHOD)
class MoeBitsAndBytesConfig(BitsAndBytesConfig):
    """4 bit by bitsandbytes for the linear layers and for the experts of a Mixture-of-Experts model.

    Embeddings, norms, routers and the output head stay as they are. The defaults are those of QLoRA.

    Args:
        llm_int8_skip_modules: names, name endings or patterns of more modules that stay as they are; for experts,
            also of a single projection (``"experts.down_proj"``).
        bnb_4bit_compute_dtype: bf16, fp16 or fp32, in which products are computed; experts that have one projection in
            full precision compute in the dtype of that one.
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: also quantize the scales: 0.4 bit per weight less.
        bnb_4bit_quant_storage: dtype that the packed weights are kept as; FSDP wants that of the other weights.
        experts_blocksize: weights of an expert that share a scale, a power of 2 from 32 to 4096; linear layers have the
            64 of bitsandbytes. Where a block does not end with a row of an expert, a slower path multiplies.
        save_id: written by ``save_pretrained``; marks the files that belong together.

    Raises:
        ValueError: naming the argument that is none of the above.
    """

    def __init__(
        self,
        llm_int8_skip_modules: Optional[list[str]] = None,
        bnb_4bit_compute_dtype: Union[torch.dtype, str] = torch.bfloat16,
        bnb_4bit_quant_type: str = "nf4",
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_quant_storage: Union[torch.dtype, str, None] = None,
        experts_blocksize: int = 64,
        save_id: Optional[str] = None,
    ):
        super().__init__(
            load_in_4bit=True,
            llm_int8_skip_modules=llm_int8_skip_modules,
            bnb_4bit_compute_dtype=bnb_4bit_compute_dtype,
            bnb_4bit_quant_type=bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            bnb_4bit_quant_storage=bnb_4bit_quant_storage,
        )
        self.quant_method = METHOD
        self.experts_blocksize = experts_blocksize
        self.save_id = save_id
        for name, allowed in (
            ("bnb_4bit_quant_type", QUANT_TYPES),
            ("experts_blocksize", BLOCKSIZES),
            ("bnb_4bit_compute_dtype", FLOATS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Reads a ``BitsAndBytesConfig`` too, and leaves aside what is not for 4 bit."""
        known = {key: value for key, value in config_dict.items() if key in _PARAMETERS}
        return super().from_dict(known, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Without ``load_in_4bit``: Transformers would take it for its own 4-bit format, which has no experts."""
        values = {name: getattr(self, name) for name in _PARAMETERS}
        plain = {name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for name, x in values.items()}
        return {"quant_method": METHOD, **plain}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


_PARAMETERS = tuple(inspect.signature(MoeBitsAndBytesConfig).parameters)
