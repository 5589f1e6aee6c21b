"""FSDP2 (``fully_shard``): parameters lie in halves, and the kernel reads them gathered, whatever wraps them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Optional

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeExperts

from qwen3_moe_integration import enable_fused_linear_lora, enable_graphed_checkpointing, lora_linear
from tests.integration import graphs
from tests.integration.distributed import training
from tests.integration.models import ExpertsCalls

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
WRAPPED = {
    "layers": (Qwen3MoeDecoderLayer,),
    "experts": (Qwen3MoeExperts,),  # without the adapters around them
    "both": (Qwen3MoeExperts, Qwen3MoeDecoderLayer),
}


def shard(model: nn.Module, wrapped: str, **settings: Any) -> nn.Module:
    for kind in WRAPPED[wrapped]:
        for module in [*model.modules()]:
            if isinstance(module, kind):
                fully_shard(module, **settings)
    return fully_shard(model, **settings)


def train(
    source, checkpoint, kind: str, wrapped: str, checkpointing: Optional[Callable] = None, device: str = "cpu"
) -> None:
    alone, model = (each.to(device) for each in training.twins(kind, source, checkpoint))
    if checkpointing:
        checkpointing(model)
    shard(model, wrapped)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for counted in (True, False):  # the second step reads what the first has changed
        batch, share = training.batch_and_share(device=device)
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
    on_two_ranks(train, source, checkpoint, kind, wrapped)


@pytest.mark.parametrize("kind", ["dense", "4 bit"])
@pytest.mark.parametrize("wrapped", ["layers", "experts"])
def test_training_with_checkpointing_is_that_of_one_process(on_two_ranks, source, checkpoint, kind, wrapped):
    on_two_ranks(train, source, checkpoint, kind, wrapped, training.with_checkpointing)


@pytest.mark.gpu
def test_training_is_that_of_one_process_on_two_gpus(on_two_gpus, source, checkpoint):
    on_two_gpus(train, source, checkpoint, "4 bit", "layers", training.with_checkpointing)


def in_graphs(model: nn.Module) -> None:
    """None is recorded: what is in halves has hooks."""
    graphs.stand_in()
    enable_graphed_checkpointing(model)


@pytest.mark.parametrize("kind", ["dense", "4 bit"])
@pytest.mark.parametrize("wrapped", ["layers", "experts"])
def test_layers_that_were_to_run_in_graphs_are_checkpointed_as_usual(on_two_ranks, source, checkpoint, kind, wrapped):
    on_two_ranks(train, source, checkpoint, kind, wrapped, in_graphs)


def train_fused(source, checkpoint, wrapped: str) -> None:
    calls, forward = [], lora_linear._AddLora.forward
    lora_linear._AddLora.forward = staticmethod(lambda *inputs: calls.append(1) or forward(*inputs))
    try:
        train(
            source,
            checkpoint,
            "4 bit",
            wrapped,
            lambda model: training.with_checkpointing(enable_fused_linear_lora(model)),
        )
    finally:
        lora_linear._AddLora.forward = forward
    assert len(calls) == 2 * 2 * 4  # steps, forwards, layers of attention


@pytest.mark.parametrize("wrapped", ["layers", "experts"])
def test_adapters_fused_with_attention_find_it_gathered(on_two_ranks, source, checkpoint, wrapped):
    on_two_ranks(train_fused, source, checkpoint, wrapped)


def stacks(experts: nn.Module) -> list[torch.Tensor]:
    """The bytes of both stacks, as a forward finds them."""
    return [getattr(experts, name).detach().view(torch.uint8).clone() for name in ("gate_up_proj", "down_proj")]


def packed(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    return {name: stacks(module) for name, module in model.named_modules() if "gate_up_proj" in module._parameters}


def train_in_bf16(source, checkpoint, wrapped: str) -> None:
    """As Accelerate has it: factors in fp32, gathered as bf16, beside packed bytes that are kept as bf16."""
    alone, model = training.twins("4 bit", source, checkpoint)
    want, got = packed(alone), {}
    for name, module in model.named_modules():
        if "gate_up_proj" in module._parameters:
            module.register_forward_pre_hook(lambda experts, _, name=name: got.update({name: stacks(experts)}))
    shard(model, wrapped, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    _, share = training.batch_and_share()
    with torch.autocast("cpu", torch.bfloat16):
        training.loss(model, share).backward()
    assert want.keys() == got.keys() and len(want) == 2
    for name, bytes_of_stacks in want.items():
        assert all(map(torch.equal, bytes_of_stacks, got[name])), f"{name} is not what was packed"
    grads = [p.grad.full_tensor() for p in training.trained(model).values()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    assert sum(bool(grad.any()) for grad in grads) == len(grads)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_packed_bytes_survive_mixed_precision(on_two_ranks, source, checkpoint, wrapped):
    on_two_ranks(train_in_bf16, source, checkpoint, wrapped)
