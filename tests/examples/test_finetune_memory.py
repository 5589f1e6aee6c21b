"""What examples/finetune.py says of a run that does not fit into the GPU, or did not: what takes less, and how much."""

import re
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import Qwen3MoeConfig

from qwen3_moe_integration.plan import Plan
from tests.conftest import ROOT
from tests.examples.runs import ADAPTER
from tests.integration.test_plan import PUBLISHED

GIB = 2**30
LIGER = "pip install liger-kernel"


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    return finetune


@pytest.fixture
def model(tmp_path) -> tuple[str, ...]:
    """The config of Qwen3-30B-A3B, on a GPU of 24 GiB, in graphs."""
    Qwen3MoeConfig(**PUBLISHED | dict(num_hidden_layers=48)).save_pretrained(tmp_path / "model")
    return ("--model", str(tmp_path / "model"), "--output", str(tmp_path), "--graphs", "--gpu-memory", "24")


@pytest.fixture
def gpu(monkeypatch, example):
    """Has the planner, and nothing else, take this machine for one with a GPU and Liger, or without."""

    def stand_in(liger: bool) -> None:
        for module in ("memory", "out_of_memory"):
            monkeypatch.setattr(f"{module}.DEVICE", "cuda")
            monkeypatch.setattr(f"{module}.LIGER", liger)
        monkeypatch.setattr("memory.pinnable", lambda: 2**36)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))

    return stand_in


def planned(example: ModuleType, command: tuple[str, ...], added: str = "") -> Plan:
    """What finetune.py plans for a command with this added."""
    rest = added.removeprefix(LIGER)
    liger = True if rest != added else None
    return example.plan_for(example.parse([*command, *rest.removeprefix(", then ").split()]), liger)


def table(example: ModuleType, command: tuple[str, ...], message: str) -> list[str]:
    """What a message says to add to ``command``, each with what the planner says of that."""
    rows = re.findall(r"^ +([\d.]+) GiB  (.+?)(?:  \(([\d.]+) GiB of the host's\))?$", message, re.M)
    for size, added, host in rows:
        less = planned(example, command, added)
        assert f"{less.peak / GIB:.2f}" == size, added
        assert (f"{less.host / GIB:.2f}" if less.host else "") == host, added
        assert less.peak < planned(example, command).peak, added
    return [added for _, added, _ in rows]


def refused(example: ModuleType, command: tuple[str, ...]) -> list[str]:
    """What makes a run fit that does not."""
    with pytest.raises(SystemExit) as stopped:
        example.check(example.parse([*command]))
    message = str(stopped.value)
    assert message.startswith("The run does not fit: lower --seq-len, --batch-size or --expert-rank.")
    fits = table(example, command, message)
    assert all(planned(example, command, added).fits for added in fits) and ("It fits with" in message) == bool(fits)
    return fits


def test_a_run_that_does_not_fit_is_told_so_before_it_starts(finetune, whole, text, tmp_path):
    arguments = ("--model", whole / "small-qwen3-moe", "--dataset", text, "--output", tmp_path)
    printed = finetune(*arguments, "--gpu-memory", "0.5", code=1)
    assert "4096 tokens per sequence: does not fit in 0.5 GiB." in printed
    assert "The run does not fit: lower --seq-len, --batch-size or --expert-rank." in printed
    assert not list(tmp_path.iterdir())


def test_a_run_is_told_what_makes_it_fit(example, model, gpu, monkeypatch):
    gpu(liger=True)
    experts = (*model, "--keep", "experts")
    offloaded, nothing, no_graphs = "--offload experts", "--keep", "--no-graphs --keep"
    peaks = {each: planned(example, experts, each).peak for each in ("", offloaded, nothing, no_graphs)}
    assert sorted(peaks.values(), reverse=True) == [*peaks.values()]
    shorter, narrower = "--seq-len 2048", "--expert-rank 8"

    def between(more: str, less: str) -> tuple[str, ...]:
        return (*experts, "--gpu-memory", str((peaks[more] + peaks[less]) / 2 / GIB))

    assert refused(example, (*experts, "--gpu-memory", "24")) == [offloaded, nothing, no_graphs, shorter, narrower]
    assert refused(example, between(offloaded, nothing)) == [nothing, no_graphs]
    assert refused(example, between(nothing, no_graphs)) == [no_graphs]
    assert refused(example, (*experts, "--gpu-memory", "16")) == []
    monkeypatch.setattr("out_of_memory.host_has", lambda size: not size)
    assert refused(example, (*experts, "--gpu-memory", "24")) == [nothing, no_graphs, shorter, narrower]
    assert "--batch-size 2" in refused(example, (*experts, "--seq-len", "1024", "--batch-size", "5"))


@pytest.mark.parametrize("trainer", ["trainer", "sft"])
@pytest.mark.parametrize("graphs", ["--graphs", "--no-graphs"])
def test_without_liger_a_run_is_told_to_install_it_if_it_fits_then(example, model, gpu, graphs, trainer):
    """The defaults on a GPU of 24 GiB: the logits of all tokens take 7. TRL has a loss of its own."""
    gpu(liger=False)
    command = (*model, graphs, "--trainer", trainer)
    options = example.parse([*command])
    if trainer == "sft":
        assert example.plan_for(options).fits
    else:
        assert refused(example, command)[0] == LIGER
        assert LIGER not in refused(example, (*command, "--gpu-memory", "20"))
    gpu(liger=True)
    assert example.plan_for(options).fits


def test_on_a_cpu_nobody_is_told_to_install_liger(example, model, monkeypatch):
    monkeypatch.setattr("out_of_memory.DEVICE", "cpu")
    monkeypatch.setattr("memory.LIGER", False)
    assert LIGER not in refused(example, model)


ALL = "--keep attention experts o_proj --offload attention experts o_proj"
PINNED = "--keep attention experts o_proj --offload experts"
"""What the planner chooses for the defaults: without it, it would take the room for more."""


@pytest.mark.parametrize(
    ("chosen", "liger", "less"),
    [
        ("", True, [ALL, "--keep", "--no-graphs", f"--seq-len 2048 {PINNED}", f"--expert-rank 8 {PINNED}"]),
        ("--no-graphs", True, ["--seq-len 2048", "--expert-rank 8"]),
        ("--keep", True, ["--no-graphs", "--seq-len 2048", "--expert-rank 8"]),
        ("--keep --seq-len 2", True, ["--no-graphs", "--expert-rank 8"]),
        ("--keep --expert-rank 0", True, ["--no-graphs", "--seq-len 2048"]),
        (
            "--keep experts --offload experts --batch-size 2 --expert-rank 1",
            True,
            ["--keep --offload", "--no-graphs --keep --offload", "--batch-size 1", "--seq-len 2048", "--expert-rank 0"],
        ),
        ("--no-graphs --seq-len 2048", False, [LIGER, "--seq-len 1024", "--expert-rank 8"]),
        ("--keep attention --seq-len 2048", False, [LIGER, "--offload attention", "--keep", "--no-graphs --keep"]),
        ("--seq-len 2048", False, [f"{LIGER}, then --keep experts k_proj --offload experts"]),
    ],
    ids=str,
)
def test_out_of_memory_says_what_takes_less_and_how_much(example, model, gpu, chosen, liger, less):
    gpu(liger)
    command = (*model, *chosen.split())
    options = example.parse([*command])
    plan = example.check(options)
    message = example.in_training(options, plan)
    assert f"the run was planned to take {plan.peak / GIB:.2f} GiB, less with one of these:\n" in message
    assert table(example, command, message)[: len(less)] == less
    assert message.endswith("No checkpoint is complete yet: start again.")
    for step in (50, 100):
        state = options.output / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"
        state.parent.mkdir(parents=True)
        state.write_text(f'{{"global_step": {step}}}')
    assert "Then --resume: it goes on from step 100, though not with another --expert-rank." in example.in_training(
        options, plan
    )


class Full:
    """A trainer that finds the memory full where a test wants it."""

    def __init__(self, where: str):
        self.where = where
        self.add_callback = lambda callback: None

    def train(self, **_) -> SimpleNamespace:
        return self._result("train")

    def evaluate(self) -> dict:
        return self._result("evaluate")

    def _result(self, name: str) -> dict:
        if name == self.where:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"eval_loss": 1.0}


@pytest.mark.parametrize("where", ["train", "evaluate"])
@pytest.mark.parametrize("memory", [(), ("--gpu-memory", "2")], ids=str)
def test_a_run_that_is_out_of_memory_ends_with_that(
    example, whole, text, kernel_dir, tmp_path, monkeypatch, where, memory
):
    monkeypatch.setattr(example, "make_trainer", lambda *_: Full(where))
    monkeypatch.setattr(example, "cap", lambda gib: None)  # it would last
    model = ("--model", str(whole / "small-qwen3-moe"), "--output", str(tmp_path), "--kernel", str(kernel_dir))
    command = (*model, "--dataset", str(text), *ADAPTER, *memory)
    with pytest.raises(SystemExit) as stopped:
        example.train(example.parse([*command]))
    begin, says = str(stopped.value).split("\nOut of memory: ")
    assert begin.endswith("Tried to allocate 2.00 GiB.") and says.endswith("start again.")
    if memory or torch.cuda.is_available():
        assert any(added.startswith("--seq-len 16") for added in table(example, command, says))
    else:
        assert says.startswith("lower --seq-len, --batch-size or --expert-rank.")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Some issues.")], ids=repr
)
def test_a_model_that_finds_no_room_is_told_apart(example, whole, text, tmp_path, monkeypatch, error):
    """Transformers catches the error and raises one that does not tell; PyTorch has counted it."""
    times = iter([3, 3 + (type(error) is RuntimeError)])
    monkeypatch.setattr("out_of_memory._times_out_of_memory", lambda: next(times))

    def load_base(*_) -> None:
        raise error

    monkeypatch.setattr(example, "load_base", load_base)
    monkeypatch.setattr(example, "cap", lambda gib: None)
    model = ("--model", str(whole / "small-qwen3-moe"), "--output", str(tmp_path), "--dataset", str(text))
    options = example.parse([*model, *ADAPTER, "--bits", "16", "--gpu-memory", "2"])
    parts = example.plan_for(options).parts
    size = f"{(parts['weights'] + parts['adapters']) / GIB:.2f}"
    with pytest.raises(SystemExit) as stopped:
        example.train(options)
    assert str(stopped.value) == (
        f"{error}\nOut of memory while the model was loaded: by the plan it takes {size} of the GPU's 2.00 GiB. "
        "Perhaps another process has some of it. --bits 4 takes less."
    )


def test_another_error_is_left_as_it_is(example):
    for error in (RuntimeError("shapes"), OSError("out of memory")):
        with pytest.raises(type(error), match=str(error)), example.explained(lambda: "!"):
            raise error


CAPPED = """
import sys

import finetune
import memory

finetune.cap = lambda _, gib=float(sys.argv.pop(1)): memory.cap(gib)
finetune.train(finetune.parse(sys.argv[1:]))
"""
"""A GPU that has less than the plan says, as one that another process uses."""


@pytest.mark.gpu
@pytest.mark.parametrize(("room", "where"), [(0.0, "loading"), (0.2, "training")])
def test_a_gpu_that_is_full_ends_a_run_with_what_to_do(example, finetune, whole, tmp_path, room, where):
    """``room`` is GiB beside a context; a step is planned to take more than twice that, the model a tenth."""
    model = ("--model", str(whole / "small-qwen3-moe"), "--output", str(tmp_path), "--seq-len", "32768")
    command = (*model, "--gpu-memory", "8", "--keep", "attention", "experts")
    plan = planned(example, command)
    assert plan.fits and plan.peak / GIB > 0.6 + 2 * 0.2
    script = tmp_path / "capped.py"
    script.write_text(CAPPED)
    printed = finetune(0.6 + room, *command, script=script, code=1)
    assert "Traceback" not in printed
    if where == "loading":
        assert "Out of memory while the model was loaded: by the plan it takes" in printed
    else:
        assert (
            f"Out of memory: the run was planned to take {plan.peak / GIB:.2f} GiB, less with one of these:" in printed
        )
        assert "CUDA out of memory" in printed
        assert {"--keep", "--no-graphs --keep", "--seq-len 16384"} <= {*table(example, command, printed)}
