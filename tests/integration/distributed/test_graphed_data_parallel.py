"""Data parallelism over layers in CUDA graphs: DDP's hooks are on parameters, and no graph passes one over."""

from contextlib import nullcontext

import pytest
from torch.nn.parallel import DistributedDataParallel

from qwen3_moe_integration import enable_graphed_checkpointing
from qwen3_moe_integration.kept import KEEPABLE
from tests.integration import graphs
from tests.integration.distributed import training

STEPS, SHORT = 3, 3
"""The first step is not in graphs yet. Of so few tokens a rank's some experts get none."""


def train(source, checkpoint, kind: str, micro_batches: int, keep: tuple[str, ...]) -> None:
    graphs.stand_in()
    graphs.empty_places()
    alone, model = training.twins(kind, source, checkpoint)
    enable_graphed_checkpointing(model, keep=keep, offload=keep)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(STEPS):
        alone.zero_grad()
        parallel.zero_grad()
        for last in [False] * (micro_batches - 1) + [True]:
            batch, share = training.batch_and_share(2, SHORT)
            with nullcontext() if last else parallel.no_sync():
                (training.loss(parallel, share) / micro_batches).backward()
            for each in batch.split(1):  # not at once: gradients that nearly cancel would show how sums are rounded
                (training.loss(alone, each) / len(batch) / micro_batches).backward()
        want, got = (
            {name: parameter.grad for name, parameter in training.trained(each).items()} for each in (alone, model)
        )
        training.assert_all_close(want, got)
    (recorder,) = graphs.made
    layers, in_graphs = 2, STEPS * micro_batches - 1
    assert (recorder.recorded, recorder.replayed) == (2 * layers, 2 * layers * in_graphs)


@pytest.mark.parametrize("kind", training.KINDS)
@pytest.mark.parametrize(
    ("micro_batches", "keep"), [(1, ()), (2, ()), (2, KEEPABLE)], ids=["plain", "no_sync", "offloaded"]
)
def test_gradients_are_those_of_one_process_on_all_batches(on_two_ranks, source, checkpoint, kind, micro_batches, keep):
    on_two_ranks(train, source, checkpoint, kind, micro_batches, keep)
