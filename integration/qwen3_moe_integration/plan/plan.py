"""The estimate as an answer: a table, whether the step fits, and the longest sequence that does."""

from dataclasses import dataclass
from math import inf

from torch import nn

from .memory import GIB, KEPT_BYTES, Step, estimate, host_bytes, longest_sequence, shapes


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, bytes of the card, the longest sequence that fits in them, and bytes of the host that what is
    offloaded takes; printed as a table."""

    step: Step
    parts: dict[str, float]
    memory: float
    longest: int
    host: float = 0

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    def __str__(self) -> str:
        rows = [f"{name:18s}{size / GIB:8.2f} GiB" for name, size in self.parts.items()]
        verdict = "fits" if self.fits else "does not fit"
        rows += ["-" * 30, f"{'peak':18s}{self.peak / GIB:8.2f} GiB"]
        rows += [f"{'host, pinned':18s}{self.host / GIB:8.2f} GiB"] if self.host else []
        rows += [f"{self.step.seq_len} tokens per sequence: {verdict} in {self.memory / GIB:g} GiB."]
        if self.longest:
            rows += [f"The longest sequence that fits has {self.longest} tokens."]
        else:
            rows += ["No sequence fits: lower the rank of the experts first, then the optimizer's bits."]
        return "\n".join(rows)


def make_plan(model: nn.Module, step: Step, memory: float) -> Plan:
    """The plan for one step of ``model``, which may be on the meta device, on a card with ``memory`` bytes.

    Raises:
        ValueError: a size of the step or of the card is not positive, or the card's infinite, something is kept without
            graphs or is nothing to keep, something is offloaded that is not kept, or the model has no stacks of
            experts.
    """
    for name in ("seq_len", "batch_size"):
        if getattr(step, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(step, name)}")
    for name in ("rank", "expert_rank"):
        if getattr(step, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(step, name)}")
    if not 0 < memory < inf:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}")
    if not set(step.keep) <= set(KEPT_BYTES):
        raise ValueError(f"keep must hold names among {', '.join(KEPT_BYTES)}, got {step.keep!r}")
    if step.keep and not step.graphs:
        raise ValueError("keep is for layers in CUDA graphs; it wants graphs=True, got False")
    if not set(step.offload) <= set(step.keep):
        raise ValueError(f"offload must hold names among those of keep, {step.keep!r}, got {step.offload!r}")
    sizes = shapes(model)
    longest = longest_sequence(sizes, step, memory)
    return Plan(step, estimate(sizes, step), memory, longest, host_bytes(sizes, step))
