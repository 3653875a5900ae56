"""Kimi-K2.5 on MI355X as ATOM measured and published it, with what its engine took."""

from __future__ import annotations

import json
from pathlib import Path

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import PairAttention, StageCost

ATOM = json.loads((Path(__file__).parents[1] / "data" / "atom_kimi_k25_mi355x.json").read_text())


def atom(pp_size: int) -> CostModel:
    """ATOM's published coefficients, the hand-off of 17.5 ms added to c."""
    stage = StageCost(
        token_count=(0, 65536),
        token_seconds=(0.0, 65536 * ATOM["b"] / 1e3),
        attention=PairAttention(pair_s=2 * ATOM["a"] / 1e3, context_token_s=ATOM["gamma"] / 1e3),
        round_overhead_s=(ATOM["c"] + ATOM["handoff_ms_per_round"]) / 1e3,
    )
    return CostModel(stages=(stage,)).for_pp_size(pp_size)
