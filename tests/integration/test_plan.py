"""The memory planner: what it counts is what the tensors of a real model take, and its answers fit each other."""

import argparse
import importlib
import math
from dataclasses import replace

import bitsandbytes.functional as bnb
import bitsandbytes.optim as bnb_optim
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_moe_integration import expert_lora_config, kernelize_model
from qwen3_moe_integration.__main__ import main
from qwen3_moe_integration.plan import Step, command, make_plan
from qwen3_moe_integration.plan import memory as plan_memory
from qwen3_moe_integration.plan.memory import (
    GIB,
    decoded_bytes,
    estimate,
    loss_bytes,
    optimizer_bytes,
    read_bytes,
    shapes,
    slot_bytes,
)
from tests.conftest import ROOT

SMALL = dict(
    vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
)  # fmt: skip
PUBLISHED = dict(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
)  # fmt: skip
BOTH = ("attention", "experts")
PROJECTIONS = ("o_proj", "k_proj", "v_proj", "q_proj")
MIB = 2**20


def lora(rank: int, expert_rank: int) -> LoraConfig:
    if not expert_rank:
        return LoraConfig(r=rank, target_modules=[*PROJECTIONS])
    return expert_lora_config(expert_rank, target_modules=[*PROJECTIONS], module_rank=rank)


def model(**sizes) -> Qwen3MoeForCausalLM:
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_take_what_bitsandbytes_makes_of_them(tied, double_quant):
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, tie_word_embeddings=tied)).bfloat16()
    total = 0
    for name, parameter in made.named_parameters():
        if parameter.dim() == 3 or (parameter.dim() == 2 and name.endswith("proj.weight")):
            packed, state = bnb.quantize_4bit(parameter.data, compress_statistics=double_quant)
            scales = (state.absmax, state.state2.absmax) if double_quant else (state.absmax,)
            total += sum(x.numel() * x.element_size() for x in (packed, *scales))
        else:
            total += parameter.numel() * parameter.element_size()
    parts = estimate(shapes(made), Step(double_quant=double_quant))
    assert abs(parts["weights"] - total) < 1e-3 * total


def test_adapters_take_what_peft_makes_of_them():
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL)).bfloat16()
    sizes = shapes(made)
    trained = [p for p in get_peft_model(made, lora(rank=4, expert_rank=6)).parameters() if p.requires_grad]
    parts = estimate(sizes, Step(rank=4, expert_rank=6))
    assert parts["adapters"] == sum(p.numel() for p in trained) * 2


@pytest.mark.parametrize(
    ("bits", "adam"), [(8, bnb_optim.AdamW8bit), (32, torch.optim.AdamW)], ids=["bitsandbytes", "torch"]
)
@pytest.mark.parametrize("size", [4095, 4096, 25600])
def test_an_optimizer_s_states_are_counted(bits, adam, size):
    parameter = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = adam([parameter])
    optimizer.step()
    shared = "qmap1", "qmap2"  # by all parameters
    states = [x for name, x in optimizer.state[parameter].items() if name not in shared and torch.is_tensor(x)]
    assert optimizer_bytes(size, Step(optimizer_bits=bits)) == sum(x.nbytes for x in states if x.dim())


def test_the_loss_takes_the_logits_of_a_chunk_or_of_all(monkeypatch):
    """A chunk of as many tokens as Liger takes, with the option that finetune.py gives it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    sizes, states = shapes(model(**PUBLISHED)), 3 * 2 * 2048
    assert importlib.import_module("memory").LOSS_CHUNK == plan_memory.LOSS_CHUNK
    for tokens, chunk in ((4096, 1024), (8192, 2048), (5 * 1024, 1024), (5 * 1024 + 1, 2048), (3, 1)):
        assert loss_bytes(sizes, Step(tokens)) == tokens * states + chunk * 151936 * 2
        assert loss_bytes(sizes, Step(tokens, chunked_loss=False)) == tokens * (states + 151936 * 3 * 4)


def test_a_4_bit_30b_leaves_room_on_a_24_gib_card_and_a_16_bit_one_does_not():
    wide = model(**PUBLISHED | dict(num_hidden_layers=48))
    plan = make_plan(wide, Step(), 24 * GIB)
    assert plan.fits and plan.longest > 4096 and 15.4 * GIB < plan.parts["weights"] < 15.7 * GIB
    assert not make_plan(wide, Step(bits=16), 24 * GIB).fits


@pytest.mark.parametrize(
    "change", [dict(expert_rank=64), dict(optimizer_bits=32), dict(checkpointing=False), dict(chunked_loss=False),
               dict(batch_size=4), dict(liger=False), dict(graphs=True),
               dict(graphs=True, keep=BOTH), dict(graphs=True, keep=BOTH, offload=("experts",)),
               dict(graphs=True, keep=PROJECTIONS)],
)  # fmt: skip
def test_the_longest_sequence_is_the_longest_and_shrinks_as_a_step_takes_more(change):
    made, memory = model(**PUBLISHED), 5 * GIB
    plan = make_plan(made, Step(), memory)
    at, behind = (make_plan(made, Step(seq_len=plan.longest + more), memory).peak for more in (0, 64))
    assert at <= memory < behind
    assert make_plan(made, replace(Step(), **change), memory).longest < plan.longest


@pytest.mark.parametrize("rank", [20, 0])
def test_a_layer_s_backward_reads_what_is_counted(source, rank):
    tokens, sizes = 1000, SMALL | dict(num_attention_heads=6, head_dim=16, num_experts=16)
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).bfloat16()
    counted = read_bytes(shapes(made), Step(tokens, rank=4, expert_rank=rank, liger=False))
    kernelize_model(made, "training", source)
    get_peft_model(made, lora(rank=4, expert_rank=rank), autocast_adapter_dtype=False)
    hidden = torch.randn(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = made.model.rotary_emb(hidden, torch.arange(tokens)[None])
    known = {x.untyped_storage().data_ptr() for x in (hidden, *rotary, *made.parameters())}
    read = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            read[storage.data_ptr()] = storage  # held, or its address may be another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made.model.layers[0](hidden, position_embeddings=rotary)
    assert sum(storage.nbytes() for storage in read.values()) == pytest.approx(counted, rel=0.06)


def test_the_kernel_decodes_as_many_experts_at_a_time_as_it_says(kernel):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    for name in ("FAST_ROWS", "PLAIN_ROWS", "SCRATCH", "LARGE_SCRATCH", "LARGE_SCRATCH_ROWS", "WINDOW"):
        assert getattr(plan_memory, name) == getattr(regime, name), name


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("tokens", [100, 2048, 2049, 4096, 8192, 12800])
def test_slots_take_what_the_kernel_computes_at_a_time(kernel, tokens, block):
    regime = importlib.import_module(f"{kernel.__name__}.regime")
    width = regime.window(8 * tokens, 2048, regime.Tile(block, 64, 4, 4), torch.bfloat16, "fast")
    assert slot_bytes(shapes(model(**PUBLISHED)), Step(tokens)) == 2 * 8 * tokens * width


@pytest.mark.parametrize("change", [dict(seq_len=12801), dict(byte_permutes=False)])
def test_slots_are_whole_where_weights_are_decoded_to_memory(change):
    step = replace(Step(4096), **change)
    assert slot_bytes(shapes(model(**PUBLISHED)), step) == step.tokens * 8 * 2048 * 2


@pytest.mark.parametrize(
    ("tokens", "change", "mib"),
    [
        (4096, dict(), 0),  # decoded in registers
        (12800, dict(), 0),
        (12801, dict(), 60),  # some expert has more than 800 rows: as many experts as 64 MiB hold, of 6 MiB
        (512, dict(byte_permutes=False), 0),
        (4096, dict(byte_permutes=False), 384),  # 511 MiB hold 85 of 128 experts, so they come in two halves
        (8192, dict(byte_permutes=False), 60),
        (4096, dict(byte_permutes=False, bits=16), 0),
    ],
)
def test_experts_are_decoded_to_memory_where_registers_do_not_do(tokens, change, mib):
    sizes = shapes(model(**PUBLISHED))
    assert decoded_bytes(sizes, Step(tokens, **change), 1536 * 2048) == mib * MIB


def test_what_is_decoded_is_scratch():
    plan = make_plan(model(**PUBLISHED), Step(4096, byte_permutes=False), GIB)
    assert plan.parts["kernels' scratch"] == plan_memory.WORKSPACES + 384 * MIB


def test_without_checkpointing_each_layer_but_one_keeps_what_its_backward_reads():
    step = Step(4096, rank=0, expert_rank=0)
    for layers in (1, 2, 5):
        made = model(**PUBLISHED | dict(num_hidden_layers=layers, vocab_size=512))  # so few that the loss takes little
        recomputed, kept = (make_plan(made, replace(step, checkpointing=x), GIB).peak for x in (True, False))
        assert kept - recomputed == (layers - 1) * read_bytes(shapes(made), step)


def test_experts_that_no_whole_tiles_cover_are_decoded_to_memory():
    sizes = shapes(model(**PUBLISHED | dict(moe_intermediate_size=704)))
    assert decoded_bytes(sizes, Step(4096), 704 * 2048) > 0


def test_memory_that_nobody_has_written_to_serves_as_scratch():
    sizes, step = shapes(model(**PUBLISHED)), Step(8192, byte_permutes=False)
    matrix = 768 * 2048
    assert decoded_bytes(sizes, step, matrix) == 57 * MIB  # 64 MiB hold 21 of 128 experts: seven runs of at most 19
    assert decoded_bytes(sizes, step, matrix, spare=18 * matrix) == 57 * MIB
    assert decoded_bytes(sizes, step, matrix, spare=19 * matrix) == 0


def test_graphs_keep_a_layer_s_turn_beside_the_loss():
    made = model(**PUBLISHED | dict(num_hidden_layers=1))
    for tokens in (4096, 16384):
        plain, graphs = (make_plan(made, Step(tokens, rank=0, expert_rank=0, graphs=x), GIB) for x in (False, True))
        assert plain.parts["loss"] == 0 < graphs.parts["loss"], "one layer's turn is the peak, until both count"
        assert graphs.parts["activations"] >= plain.parts["activations"]


@pytest.mark.parametrize("keep", [("attention",), ("experts",), BOTH])
def test_what_graphs_keep_is_counted_for_each_layer_and_not_in_the_graphs(keep):
    made, step = model(**PUBLISHED), Step(4096, rank=4, expert_rank=16, graphs=True)
    without, keeps = (make_plan(made, replace(step, keep=each), GIB) for each in ((), keep))
    a_layer = {"attention": 4096 * (32 * 128 * 2 + 32 * 4), "experts": 4096 * 8 * (2 * 768 * 2 + 2 * 16 * 2 + 4)}
    for name in keep:
        assert keeps.parts[f"kept {name}"] == 4 * a_layer[name]
        assert f"kept {name}" in str(keeps) and f"kept {name}" not in str(without)
    assert keeps.peak - without.peak == (4 - 1) * sum(a_layer[name] for name in keep)


@pytest.mark.parametrize("liger", [True, False])
@pytest.mark.parametrize("others", [(), BOTH])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_of_a_kept_projection_the_graphs_lack_what_backward_reads(others, liger, name):
    made, step = model(**PUBLISHED), Step(4096, rank=4, graphs=True, liger=liger)
    without, keeps = (make_plan(made, replace(step, keep=each), GIB) for each in (others, (*others, name)))
    width = {"o_proj": 2048, "k_proj": 4 * 128, "v_proj": 4 * 128, "q_proj": 32 * 128}[name]
    assert keeps.parts[f"kept {name}"] == 4 * 4096 * 2 * (width + 4)
    is_read = {"o_proj": False, "k_proj": liger, "v_proj": True, "q_proj": liger}[name]  # in fp32, norms keep a copy
    assert without.parts["activations"] - keeps.parts["activations"] == (4096 * 2 * width if is_read else 0)


def test_what_several_projections_take_adds_up():
    made, step = model(**PUBLISHED), Step(4096, rank=4, graphs=True)
    without, *one, all_of_them = (
        make_plan(made, replace(step, keep=keep), GIB).peak
        for keep in ((), *((name,) for name in PROJECTIONS), PROJECTIONS)
    )
    assert all_of_them - without == sum(peak - without for peak in one) > 0


@pytest.mark.parametrize("change", [dict(rank=0), dict(bits=16)])
def test_projections_are_kept_in_4_bit_with_adapters_alone(change):
    made, step = model(**PUBLISHED), replace(Step(4096, graphs=True), **change)
    without, keeps = (make_plan(made, replace(step, keep=each), GIB) for each in ((), PROJECTIONS))
    assert keeps.peak == without.peak and [keeps.parts[f"kept {name}"] for name in PROJECTIONS] == [0] * 4


@pytest.mark.parametrize("offload", [("attention",), ("experts",), BOTH, ("o_proj",), PROJECTIONS])
def test_of_what_is_offloaded_two_layers_have_the_gpu_s_memory_and_all_the_host_s(offload):
    step = Step(4096, graphs=True, keep=(*BOTH, *PROJECTIONS))
    for layers in (1, 2, 3, 8):
        made = model(**PUBLISHED | dict(num_hidden_layers=layers))
        kept, offloads = (make_plan(made, replace(step, offload=each), GIB) for each in ((), offload))
        freed = sum(kept.parts[f"kept {name}"] for name in offload) * (1 - min(2, layers) / layers)
        assert kept.peak - offloads.peak == pytest.approx(freed)
        assert offloads.host == sum(kept.parts[f"kept {name}"] for name in offload) and kept.host == 0
        assert "host, pinned" in str(offloads) and "host" not in str(kept)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(seq_len=0), "seq_len must be at least 1, got 0"),
        (Step(batch_size=0), "batch_size must be at least 1, got 0"),
        (Step(keep=("experts",)), "keep is for layers in CUDA graphs"),
        (Step(keep=("routers",), graphs=True), rf"among {', '.join((*BOTH, *PROJECTIONS))}, got \('routers',\)"),
        (Step(keep=("attention",), offload=("experts",), graphs=True), r"among those of keep, \('attention',\), got"),
        (Step(expert_rank=-1), "expert_rank must not be negative"),
        (Step(rank=-1), "rank must not be negative, got -1"),
    ],
)
def test_sizes_that_make_no_step_are_named(step, message):
    with pytest.raises(ValueError, match=message):
        make_plan(model(**SMALL), step, GIB)


@pytest.mark.parametrize("memory", [-GIB, 0, math.inf, math.nan])
def test_memory_that_no_card_has_is_named(memory):
    with pytest.raises(ValueError, match=f"memory must be a positive number of bytes, got {memory}"):
        make_plan(model(**SMALL), Step(), memory)


def test_a_model_without_stacks_of_experts_is_refused():
    class Plain(nn.Module):
        config = Qwen3MoeConfig(**SMALL)
        get_output_embeddings = staticmethod(lambda: None)

    with pytest.raises(ValueError, match="model must hold its experts in stacks gate_up_proj and down_proj, got Plain"):
        make_plan(Plain(), Step(), GIB)


CHANGES = {
    "--seq-len 640": dict(seq_len=640),
    "--batch-size 3": dict(batch_size=3),
    "--rank 8": dict(rank=8, expert_rank=8),
    "--rank 8 --expert-rank 0": dict(rank=8, expert_rank=0),
    "--bits 16": dict(bits=16),
    "--optimizer-bits 32": dict(optimizer_bits=32),
    "--no-double-quant": dict(double_quant=False),
    "--no-checkpointing": dict(checkpointing=False),
    "--no-chunked-loss": dict(chunked_loss=False),
    "--no-liger": dict(liger=False),
    "--no-byte-permutes": dict(byte_permutes=False),
    "--graphs --keep attention experts --offload experts": dict(graphs=True, keep=BOTH, offload=("experts",)),
    "--graphs --keep o_proj v_proj --offload o_proj": dict(graphs=True, keep=("o_proj", "v_proj"), offload=("o_proj",)),
}


@pytest.mark.parametrize("options", ["", *CHANGES])
def test_the_command_plans_the_step_that_its_options_say(tmp_path, options):
    Qwen3MoeConfig(**SMALL).save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    plan = command.plan_of(parser.parse_args(["--model", str(tmp_path), *options.split()]))
    assert plan == make_plan(model(**SMALL), Step(**CHANGES.get(options, {})), 24 * GIB)


def test_the_command_reads_the_config_alone(tmp_path, capsys):
    Qwen3MoeConfig(**SMALL).save_pretrained(tmp_path)
    small = ["plan", "--model", str(tmp_path), "--seq-len", "128"]
    assert main([*small, "--gpu-memory", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("weights") and lines[-2] == "128 tokens per sequence: fits in 1 GiB."
    assert main([*small, "--gpu-memory", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "No sequence fits" in out
    assert main([*small, "--graphs", "--keep", "attention", "experts"]) == 0
    assert "kept attention" in (out := capsys.readouterr().out) and "kept experts" in out and "host" not in out
    assert main([*small, "--graphs", "--keep", "attention", "experts", "--offload", "experts"]) == 0
    assert "host, pinned" in capsys.readouterr().out
    assert main([*small, "--offload", "experts"]) == 1
    assert "offload must hold names among those of keep" in capsys.readouterr().err
    assert main([*small, "--seq-len", "0"]) == 1
    assert capsys.readouterr().err == "error: seq_len must be at least 1, got 0\n"
