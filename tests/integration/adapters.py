"""Random adapters of Transformers v4, and what an adapter adds to each weight, read from its files independently."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor

PREFIX = "base_model.model."
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class V4Adapter:
    """An adapter of every expert and of attention.

    H, I, E and layers are the model's; ranks and alphas go by projection; modules that match ``lacks`` have no adapter.
    """

    H: int = 7
    I: int = 5
    E: int = 3
    layers: tuple[int, ...] = (0, 1)
    r: int = 4
    alpha: float = 8
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dtype: torch.dtype = torch.float32
    projections: tuple[str, ...] = EXPERT_PROJECTIONS
    lacks: str = "$."
    config: dict[str, Any] = field(default_factory=dict)

    def sizes(self, projection: str) -> tuple[int, int]:
        """(in, out)"""
        return {"down_proj": (self.I, self.H), "q_proj": (self.H, self.H)}.get(projection, (self.H, self.I))

    def tensors(self) -> dict[str, Tensor]:
        modules = {f"model.layers.{l}.self_attn.q_proj": "q_proj" for l in self.layers}
        for l in self.layers:
            for e in range(self.E):
                modules.update({f"model.layers.{l}.mlp.experts.{e}.{p}": p for p in self.projections})
        tensors = {}
        for module, projection in modules.items():
            if re.search(self.lacks, module):
                continue
            rank, (width, height) = self.ranks.get(projection, self.r), self.sizes(projection)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, width).to(self.dtype)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(height, rank).to(self.dtype)
        return tensors

    def adapter_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "r": self.r,
            "lora_alpha": self.alpha,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "use_rslora": self.rslora,
            "lora_dropout": 0.05,
            "init_lora_weights": True,
            "target_modules": ["q_proj", *self.projections],
            **self.config,
        }

    def save(self, folder: Path) -> Path:
        return save(folder, self.tensors(), self.adapter_config())


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def additions(folder: Path) -> dict[str, Tensor]:
    """``scaling * B @ A`` in fp64 by module of Transformers v4, experts apart: of any layout, by its definition."""
    tensors, config = load(folder)
    found = {}
    for key, A in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        A, B = A.double(), tensors[key.replace("lora_A", "lora_B")].double()
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        owner = module.removesuffix(".base_layer").removesuffix(".experts")
        if owner + ".experts" in (module, module.removesuffix(".base_layer")):
            beside = f"{PREFIX}{owner}.experts.base_layer.lora_A.weight" in tensors
            both = any(f".{owner}.experts.gate_up_proj".endswith(f".{name}") for name in config["target_parameters"])
            down = module.endswith("experts") and (beside or not both)
            name = f"{owner}.experts.{'down_proj' if down else 'gate_up_proj'}"
            rank, scaling = _rank_and_scaling(config, name)
            A, B = A.reshape(-1, rank, A.shape[1]), B.reshape(B.shape[0], rank, -1)
            deltas = scaling * torch.einsum("ore,eri->eoi", B, A)
            half = deltas.shape[1] // 2
            parts = {"down_proj": deltas} if down else {"gate_proj": deltas[:, :half], "up_proj": deltas[:, half:]}
        elif A.dim() == 3:
            owner, _, projection = module.rpartition(".")
            _, scaling = _rank_and_scaling(config, module)
            parts = {projection: scaling * torch.einsum("eor,eri->eoi", B, A)}
        else:
            rank, scaling = _rank_and_scaling(config, module)
            assert rank == len(A), module
            found[module] = scaling * B @ A
            continue
        for projection, deltas in parts.items():
            found.update({f"{owner}.experts.{e}.{projection}": delta for e, delta in enumerate(deltas)})
    return found


def _rank_and_scaling(config: dict[str, Any], name: str) -> tuple[int, float]:
    def look_up(pattern: str, default: Any) -> Any:
        names = (name, f"{name}.weight")  # the router is a module in v4, a parameter in PEFT's layout
        keys = [key for key in config[pattern] if any(re.fullmatch(rf"(.*\.)?({key})", each) for each in names)]
        return config[pattern][keys[0]] if keys else default

    rank, alpha = look_up("rank_pattern", config["r"]), look_up("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config["use_rslora"] else rank)


def assert_same_additions(one: Path, other: Path, ratio: float = 1e-12) -> None:
    want, got = additions(one), additions(other)
    assert want.keys() == got.keys()
    for name, delta in want.items():
        assert delta.norm() > 0
        assert (got[name] - delta).norm() <= ratio * delta.norm(), name


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit for bit, dtypes included, with the same ranks and alphas."""
    (want, want_config), (got, got_config) = load(one), load(other)
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
    for key in want:
        name = re.sub(r"\.lora_[AB]\.weight$", "", key.removeprefix(PREFIX))
        assert _rank_and_scaling(got_config, name) == _rank_and_scaling(want_config, name)
