"""Checkpoints with random experts, dense and in 4 bit, and their weights by expert, whatever the layout."""

import json
from collections import defaultdict

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

BLOCK = "model.layers.{}.mlp"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def random_experts(H=32, I=24, E=3, layers=(0, 10), dtype=torch.bfloat16):
    sizes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {
        f"{BLOCK.format(l)}.experts.{e}.{p}.weight": torch.randn(sizes[p]).to(dtype)
        for l in layers
        for e in range(E)
        for p in PROJECTIONS
    }


def others(H=32):
    return {
        "model.embed_tokens.weight": torch.randn(17, H).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(3, H),
        "model.layers.1.mlp.gate_proj.weight": torch.randn(5, H),  # a layer without experts
        "a.buffer": torch.arange(7, dtype=torch.int16),
        "a.scalar": torch.tensor(2.5),
    }


def in_4_bit(tensors, blocksize=64, nested=True, quant_type="nf4"):
    """As Transformers 4 with bitsandbytes saves experts: each matrix quantized alone."""
    packed = {}
    for key, tensor in tensors.items():
        data, state = quantize_4bit(tensor, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
        packed[key] = data
        packed.update({f"{key}.{name}": x.contiguous() for name, x in state.as_dict(packed=True).items()})
    return packed


def save(path, tensors, files=1, config=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {"model_type": "qwen3_moe"}))
    (path / "tokenizer.json").write_text("{}")
    if files == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    index = {key: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, key in enumerate(tensors)}
    for name in set(index.values()):
        save_file({key: tensors[key] for key in index if index[key] == name}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def load(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found.update(tensors)
    index = path / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == found.keys()
    return found


def decoded(tensors):
    """Every 4-bit weight as bitsandbytes decodes it, the rest as it is."""
    found = {}
    for key, tensor in tensors.items():
        if any(f".{name}" in key for name in STATISTICS):
            continue
        beside = {name.removeprefix(f"{key}."): x for name, x in tensors.items() if name.startswith(f"{key}.")}
        found[key] = _decode(tensor, QuantState.from_dict(beside, "cpu")) if beside else tensor
    return found


def _decode(packed, state):
    # As one row: on a CPU bitsandbytes 0.50.2 decodes wrongly what has blocks that do not end with a row.
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return dequantize_4bit(packed, state).view(shape)


def by_expert(tensors):
    """The weights by the names they have in Transformers 4."""
    found = {}
    for key, tensor in tensors.items():
        block, _, name = key.removesuffix(".weight").rpartition(".")
        if tensor.dim() != 3:
            found[key] = tensor
        elif name == "gate_up_proj":
            for e, (gate, up) in enumerate(tensor.unflatten(1, (2, -1))):
                found[f"{block}.{e}.gate_proj.weight"], found[f"{block}.{e}.up_proj.weight"] = gate, up
        else:
            block = block if block.endswith(".experts") else f"{block}.experts"
            found.update({f"{block}.{e}.{name}.weight": matrix for e, matrix in enumerate(tensor)})
    return found


def stacked(tensors):
    """The weights of experts by the names they have in Transformers 5."""
    stacks = defaultdict(list)
    for key, tensor in tensors.items():
        owner, _, name = key.removesuffix(".weight").rsplit(".", 2)
        stacks[owner, name].append(tensor)
    found = {}
    for (owner, name), matrices in stacks.items():
        if name == "down_proj":
            found[f"{owner}.down_proj"] = torch.stack(matrices)
        elif name == "gate_proj":
            both = zip(matrices, stacks[owner, "up_proj"])
            found[f"{owner}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
    return found


def assert_same_bits(want, got):
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
