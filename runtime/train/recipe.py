"""How a model is trained: steps, learning rate, precision, what is learned, and what is kept on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from db.errors import UserError
from profiler.model import Precision, precision_of
from tuner.training.order import Order, Recompute

LARGEST_SCALE = 2.0**24


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """Raises `UserError` for what is not allowed."""

    steps: int
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    least_rate: float = 0.0
    """Share of the learning rate that the cosine ends at."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    accumulate: int = 1
    """Passes over the plan a step, each with other sequences."""
    precision: str = "float32"
    """Of weights, activations and a chunk's gradients; 8-bit ones round the operands of the layers' products."""
    loss_scale: float | None = None
    """Fixed; None doubles and halves it as float16 needs it, and is 1 in other formats."""
    recompute: Recompute = Recompute.NONE
    order: Order = Order.ONE_EACH
    distill_weight: float = 1.0
    """Of the teacher's distribution against the text's next tokens, where there is a teacher."""
    temperature: float = 1.0
    seed: int = 0
    save_every: int = 100
    """Steps between checkpoints to resume from."""
    compiles: bool | None = None
    """Whether a layer's halves are compiled; None where that pays: on a card, with whole layers."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "eps", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(name, getattr(self, name), "must be a number above 0")
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError("warmup_steps", self.warmup_steps, f"0 to {self.steps - 1}, fewer than steps")
        for name in ("least_rate", "distill_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(name, getattr(self, name), "0 to 1")
        if not 0.0 <= self.weight_decay < math.inf:
            raise UserError("weight_decay", self.weight_decay, "must be 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError("betas", self.betas, "0 to below 1")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise UserError("clip_norm", self.clip_norm, "must be above 0")
        if self.loss_scale is not None and not 0.0 < self.loss_scale <= LARGEST_SCALE:
            raise UserError("loss_scale", self.loss_scale, f"must be above 0, at most {LARGEST_SCALE:g}")
        precision_of(self.precision, field="precision")

    @property
    def formats(self) -> Precision:
        """The precision."""
        return precision_of(self.precision, field="precision")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear to its height, then half a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        passed = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        height = 0.5 * (1.0 + math.cos(math.pi * passed))
        return self.learning_rate * (self.least_rate + (1.0 - self.least_rate) * height)

    def differs(self, other: dict[str, Any]) -> str | None:
        """The first field that would change the curve of a training begun as `other` says."""
        free = ("recompute", "order", "save_every", "compiles")
        for each in fields(self):
            mine, its = getattr(self, each.name), other.get(each.name)
            if each.name not in free and (list(mine) if isinstance(mine, tuple) else mine) != its:
                return each.name
        return None
