"""Parts of finetune.py, called alone: what is held out, what saving leaves when it fails, the adapters' dtype, and what
the Trainer reads of a step's tensors."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qwen3_moe_integration import KernelSource
from tests.conftest import ROOT
from tests.host_syncs import host_syncs
from tests.integration.graphs import recordings, stand_in
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3


@pytest.fixture
def finetune(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune

    return finetune


class Letters:
    """A tokenizer that knows small letters."""

    eos_token_id = 0

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) - ord("`") for letter in text])


def test_documents_are_packed_end_to_end_and_every_twentieth_sequence_is_held_out(finetune):
    documents = ["abcde", "fg", "a" * 130]
    train, held_out = (rows["input_ids"] for rows in finetune.pack(documents, Letters(), 3))
    assert held_out[0] == [1, 2, 3] and train[:2] == [[4, 5, 0], [6, 7, 0]]
    assert (len(train), len(held_out)) == (43, 3)  # 140 tokens: 46 sequences, and two tokens that make none


def test_a_model_is_replaced_by_a_complete_one_alone(finetune, tmp_path):
    """The disk is full when half of the new one is written."""
    folder = tmp_path / "model"

    def save_model(to: str, text: str, fails: bool) -> None:
        Path(to).mkdir()
        (Path(to) / "weights").write_text(text)
        if fails:
            raise OSError(28, "No space left on device")

    def save(text: str, fails: bool) -> None:
        finetune.save(SimpleNamespace(save_model=lambda to: save_model(to, text, fails)), folder)

    save("first", fails=False)
    with pytest.raises(OSError, match="No space left"):
        save("half of", fails=True)
    assert (folder / "weights").read_text() == "first"
    save("second", fails=False)
    assert (folder / "weights").read_text() == "second" and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(("of_yours", "dtype"), [(["--model", "any"], torch.bfloat16), ([], torch.float32)], ids=str)
def test_adapters_of_a_model_of_yours_have_its_dtype(finetune, of_yours, dtype):
    options = finetune.parse([*of_yours, "--bits", "16", "--rank", "3", "--expert-rank", "2"])
    model = finetune.with_adapter(QWEN3.build().bfloat16(), options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {dtype}
    assert trained["base_model.model.model.layers.1.self_attn.o_proj.lora_A.default.weight"].shape[0] == 3
    assert any("experts" in name for name in trained)


@pytest.mark.parametrize("resumes", [False, True], ids=["the best", "to resume"])
@pytest.mark.parametrize("of_yours", [["--model", "any"], []], ids=["of yours", "small"])
def test_an_adapter_is_loaded_by_way_of_the_host_to_where_it_is(finetune, tmp_path, monkeypatch, of_yours, resumes):
    """Of Qwen3-30B-A3B it is 1.2 GiB, which a GPU of 24 has not left after a step. PEFT would take the GPU's, and twice
    as much in the end, since it makes adapters fp32."""
    options = finetune.parse([*of_yours, "--bits", "16", "--rank", "2"])
    model = finetune.with_adapter(QWEN3.build().bfloat16(), options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    saved = {name: (parameter.clone(), parameter.data_ptr()) for name, parameter in trained.items()}
    model.save_pretrained(tmp_path)
    for parameter in trained.values():
        torch.nn.init.zeros_(parameter)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "a GPU without room")
    model.load_adapter(str(tmp_path), "default", **({"is_trainable": True} if resumes else {}))  # as the Trainer does
    loaded = dict(model.named_parameters())
    for name, (values, address) in saved.items():
        assert torch.equal(loaded[name], values) and loaded[name].dtype == values.dtype
        assert loaded[name] is trained[name] and loaded[name].data_ptr() == address, "which an optimizer may have"


@pytest.mark.parametrize("graphs", [False, True])
def test_the_trainer_asks_no_step_for_its_values(finetune, kernel_dir, tmp_path, monkeypatch, graphs):
    """On a GPU each answer has to be waited for. Between two entries of the log there is no need. Without graphs
    Transformers asks a question of its own, whether sequences are packed."""
    options = finetune.parse(["--output", str(tmp_path), "--bits", "16", "--steps", "20"])
    rows = finetune.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 80, "labels": [[1, 2, 3]] * 80})
    model = pair(KernelSource(path=kernel_dir), config())[0]
    if graphs:
        stand_in(monkeypatch.setattr)
        finetune.enable_graphed_checkpointing(model)
    trainer = finetune.make_trainer(options, model, None, rows, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.get_batch_samples(iter([batch]), 1, "cpu") == ([batch], None), "to count it, a number is copied"
    files, steps = host_syncs(monkeypatch), []
    monkeypatch.setattr(trainer, "_maybe_log_save_evaluate", lambda *args, **kwargs: steps.append(len(files)))
    trainer.args.max_steps, trainer.args.eval_on_start = 5, False
    trainer.train()
    assert len(steps) == 6 and (not graphs or recordings(model) == 2)  # after each step, and at the end
    assert set(files[steps[1] : steps[4]]) == (set() if graphs else {"masking_utils.py"})


class Writer:
    """In the place of tensorboardX's."""

    scalars: list[tuple[str, float, int]]

    def __init__(self, log_dir: str):
        self.scalars.append(("folder", log_dir, 0))

    def add_scalar(self, *scalar) -> None:
        self.scalars.append(scalar)

    def add_text(self, *_) -> None:
        pass

    flush = close = lambda self: None


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="the Trainer would take that instead of the stand-in")
@pytest.mark.parametrize("tracker", ["tensorboard", "none"])
def test_a_tracker_gets_the_losses_if_one_is_named(finetune, kernel_dir, tmp_path, monkeypatch, tracker):
    module = ModuleType("tensorboardX")
    module.__spec__, module.SummaryWriter = ModuleSpec("tensorboardX", None), Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    Writer.scalars = []
    arguments = ["--output", str(tmp_path), "--bits", "16", "--steps", "2", "--save-every", "2"]
    options = finetune.parse(arguments + ["--report-to", tracker] * (tracker != "none"))
    rows = finetune.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 16, "labels": [[1, 2, 3]] * 16})
    trainer = finetune.make_trainer(options, pair(KernelSource(path=kernel_dir), config())[0], None, rows, rows)
    trainer.train()
    losses = [
        (f"{'eval/' if kind == 'eval_loss' else 'train/'}loss", entry[kind], entry["step"])
        for entry in trainer.state.log_history
        for kind in ("loss", "eval_loss")
        if kind in entry
    ]
    assert len(losses) == 4
    if tracker == "none":
        assert not Writer.scalars
    else:
        assert [scalar for scalar in Writer.scalars if scalar[0].endswith("/loss")] == losses
        assert Writer.scalars[0][1].startswith(str(tmp_path))


def test_what_a_run_may_take_is_set_before_it_loads_anything(finetune, monkeypatch):
    """12 GiB of a card with 48, less the 0.6 of a context."""
    fractions, loads = [], pytest.raises(RuntimeError, match="loads")
    monkeypatch.setattr(finetune, "ON_GPU", True)
    monkeypatch.setattr(finetune, "check", lambda options: None)
    monkeypatch.setattr(finetune, "PartialState", lambda cpu: SimpleNamespace())
    monkeypatch.setattr(finetune, "read_texts", lambda *_: [])

    def load_base(*_) -> None:
        raise RuntimeError("loads")

    monkeypatch.setattr(finetune, "load_base", load_base)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=48 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    for memory in ("12", "96"):
        with loads:
            finetune.train(finetune.parse(["--model", "any", "--gpu-memory", memory]))
    with loads:
        finetune.train(finetune.parse(["--model", "any"]))
    assert fractions == pytest.approx([(12 - 0.6) / 48, 1.0])


@pytest.mark.gpu
def test_a_run_gets_no_more_of_the_gpu_than_it_may(finetune):
    """1 GiB beside what this process has, and the 0.6 of a context."""
    torch.cuda.empty_cache()
    try:
        finetune.cap(torch.cuda.memory_reserved() / 2**30 + 1.6)
        torch.empty(2**29, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * 2**29, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
