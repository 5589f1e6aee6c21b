"""Says from a model's config alone what a LoRA training step takes of a GPU's memory, and whether it fits."""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..kept import KEEPABLE
from .memory import GIB, Step
from .plan import Plan, make_plan

HELP = "estimate the memory of a training step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub id; only its config.json is read")
    parser.add_argument("--seq-len", type=int, default=Step.seq_len, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=Step.batch_size, help="default: %(default)s")
    parser.add_argument(
        "--rank", type=int, default=Step.rank, help="of the LoRA on attention; 0 for none (default: %(default)s)"
    )
    parser.add_argument("--expert-rank", type=int, help="of the LoRA on every expert; 0 for none (default: --rank)")
    parser.add_argument(
        "--bits", type=int, choices=(4, 16), default=Step.bits, help="of the model's weights (default: %(default)s)"
    )
    parser.add_argument(
        "--optimizer-bits",
        type=int,
        choices=(8, 32),
        default=Step.optimizer_bits,
        help="of Adam's states (default: %(default)s)",
    )
    parser.add_argument("--no-double-quant", action="store_true", help="keep the scales of 4-bit weights in fp32")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations for backward")
    parser.add_argument("--no-chunked-loss", action="store_true", help="logits of the whole batch at once")
    parser.add_argument("--no-liger", action="store_true", help="norms and rotary embeddings of Transformers")
    parser.add_argument("--graphs", action="store_true", help="decoder layers in CUDA graphs")
    parser.add_argument("--keep", nargs="*", choices=KEEPABLE, default=(), help="what graphs keep for backward")
    parser.add_argument("--offload", nargs="*", choices=KEEPABLE, default=(), help="what of --keep waits on the host")
    parser.add_argument("--no-byte-permutes", action="store_true", help="for GPUs other than NVIDIA's from sm_80 on")
    parser.add_argument("--gpu-memory", type=float, default=24.0, help="GiB of the card (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    print(plan_of(arguments))


def plan_of(arguments: argparse.Namespace) -> Plan:
    config = AutoConfig.from_pretrained(arguments.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    step = Step(
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        rank=arguments.rank,
        expert_rank=arguments.rank if arguments.expert_rank is None else arguments.expert_rank,
        bits=arguments.bits,
        double_quant=not arguments.no_double_quant,
        optimizer_bits=arguments.optimizer_bits,
        checkpointing=not arguments.no_checkpointing,
        chunked_loss=not arguments.no_chunked_loss,
        liger=not arguments.no_liger,
        graphs=arguments.graphs,
        keep=tuple(arguments.keep),
        offload=tuple(arguments.offload),
        byte_permutes=not arguments.no_byte_permutes,
    )
    return make_plan(model, step, arguments.gpu_memory * GIB)
