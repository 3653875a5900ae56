"""`dp` remembers the rounds of caps alike: they are those that it would find anew."""

from __future__ import annotations

import random

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import StageCost, TableAttention
from tuner.policies.dp import LinePacker, pack_line
from tuner.rounds.packing.packer import Packer
from tuner.rounds.problem import Problem

ATTENTION = TableAttention(
    count=(256, 1024, 4096), base_s=(1e-4, 4e-4, 3e-3), context_s=(1e-7, 2e-7, 7e-7)
)  # fmt: skip
STAGE = StageCost(token_count=(0, 256, 512, 4096), token_seconds=(0.0, 4e-3, 5e-3, 4e-2), attention=ATTENTION)
COST = CostModel(stages=(STAGE, STAGE))


def test_rounds_that_are_remembered_are_those_found_anew() -> None:
    rng = random.Random(1)
    for _ in range(6):
        requests = tuple(Request(id=str(i), prompt_tokens=rng.randrange(300, 9000)) for i in range(rng.randrange(1, 7)))
        problem = Problem(cost=COST, requests=requests, chunk_multiple=256)
        packer, order, remembers = Packer.of(problem), list(range(len(requests))), LinePacker()
        remembered, caps_s = 0, np.geomspace(1e-3, 1.0, 60).tolist()
        seen: set[int] = set()
        for cap_s in rng.sample(caps_s, len(caps_s)):
            caps = [cap_s] * len(requests)
            rounds = remembers(packer, requests, order, caps)
            assert rounds == pack_line(packer, requests, order, caps)
            remembered += id(rounds) in seen
            seen.add(id(rounds))
        assert remembered > 10
