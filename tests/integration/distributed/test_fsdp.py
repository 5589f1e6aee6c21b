"""FSDP2 (``fully_shard``): parameters lie in halves, and the kernel reads them gathered, whatever wraps them."""

from contextlib import nullcontext

import pytest
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.integration.distributed import training
from tests.integration.models import ExpertsCalls

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, wrapped: str) -> nn.Module:
    for layer in model.get_decoder().layers:
        if wrapped in ("experts", "both"):
            fully_shard(layer.mlp.experts)
        if wrapped in ("layers", "both"):
            fully_shard(layer)
    return fully_shard(model)


def train(source, kind: str, wrapped: str, checkpointing: bool) -> None:
    alone, model = training.twins(kind, source)
    if checkpointing:
        training.with_checkpointing(model)
    shard(model, wrapped)
    assert sum(isinstance(parameter, DTensor) for parameter in model.parameters()) == len([*alone.parameters()])
    for counted in (True, False):  # the second step reads what the first has changed
        batch, share = training.batch_and_share()
        with ExpertsCalls() if counted else nullcontext() as calls:
            got = training.step(model, share)
        if counted:
            assert (calls.forward, calls.backward) == (4 if checkpointing else 2, 2)
        training.assert_all_close({"loss": training.step(alone, batch)}, {"loss": training.average(got)})
    trained = get_model_state_dict(model, options=FULL)
    if distributed.get_rank() == 0:
        training.assert_all_close(alone.state_dict(), trained)


@pytest.mark.parametrize("kind", training.KINDS)
@pytest.mark.parametrize("wrapped", ["layers", "experts", "both"])
def test_training_is_that_of_one_process(on_two_ranks, source, kind, wrapped):
    on_two_ranks(train, source, kind, wrapped, False)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("wrapped", ["layers", "experts"])
def test_training_with_checkpointing_is_that_of_one_process(on_two_ranks, source, kind, wrapped):
    on_two_ranks(train, source, kind, wrapped, True)
