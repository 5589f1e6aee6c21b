"""Models that Unsloth has loaded, by a stand-in for it: tests/packages/unsloth.py."""

import pytest
import torch

from tests.documents import in_own_process
from tests.integration import unsloth_user
from tests.integration.quantized import SIZES, checkpoint


@pytest.fixture
def run(tmp_path):
    def run(function, *arguments, **sizes):
        checkpoint(tmp_path / "model", **SIZES, **sizes)
        in_own_process(function, tmp_path / "model", *arguments, folder=tmp_path, environment={})

    return run


@pytest.mark.compat
@pytest.mark.parametrize("imported", ["before", "after"])
def test_one_call_and_it_trains_as_on_unsloths_own_experts(run, kernel_dir, imported):
    run(unsloth_user.train_as_unsloth_does, kernel_dir, torch.float32, imported)


def test_adapters_in_fp32_train_on_a_model_in_bf16(run, kernel_dir):
    """Every token takes all experts: a rounding cannot send it to another."""
    run(unsloth_user.train_as_unsloth_does, kernel_dir, torch.bfloat16, "before", num_experts_per_tok=8)


def test_compiled_layers_have_the_kernel_in_their_graph(run, kernel_dir):
    run(unsloth_user.compile_its_layers, kernel_dir)


@pytest.mark.compat
def test_a_model_kernelized_before_it_has_adapters_trains(run, kernel_dir):
    run(unsloth_user.kernelize_before_adapters, kernel_dir)


def test_what_is_no_stack_of_experts_is_refused_and_nothing_is_changed(run, kernel_dir):
    run(unsloth_user.refuse_what_is_no_stack, kernel_dir)


def test_without_the_call_its_experts_say_what_to_call(run):
    run(unsloth_user.refuse_to_run_without_the_kernel)
