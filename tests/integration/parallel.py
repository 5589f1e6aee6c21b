"""A program for test_parallel.py, which runs it on two ranks: python -m torch.distributed.run ... CHECKPOINT KERNEL."""

import sys

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qwen3_moe_integration import KernelSource, register
from tests.integration.models import ExpertsCalls, assert_same_training

PLANS = {
    "tensor parallel": {"tp_plan": "auto"},
    "expert parallel": {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)},
}


def main(checkpoint: str, kernel: str) -> None:
    register(KernelSource(path=kernel))
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    for name, plan in PLANS.items():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="qwen3_moe_fused", **plan)
        assert hasattr(model.model.layers[0].mlp.experts.gate_up_proj, "full_tensor"), "the experts are not sharded"
        torch.manual_seed(0)  # the same tokens on both ranks
        with ExpertsCalls() as calls:
            assert_same_training(model, stock)
        assert (calls.forward, calls.backward) == (2, 2)
        print(f"rank {distributed.get_rank()}: {name} as stock", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
