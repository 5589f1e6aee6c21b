"""expert_weights and unsupported_reason: which experts modules qualify, and what is read from them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .modules import Experts
from .problems import Problem


class GELUActivation(nn.Module):
    """Stands for Transformers' class of this name."""


class GELUTanh(GELUActivation):
    """Stands for Transformers' class of this name."""


class SiLUActivation(nn.SiLU):
    """Stands for Transformers' class of this name."""


@pytest.fixture
def experts() -> Experts:
    return Experts(Problem().draw("cpu", torch.float32))


def test_the_weights_of_an_experts_module_are_its_own_tensors(kernel, experts):
    weights = kernel.expert_weights(experts)
    assert weights.gate_up_proj is experts.gate_up_proj and weights.down_proj is experts.down_proj
    assert kernel.unsupported_reason(experts) is None


@pytest.mark.parametrize(
    ("act_fn", "name"),
    [
        (nn.SiLU(), "silu"),
        (F.silu, "silu"),
        (SiLUActivation(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (GELUActivation(), "gelu"),
        (GELUTanh(), "gelu_tanh"),
    ],
)
def test_the_activation_is_known_by_its_class_or_function(kernel, experts, act_fn, name):
    del experts.act_fn  # a function cannot take a module's place
    experts.act_fn = act_fn
    assert kernel.expert_weights(experts).activation == name


def test_transposed_storage_is_read_as_a_view(kernel, experts):
    stored = Experts(Problem().draw("cpu", torch.float32))
    for name in ("gate_up_proj", "down_proj"):
        setattr(stored, name, nn.Parameter(getattr(experts, name).detach().transpose(1, 2).contiguous()))
    stored.is_transposed = True
    weights = kernel.expert_weights(stored)
    assert torch.equal(weights.gate_up_proj, experts.gate_up_proj) and torch.equal(weights.down_proj, experts.down_proj)
    assert weights.gate_up_proj.data_ptr() == stored.gate_up_proj.data_ptr()
    assert weights.down_proj.data_ptr() == stored.down_proj.data_ptr()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gate_up_proj": None}, "gate_up_proj"),
        ({"down_proj": nn.Parameter(torch.zeros(96, 1))}, "down_proj"),
        ({"has_bias": True}, "biases"),
        ({"has_gate": False}, "no gate"),
        ({"is_concatenated": False}, "interleaved"),
        ({"has_post_expert_norm": True}, "normalises"),
        ({"act_fn": nn.ReLU()}, "ReLU"),
        ({"act_fn": None}, "activation"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_an_unsupported_module_says_why(kernel, experts, change, reason):
    for name, value in change.items():
        setattr(experts, name, value)
    assert reason in kernel.unsupported_reason(experts)
    with pytest.raises(ValueError, match=f"Experts cannot run as fused_experts: .*{reason}"):
        kernel.expert_weights(experts)


def test_weights_that_deepspeed_has_partitioned_are_refused_by_name(kernel, experts):
    experts.down_proj = nn.Parameter(torch.empty(0))
    experts.down_proj.ds_id = 7
    reason = "its down_proj is partitioned by DeepSpeed and not gathered"
    assert kernel.unsupported_reason(experts) == reason
    with pytest.raises(ValueError, match=reason):
        kernel.expert_weights(experts)


def test_weights_that_a_call_will_gather_are_taken_for_whole_until_they_are_read(kernel, experts):
    experts.down_proj.device_mesh = object()
    reason = r"its down_proj is sharded \(a Parameter\)"
    assert kernel.unsupported_reason(experts, call_gathers=True) is None
    assert kernel.unsupported_reason(experts) == reason.replace("\\", "")
    with pytest.raises(ValueError, match=reason):
        kernel.expert_weights(experts)


def test_a_module_that_is_no_experts_module_says_why(kernel):
    assert "gate_up_proj" in kernel.unsupported_reason(nn.Linear(2, 2))
