"""loading.py: the checkpoint is one that Transformers reads, what is watched is what a process takes, bounds hold."""

import json
import os
import subprocess
import sys
import time

import loading
import pytest
import torch
from harness import watch
from harness.checkpoint import shard_sizes, write_checkpoint
from harness.config import TINY, config
from safetensors import safe_open
from transformers import AutoModelForCausalLM

MIB = 2**20


def test_the_checkpoint_is_read_whole_and_every_shard_is_full(tmp_path):
    folder, limit = tmp_path / "model", 100_000
    write_checkpoint(folder, config(2, **TINY), "cpu", limit, seed=3)
    sizes = shard_sizes(folder)
    assert len(sizes) > 5 and max(sizes) < limit + 20_000  # the header
    assert all(size > limit / 2 for size in sizes[:-1])
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    parameters = [parameter.detach() for parameter in model.parameters()]
    assert index["metadata"]["total_size"] == 2 * sum(parameter.numel() for parameter in parameters)
    for name, at in (("gate", slice(64)), ("up", slice(64, None))):
        key = f"model.layers.1.mlp.experts.5.{name}_proj.weight"
        with safe_open(folder / index["weight_map"][key], "pt") as file:
            assert torch.equal(file.get_tensor(key), model.model.layers[1].mlp.experts.gate_up_proj[5, at])
    for parameter in parameters:
        assert parameter.dim() == 1 or float(parameter.float().std()) == pytest.approx(0.02, rel=0.1)


def test_the_same_seed_makes_the_same_checkpoint(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(tmp_path / name, config(1, **TINY), "cpu", 200_000, seed)
    a, b, c = ([file.read_bytes() for file in sorted((tmp_path / x).glob("*.safetensors"))] for x in "abc")
    assert a == b and a != c and not list(tmp_path.glob("*.part"))


def test_anonymous_memory_is_told_from_mapped_files(tmp_path):
    (tmp_path / "file").write_bytes(bytes(200 * MIB))
    program = (
        "import mmap, sys; own = bytearray(100 * 2**20)\n"
        "file = open(sys.argv[1], 'rb'); mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(mapped[::4096]); print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = watch.host_memory(process.pid)
        process.stdin.close()
    assert 100 * MIB < found["host_anonymous"] < 150 * MIB
    assert found["host_resident"] > found["host_anonymous"] + 190 * MIB
    for _ in range(100):  # the kernel takes a moment to forget it
        if not watch.host_memory(process.pid):
            break
        time.sleep(0.01)
    assert watch.host_memory(process.pid) == {}


def test_each_phase_has_its_own_peak(tmp_path, monkeypatch):
    (tmp_path / "phases.py").write_text(
        "import json, time\n"
        "for phase, size in (('large', 300), ('small', 1)):\n"
        "    own = bytearray(size * 2**20); time.sleep(0.2); del own; print(json.dumps({'phase': phase}), flush=True)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    large, small = watch.watch("phases", [])
    assert (large["phase"], small["phase"]) == ("large", "small")
    assert large["host_anonymous"] > small["host_anonymous"] + 250 * MIB
    with pytest.raises(RuntimeError, match="python -m no_such_program ended with 1"):
        watch.watch("no_such_program", [])


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    out = tmp_path / "out"
    code = loading.main(["--tiny", "--layers", "2", "--out", str(out), *arguments])
    (path,) = out.glob("*.json")
    return code, json.loads(path.read_text())


def test_a_checkpoint_is_loaded_saved_and_loaded_again(kernel_dir, tmp_path):
    folder = tmp_path / "model"
    code, result = run(tmp_path, "--kernel", str(kernel_dir), "--checkpoint", str(folder))
    assert code == 0 and result["complete"] and result["broken"] == []
    assert result["shard_bytes"] == shard_sizes(folder) and len(result["shard_bytes"]) > 2
    assert [each["what"] for each in result["runs"]] == [loading.IN_4_BIT, loading.SAVE, loading.AGAIN]
    in_full, packed = sum(result["shard_bytes"]), 2 * (8 * 3 + 4) * 64 * 64  # weights of experts and attention
    assert in_full - 1.5 * packed < result["runs"][1]["bytes"] < in_full - 1.3 * packed
    for each in result["runs"]:
        assert each["seconds"] > 0 and each["host_resident"] > each["host_anonymous"] > 100 * MIB
    assert (tmp_path / "out" / "loading-2-layers.md").read_text().count("\n| ") == 2 + 3


def test_a_broken_bound_fails(tmp_path, monkeypatch, capsys):
    def watched(module, arguments):
        way = arguments[1]
        taken = {"seconds": 1.0, "host_anonymous": 5 * 2**30 if way == "ours" else 0, "host_resident": 6 * 2**30}
        return [{"phase": phase, **taken} for phase in ("start", "load", "save")[: 2 + (way == "ours")]]

    monkeypatch.setattr(loading, "watch", watched)
    monkeypatch.setattr(loading, "shard_sizes", lambda folder: [1000])
    code, result = run(tmp_path)
    assert code == 1 and result["complete"] and len(result["broken"]) == 1
    assert "**Too much:** bf16 shards, all in 4 bit: 5.00 GiB of the host" in capsys.readouterr().out


def test_stock_4_bit_is_measured_and_bound_by_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "HOST_ROOM", 0)
    code, result = run(tmp_path, "--stock")
    assert code == 0 and [each["what"] for each in result["runs"]] == [loading.STOCK]


def test_device_memory_has_a_gibibyte_of_room():
    load = {"what": "x", "device_final": 5, "host_anonymous": 0, "room_of": 0}
    assert loading.broken({**load, "device_peak": 5 + 2**30}) == []
    assert loading.broken({**load, "device_peak": 6 + 2**30}) != []
