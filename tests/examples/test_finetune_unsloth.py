"""examples/finetune_unsloth.py as a user runs it, with a stand-in for Unsloth."""

import json
import os
import re
import subprocess
from typing import Any

import torch
from safetensors.torch import load_file

from tests import programs
from tests.documents import PACKAGES, ROOT, in_own_process
from tests.integration.unsloth_user import finetune_without_a_kernel


def finetune(*arguments, unsloth: bool = True, **settings: Any) -> subprocess.CompletedProcess:
    paths = [ROOT / "integration", os.environ.get("PYTHONPATH", ""), *([PACKAGES] if unsloth else [])]
    variables = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    return programs.run(ROOT / "examples/finetune_unsloth.py", *arguments, variables=variables, **settings)


def test_the_loss_falls_and_every_adapter_of_the_experts_is_saved(kernel_dir, tmp_path):
    text = tmp_path / "notes.jsonl"
    text.write_text(
        json.dumps({"text": "A grouped product multiplies every row by the matrix of its own expert. " * 80})
    )
    sizes = ["--steps", 20, "--seq-len", 32, "--batch-size", 2, "--rank", 2]
    ran = finetune("--dataset", text, "--output", tmp_path / "out", "--kernel", kernel_dir, *sizes)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first, last = (float(re.search(rf"loss, {word} five steps +(\S+)", ran.stdout)[1]) for word in ("first", "last"))
    assert last < first - 0.5
    adapter = load_file(tmp_path / "out/model/adapter_model.safetensors")
    trained = [factor for name, factor in adapter.items() if "experts" in name and "lora_B" in name]
    assert len(trained) == 3 * 2 and all(factor.any() and factor.isfinite().all() for factor in trained)
    assert {factor.dtype for factor in trained} == {torch.float32}


def test_without_a_kernel_it_says_how_to_build_one(tmp_path):
    in_own_process(finetune_without_a_kernel, tmp_path, folder=tmp_path, environment={})


def test_without_unsloth_it_says_what_to_install():
    ran = finetune(unsloth=False, fresh=True)
    assert ran.returncode == 1 and ran.stderr.startswith("Unsloth is not installed.")
    assert "pip install unsloth" in ran.stderr
