"""Data parallelism (DDP): two ranks with half a batch each train as one process does with one half after the other,
which rounds alike: products of another height would not."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.integration.distributed import training
from tests.integration.models import ExpertsCalls

SHORT = 3
"""Tokens a rank: at two experts each, at least two of the eight experts get none there."""


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in training.trained(model).items()}


def train(source, checkpoint, kind: str, checkpointing: bool, micro_batches: int, device: str = "cpu") -> None:
    alone, model = (each.to(device) for each in training.twins(kind, source, checkpoint))
    if checkpointing:
        training.with_checkpointing(model)
    parallel = DistributedDataParallel(model)
    for counted in (True, False):  # DDP notices a parameter that got no gradient when the next step begins
        alone.zero_grad()
        model.zero_grad()
        with ExpertsCalls() if counted else nullcontext() as calls:
            for last in [False] * (micro_batches - 1) + [True]:
                batch, share = training.batch_and_share(2, SHORT, device)
                with nullcontext() if last else parallel.no_sync():
                    (training.loss(parallel, share) / micro_batches).backward()
                for each in training.shares(batch):
                    (training.loss(alone, each) / 2 / micro_batches).backward()
        if counted:
            assert calls.backward == 2 * 3 * micro_batches
        training.assert_all_close(gradients(alone), gradients(model))


@pytest.mark.parametrize("kind", training.KINDS)
@pytest.mark.parametrize(
    ("checkpointing", "micro_batches"), [(False, 1), (False, 2), (True, 2)], ids=["plain", "no_sync", "checkpointing"]
)
def test_gradients_are_those_of_one_process_on_both_halves(
    on_two_ranks, source, checkpoint, kind, checkpointing, micro_batches
):
    on_two_ranks(train, source, checkpoint, kind, checkpointing, micro_batches)


@pytest.mark.gpu
def test_gradients_are_those_of_one_process_on_two_gpus(on_two_gpus, source, checkpoint):
    on_two_gpus(train, source, checkpoint, "4 bit", True, 2)
