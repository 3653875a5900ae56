"""Hypothesis strategies: cost models with every term, batches, windows and limits."""

from __future__ import annotations

from hypothesis import strategies as st

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import Attention, PairAttention, StageCost, TableAttention

seconds = st.integers(0, 10_000).map(lambda ticks: ticks * 1e-5)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    if draw(st.booleans()):
        return PairAttention(pair_s=draw(st.integers(0, 10)) * 1e-9, context_token_s=draw(st.integers(0, 10)) * 1e-7)
    count = tuple(sorted(draw(st.sets(st.integers(1, 4096), min_size=1, max_size=5))))
    base = sorted(draw(st.lists(seconds, min_size=len(count), max_size=len(count))))
    slope = sorted(draw(st.lists(seconds.map(lambda value: value * 1e-4), min_size=len(count), max_size=len(count))))
    return TableAttention(count=count, base_s=tuple(base), context_s=tuple(slope))


@st.composite
def stages(draw: st.DrawFn) -> StageCost:
    count = tuple(sorted(draw(st.sets(st.integers(0, 8192), min_size=1, max_size=6))))
    table = sorted(draw(st.lists(seconds, min_size=len(count), max_size=len(count))))
    return StageCost(
        token_count=count,
        token_seconds=tuple(table),
        attention=draw(attentions()),
        round_overhead_s=draw(seconds),
        chunk_s=draw(st.sampled_from([0.0, 0.001, 0.05])),
        final_s=draw(st.sampled_from([0.0, 0.01])),
    )


@st.composite
def cost_models(draw: st.DrawFn, max_stages: int = 5) -> CostModel:
    pp_size = draw(st.integers(1, max_stages))
    different = pp_size if draw(st.booleans()) else 1
    pipeline = tuple(draw(stages()) for _ in range(different))
    return CostModel(
        stages=pipeline if different > 1 else pipeline * pp_size,
        hop_latency_s=draw(st.sampled_from([0.0, 0.003])),
        hop_token_s=draw(st.sampled_from([0.0, 1e-6, 1e-4])),
        return_s=draw(st.sampled_from([0.0, 0.02])),
    )


@st.composite
def batches(draw: st.DrawFn, *, max_requests: int = 5, max_tokens: int = 6000, timed: bool = True) -> list[Request]:
    out = []
    for i in range(draw(st.integers(1, max_requests))):
        prompt = draw(st.integers(1, max_tokens))
        out.append(
            Request(
                id=f"r{i}",
                prompt_tokens=prompt,
                cached_tokens=draw(st.one_of(st.just(0), st.integers(0, prompt - 1))),
                arrival_s=draw(st.sampled_from([0.0, 0.0, 0.1, 0.7])) if timed else 0.0,
                weight=draw(st.sampled_from([1.0, 0.0, 5.0])),
                sla_ttft_s=draw(st.sampled_from([None, 0.05, 1.0])),
            )
        )
    return out


windows = st.sampled_from([None, 1, 2, 5])
