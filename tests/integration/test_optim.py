"""The 8-bit Adam that does not wait is bitsandbytes' own in all but that and its kernel: see test_adam_kernel.py."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")

from qwen3_moe_integration import optim  # noqa: E402
from qwen3_moe_integration.optim import AdamW8bit  # noqa: E402

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """One large enough for states in 8 bit; one that is not; one that never has a gradient."""
    return [torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype)) for size in ((96, 70), (3, 5), (4,))]


def groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    """With settings of their own, as the Trainer's are."""
    return [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0, "lr": 3e-2}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_kernel_parameters_and_states_are_bitsandbytes_own_to_the_last_bit(device, dtype, monkeypatch):
    monkeypatch.setattr(optim, "DEVICES", ())
    ours = parameters(device, dtype)
    theirs = copy.deepcopy(ours)
    kinds = AdamW8bit, bitsandbytes.optim.AdamW8bit
    optimizers = [kind(groups(each), **SETTINGS) for kind, each in zip(kinds, (ours, theirs))]
    for _ in range(5):
        for a, b in zip(ours[:2], theirs[:2]):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
        ours_kept, theirs_kept = (optimizer.state[p] for optimizer, p in zip(optimizers, (a, b)))
        assert ours_kept.keys() == theirs_kept.keys()
        assert all(torch.equal(torch.as_tensor(ours_kept[k]), torch.as_tensor(theirs_kept[k])) for k in ours_kept)
    assert optimizers[0].state[ours[0]]["state1"].dtype == torch.uint8


def test_without_the_kernel_it_goes_on_from_a_state_that_bitsandbytes_saved(device, monkeypatch):
    monkeypatch.setattr(optim, "DEVICES", ())
    ours = parameters(device, torch.float32)
    theirs = copy.deepcopy(ours)
    kept = bitsandbytes.optim.AdamW8bit(theirs, **SETTINGS)
    for optimizer, group in ((kept, theirs), (AdamW8bit(ours, **SETTINGS), ours)):
        for i, parameter in enumerate(group[:2]):
            parameter.grad = torch.full_like(parameter, 0.1 + i)
        optimizer.step()
    again = AdamW8bit(ours, **SETTINGS)
    again.load_state_dict(copy.deepcopy(kept.state_dict()))
    for optimizer in (kept, again):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_what_bitsandbytes_is_told_of_one_weight_holds(device, monkeypatch):
    module = torch.nn.Sequential(*(torch.nn.Linear(96, 70, bias=False, device=device) for _ in range(2)))
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for name in ("pid2config", "index2config"):
        monkeypatch.setattr(manager, name, {})
    monkeypatch.setattr(manager, "module_weight_config_triple", [(module[1], "weight", {"optim_bits": 32})])
    optimizer = AdamW8bit(module.parameters(), **SETTINGS)
    for each in module:
        each.weight.grad = torch.randn_like(each.weight)
    optimizer.step()
    assert [optimizer.state[each.weight]["state1"].dtype for each in module] == [torch.uint8, torch.float32]


def test_it_waits_for_paged_states_alone(device):
    (parameter, *_) = parameters(device, torch.float32)
    parameter.grad = torch.randn_like(parameter)
    with mock.patch("bitsandbytes.optim.optimizer.sync_gpu") as waits:
        bitsandbytes.optim.AdamW8bit([parameter]).step()
        assert waits.call_count == 1
        optimizer = AdamW8bit([parameter])
        optimizer.step()
        assert waits.call_count == 1
        with mock.patch.object(bitsandbytes.optim.AdamW8bit, "step", return_value="theirs"):
            optimizer.is_paged = True
            assert optimizer.step() == "theirs"


def test_a_closure_gives_the_loss_and_the_gradients(device):
    (parameter, *_) = parameters(device, torch.float32)
    before = parameter.detach().clone()

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = AdamW8bit([parameter], lr=1e-2).step(closure)
    assert torch.allclose(loss, before.square().sum()) and not torch.equal(parameter, before)


def test_the_kernel_holds_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("test_adam_kernel.py")), "-m", "not gpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
