"""The comparison of layers with adapters: both ways are checked against fp64, and the tables hold what was timed."""

import json

import compare_lora
import pytest
import torch
from harness import adapters, problem

TINY = problem.Shape(hidden=16, intermediate=12, experts=5, top_k=2)


def test_every_way_that_is_right_has_a_time_and_a_place_in_the_tables(kernel_dir, tmp_path, capsys):
    options = ["--quick", "--device", "cpu", "--tokens", "8", "--rank", "8", "--four-bit"]
    options += ["--rounds", "1", "--budget-ms", "1", "--input-sets", "1"]
    compare_lora.main([*options, "--kernel", str(kernel_dir), "--out", str(tmp_path)])
    records = json.loads((tmp_path / "compare-lora.json").read_text())["layer"]
    assert [record["reason"] for record in records] == [None] * 8
    for record in records:
        assert record["call_ms"]["median"] > 0
        assert f"| {record['peer']} | {record['call_ms']['median']:.3f} |" in (tmp_path / "compare-lora.md").read_text()
    assert "grad_down_B" in records[1]["errors"] and "grad_down_B" not in records[0]["errors"]
    assert "ours over ours, frozen" in capsys.readouterr().out


def test_factors_are_stored_as_their_row_says(kernel):
    options = compare_lora.parse(["--quick", "--device", "cpu", "--rank", "8", "--four-bit"])
    weights = problem.make_weights(options.shape, torch.bfloat16, "cpu")
    layers = compare_lora.contestants(kernel, weights, options)
    assert layers[compare_lora.FROZEN][1] is None and layers[compare_lora.FROZEN_4BIT][1] is None
    for name, (_, factors, base) in layers.items():
        assert (base is not weights) == ("nf4" in name)
        for factor in factors or ():
            assert factor.dtype == (torch.float32 if "PEFT" in name else torch.bfloat16)
        if factors:
            assert factors.gate_up_A.shape[1] == (2 if name == compare_lora.HALVES else 1) * 8
            assert factors.down_B.stride(0) == (1 if "PEFT" in name else 64 * 8)


@pytest.mark.parametrize("halves", [1, 2])
def test_the_reference_is_that_of_merged_weights(halves):
    weights = problem.make_weights(TINY, torch.float64, "cpu")
    inputs = problem.make_inputs(TINY, 9, torch.float64, "cpu", 1)
    factors = adapters.make_factors(TINY, 3, torch.float64, "cpu", halves=halves)
    gate, up = factors.gate_up_B.chunk(2, 1)
    merged = problem.Weights(
        weights.gate_up_proj + 2.0 * torch.cat((gate @ factors.gate_up_A[:, :3], up @ factors.gate_up_A[:, -3:]), 1),
        weights.down_proj + 2.0 * factors.down_B @ factors.down_A,
    )
    wanted = problem.reference(inputs, merged, weight_grads=True)
    found = adapters.reference(inputs, weights, factors, 2.0)
    for name in ("out", "grad_hidden_states", "grad_top_k_weights"):
        torch.testing.assert_close(found[name], wanted[name])
    dense = wanted["grad_down_proj"].double()
    torch.testing.assert_close(found["grad_down_B"], 2.0 * dense @ factors.down_A.mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["grad_down_A"], 2.0 * factors.down_B.mT @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_the_split_formulation_is_the_reference(trained):
    shape = problem.Shape(hidden=16, intermediate=16, experts=5, top_k=2)
    weights = problem.make_weights(shape, torch.bfloat16, "cpu")
    inputs = problem.make_inputs(shape, 9, torch.bfloat16, "cpu", 1)
    problem.train_weights(weights, False)
    factors = adapters.make_factors(shape, 8, torch.bfloat16, "cpu") if trained else None
    wanted = adapters.reference(inputs, weights, factors, 2.0)
    found = adapters.run(adapters.split(weights, factors, 2.0), inputs, factors)
    assert found.keys() == wanted.keys()
    for name, result in found.items():
        assert problem.relative_error(result, wanted[name]) < problem.TOLERANCE[torch.bfloat16], name
