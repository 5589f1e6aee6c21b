"""How much memory a training step takes, before it runs."""

from .memory import Step
from .plan import Plan, make_plan

__all__ = ["Plan", "Step", "make_plan"]
