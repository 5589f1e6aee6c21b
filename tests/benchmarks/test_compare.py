"""The comparison itself: its reference is right, it times what it says, and no bad result gets a time."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import compare
import plot
import profile_layer
import pytest
import torch
from harness import contest, measure, problem, report
from harness.options import parse
from harness.peers import Peer

BENCHMARKS = Path(compare.__file__).parent
TINY = problem.Shape(hidden=16, intermediate=12, experts=5, top_k=2)


@pytest.fixture
def weights():
    return problem.make_weights(TINY, torch.float32, "cpu")


@pytest.fixture
def options():
    return parse(["--quick", "--device", "cpu", "--dtype", "float32", "--passes", "forward", "trained"])


def inputs(tokens, seed=1):
    return problem.make_inputs(TINY, tokens, torch.float32, "cpu", seed)


def dense(weights, hidden_states, top_k_index, top_k_weights):
    """Every expert on every token, weighted by the token's weight for it or zero."""
    gate, up = torch.einsum("th,eih->tei", hidden_states, weights.gate_up_proj).chunk(2, dim=-1)
    outs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, weights.down_proj)
    shares = torch.zeros(outs.shape[:2], dtype=outs.dtype).scatter(1, top_k_index, top_k_weights)
    return torch.einsum("te,teh->th", shares, outs)


def results_of(layer, weights, options, tokens=7):
    """The record of one peer in one trained contest."""
    peer = Peer("peer", layer, None)
    (record,) = contest.Contest([peer], weights, [inputs(tokens, seed) for seed in (1, 2)], options).run("trained")
    return record


@pytest.mark.parametrize("tokens", [1, 33])
def test_the_reference_is_the_dense_definition_and_its_gradients(tokens, weights):
    wide = problem.Weights(*(torch.nn.Parameter(weight.detach().double()) for weight in weights))
    sample = inputs(tokens)
    doubled = problem.Inputs(*(x.detach().double() if x.is_floating_point() else x for x in sample))
    for x in (doubled.hidden_states, doubled.top_k_weights):
        x.requires_grad_()
    wanted = problem.run_pass(partial(dense, wide), "trained", doubled, wide)
    found = problem.reference(sample, weights, weight_grads=True)
    assert found.keys() == wanted.keys()
    for name, result in found.items():
        torch.testing.assert_close(result.double(), wanted[name], rtol=1e-6, atol=1e-7, msg=name)


def test_relative_error_is_the_ratio_of_norms_and_nan_for_any_nan():
    wanted = torch.randn(40, 3)
    assert problem.relative_error(wanted, wanted) == 0
    assert problem.relative_error(1.25 * wanted, wanted) == pytest.approx(0.25)
    broken = wanted.clone()
    broken[-1, -1] = float("nan")
    assert problem.relative_error(broken, wanted) != problem.relative_error(broken, wanted)
    with pytest.raises(ValueError, match="result must have shape"):
        problem.relative_error(wanted[:1], wanted)


def test_the_default_layer_costs_what_its_model_card_implies():
    operations, size = problem.Shape().cost("forward", tokens=1, active_experts=8, element_size=2)
    assert operations == pytest.approx(75.5e6, rel=1e-3)
    assert size == pytest.approx(8 * 9.437e6, rel=1e-3)


def test_calls_go_round_every_input_set():
    seen = []
    samples = measure.time_calls([partial(seen.append, i) for i in range(3)], 7, "cpu")
    assert len(samples) == 7
    assert seen[measure.WARM_UP_CALLS :] == [0, 1, 2, 0, 1, 2, 0]


def test_no_thread_has_to_wake_while_calls_are_timed():
    def call():
        assert not torch._C._is_multithreading_enabled()

    measure.time_calls([call], 2, "cpu")
    assert torch._C._is_multithreading_enabled()


def test_a_right_peer_gets_times_and_errors(weights, options):
    record = results_of(partial(dense, weights), weights, options)
    assert record["status"] == "ok"
    assert set(record["errors"]) == set(problem.reference(inputs(7), weights, weight_grads=True))
    assert max(record["errors"].values()) < 1e-5
    assert record["call_ms"]["min"] <= record["call_ms"]["median"] <= record["call_ms"]["p90"]


def scaled(weights, *arguments):
    return 1.01 * dense(weights, *arguments)


def half_written(weights, *arguments):
    return dense(weights, *arguments) * torch.tensor([1.0] * 15 + [float("nan")])


def wrong_only_in_backward(weights, *arguments):
    out = dense(weights, *arguments)
    return out + (out - out.detach())


@pytest.mark.parametrize("layer", [scaled, half_written, wrong_only_in_backward])
def test_a_wrong_peer_is_named_and_gets_no_time(layer, weights, options):
    record = results_of(partial(layer, weights), weights, options)
    assert record["status"] == "wrong"
    assert "call_ms" not in record
    json.dumps(record, allow_nan=False)


def test_a_peer_that_raises_is_a_finding_and_the_others_go_on(weights, options):
    def broken(*arguments):
        raise NotImplementedError("no such card\nand a second line")

    peers = [Peer("broken", broken, None), Peer("whole", partial(dense, weights), None)]
    first, second = contest.Contest(peers, weights, [inputs(7)], options).run("forward")
    assert (first["status"], first["reason"]) == ("failed", "NotImplementedError: no such card")
    assert second["status"] == "ok"


def test_a_peer_without_room_is_never_called(weights, options, monkeypatch):
    monkeypatch.setattr(contest, "free_memory", lambda device: 2**30)
    peer = Peer("large", lambda *arguments: pytest.fail("it was called"), None, workspace=lambda which, tokens: 2**31)
    (record,) = contest.Contest([peer], weights, [inputs(7)], options).run("forward")
    assert record["status"] == "skipped"
    assert "2 GiB" in record["reason"]


def test_the_lead_is_the_best_peers_time_over_ours():
    times = {report.OURS: 2.0, "slow": 9.0, "best": 3.0}
    records = [{"peer": peer, "call_ms": {"median": median}} for peer, median in times.items()]
    records.append({"peer": "broken", "status": "failed"})
    assert report.lead(records, "call_ms") == 1.5
    assert report.lead(records[1:], "call_ms") is None


def test_a_run_is_written_reported_and_drawn(kernel_dir, tmp_path, capsys):
    peers = ["ours", "eager", "batched_mm", "grouped_mm", "scattermoe"]
    arguments = ["--quick", "--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path), "--peers", *peers]
    assert compare.main([*arguments, "--tokens", "1", "16"]) == 0
    results = json.loads((tmp_path / "compare.json").read_text())
    assert results["complete"]
    assert results["kernel"]["id"].startswith("_qwen3_moe_fused")
    assert results["cold_start"]["first_calls"][0]["tokens"] == 16

    timed = {(r["peer"], r["pass"], r["tokens"]) for r in results["layer"] if r["status"] == "ok" and r["call_ms"]}
    names = {peer["name"] for peer in results["peers"] if not peer["reason"]}
    assert {report.OURS, "Transformers eager", "Transformers batched_mm", "Transformers grouped_mm"} <= names
    assert timed == {(name, which, tokens) for name in names for which in problem.PASSES for tokens in (1, 16)}
    assert {(r["name"], r["tokens"]) for r in results["routing"] if r["call_ms"]} >= {(report.OURS, 16)}

    table = (tmp_path / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert "| qwen3-moe-fused, ms a call |" in table

    plot.main([str(tmp_path / "compare.json")])
    for name in ("compare-time.png", "compare-ratio.png"):
        assert plot.plt.imread(tmp_path / name).std() > 0.05


def test_weights_in_4_bit_are_judged_as_they_were_packed(kernel_dir, tmp_path):
    arguments = ["--quick", "--four-bit", "--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path)]
    assert compare.main([*arguments, "--tokens", "16"]) == 0
    records = json.loads((tmp_path / "compare-four-bit.json").read_text())["layer"]
    assert {(r["peer"], r["pass"]) for r in records} == {
        (name, which)
        for name in (report.OURS, "bitsandbytes dequantize + grouped_mm")
        for which in ("forward", "frozen")
    }
    for record in records:
        assert record["call_ms"] and max(record["errors"].values()) < 0.01, "quantizing itself has an error of 0.09"


def test_grouped_nf4_gemm_is_called_as_its_contract_says(monkeypatch, tmp_path, kernel_dir):
    """Its kernels need a GPU: these compute what its documentation promises, from the layout that it describes."""

    def decoded(packed, absmax):
        code = bnb.functional.get_4bit_type("nf4", device="cpu")
        nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2).long()
        return (code[nibbles].unflatten(-1, (-1, 64)) * absmax[..., None]).flatten(-2)

    def product(x, stack, sizes, experts):
        assert all(isinstance(size, int) and size > 0 for size in sizes) and sum(sizes) == len(x)
        return torch.cat([rows.float() @ stack[e] for rows, e in zip(x.split(sizes), experts)]).bfloat16()

    def repack(packed, states, n, k):
        ((data,), (state,)) = packed, states
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return data.view(1, n, k // 2), absmax.view(1, n, k // 64)

    def forward(x, packed, absmax, *groups):
        return product(x, decoded(packed, absmax).transpose(1, 2), *groups)

    def dgrad(grad, packed, absmax, *groups):
        return product(grad, decoded(packed, absmax), *groups)

    grouped = {"gemm_4bit_grouped": forward, "dgrad_4bit_grouped": dgrad, "repack_from_bnb": repack}
    monkeypatch.setitem(sys.modules, "nf4_grouped", SimpleNamespace(**grouped))
    monkeypatch.setitem(sys.modules, "nf4_qlora", SimpleNamespace(gemm_4bit_grouped_train=forward))
    arguments = ["--quick", "--four-bit", "--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path)]
    assert compare.main([*arguments, "--tokens", "1", "16", "--peers", "nf4_fused", "nf4_auto"]) == 0
    records = json.loads((tmp_path / "compare-four-bit.json").read_text())["layer"]
    assert {(r["peer"], r["pass"], r["tokens"]) for r in records} == {
        (f"grouped-nf4-gemm {way}", which, tokens)
        for way in ("fused", "auto")
        for which in ("forward", "frozen")
        for tokens in (1, 16)
    }
    for record in records:
        assert record["call_ms"] and max(record["errors"].values()) < 0.01


def test_scattermoe_is_called_as_its_functions_are_defined(monkeypatch, tmp_path, kernel_dir):
    """Its kernels need a GPU: these compute what its two functions do, and take dtypes and sizes as strictly."""

    def flatten_sort_count(expert_idxs, num_experts):
        sorted_experts, slots = expert_idxs.flatten().sort()
        return sorted_experts, slots, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs, expert_weights, k, sorted_experts, slots, offsets, gates=None, grouped_in=False, grouped_out=False
    ):
        assert len(slots) == len(inputs) * k and len(offsets) == len(expert_weights)
        rows = inputs if grouped_in else inputs[slots // k]
        groups = zip(rows.split(sorted_experts.bincount(minlength=len(offsets)).tolist()), expert_weights)
        out = torch.cat([rows @ matrix for rows, matrix in groups])
        if not grouped_out:
            out = torch.empty_like(out).index_copy(0, slots, out)
        return out if gates is None else (gates[:, None] @ out.view(*gates.shape, -1)).squeeze(1)

    functions = SimpleNamespace(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    monkeypatch.setitem(sys.modules, "scattermoe", SimpleNamespace(parallel_experts=functions))
    monkeypatch.setitem(sys.modules, "scattermoe.parallel_experts", functions)
    arguments = ["--quick", "--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path)]
    assert compare.main([*arguments, "--tokens", "1", "16", "--peers", "scattermoe"]) == 0
    records = json.loads((tmp_path / "compare.json").read_text())["layer"]
    assert {(r["peer"], r["pass"], r["tokens"]) for r in records} == {
        ("ScatterMoE", which, tokens) for which in problem.PASSES for tokens in (1, 16)
    }
    for record in records:
        assert record["call_ms"] and max(record["errors"].values()) < 0.01


def test_an_interrupted_run_leaves_a_whole_file(kernel_dir, tmp_path, monkeypatch):
    def interrupted(self, which):
        if which == "frozen":
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(contest.Contest, "run", interrupted)
    arguments = ["--quick", "--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path), "--peers", "ours"]
    with pytest.raises(KeyboardInterrupt):
        compare.main([*arguments, "--no-cold-start"])
    assert not json.loads((tmp_path / "compare.json").read_text())["complete"]
    assert "not complete" in (tmp_path / "compare.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.md"}


def test_a_profile_names_what_ran(kernel_dir, tmp_path):
    arguments = ["--quick", "--device", "cpu", "--kernel", str(kernel_dir), "--out", str(tmp_path)]
    profile_layer.main([*arguments, "--tokens", "16", "--passes", "frozen"])
    (profile,) = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    assert profile["pass"] == "frozen"
    assert any("FusedExpertsBackward" in op["name"] and op["launches"] == 1 for op in profile["device_ops"])
    assert "FusedExpertsBackward" in (tmp_path / "profile.md").read_text()


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("benchmark*.py")), ids=lambda path: path.stem)
def test_kernels_benchmark_runs_and_verifies(script, kernel_dir):
    from kernels.cli.benchmark import run_benchmark_script

    results, _ = run_benchmark_script(
        script, iterations=1, warmup=0, cwd=kernel_dir, repo_id=str(kernel_dir), is_local=True, revision="local"
    )
    assert len(results) >= 3
    assert all(result.verified for result in results.values())
