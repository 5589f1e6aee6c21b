"""Transformers' Trainer under the configs of examples/accelerate: losses and files are those of one process."""

import json
import secrets
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qwen3_moe_integration import kernelize_model
from tests.integration import lora
from tests.integration.distributed import training
from tests.integration.distributed.launch import apply_config
from tests.integration.distributed.ranks import run_on_ranks
from tests.integration.models import tokens
from tests.kernel.oracle import assert_close

BATCH, STEPS = 4, 4
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}
RATIO = 1e-4
"""Rounding differs from run to run, and steps carry it on."""


class Rows(Dataset):
    def __init__(self) -> None:
        self.rows = tokens(3 * BATCH, 6)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def fit(source, checkpoint: Path, kind: str, output: Path, config: str = "", resume: str = "") -> None:
    """Trains with or without a config, from the start or from a checkpoint, and saves the model."""
    as_gpus = apply_config(config) if config else False
    ranks = distributed.get_world_size() if config else 1
    model = training.base_model(kind, source, checkpoint)
    if kind == "4 bit":
        model = get_peft_model(model, lora.config())
    elif resume and config != "fsdp2":
        # Of a checkpoint with an entry an expert the Trainer loads no experts (huggingface/transformers#48805).
        model = kernelize_model(AutoModelForCausalLM.from_pretrained(resume, dtype=torch.float32), kernel=source)
    rows = Rows()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // ranks,
        learning_rate=1e-2,
        adam_epsilon=1e-2,  # so that a rounding error in a gradient next to zero stays one in the step
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=not as_gpus,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume or None)
    assert not config or isinstance(trainer.model_wrapped, WRAPPERS[config])
    trainer.save_model(str(output / "model"))


@pytest.fixture(scope="module", params=["dense", "4 bit"])
def runs(request, server, source, checkpoint, tmp_path_factory):
    """Runs ``fit``, always with the same model and rows: ``runs(name, config, ranks, resume)`` is its folder."""
    seed, folder = secrets.randbelow(2**31), tmp_path_factory.mktemp("runs")
    print(f"torch.manual_seed({seed})")

    def run(name: str, config: str = "", ranks: int = 1, resume: str = "") -> Path:
        if not (folder / name).exists():
            resume = str(folder / resume / f"checkpoint-{STEPS // 2}") if resume else ""
            run_on_ranks(ranks, fit, source, checkpoint, request.param, folder / name, config, resume, seed=seed)
        return folder / name

    return run


def losses(folder: Path) -> torch.Tensor:
    history = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def assert_same_run(want: Path, got: Path) -> None:
    assert len(losses(want)) == STEPS
    assert_close("losses", losses(want), losses(got), RATIO)
    names = [sorted(path.name for path in (folder / "model").iterdir()) for folder in (want, got)]
    assert names[0] == names[1]
    (weights,) = (name for name in names[0] if name.endswith(".safetensors"))
    training.assert_all_close(load_file(want / "model" / weights), load_file(got / "model" / weights), RATIO)


@pytest.mark.parametrize("config", WRAPPERS)
def test_losses_and_files_are_those_of_one_process(runs, config):
    assert_same_run(runs("alone"), runs(config, config, ranks=2))


@pytest.mark.parametrize(("config", "ranks", "before"), [("", 1, "ddp"), ("ddp", 2, "alone"), ("fsdp2", 4, "fsdp2")])
def test_a_run_goes_on_with_another_number_of_ranks(runs, config, ranks, before):
    runs(before, before.removesuffix("alone"), ranks=1 if before == "alone" else 2)
    assert_same_run(runs("alone"), runs(f"{before}, then {ranks} ranks", config, ranks, resume=before))
