"""What more GPUs would bring: tokens a second and memory from 1 to 64 GPUs, worked out, not measured.

    python benchmarks/scaling_model.py        the tables of docs/scaling.md

A step trains on GLOBAL_BATCH sequences of 4096 tokens, however many GPUs share them: each takes its part one sequence
after another and adds up the gradients. One sequence takes as long as it was measured to take on one GPU, or, where no
one GPU holds the model, as its parts were. What GPUs have to tell each other comes on top, as far as it does not hide
behind arithmetic:

    ring(S)    a gather or a scatter of S bytes over n GPUs: S * (n - 1) / n / bandwidth; a sum over all takes two
    DDP        one sum of the trained gradients a step, behind the last sequence's backward
    FSDP2      for each sequence and layer: a gather behind forward, a gather and a scatter behind backward
    EP         for each sequence and layer six exchanges of tokens * top-k rows, behind nothing: tokens go to their
               experts and back, in forward, in the forward that checkpointing repeats, and in backward

Left out: latency, imbalance of the routing, GPUs that wait for each other, optimizer steps.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.config import config
from transformers import Qwen3MoeForCausalLM

from qwen3_moe_integration.plan.memory import (
    GIB,
    HALF,
    Shapes,
    Step,
    estimate,
    moments,
    shapes,
    weight_bytes,
)

RESULTS = Path(__file__).resolve().parent / "results"
LORA_STEP = "nvidia-h200/train_step-48-layers-graphs-keep-attention-experts-o_proj-offload-experts.json"
EXPERTS = "nvidia-h200/compare-bf16.json"
LAYERS, TOKENS, GLOBAL_BATCH = 48, 4096, 64
GPUS = (1, 2, 4, 8, 16, 32, 64)
BACKWARD = 2 / 3
"""Share of a checkpointed step's time in backward: one forward, then a forward and as much again for gradients."""
ATTAINED = 0.5
"""Share of a large product's rate that attention and the output head are taken to reach."""
PAYS = 1.5
"""Twice the GPUs should do this much more, or the last doubling did not pay."""


@dataclass(frozen=True)
class Links:
    """Bytes a second that a GPU sends while it receives as many: to GPUs of its node, and across nodes."""

    name: str
    within: float
    across: float
    node: int = 8

    def bandwidth(self, gpus: int) -> float:
        return self.within if gpus <= self.node else min(self.within, self.across)

    def ring_ms(self, size: float, gpus: int) -> float:
        return 1e3 * size * (gpus - 1) / gpus / self.bandwidth(gpus)


# Four fifths of what the links are sold as: NVLink 450 and PCIe 32 GB/s a direction, networks 400 and 100 Gb/s a GPU.
NVLINK = Links("NVLink, 400 Gb/s a GPU between nodes of 8", 360e9, 40e9)
PCIE = Links("PCIe 4.0, 100 Gb/s a GPU between nodes of 8", 25.6e9, 10e9)


@dataclass(frozen=True)
class Work:
    """A way to train, on one GPU.

    sequence_ms: of one sequence, forward and backward.
    layer_bytes: weights of a layer, as they are gathered; expert_bytes: those of its experts.
    trained_bytes: gradients.
    sharded, whole: bytes of memory that FSDP divides among GPUs, and that it does not.
    """

    name: str
    sequence_ms: float
    layer_bytes: float
    expert_bytes: float
    trained_bytes: float
    sharded: float
    whole: float


def lora_in_4_bit(model: Shapes, measured: dict) -> Work:
    """Everything but the bytes is measured: benchmarks/train_step.py, all 48 layers on one H200."""
    step = Step(seq_len=TOKENS, rank=measured["rank"], expert_rank=measured["rank"])
    parts = estimate(model, step)
    statistics = weight_bytes(model, step) - HALF * model.full - sum(model.quantized) / 2  # these every GPU has
    sharded = sum(parts[name] for name in ("weights", "adapters", "optimizer", "gradients")) - statistics
    weights = sum(model.quantized) / 2 / model.layers
    return Work(
        name="LoRA over 4 bit",
        sequence_ms=measured["runs"][0]["step_ms"],
        layer_bytes=weights + parts["adapters"] / model.layers,
        expert_bytes=weights,
        trained_bytes=parts["adapters"],
        sharded=sharded,
        whole=sum(parts.values()) - sharded,
    )


def whole_in_bf16(model: Shapes, measured: dict) -> Work:
    """All weights: the experts' time is measured on one H200, the rest follows from its arithmetic."""
    times = {
        record["pass"]: record["call_ms"]["median"]
        for record in measured["layer"]
        if record["peer"] == "qwen3-moe-fused" and record["tokens"] == TOKENS
    }
    parameters = model.full + sum(model.quantized)
    experts = 3 * 128 * model.hidden * model.intermediate
    dense = parameters - model.layers * experts - model.vocabulary * model.hidden  # an embedding multiplies nothing
    attention_scores = 2 * model.layers * TOKENS * model.query  # a causal half of both products, a token
    operations = 4 * 2 * TOKENS * (dense + attention_scores)  # forward twice, gradients of inputs and weights
    rest = 1e3 * operations / (ATTAINED * measured["ceilings"]["operations_per_second"])
    layer = 2 * (parameters - 2 * model.vocabulary * model.hidden) / model.layers
    step = Step(seq_len=TOKENS, bits=16, rank=0, expert_rank=0)
    return Work(
        name="all weights in bf16",
        sequence_ms=model.layers * (times["forward"] + times["trained"]) + rest,
        layer_bytes=layer,
        expert_bytes=2 * experts,
        trained_bytes=2 * parameters,
        sharded=(2 + 2 + 4) * parameters,  # weights, gradients, Adam's two states
        whole=max(map(sum, moments(model, step, adapters=0))),
    )


def step_ms(work: Work, engine: str, gpus: int, links: Links) -> float:
    """Of GLOBAL_BATCH sequences."""
    sequences = GLOBAL_BATCH // gpus
    alone = sequences * work.sequence_ms
    if gpus == 1:
        return alone
    if engine == "DDP":
        exchange = 2 * links.ring_ms(work.trained_bytes, gpus)
        return alone + max(0.0, exchange - BACKWARD * work.sequence_ms)
    gathered = work.layer_bytes if engine == "FSDP2" else work.layer_bytes - work.expert_bytes
    trained = min(1.0, work.trained_bytes / (LAYERS * work.layer_bytes))
    gather, scatter = (links.ring_ms(size, gpus) for size in (gathered, trained * gathered))
    forward, backward = ((1 - BACKWARD) * work.sequence_ms / LAYERS, BACKWARD * work.sequence_ms / LAYERS)
    layer = max(forward, gather) + max(backward, gather + scatter)
    if engine == "EP":
        layer += 6 * links.ring_ms(2 * TOKENS * 8 * 2048, gpus)
    return sequences * LAYERS * layer


def memory(work: Work, engine: str, gpus: int) -> float:
    """Bytes a GPU. DDP has its gradients twice, in buckets; FSDP2 has two layers gathered."""
    if gpus == 1:
        return work.sharded + work.whole
    if engine == "DDP":
        return work.sharded + work.whole + work.trained_bytes
    gathered = work.layer_bytes if engine == "FSDP2" else work.layer_bytes - work.expert_bytes
    return work.sharded / gpus + work.whole + 2 * gathered


def table(work: Work, engines: list[str], links: Links) -> str:
    """Tokens a second, that divided by one GPU's times the GPUs, and GiB per GPU; a line says where doubling ends."""
    head = ["GPUs", *(f"{engine}: {what}" for engine in engines for what in ("tokens/s", "efficiency", "GiB per GPU"))]
    lines = [head, ["---:"] * len(head)]
    one = work.sequence_ms
    last = dict.fromkeys(engines, 1)
    for gpus in GPUS:
        cells = [str(gpus)]
        for engine in engines:
            ms = step_ms(work, engine, gpus, links)
            efficiency = GLOBAL_BATCH * one / gpus / ms
            cells += [f"{1e3 * GLOBAL_BATCH * TOKENS / ms:,.0f}", f"{efficiency:.0%}"]
            cells += [f"{memory(work, engine, gpus) / GIB:.1f}"]
            if gpus > 1 and last[engine] == gpus // 2 and step_ms(work, engine, gpus // 2, links) >= PAYS * ms:
                last[engine] = gpus
        lines.append(cells)
    ends = "; ".join(f"{engine} pays up to {last[engine]} GPU{'s'[: last[engine] > 1]}" for engine in engines)
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{work.name}, {links.name}**: {ends}.\n\n{rows}"


def tables() -> str:
    with torch.device("meta"):
        model = shapes(Qwen3MoeForCausalLM(config(LAYERS)))
    lora, whole = (json.loads((RESULTS / name).read_text()) for name in (LORA_STEP, EXPERTS))
    lora, whole = lora_in_4_bit(model, lora), whole_in_bf16(model, whole)
    return "\n\n".join(
        [
            table(lora, ["DDP", "FSDP2"], NVLINK),
            table(lora, ["DDP", "FSDP2"], PCIE),
            table(whole, ["FSDP2", "EP"], NVLINK),
            table(whole, ["FSDP2", "EP"], PCIE),
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")
