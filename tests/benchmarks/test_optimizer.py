"""optimizer.py on few experts: all optimizers make their steps, and the table has what was measured."""

import json

from tests.documents import ROOT, call_main, in_own_process


def test_a_row_for_each_optimizer_and_number_of_layers(tmp_path):
    arguments = ["--tiny", "--layers", "1", "2", "--steps", "2", "--out", tmp_path]
    in_own_process(call_main, ROOT / "benchmarks/optimizer.py", *arguments, folder=tmp_path, environment={})
    runs = json.loads((tmp_path / "optimizer.json").read_text())["runs"]
    optimizers = ["bitsandbytes", "its kernel, without waits", "AdamW8bit"]
    assert [(run["layers"], run["optimizer"]) for run in runs] == [(n, name) for n in (1, 2) for name in optimizers]
    assert [run["tensors"] for run in runs] == [12] * 3 + [24] * 3
    a_layer = 16 * 4 * (2048 + 2 * 768 + 768 + 2048) + 16 * (3 * 2048 + 4096 + 4096 + 512 + 512 + 2048)
    assert [run["parameters"] for run in runs] == [a_layer] * 3 + [2 * a_layer] * 3
    assert all(run["step_ms"] > 0 and run["host_ms"] > 0 for run in runs)
    table = (tmp_path / "optimizer.md").read_text()
    assert all(f"| {run['optimizer']} |  | {run['step_ms']:.2f} |" in table or run["kernels_ms"] for run in runs)
