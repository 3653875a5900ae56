"""A pipeline that rounds cut for latency alone would overload, and streams of requests alike."""

from __future__ import annotations

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import PairAttention, StageCost

OVERLOADED_BY_SHORT_ROUNDS = CostModel(
    stages=(
        StageCost(
            token_count=(0, 1024),
            token_seconds=(0.0, 0.006),
            attention=PairAttention(pair_s=6.5e-10, context_token_s=5e-7),
            round_overhead_s=0.02,
        ),
    )
).for_pp_size(4)
"""A prompt of 8192 tokens takes 90 ms a stage uncut."""


def stream(tokens: int, gap_s: float, count: int) -> tuple[Request, ...]:
    """So many requests of a length, regularly."""
    return tuple(Request(id=f"r{i}", prompt_tokens=tokens, arrival_s=gap_s * i) for i in range(count))
