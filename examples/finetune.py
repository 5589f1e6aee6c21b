"""Fine-tunes a Qwen3-MoE with the qwen3-moe-fused kernel, by Transformers' Trainer or TRL's SFTTrainer.

    python examples/finetune.py                                             a small model, made on the spot
    python examples/finetune.py --model Qwen/Qwen3-30B-A3B --dataset notes.jsonl
    python examples/finetune.py --resume                                    goes on from the last checkpoint

The model is in 4 bit, its experts too, and is trained by LoRA on its attention and on all experts. For a model of yours
the defaults are those for a card of 24 GB: sequences of 4096 tokens, one a step, activations computed again in
backward, adapters in bf16, Adam with 8-bit states. Whether that fits is worked out first. With --bits 16 the model is
loaded as it is, and the small one, whose weights are random, is trained whole.
"""

import argparse
import logging
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import PartialState
from checkpoints import checkpoint_to_resume, full_disk_explained, remove_incomplete, save
from datasets import Dataset
from documents import pack, read_texts
from kernelized import DEVICE, load_model
from memory import apply_liger_layers, cap, collate_for_liger, plan_for, training_arguments
from out_of_memory import explained, in_loading, in_training, table, takes_less
from peft import LoraConfig, get_peft_model
from plots import Clock, plot_losses, plot_throughput
from tiny_checkpoint import small_model
from transformers import (
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from qwen3_moe_integration import (
    enable_fused_linear_lora,
    enable_graphed_checkpointing,
    expert_lora_config,
    load_adapters_in_place,
)
from qwen3_moe_integration.kept import KEEPABLE
from qwen3_moe_integration.optim import AdamW8bit
from qwen3_moe_integration.plan import Plan

ON_GPU = DEVICE == "cuda"


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse. Of 0 steps the Trainer would make three epochs, and from 1 token nothing can be learned."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a Qwen3-MoE (default: a small one, made in --output)")
    parser.add_argument("--dataset", help="text or JSONL file, or dataset id (default: Python's language reference)")
    parser.add_argument(
        "--text-column", default="text", help="column, or JSONL field, that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/finetune"),
        help="of checkpoints, model and pictures; a new run wants one without checkpoints (default: %(default)s)",
    )
    parser.add_argument("--kernel", type=Path, help="folder of a built kernel (default: version 1 of the Hub's)")
    parser.add_argument(
        "--bits",
        type=int,
        choices=[4, 16],
        default=4,
        help="of the weights that are not trained (default: %(default)s)",
    )
    parser.add_argument(
        "--trainer",
        choices=["trainer", "sft"],
        default="trainer",
        help="Transformers' Trainer or TRL's SFTTrainer (default: %(default)s)",
    )
    parser.add_argument("--steps", type=at_least(1), default=150, help="default: %(default)s")
    parser.add_argument("--seq-len", type=at_least(2), help="default: 4096, of the small model 128")
    parser.add_argument("--batch-size", type=at_least(1), help="default: 1, of the small model 8")
    parser.add_argument("--lr", type=float, help="default: 3e-3 for the small model, 2e-4 for LoRA")
    parser.add_argument(
        "--rank", type=at_least(1), default=16, help="rank of the LoRA on attention (default: %(default)s)"
    )
    parser.add_argument(
        "--expert-rank", type=at_least(0), help="rank of the LoRA on all experts, 0 for none (default: --rank)"
    )
    parser.add_argument(
        "--save-every", type=at_least(1), default=50, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="less memory, a third more time; default: on, of the small model off",
    )
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing by CUDA graphs, two launches a layer and step; default: on a GPU, with the former",
    )
    parser.add_argument(
        "--keep",
        nargs="*",
        choices=KEEPABLE,
        help="what graphs keep for backward, memory for time; nothing by --keep alone; default: for a model of yours, "
        "what fits",
    )
    parser.add_argument(
        "--offload",
        nargs="*",
        choices=KEEPABLE,
        default=[],
        help="what of --keep waits in host memory; default: with --keep's, experts that fit only so",
    )
    parser.add_argument("--gpu-memory", type=float, help="GiB that the run may take (default: what the GPU has)")
    parser.add_argument(
        "--report-to",
        default="none",
        help="a tracker that the Trainer knows, such as tensorboard (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args(argv)
    defaults = {"seq_len": 4096, "batch_size": 1, "gradient_checkpointing": True, "lr": 2e-4}
    if not options.model:
        defaults = {"seq_len": 128, "batch_size": 8, "gradient_checkpointing": False, "lr": 3e-3}
    for name, value in {**defaults, "expert_rank": options.rank}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.graphs is None:
        options.graphs = ON_GPU and options.gradient_checkpointing
    if options.graphs and not options.gradient_checkpointing:
        parser.error("--graphs is a kind of gradient checkpointing; add --gradient-checkpointing")
    if options.keep and not options.graphs:
        parser.error("--keep is for layers in CUDA graphs; add --graphs")
    if not set(options.offload) <= set(options.keep or ()):
        parser.error("--offload is for what graphs keep; name it in --keep too")
    return options


def is_whole(options: argparse.Namespace) -> bool:
    """Whether the model is trained whole."""
    return options.bits == 16 and not options.model


def load_base(options: argparse.Namespace, checkpoint: Path | None = None) -> torch.nn.Module:
    """The model with its experts on the kernel; trained whole, with the weights of ``checkpoint``."""
    weights = options.model or small_model(options.output)
    if checkpoint and is_whole(options):
        # The Trainer would pass over the experts: checkpoints hold one matrix an expert, and only from_pretrained
        # stacks them (huggingface/transformers#48805). It still tries, and warns of a key for each.
        weights = checkpoint
        logging.getLogger("transformers.trainer").addFilter(
            lambda record: "checkpoint model loaded" not in str(record.msg)
        )
    dtype = torch.float32 if is_whole(options) or not ON_GPU else torch.bfloat16
    model = load_model(weights, options.bits, dtype, "training", options.kernel)
    model.config.use_cache = False
    return model


def with_adapter(model: torch.nn.Module, options: argparse.Namespace) -> torch.nn.Module:
    """LoRA on attention, and with ``--expert-rank`` on all experts."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=attention, task_type="CAUSAL_LM")
    if options.expert_rank:
        lora = expert_lora_config(
            options.expert_rank, target_modules=attention, module_rank=options.rank, task_type="CAUSAL_LM"
        )
    # For a model of yours adapters have its dtype, bf16 on a GPU; PEFT would make them fp32.
    model = get_peft_model(model, lora, autocast_adapter_dtype=not options.model)
    load_adapters_in_place(model)  # as the Trainer does to resume, and with the best one at the end
    return enable_fused_linear_lora(model) if options.bits == 4 else model


def make_trainer(options: argparse.Namespace, model, tokenizer, train: Dataset, held_out: Dataset) -> Trainer:
    arguments = {
        "output_dir": str(options.output / "checkpoints"),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "learning_rate": options.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, options.steps // 10),
        "eval_strategy": "steps",
        "eval_steps": options.save_every,
        # Before the first step, but after the Trainer has prepared the model: one that was evaluated earlier than that
        # is not wrapped by DDP any more, without a word, and refused by FSDP.
        "eval_on_start": not options.resume,
        "save_steps": options.save_every,
        "save_total_limit": 2,
        "logging_steps": max(1, min(10, options.steps // 10)),
        "logging_nan_inf_filter": False,  # it waits for the GPU in each step, which then waits for the host
        "gradient_checkpointing": options.gradient_checkpointing and not options.graphs,
        "bf16": ON_GPU,
        "use_cpu": not ON_GPU,
        "dataloader_pin_memory": ON_GPU,
        "report_to": options.report_to,
        "load_best_model_at_end": not is_whole(options),  # of a whole model the Trainer would lose the experts
        "seed": 0,
    }
    optimizer = None
    if ON_GPU and options.model:
        arguments |= training_arguments()
        optimizer = (AdamW8bit, {"lr": options.lr})
    kind, config = Trainer, TrainingArguments
    collator = collate_for_liger if "use_liger_kernel" in arguments else default_data_collator
    if options.trainer == "sft":
        from trl import SFTConfig, SFTTrainer

        kind, config = SFTTrainer, SFTConfig
        collator = None  # its own adds the attention mask that it counts tokens by
        if arguments.pop("use_liger_kernel", False):  # of which it has a loss of its own
            apply_liger_layers(model)
        arguments |= {"max_length": options.seq_len, "dataset_kwargs": {"skip_prepare_dataset": True}}
        if options.graphs:
            arguments["router_aux_loss_coef"] = 0.0  # routers are frozen, and graphs do not record their logits
    trainer = kind(
        model=model,
        args=config(**arguments),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=collator,
        optimizer_cls_and_kwargs=optimizer,
    )
    # So it does to count a batch's tokens. All sequences have as many, so that the batch's mean is that of the tokens.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def check(options: argparse.Namespace) -> Plan | None:
    """Stops a run that cannot work; the plan of one that fits, None for the small model and where there is no GPU."""
    if options.trainer == "sft" and not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit(
            "--trainer sft: TRL computes the loss by a Triton kernel, which needs a GPU; take the default trainer, "
            "or set TRITON_INTERPRET=1 to have Triton's interpreter run it on the CPU, slowly"
        )
    plan = plan_for(options) if options.model and (ON_GPU or options.gpu_memory) else None
    if plan:
        print(plan)
        if not plan.fits:
            less = {added: other for added, other in takes_less(options, plan).items() if other.fits}
            how = f" It fits with one of these:\n{table(less)}" if less else ""
            raise SystemExit(f"The run does not fit: lower --seq-len, --batch-size or --expert-rank.{how}")
    return plan


def train(options: argparse.Namespace) -> Trainer:
    """Trains, saves, and prints what came of it."""
    plan, checkpoint = check(options), checkpoint_to_resume(options)
    remove_incomplete(options.output)
    processes = PartialState(cpu=not ON_GPU)
    if ON_GPU and options.gpu_memory:
        cap(options.gpu_memory)
    if not options.model:
        with processes.main_process_first():
            small_model(options.output)
    set_seed(0)
    documents = read_texts(options.dataset, options.text_column)
    with explained(partial(in_loading, options, plan)):
        model = load_base(options, checkpoint)
        if not is_whole(options):
            model = with_adapter(model, options)
    keep, offload = (plan.step.keep, plan.step.offload) if plan else (options.keep or (), options.offload)
    if options.graphs:
        enable_graphed_checkpointing(model, keep=keep, offload=offload)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"Training {trained / 1e6:.2f} M parameters.")
    tokenizer = AutoTokenizer.from_pretrained(options.model or small_model(options.output))
    trainer = make_trainer(options, model, tokenizer, *pack(documents, tokenizer, options.seq_len))
    clock = Clock(options.batch_size * options.seq_len * processes.num_processes)
    trainer.add_callback(clock)
    where = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"Training {options.steps} steps on {where}{f', going on from {checkpoint}' if checkpoint else ''} ...")
    with explained(partial(in_training, options, plan)), full_disk_explained(options.output):
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        after = trainer.evaluate()["eval_loss"]
        save(trainer, options.output / "model")
    if processes.is_main_process:
        report(trainer, options.output, clock, after, result.metrics["train_runtime"], plan)
    return trainer


def report(trainer: Trainer, output: Path, clock: Clock, after: float, seconds: float, plan: Plan | None) -> None:
    """Draws the curves and prints the result: ``after`` is the last held-out loss, ``seconds`` what training took.
    Beside what PyTorch took, what was planned, less a CUDA context; with graphs that is what it reserves."""
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    plot_losses(trainer.state.log_history, output / "loss.png")
    plot_throughput(clock.points, output / "throughput.png")
    rates = [rate for _, rate in clock.points]
    peak = torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    more = [("reserved for that", f"{torch.cuda.max_memory_reserved() / 2**20:.0f} MiB")] if ON_GPU else []
    if ON_GPU and plan:
        kind, planned = "reserved" if plan.step.graphs else "allocated", plan.peak - plan.parts["CUDA context"]
        more.append((f"planned to be {kind}", f"{planned / 2**20:.0f} MiB"))
    rows = [
        ("loss before, held-out text", f"{before:.4f}"),
        ("loss after, held-out text", f"{after:.4f}"),
        ("tokens a second, median", f"{median(rates):.0f}" if rates else "no step"),
        (f"peak {'GPU' if ON_GPU else 'process'} memory", f"{peak / 2**20:.0f} MiB"),
        *more,
        ("seconds, with evaluation", f"{seconds:.1f}"),
        ("model", str(output / "model")),
        ("loss curve", str(output / "loss.png")),
        ("tokens a second, by step", str(output / "throughput.png")),
    ]
    print("\n" + "\n".join(f"{name:28s} {value}" for name, value in rows))


def main(argv: list[str] | None = None) -> None:
    train(parse(argv))


if __name__ == "__main__":
    main()
