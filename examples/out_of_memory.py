"""What to say of a run that does not fit into the GPU, or did not: what takes less, by the planner's numbers."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from checkpoints import complete_checkpoints
from kernelized import DEVICE
from memory import GIB, LIGER, host_has, plan_for

from qwen3_moe_integration.plan import Plan


def takes_less(options: argparse.Namespace, plan: Plan) -> dict[str, Plan]:
    """The plans of runs that take less than ``plan``, that of ``options``; each by what a user adds to the command.

    Where the run fits, what its graphs keep is named: they would take the room for more.
    """
    kept = {"keep": [*plan.step.keep], "offload": [*plan.step.offload]} if options.graphs and plan.fits else {}
    plans = {}
    if DEVICE == "cuda" and not LIGER:
        install = ", then ".join(filter(None, ["pip install liger-kernel", _added(options, kept)]))
        plans[install] = plan_for(_changed(options, kept), liger=True)
    nothing = {"keep": [], "offload": []}
    in_graphs = [
        {"keep": [*plan.step.keep], "offload": [*plan.step.keep]},
        nothing,
        {"graphs": False} | (nothing if options.keep else {}),
    ]
    sizes = [
        {"batch_size": max(1, options.batch_size // 2)},
        {"seq_len": max(2, options.seq_len // 2)},
        {"expert_rank": options.expert_rank // 2},
    ]
    for change in (in_graphs if options.graphs else []) + [size | kept for size in sizes]:
        plans[_added(options, change)] = plan_for(_changed(options, change))
    return {
        added: less
        for added, less in plans.items()
        if less.peak < plan.peak and (less.host <= plan.host or host_has(less.host))
    }


def _changed(options: argparse.Namespace, change: dict) -> argparse.Namespace:
    return argparse.Namespace(**vars(options) | change)


def _added(options: argparse.Namespace, change: dict) -> str:
    """What of ``change`` the ``options`` do not say, as one would at the end of their command."""
    words = []
    for name, value in change.items():
        if value != getattr(options, name):
            flag = name.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", *map(str, values)]
    return " ".join(words)


def table(plans: dict[str, Plan]) -> str:
    """One line each: what it takes, and how."""
    lines = []
    for added, plan in plans.items():
        host = f"  ({plan.host / GIB:.2f} GiB of the host's)" if plan.host else ""
        lines.append(f"  {plan.peak / GIB:6.2f} GiB  {added}{host}")
    return "\n".join(lines)


@contextmanager
def explained(explain: Callable[[], str]) -> Iterator[None]:
    """Ends a run for which the GPU's memory was too little with ``explain``'s words, which come after the error's."""
    before = _times_out_of_memory()
    try:
        yield
    except RuntimeError as error:
        # What loads a model catches the error that says so, and raises one that does not.
        if "out of memory" not in str(error) and _times_out_of_memory() == before:
            raise
        raise SystemExit(f"{error}\nOut of memory{explain()}") from error


def _times_out_of_memory() -> int:
    return torch.cuda.memory_stats().get("num_ooms", 0) if DEVICE == "cuda" else 0


def in_loading(options: argparse.Namespace, plan: Plan | None) -> str:
    """What is wrong when a model, or its adapters, found no room."""
    size = ""
    if plan:
        takes = (plan.parts["weights"] + plan.parts["adapters"]) / GIB
        size = f": by the plan it takes {takes:.2f} of the GPU's {plan.memory / GIB:.2f} GiB"
    less = " --bits 4 takes less." if options.bits == 16 else ""
    return f" while the model was loaded{size}. Perhaps another process has some of it.{less}"


def in_training(options: argparse.Namespace, plan: Plan | None) -> str:
    """What to lower when a step found no room, by the planner's numbers."""
    lower = ": lower --seq-len, --batch-size or --expert-rank."
    if plan and (less := takes_less(options, plan)):
        lower = f": the run was planned to take {plan.peak / GIB:.2f} GiB, less with one of these:\n{table(less)}"
    if complete := complete_checkpoints(options.output / "checkpoints"):
        return f"{lower}\nThen --resume: it goes on from step {max(complete)}, though not with another --expert-rank."
    return f"{lower}\nNo checkpoint is complete yet: start again."
