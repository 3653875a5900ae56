"""A request that waits, and what is left of it."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.plan.plan import Request


@dataclass(slots=True)
class Waiting:
    """A request with tokens to run."""

    index: int
    request: Request
    done: int
    work_s: float = 0.0
    """Seconds that its remaining tokens take on the slowest stage, cut nowhere."""
    context_work: float = 0.0
    """work_s times the mean context of its remaining tokens: what its chunks will read again."""
    rank: float = 0.0
    """Its place in the running order, the smallest first; changes only when it runs."""

    @property
    def left(self) -> int:
        """Tokens to run."""
        return self.request.prompt_tokens - self.done
