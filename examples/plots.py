"""Pictures of a run: its losses, and how fast it went."""

import time
from pathlib import Path

import matplotlib
import torch
from transformers import TrainerCallback

matplotlib.use("Agg")
from matplotlib import pyplot


class Clock(TrainerCallback):
    """Tokens a second between two entries of the log; evaluation and saving do not count.

    The host is ahead of the GPU, so what counts is the time from the first step's begin to the GPU's end of the last.

    Attributes:
        points: (step, tokens a second).
    """

    def __init__(self, tokens_a_step: int) -> None:
        self.tokens_a_step = tokens_a_step
        self.points: list[tuple[int, float]] = []
        self.began: float | None = None
        self.seconds, self.steps = 0.0, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.began is None:
            self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1
        if control.should_log or control.should_evaluate or control.should_save:  # which wait for the GPU, too
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.began
            self.began = None

    def on_log(self, args, state, control, **kwargs) -> None:
        if self.steps and self.began is None:
            self.points.append((state.global_step, self.steps * self.tokens_a_step / self.seconds))
            self.seconds, self.steps = 0.0, 0


def plot_losses(history: list[dict], path: Path) -> None:
    """The training and held-out losses of a Trainer's log."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), marker="o" if key == "eval_loss" else None, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    _save(figure, path)


def plot_throughput(points: list[tuple[int, float]], path: Path) -> None:
    """Tokens a second by step."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*points, strict=True), marker=".")
    axes.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    _save(figure, path)


def _save(figure, path: Path) -> None:
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    beside.rename(path)
