"""Experts shared out over two ranks, with their adapters: they train as one process does, and leave the same files."""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from qwen3_moe_integration import (
    MoeBitsAndBytesConfig,
    clip_grad_norm_,
    enable_graphed_checkpointing,
    exchange,
    kernelize_model,
    register,
    share_out_experts,
    whole_adapters,
)
from qwen3_moe_integration.exchange import Exchange
from qwen3_moe_integration.kept import KEEPABLE
from qwen3_moe_integration.quantize.stacks import QuantState, quantize_stack, slice_stack
from tests.integration import graphs, lora, quantized
from tests.integration.distributed import training
from tests.integration.distributed.launch import apply_config
from tests.integration.distributed.ranks import run_on_ranks
from tests.integration.models import QWEN3, tokens
from tests.integration.test_experts import FUSED

KINDS = ("experts", "4 bit")
LR = 0.5
CLIPPED_LR = 50.0  # or the weights' own rounding would be seen in what a step changes
Tensor = torch.Tensor


def pair(kind: str, source, checkpoint: Path) -> tuple[nn.Module, nn.Module]:
    """A model to train alone, and its twin of which each rank has half the experts."""
    alone, model = training.twins(kind, source, checkpoint)
    return alone, share_out_experts(model)


def changes(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().cpu() - before[name] for name, p in training.trained(model).items()}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().cpu() for name, p in training.trained(model).items()}


def train(
    source, checkpoint, kind: str, checkpointing: str, lengths: tuple[int, ...], max_norm: float, device: str = "cpu"
) -> None:
    alone, model = training.twins(kind, source, checkpoint)
    alone, model = alone.to(device), share_out_experts(model).to(device)
    if checkpointing == "recomputed":
        training.with_checkpointing(model)
    elif checkpointing in ("in graphs", "offloaded"):
        if device == "cpu":
            graphs.stand_in()
        graphs.empty_places()
        offload = KEEPABLE if checkpointing == "offloaded" else ()
        enable_graphed_checkpointing(model, keep=KEEPABLE, offload=offload)
    parallel = DistributedDataParallel(model)
    for _ in range(3):
        step(alone, parallel, [inputs(tokens(1, length, device)) for length in lengths], max_norm)
    if checkpointing in ("in graphs", "offloaded"):
        assert graphs.recordings(model) == 2  # one for each layer


def inputs(ids: Tensor, **others: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids, "use_cache": False, **others}


def step(alone: nn.Module, parallel: DistributedDataParallel, every: list[dict[str, Any]], max_norm: float = 0) -> None:
    """Trains on what each rank has, and compares what that changes."""
    model, before = parallel.module, values(alone)
    lr = CLIPPED_LR if max_norm else LR
    optimizers = [torch.optim.SGD(training.trained(each).values(), lr=lr) for each in (alone, model)]
    (sum(alone(**batch).loss for batch in every) / len(every)).backward()
    parallel(**every[distributed.get_rank()]).loss.backward()
    if max_norm:
        for norm_type in (1, math.inf):
            want = torch.nn.utils.clip_grad_norm_(alone.parameters(), math.inf, norm_type)
            torch.testing.assert_close(clip_grad_norm_(parallel, math.inf, norm_type), want, rtol=1e-5, atol=0)
        want = torch.nn.utils.clip_grad_norm_(alone.parameters(), max_norm)
        got = clip_grad_norm_(parallel, max_norm)
        assert want > max_norm
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    with whole_adapters(model):
        training.assert_all_close(changes(alone, before), changes(model, before), ratio=1e-4)


CASES = pytest.mark.parametrize(
    ("checkpointing", "lengths", "max_norm"),
    [
        ("none", (5, 5), 0),
        ("none", (3, 6), 0.01),
        ("recomputed", (6, 3), 0),
        ("in graphs", (5, 5), 0.01),
        ("in graphs", (3, 5), 0),
        ("offloaded", (3, 5), 0),
    ],
)


@pytest.mark.parametrize("kind", KINDS)
@CASES
def test_adapters_train_as_in_one_process(on_two_ranks, source, checkpoint, kind, checkpointing, lengths, max_norm):
    on_two_ranks(train, source, checkpoint, kind, checkpointing, lengths, max_norm)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in training.trained(model).values()]
    yield
    for parameter, value in zip(training.trained(model).values(), before, strict=True):
        parameter.data.copy_(value)


def train_in_graphs(source, checkpoint) -> None:
    graphs.stand_in()
    _, model = pair("4 bit", source, checkpoint)
    enable_graphed_checkpointing(model)
    scattered, scatter = [], exchange._scatter
    exchange._scatter = lambda x: scattered.append(x) or scatter(x)
    for _ in range(2):
        scattered.clear()
        training.loss(model, tokens(1, 5)).backward()
    assert graphs.recordings(model) == 2 and all(x.isfinite().all() for x in scattered)
    assert len(scattered) == 2 * 3  # a layer's result, and the gradients of its tokens and of their weights


def test_layers_in_graphs_exchange_no_results_when_they_are_computed_again(on_two_ranks, source, checkpoint):
    on_two_ranks(train_in_graphs, source, checkpoint)


def train_padded(source, checkpoint, device: str = "cpu") -> None:
    if device == "cpu":
        graphs.stand_in()
    alone, model = (each.to(device) for each in pair("4 bit", source, checkpoint))
    parallel = DistributedDataParallel(enable_graphed_checkpointing(model))
    for padded in ((), (1,), (), (1,), (0, 1), (1,)):
        every = [inputs(ids, attention_mask=torch.ones_like(ids)) for ids in tokens(2, 5, device).split(1)]
        for rank in padded:
            every[rank]["attention_mask"][:, :2] = 0
        with restored(alone), restored(model):  # or rounding would grow from step to step
            step(alone, parallel, every)
    assert graphs.recordings(model) == 2 * 2  # both layers, for the two ways to pad that came twice


def test_ranks_of_which_one_has_padding_run_other_graphs(on_two_ranks, source, checkpoint):
    """A layer gets no mask for attention where nothing is padded: what one rank has recorded, another may not have."""
    on_two_ranks(train_padded, source, checkpoint)


@pytest.mark.gpu
@CASES
def test_adapters_train_as_in_one_process_on_two_gpus(
    on_two_gpus, source, checkpoint, checkpointing, lengths, max_norm
):
    on_two_gpus(train, source, checkpoint, "4 bit", checkpointing, lengths, max_norm)


@pytest.mark.gpu
def test_ranks_of_which_one_has_padding_run_other_graphs_on_two_gpus(on_two_gpus, source, checkpoint):
    on_two_gpus(train_padded, source, checkpoint)


def train_around_another_call(source, checkpoint) -> None:
    alone, model = pair("4 bit", source, checkpoint)
    parallel = DistributedDataParallel(training.with_checkpointing(model))
    for lengths in ((6, 4), (3, 2), (2, 9)):
        every, others = ([tokens(1, length) for length in each] for each in ((4, 6), lengths))
        loss = training.loss(parallel, every[distributed.get_rank()])
        with torch.no_grad():
            model(input_ids=others[distributed.get_rank()])
        loss.backward()
        (sum(training.loss(alone, ids) for ids in every) / 2).backward()
        want, got = ({name: p.grad for name, p in training.trained(each).items() if "experts" not in name}
                     for each in (alone, model))  # fmt: skip
        training.assert_all_close(want, got, ratio=1e-4)


def test_a_call_between_forward_and_its_recomputation_changes_nothing(on_two_ranks, source, checkpoint):
    on_two_ranks(train_around_another_call, source, checkpoint)


def train_others(source) -> None:
    """All but the experts, in fp64: some of these models' gradients are ill-conditioned."""
    register(source)
    for tiny in FUSED:
        alone = tiny.build().double()
        alone.set_experts_implementation("qwen3_moe_fused")
        for name, parameter in alone.named_parameters():
            parameter.requires_grad_(not name.endswith(("experts.gate_up_proj", "experts.down_proj")))
        model = share_out_experts(copy.deepcopy(alone))
        assert len([module for module in model.modules() if hasattr(module, "_old_forward")]) == tiny.moe_layers
        every = tokens(2, 6).split(1)
        (sum(training.loss(alone, ids) for ids in every) / 2).backward()
        training.loss(model, every[distributed.get_rank()]).backward()
        want, got = ({name: p.grad for name, p in training.trained(each).items() if p.grad is not None}
                     for each in (alone, model))  # fmt: skip
        training.assert_all_close(want, {name: training.average(grad) for name, grad in got.items()}, ratio=1e-9)


def test_experts_of_other_models_are_shared_out(on_two_ranks, source):
    on_two_ranks(train_others, source)


def share_is_half(source, checkpoint, kind: str) -> None:
    alone, model = pair(kind, source, checkpoint)
    rank = distributed.get_rank()
    for whole, part in zip(alone.modules(), model.modules(), strict=True):
        if "gate_up_proj" in part._parameters:
            assert isinstance(part.forward, Exchange)
            for name in ("gate_up_proj", "down_proj"):
                want, got = (getattr(each, name) for each in (whole, part))
                if kind == "4 bit":
                    want, got = quantized.decoded(want), quantized.decoded(got)
                    assert getattr(part, name).untyped_storage().nbytes() * 2 == getattr(whole, name).nbytes
                assert torch.equal(got, want.chunk(2)[rank])


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_keeps_its_half_bit_for_bit(on_two_ranks, source, checkpoint, kind):
    on_two_ranks(share_is_half, source, checkpoint, kind)


def router_logits(source, checkpoint) -> None:
    alone, model = pair("4 bit", source, checkpoint)
    mine = inputs(tokens(2, 4).split(1)[distributed.get_rank()], output_router_logits=True)
    want, got = (each(**mine) for each in (alone, model))
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)


def test_router_logits_and_their_loss_are_those_of_a_ranks_own_tokens(on_two_ranks, source, checkpoint):
    on_two_ranks(router_logits, source, checkpoint)


def save(source, checkpoint, folder: Path) -> None:
    alone, model = pair("4 bit", source, checkpoint)
    with pytest.raises(RuntimeError, match=r"mlp\.experts.* holds 4 of its experts.*whole_adapters"):
        model.save_pretrained(folder / "incomplete")
    with whole_adapters(model):
        if distributed.get_rank() == 0:
            model.save_pretrained(folder / "shared out")
        names = [name for name in model.state_dict() if "experts" in name]
        assert names and all("lora_" in name for name in names)
    alone.save_pretrained(folder / f"alone {distributed.get_rank()}")
    distributed.barrier()
    base = training.base_model("4 bit", source, checkpoint)
    loaded = PeftModel.from_pretrained(base, folder / "shared out" / "first", adapter_name="first")
    ids = tokens(1, 4)
    torch.testing.assert_close(loaded(input_ids=ids).logits, alone.eval()(input_ids=ids).logits)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_adapters_are_saved_as_those_of_one_process(on_two_ranks, source, checkpoint, tmp_path):
    on_two_ranks(save, source, checkpoint, tmp_path)
    want, got = ((tmp_path / name / "first" / "adapter_model.safetensors") for name in ("alone 0", "shared out"))
    assert got.read_bytes() == want.read_bytes()
    assert not any((tmp_path / "incomplete").rglob("*.safetensors"))


def fit(source, checkpoint, output: Path, ranks: int) -> list[dict[str, float]]:
    """By the Trainer, as it clips; saves the adapters and returns what was logged."""
    model = get_peft_model(training.base_model("4 bit", source, checkpoint), lora.config())
    if ranks > 1:
        apply_config("ddp")
        share_out_experts(model)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=2 // ranks,
        learning_rate=1e-2,
        adam_epsilon=1e-2,
        max_grad_norm=0.01,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        report_to="none",
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(6, 5)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    with whole_adapters(model):
        trainer.save_model(str(output / "model"))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_clips_by_the_norm_of_all_ranks(server, source, checkpoint, tmp_path, seed):
    (want,) = run_on_ranks(1, fit, source, checkpoint, tmp_path / "alone", 1, seed=seed)
    for got in run_on_ranks(2, fit, source, checkpoint, tmp_path / "shared out", 2, seed=seed):
        assert [entry["grad_norm"] for entry in got] == pytest.approx([entry["grad_norm"] for entry in want], rel=1e-4)
        assert min(entry["grad_norm"] for entry in got) > 0.01
    files = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("alone", "shared out")]
    training.assert_all_close(*files, ratio=1e-4)


def misuse(source, checkpoint) -> None:
    ids = tokens(1, 4)
    _, model = pair("4 bit", source, checkpoint)
    with pytest.raises(RuntimeError, match="run in calls of the whole model"):
        graphs.layers(model)[0].mlp(torch.randn(1, 4, 64))
    model(input_ids=ids)
    with whole_adapters(model), pytest.raises(RuntimeError, match="within whole_adapters a model is saved"):
        model(input_ids=ids)
    model(input_ids=ids)
    with pytest.raises(ValueError, match="adapter 'late' comes too late: the experts are shared out already"):
        model.add_adapter("late", lora.config())
    model(input_ids=ids)
    DistributedDataParallel(nn.ModuleList([model]))
    with pytest.raises(RuntimeError, match="overwritten after they were shared out, as DDP does"):
        model(input_ids=ids)


def test_what_would_compute_something_else_is_an_error(on_two_ranks, source, checkpoint):
    on_two_ranks(misuse, source, checkpoint)


def refused(model: nn.Module, message: str) -> None:
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=message):
        share_out_experts(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data.view(torch.uint8), before[name].data.view(torch.uint8))


def refusals(source, checkpoint, small: Path) -> None:
    refused(QWEN3.build(), "call kernelize_model before")
    refused(kernelize_model(QWEN3.build(), kernel=source), r"experts is trained itself")
    odd = kernelize_model(QWEN3.build(num_experts=3, num_experts_per_tok=2), kernel=source).requires_grad_(False)
    refused(odd, "has 3 experts, which 2 ranks cannot share equally")
    _, model = pair("4 bit", source, checkpoint)
    refused(model, "is shared out already")
    settings = {"experts_blocksize": 4096, "bnb_4bit_compute_dtype": torch.float32}
    blocks = quantized.load(small, MoeBitsAndBytesConfig(**settings), dtype=torch.float32)
    refused(blocks, "experts.gate_up_proj: a block of 4096 weights belongs to two experts")


def test_what_cannot_be_shared_out_is_left_as_it_was(on_two_ranks, source, checkpoint, tmp_path):
    quantized.checkpoint(tmp_path)
    on_two_ranks(refusals, source, checkpoint, tmp_path)


def test_without_a_process_group_there_is_nobody_to_share_with():
    with pytest.raises(RuntimeError, match="init_process_group"):
        share_out_experts(nn.Linear(1, 1))


def stack_of(experts: int, rows: int, columns: int, nested: bool, **settings):
    config = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=nested, **settings)
    weights = torch.randn(experts, rows, columns)
    return quantize_stack("stack", weights, weights.shape, config)


@pytest.mark.parametrize(("rows", "nested", "stays"), [(256, True, True), (64, True, False), (64, False, False)])
def test_a_part_of_a_stack_decodes_to_the_same_weights(rows, nested, stays):
    stack = stack_of(4, rows, 64, nested)
    part = slice_stack("stack", stack, 1, 2)
    assert isinstance(part.quant_state, QuantState) and part.quant_state.nested is stays
    assert torch.equal(quantized.decoded(part), quantized.decoded(stack)[1:3])


def test_experts_that_share_a_block_cannot_be_parted():
    stack = stack_of(4, 3, 32, False)
    message = "stack: a block of 64 weights belongs to two experts of shape (3, 32)"
    with pytest.raises(ValueError, match=re.escape(message)):
        slice_stack("stack", stack, 1, 2)
