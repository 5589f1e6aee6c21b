"""DeepSpeed's ZeRO-2 and ZeRO-3, where it is installed: it gathers what the kernelized forward reads."""

import os

import pytest

from tests.integration.distributed import training
from tests.integration.models import ExpertsCalls

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
}
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}


def train(source, checkpoint, kind: str, stage: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch

    alone, model = training.twins(kind, source, checkpoint)
    deepspeed.init_distributed("gloo")
    zero = PARTITIONED if stage == 3 else {"stage": stage}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[*training.trained(model).values()], config=CONFIG | {"zero_optimization": zero}
    )
    assert all(parameter.numel() == 0 for parameter in model.parameters()) == (stage == 3)
    optimizer = torch.optim.AdamW(training.trained(alone).values(), lr=1e-2, eps=1e-2, weight_decay=0)
    for _ in range(3):
        batch, share = training.batch_and_share()
        with ExpertsCalls() as calls:
            got = training.loss(engine, share)
            engine.backward(got)
        engine.step()
        assert (calls.forward, calls.backward) == (2, 2)
        optimizer.zero_grad()
        want = training.loss(alone, batch)
        want.backward()
        optimizer.step()
        training.assert_all_close({"loss": want}, {"loss": training.average(got.detach())}, 1e-4)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("stage", [2, 3])
def test_training_is_that_of_one_process(on_two_ranks, source, checkpoint, kind, stage):
    pytest.importorskip("deepspeed")
    on_two_ranks(train, source, checkpoint, kind, stage)
