"""Finds deadlines that no plan can meet, with the least TTFT that each prompt can have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.rounds.bound import makespan_bound_s
from tuner.rounds.problem import Problem, RoundOptions

MOST_BOUNDS = 64
"""Different prompts whose least TTFT is proven; those with the tightest deadlines for their tokens first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Impossible:
    """A deadline that is not met even by a prompt that has the pipeline to itself."""

    request: Request
    least_s: float
    """No plan for the prompt alone has a smaller TTFT (`rounds.bound`)."""

    def __str__(self) -> str:
        """One line for people."""
        one = self.request
        return (
            f"{one.sla_ttft_s:g} s for request {one.id} of {one.prompt_tokens} tokens; "
            f"no plan takes less than {self.least_s:.4g} s"
        )


def impossible_deadlines(
    cost: CostModel, requests: Sequence[Request], **options: Unpack[RoundOptions]
) -> Iterator[Impossible]:
    """Requests whose deadline is below the bound on their TTFT alone; other requests only make it longer."""
    tight = [request for request in requests if request.sla_ttft_s is not None]
    tight.sort(key=lambda request: (request.sla_ttft_s or 0.0) / request.new_tokens)
    least: dict[tuple[int, int], float] = {}
    for request in tight:
        key = request.prompt_tokens, request.cached_tokens
        if key not in least:
            if len(least) == MOST_BOUNDS:
                continue
            least[key] = makespan_bound_s(Problem.of(cost, [replace(request, arrival_s=0.0)], **options))
        if request.sla_ttft_s is not None and request.sla_ttft_s < least[key]:
            yield Impossible(request=request, least_s=least[key])
