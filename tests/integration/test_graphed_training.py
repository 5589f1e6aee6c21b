"""Checkpointing by CUDA graphs in what trains a model: PEFT's switches, preparations for 4 bit, Trainer, its files."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from qwen3_moe_integration import enable_graphed_checkpointing, graphed, kernelize_model
from qwen3_moe_integration.kept import KEEPABLE
from tests.integration import graphs
from tests.integration.graphs import assert_same_steps, kept, recordings
from tests.integration.lora import config, pair
from tests.integration.models import QWEN3, tokens
from tests.integration.quantized import NESTED, SIZES, checkpoint, load

USUAL = {"use_reentrant": False}


@pytest.fixture(autouse=True)
def in_graphs(monkeypatch):
    graphs.stand_in(monkeypatch.setattr)
    graphed._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* without CUDA graphs")
        yield


def checkpointed_twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """One in graphs and one as usual."""
    usual = copy.deepcopy(model)
    usual.gradient_checkpointing_enable(gradient_checkpointing_kwargs=USUAL)
    return enable_graphed_checkpointing(model), usual


def test_each_choice_of_adapters_has_graphs_of_its_own(source):
    model, _ = pair(source, config(), config(r=2))
    twins, batches = checkpointed_twins(model), [tokens() for _ in range(3)]
    for number, names in enumerate(("first", "second", ["first", "second"]), 1):
        for each in twins:
            each.base_model.set_adapter(names)
        assert_same_steps(*twins, batches)
        assert recordings(model) == 2 * number
    for each in twins:
        each.delete_adapter("second")
        each.set_adapter("first")
    assert_same_steps(*twins, batches)


def test_merged_adapters_are_not_added_twice(source):
    """They are merged into the weights where those lie, and PEFT's list of them is the same list."""
    twins, batch = checkpointed_twins(pair(source, config())[0]), tokens()
    assert_same_steps(*twins, [batch] * 3)
    (recorder,) = graphs.made
    replayed = recorder.replayed
    for each in twins:
        each.merge_adapter()
    assert torch.equal(*[each(input_ids=batch, labels=batch).loss for each in twins])
    assert recorder.replayed == replayed, "what was recorded adds the adapters"
    for each in twins:
        each.unmerge_adapter()
    assert_same_steps(*twins, [batch] * 3)


def test_what_peft_prepares_for_4_bit_trains_the_same(registered, tmp_path):
    checkpoint(tmp_path, **SIZES)
    model = prepare_model_for_kbit_training(load(tmp_path, NESTED), gradient_checkpointing_kwargs=USUAL)
    twins = checkpointed_twins(get_peft_model(model, config()).train())
    assert_same_steps(*twins, [tokens() for _ in range(4)], autocast=torch.bfloat16)
    assert recordings(twins[0]) == 2


def test_transformers_own_mixin_trains_the_same(registered, tmp_path):
    checkpoint(tmp_path, **SIZES)
    model = load(tmp_path, NESTED)
    model.add_adapter(config())
    twins = checkpointed_twins(model.train())
    assert_same_steps(*twins, [tokens() for _ in range(4)])
    assert recordings(model) == 2


def test_out_of_memory_while_recording_is_out_of_memory(source, monkeypatch):
    """As what it is, not as a layer that graphs cannot hold: programs lower a length then, and go on."""
    twins, batch = checkpointed_twins(pair(source, config())[0]), tokens()
    for each in twins:
        each(input_ids=batch, labels=batch).loss.backward()

    def fails(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        patch.setattr(graphed.Device, "record", fails)
        twins[0](input_ids=batch, labels=batch)
    for each in twins:
        each.zero_grad()
    assert_same_steps(*twins, [batch] * 3)


class Rows(Dataset):
    def __init__(self):
        self.rows = tokens(16, 10)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return {"input_ids": self.rows[at], "labels": self.rows[at]}


@pytest.mark.parametrize("keep", [(), KEEPABLE])
def test_a_trainer_accumulates_evaluates_saves_and_resumes_the_same(source, tmp_path, keep):
    base, rows = QWEN3.build(), Rows()

    def run(name: str, resume: str | None = None) -> tuple[list, Trainer]:
        set_seed(3)
        model = get_peft_model(copy.deepcopy(base), config(init_lora_weights=True))
        kernelize_model(model, kernel=source)
        if name == "graphs":
            enable_graphed_checkpointing(model, keep=keep)
        arguments = TrainingArguments(
            tmp_path / name, max_steps=6, save_steps=3, eval_strategy="steps", eval_steps=3, learning_rate=3e-2,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, use_cpu=True,
            dataloader_pin_memory=False, report_to="none", disable_tqdm=True, eval_on_start=resume is None,
            gradient_checkpointing=name == "usual", gradient_checkpointing_kwargs=USUAL, load_best_model_at_end=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        set_seed(4)
        trainer.train(resume_from_checkpoint=resume)
        kinds = ("loss", "eval_loss", "grad_norm")
        return [(e["step"], k, e[k]) for e in trainer.state.log_history for k in kinds if k in e], trainer

    (want, usual), (got, trainer) = run("usual"), run("graphs")
    assert got == want and recordings(trainer.model) == 2
    assert all(map(bool, kept(trainer.model))) == bool(keep)
    evaluated = [value for _, kind, value in want if kind == "eval_loss"]
    assert evaluated[-1] < evaluated[0]
    again, resumed = run("graphs", resume=str(tmp_path / "graphs" / "checkpoint-3"))
    assert again == want and recordings(resumed.model) == 2
    for (name, parameter), *others in zip(
        usual.model.named_parameters(), trainer.model.parameters(), resumed.model.parameters()
    ):
        assert all(torch.equal(parameter, other) for other in others), name
