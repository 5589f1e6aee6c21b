"""Fine-tunes a Qwen3-MoE that Unsloth loads, with its experts on the qwen3-moe-fused kernel.

    python examples/finetune_unsloth.py                                       a small model, made on the spot
    python examples/finetune_unsloth.py --model Qwen/Qwen3-30B-A3B --dataset notes.jsonl

Unsloth quantizes the model to 4 bit, adds LoRA to attention and all experts, checkpoints activations and computes the
loss. One call, kernelize_model, puts the experts and their adapters on the kernel.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

INSTALL = (
    "Unsloth is not installed. In an environment of its own: pip install unsloth 'kernels>=0.16,<0.17' ./integration"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a Qwen3-MoE (default: a small one, made in --output)")
    parser.add_argument("--dataset", help="text or JSONL file, or dataset id (default: Python's language reference)")
    parser.add_argument("--text-column", default="text", help="column, or JSONL field, that holds the text")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune-unsloth"))
    parser.add_argument("--kernel", type=Path, help="folder of a built kernel (default: version 1 of the Hub's)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seq-len", type=int, help="default: 4096, of the small model 128")
    parser.add_argument("--batch-size", type=int, help="default: 1, of the small model 8")
    parser.add_argument("--lr", type=float, help="default: 2e-4, for the small model 3e-3")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    options = parser.parse_args(argv)
    defaults = {"seq_len": 4096, "batch_size": 1, "lr": 2e-4}
    if not options.model:
        defaults = {"seq_len": 128, "batch_size": 8, "lr": 3e-3}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if importlib.util.find_spec("unsloth") is None:
        raise SystemExit(INSTALL)
    from unsloth import FastModel  # before all else: it changes Transformers and PEFT while it is imported

    # isort: split
    import torch
    from documents import pack, read_texts
    from finetune import ON_GPU, save
    from tiny_checkpoint import small_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    from qwen3_moe_integration import KernelSource, kernelize_model

    documents = read_texts(options.dataset, options.text_column)
    model, tokenizer = FastModel.from_pretrained(
        options.model or str(small_model(options.output)),
        max_seq_length=options.seq_len,
        dtype=torch.bfloat16 if ON_GPU else torch.float32,
        load_in_4bit=True,
    )
    model = FastModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    try:
        kernelize_model(model, "training", KernelSource(path=options.kernel))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise SystemExit(
            f"The model cannot be put on the kernel: {error}\n"
            "Build the kernel with `python scripts/build_kernel.py` and give --kernel . for a local one."
        ) from error
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"Training {trained / 1e6:.2f} M parameters for {options.steps} steps ...")

    train, _ = pack(documents, tokenizer, options.seq_len)
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, options.steps // 10),
        optim="adamw_8bit" if ON_GPU else "adamw_torch",
        bf16=ON_GPU,
        use_cpu=not ON_GPU,
        dataloader_pin_memory=ON_GPU,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_dataset=train,
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    save(trainer, options.output / "model")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rows = [
        ("loss, first five steps", f"{statistics.mean(losses[:5]):.4f}"),
        ("loss, last five steps", f"{statistics.mean(losses[-5:]):.4f}"),
        ("tokens a second", f"{options.steps * options.batch_size * options.seq_len / seconds:.0f}"),
        ("seconds", f"{seconds:.1f}"),
        ("model", str(options.output / "model")),
    ]
    if ON_GPU:
        rows.insert(3, ("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"))
    print("\n" + "\n".join(f"{name:24s} {value}" for name, value in rows))


if __name__ == "__main__":
    main()
