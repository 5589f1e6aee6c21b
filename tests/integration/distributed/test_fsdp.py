"""FSDP2 (``fully_shard``): parameters lie in halves, and the kernel reads them gathered, whatever wraps them."""

from contextlib import nullcontext

import pytest
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeExperts

from tests.integration.distributed import training
from tests.integration.models import ExpertsCalls

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
WRAPPED = {
    "layers": (Qwen3MoeDecoderLayer,),
    "experts": (Qwen3MoeExperts,),  # without the adapters around them
    "both": (Qwen3MoeExperts, Qwen3MoeDecoderLayer),
}


def shard(model: nn.Module, wrapped: str) -> nn.Module:
    for kind in WRAPPED[wrapped]:
        for module in [*model.modules()]:
            if isinstance(module, kind):
                fully_shard(module)
    return fully_shard(model)


def train(source, checkpoint, kind: str, wrapped: str, checkpointing: bool) -> None:
    alone, model = training.twins(kind, source, checkpoint)
    if checkpointing:
        training.with_checkpointing(model)
    shard(model, wrapped)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for counted in (True, False):  # the second step reads what the first has changed
        batch, share = training.batch_and_share()
        with ExpertsCalls() if counted else nullcontext() as calls:
            got = training.step(model, share)
        if counted:
            assert (calls.forward, calls.backward) == (4 if checkpointing else 2, 2)
        training.assert_all_close({"loss": training.step(alone, batch)}, {"loss": training.average(got)})
    whole = get_model_state_dict(model, options=FULL)
    if distributed.get_rank() == 0:
        want = training.trained(alone)
        training.assert_all_close(want, {name: whole[name] for name in want})


@pytest.mark.parametrize("kind", training.KINDS)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_training_is_that_of_one_process(on_two_ranks, source, checkpoint, kind, wrapped):
    on_two_ranks(train, source, checkpoint, kind, wrapped, False)


@pytest.mark.parametrize("kind", ["dense", "4 bit"])
@pytest.mark.parametrize("wrapped", ["layers", "experts"])
def test_training_with_checkpointing_is_that_of_one_process(on_two_ranks, source, checkpoint, kind, wrapped):
    on_two_ranks(train, source, checkpoint, kind, wrapped, True)
