"""finetune.py's layers in graphs keep, and offload, what its options say or its plan; and what it plans for as much
memory as there is."""

from types import SimpleNamespace

import pytest
from transformers import Qwen3MoeConfig

from tests.conftest import ROOT

PROJECTIONS = ("o_proj", "k_proj", "v_proj", "q_proj")


class ReachedError(Exception):
    """A run is where the test wanted it."""


@pytest.mark.parametrize("planned", [False, True])
def test_graphs_keep_and_offload_what_the_options_or_the_plan_say(kernel_dir, tmp_path, monkeypatch, planned):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    got = []

    def enable(model, **what) -> None:
        got.append(what)
        raise ReachedError

    monkeypatch.setattr(finetune, "enable_graphed_checkpointing", enable)
    step = SimpleNamespace(keep=("experts",), offload=("experts",))
    monkeypatch.setattr(finetune, "check", lambda options: SimpleNamespace(step=step) if planned else None)
    arguments = ["--kernel", str(kernel_dir), "--output", str(tmp_path), "--gradient-checkpointing", "--graphs"]
    arguments += ["--keep", "attention", "experts", "--offload", "attention"]
    with pytest.raises(ReachedError):
        finetune.train(finetune.parse(arguments))
    wanted = (["experts"], ["experts"]) if planned else (["attention", "experts"], ["attention"])
    assert [(list(what["keep"]), list(what["offload"])) for what in got] == [wanted]


def test_graphs_keep_what_is_sure_to_fit_attention_first(whole, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    model = ("--model", str(whole / "small-qwen3-moe"), "--seq-len", "2048", "--graphs")

    def plan(*arguments: str):
        return finetune.check(finetune.parse([*model, *arguments]))

    monkeypatch.setattr("memory.host_has", lambda size: not size)
    both, projections = ("attention", "experts"), ("o_proj", "k_proj", "v_proj", "q_proj")
    choices = [(), ("attention",), both, (*both, *projections)]
    instead = [("k_proj",), ("attention", *projections), (*both, *projections[:3])]  # without what a choice ends with
    peaks = [plan("--gpu-memory", "80", "--keep", *keep).peak / 2**30 for keep in choices]
    assert peaks == sorted(set(peaks))
    for peak, keep, less in zip(peaks[1:], choices[1:], instead):
        assert plan("--gpu-memory", str(peak * 1.0301)).step.keep == keep
        assert plan("--gpu-memory", str(peak * 1.0299)).step.keep == less
        assert plan("--gpu-memory", str(peak * 1.01), "--keep", *keep).step.keep == keep
    with pytest.raises(SystemExit):
        finetune.parse(["--keep", "attention", "--no-graphs"])


@pytest.fixture
def deep(tmp_path, monkeypatch) -> tuple:
    """finetune.py, and what it plans for a model of many layers, of which there is no more than the config."""
    sizes = dict(hidden_size=128, moe_intermediate_size=128, head_dim=32, num_experts=16, num_experts_per_tok=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    Qwen3MoeConfig(vocab_size=512, num_hidden_layers=12, **sizes, **heads).save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    model = ("--model", str(tmp_path), "--seq-len", "2048", "--graphs")
    return finetune, lambda *arguments: finetune.check(finetune.parse([*model, *arguments]))


def test_experts_that_do_not_fit_are_offloaded_if_the_host_has_memory_for_them(deep, monkeypatch):
    finetune, plan = deep
    keeps, both = ("--keep", "attention", "experts"), ("attention", "experts")
    on_gpu = plan("--gpu-memory", "80", *keeps).peak / 2**30
    offloaded = plan("--gpu-memory", "80", *keeps, "--offload", "experts")
    on_host = offloaded.peak / 2**30
    assert on_host * 1.031 < on_gpu * 1.029
    available = 2 * offloaded.host

    def chosen(gib: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        step = plan("--gpu-memory", str(gib)).step
        return step.keep, step.offload

    monkeypatch.setattr("memory.pinnable", lambda: available)
    assert chosen(on_gpu * 1.031) == (both, ())
    assert chosen(on_gpu * 1.029) == ((*both, *PROJECTIONS), ("experts",))
    assert chosen(on_host * 1.031) == (both, ("experts",))
    assert chosen(on_host * 1.029) == (("attention", "k_proj"), ())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert chosen(on_gpu * 1.029) == (("attention", *PROJECTIONS), ())
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    available -= 2
    assert chosen(on_gpu * 1.029) == (("attention", *PROJECTIONS), ())
    with pytest.raises(SystemExit):
        finetune.parse(["--graphs", "--offload", "experts"])


def test_each_projection_is_kept_if_it_fits_o_proj_first(deep):
    """Which takes as much here as q_proj, and more than the other two."""
    _, plan = deep
    first = ("attention", "experts")
    instead = [("k_proj",), ("o_proj", "v_proj"), ("o_proj", "k_proj"), ("o_proj", "k_proj", "v_proj")]
    for count, less in enumerate(instead, 1):
        keep = (*first, *PROJECTIONS[:count])
        peak = plan("--gpu-memory", "80", "--keep", *keep).peak / 2**30
        for share, wanted in ((1.0301, keep), (1.0299, (*first, *less))):
            step = plan("--gpu-memory", str(peak * share)).step
            assert (step.keep, step.offload) == (wanted, ())


def test_of_projections_in_16_bit_nothing_is_kept(deep):
    _, plan = deep
    assert plan("--gpu-memory", "80", "--bits", "16").step.keep == ("attention", "experts")
    kept_and_offloaded = ("--keep", *PROJECTIONS, "--offload", *PROJECTIONS)
    assert plan("--gpu-memory", "80", "--bits", "16", *kept_and_offloaded).host == 0
    assert plan("--gpu-memory", "80", "--bits", "4", *kept_and_offloaded).host > 0
