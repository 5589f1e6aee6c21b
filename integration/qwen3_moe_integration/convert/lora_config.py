"""``adapter_config.json``: which rank and scaling a module has, and the shortest configuration that says so.

PEFT finds a module's rank in ``rank_pattern``, whose keys are regular expressions for the end of the module's name,
the first that matches; without a match it is ``r``. Alpha likewise.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

from .factors import Factors, scaling_of

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""These also change the base weights when the adapter is made, so that the factors alone do not say what it adds."""

_LAYER = re.compile(r"(?P<before>(?:.*\.)?layers\.(?P<index>\d+)\.)(?P<after>.+)")


class Target(NamedTuple):
    """What the configuration has to say about one module or parameter, by the name it has in the base model."""

    name: str
    factors: Factors
    is_parameter: bool = False


def check(config: dict[str, Any]) -> None:
    """Raises ValueError for an adapter that is more than factors of plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f'adapter_config.json must have peft_type "LORA", got {config.get("peft_type")!r}')
    for field, wanted, pattern in (("r", int, "rank_pattern"), ("lora_alpha", (int, float), "alpha_pattern")):
        for name, value in {field: config.get(field), **(config.get(pattern) or {})}.items():
            if not isinstance(value, wanted) or value <= 0:
                raise ValueError(f"adapter_config.json: {field} must be a positive number, got {value!r} for {name}")
            _compiled(name)
    for field in ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out"):
        if config.get(field):
            raise ValueError(
                f"adapter_config.json: {field} must be false to convert expert LoRA, got {config[field]!r}"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS):
        raise ValueError(
            f"adapter_config.json: init_lora_weights is {init!r}, which changes the base weights; convert the adapter "
            "to plain LoRA first (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def rank_of(config: dict[str, Any], name: str) -> int:
    return _first_match(config.get("rank_pattern"), name, config["r"])


def scaling_at(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = _first_match(config.get("alpha_pattern"), name, config["lora_alpha"])
    return scaling_of(alpha, rank, bool(config.get("use_rslora")))


def _first_match(pattern: Optional[dict[str, Any]], name: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if _compiled(key).match(name):
            return value
    return default


def _compiled(key: str) -> re.Pattern:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise ValueError(f"adapter_config.json: the pattern {key!r} is no regular expression: {error}") from error


def describe(config: dict[str, Any], targets: list[Target]) -> dict[str, Any]:
    """``config`` with the targets, ranks and alphas of an adapter that consists of ``targets``."""
    rslora = bool(config.get("use_rslora"))
    names = [target.name for target in targets]
    r, rank_pattern = _with_patterns(config["r"], names, [target.factors.rank for target in targets])
    alpha, alpha_pattern = _with_patterns(
        config["lora_alpha"], names, [target.factors.alpha(rslora) for target in targets]
    )
    return {
        **config,
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": True,  # the others differ only before there are weights to load
        "exclude_modules": None,
        **_targets(config, targets),
    }


def _with_patterns(default: Any, names: list[str], values: list[Any]) -> tuple[Any, dict[str, Any]]:
    """(the value of most modules, a pattern for the others); ``default`` stays if any module has it."""
    if default not in values:
        default = Counter(values).most_common(1)[0][0]
    found = defaultdict(set)
    for name, value in zip(names, values):
        for pattern in _patterns_for(name):
            found[pattern].add(value)
    pattern = {}
    for name, value in zip(names, values):
        if value != default:
            # The most general expression under which all modules have this value.
            pattern[next(each for each in _patterns_for(name) if len(found[each]) == 1)] = value
    return default, pattern


def _patterns_for(name: str) -> tuple[str, str, str]:
    """Expressions that match ``name``, general to specific; experts of a projection are never told apart."""
    layer = _LAYER.fullmatch(name)
    within = re.sub(r"(experts\\\.)\d+", r"\1\\d+", re.escape(layer["after"] if layer else name))
    return _leaf(name), within, (re.escape(layer["before"]) if layer else "") + within


def _leaf(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return leaf if leaf != "weight" else f"{owner.rpartition('.')[2]}.{leaf}"


def _targets(config: dict[str, Any], targets: list[Target]) -> dict[str, Any]:
    """The fields that say what is adapted: by short names, unless the adapter leaves out some layers."""
    modules = [target.name for target in targets if not target.is_parameter]
    parameters = [target.name for target in targets if target.is_parameter]
    layers = {int(layer["index"]) for target in targets if (layer := _LAYER.fullmatch(target.name))}
    everywhere = set(range(max(layers, default=-1) + 1))
    complete = not _names_layers(config) and _layer_sets(modules + parameters) <= {frozenset(everywhere), None}
    fields = {"layers_to_transform": None, "layers_pattern": None}
    if complete:
        fields["target_modules"] = sorted({_leaf(name) for name in modules})
        fields["target_parameters"] = sorted({_LAYER.sub(r"\g<after>", name) for name in parameters})
        return fields
    fields.update(target_modules=sorted(modules), target_parameters=sorted(parameters))
    same = _layer_sets(modules)
    if len(same) == 1 and None not in same:
        # Of every expert's projection, one short name and the layers are much less than all the names.
        fields["target_modules"] = sorted({_leaf(name) for name in modules})
        fields.update(layers_to_transform=sorted(*same), layers_pattern="layers")
    return fields


def _names_layers(config: dict[str, Any]) -> bool:
    """Whether the adapter may have been restricted to some layers, of which the last present need not be the last."""
    names = [config.get("target_modules"), *_listed(config, "target_modules"), *_listed(config, "target_parameters")]
    return (
        config.get("layers_to_transform") is not None
        or bool(config.get("exclude_modules"))
        or any(isinstance(name, str) and name != "all-linear" and not re.fullmatch(r"[a-z_.]+", name) for name in names)
    )


def _listed(config: dict[str, Any], field: str) -> list[str]:
    value = config.get(field)
    return value if isinstance(value, list) else []


def _layer_sets(names: Iterable[str]) -> set[Optional[frozenset[int]]]:
    """The sets of layers in which each short name occurs; None stands for names outside all layers."""
    found = defaultdict(set)
    for name in names:
        layer = _LAYER.fullmatch(name)
        found[_leaf(name)].add(int(layer["index"]) if layer else None)
    return {None if indices == {None} else frozenset(indices) for indices in found.values()}
