"""LoRA of every expert, in PEFT: on the kernel, ``W + B @ A`` is never built.

PEFT adapts a parameter by its ``ParamWrapper``, which stands around the module. For the time of a call it puts
``W + scaling * B @ A``, of all experts, in the parameter's place. The wrapper here hands the factors to the kernel
instead, by leaving them on the module for that time. Where the experts do not run on the kernel it is PEFT's own.

The wrappers of two projections nest: ``down_proj`` is around ``gate_up_proj``, in the order of PEFT's sorted names.
Factors, their names and files are those of PEFT: ``lora_A (E*r, in)``, expert after expert, and ``lora_B (out, r*E)``,
the experts of one rank side by side.
"""

from collections.abc import Collection, Iterator
from copy import copy
from typing import Any, Optional

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import nn

from .exchange import is_shared_out
from .experts import takes_adapters

PROJECTIONS = ("gate_up_proj", "down_proj")
INITS = (True, False, "gaussian")


def expert_lora_config(
    rank: int,
    alpha: Optional[float] = None,
    target_modules: Collection[str] = (),
    module_rank: Optional[int] = None,
    module_alpha: Optional[float] = None,
    **settings: Any,
) -> LoraConfig:
    """A ``LoraConfig`` that adapts all experts, and other modules with a rank of their own.

    Args:
        rank: of the experts' adapters.
        alpha: their ``lora_alpha``, by default ``rank``, so that the scaling is 1.
        target_modules: names of other modules to adapt.
        module_rank, module_alpha: of their adapters; by default ``rank`` and ``module_rank``.
        settings: more of ``LoraConfig``.
    """
    module_rank = rank if module_rank is None else module_rank
    # PEFT warns of a pattern for parameters that it matched nothing, although it did; so these are for the modules.
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=list(target_modules),
        target_parameters=[f"mlp.experts.{projection}" for projection in PROJECTIONS],
        rank_pattern=dict.fromkeys(target_modules, module_rank),
        alpha_pattern=dict.fromkeys(target_modules, module_rank if module_alpha is None else module_alpha),
        **settings,
    )


class ParamWrapper(peft_layer.ParamWrapper):
    """Adapts one projection of an experts module. PEFT knows its wrappers by the name of this class.

    Raises:
        ValueError: the config asks for what the experts cannot have, see :func:`check_config`; or an adapter comes when
            the experts are shared out already.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        check_config(config)
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        check_config(config)
        if is_shared_out(self.get_base_layer()):
            raise ValueError(
                f"adapter {adapter_name!r} comes too late: the experts are shared out already, and their gradients and "
                "files with them; add all adapters before share_out_experts"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name: str, config: LoraConfig) -> None:
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        """Raises:
        ValueError: adapters with different dropout are to be active together.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        rates = {name: getattr(self.lora_dropout[name], "p", 0.0) for name in names if name in self.lora_dropout}
        if len(set(rates.values())) > 1:
            raise ValueError(f"adapters that are active together must have the same lora_dropout, got {rates}")
        super().set_adapter(adapter_names, inference_mode)

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (E, r, in) and B (E, out, r) of an adapter, as views of its parameters."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        E = self.num_experts
        return A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)

    def active_lora(self) -> Optional[tuple[torch.Tensor, torch.Tensor, float, float]]:
        """A, B, scaling and dropout of the active adapters, their ranks side by side; None if there is none."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names or self.disable_adapters or self.merged:
            return None
        dropout = self.lora_dropout[names[0]]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if len(names) == 1:
            return *self.factors(names[0]), self.scaling[names[0]], rate
        A, B = zip(*(self.factors(name) for name in names))
        B = [self.scaling[name] * each for name, each in zip(names, B)]
        return torch.cat(A, 1), torch.cat(B, 2), 1.0, rate

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        experts, wrappers = self.get_base_layer(), list(self._chain())
        ours = all(isinstance(wrapper, ParamWrapper) for wrapper in wrappers)
        if not ours or not takes_adapters(experts):
            self._check_plain(experts)
            return super().forward(x, *args, **kwargs)
        experts.lora = {}
        try:
            for wrapper in wrappers:
                wrapper._check_forward_args(x, *args, **kwargs)
                if wrapper.disable_adapters and wrapper.merged:
                    wrapper.unmerge()
                if (lora := wrapper.active_lora()) is not None:
                    experts.lora[wrapper.parameter_name] = lora
            return experts(x, *args, **kwargs)
        finally:
            del experts.lora

    def _chain(self) -> Iterator[nn.Module]:
        """This wrapper and those within it."""
        module = self
        while hasattr(module, "base_layer"):
            yield module
            module = module.base_layer

    def _check_plain(self, experts: nn.Module) -> None:
        """PEFT's way adds to the weights, before a token is seen: nothing of the tokens can be dropped."""
        lora = self.active_lora()
        if lora is not None and lora[-1]:
            raise ValueError(
                f"lora_dropout={lora[-1]} needs {type(experts).__name__} to run on the kernel; call kernelize_model"
            )


def check_config(config: LoraConfig) -> None:
    """What experts cannot have is refused when an adapter is made, not when it trains.

    Raises:
        ValueError: naming the argument, what it got and what it wants.
    """
    if config.init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights must be one of {', '.join(map(repr, INITS))} for experts, "
            f"got {config.init_lora_weights!r}"
        )
    for name in ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"):
        if getattr(config, name):
            raise ValueError(f"{name} must be False for experts, got {getattr(config, name)!r}")


def has_experts(module: nn.Module, parameter_name: Optional[str]) -> bool:
    """Whether a parameter is one of the two projections of an experts module."""
    return parameter_name in PROJECTIONS and all(
        getattr(getattr(module, projection, None), "ndim", None) == 3 for projection in PROJECTIONS
    )


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """PEFT's wrapper refuses dropout, which the kernel can do."""
    config = copy(config)
    config.lora_dropout = 0.0
    return config
