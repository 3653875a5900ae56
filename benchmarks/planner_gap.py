"""How tight the bound is on stages that differ and on measured tables: `python -m benchmarks.planner_gap`."""

from __future__ import annotations

import random

from benchmarks.planner_records import prompts
from tuner.plan.cost_model import Attention, CostModel, PairAttention, StageCost, TableAttention
from tuner.search.planner import plan_rounds

COUNTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def stage(*, layers: float, head: float = 0.0, table: bool = False, stairs: bool = False) -> StageCost:
    """Layers of an 8B model on one fast device; `head` as a share of all layers' token-wise work."""
    token_s, pair_s, context_s = 6e-7 * layers, 3e-12 * layers, 1.2e-9 * layers
    attention: Attention = PairAttention(pair_s=pair_s, context_token_s=context_s)
    if table:  # short chunks run below the kernel's rate: a floor, and a slope that is not in proportion
        base = tuple(max(pair_s * n * n / 2 * (1.0 + 300.0 / n), 2e-5 * layers) for n in COUNTS)
        slope = tuple(context_s + pair_s * (n + 150.0) for n in COUNTS)
        attention = TableAttention(count=COUNTS, base_s=base, context_s=slope)
    counts: tuple[int, ...] = (0, *COUNTS)
    tokens = [token_s * (max(n, 96) + 40.0 * (1.0 - 96.0 / max(n, 96))) if table else token_s * n for n in counts]
    if stairs:  # tiles of 1024 tokens
        counts = (*(n for i in range(16) for n in (i * 1024 + 1, (i + 1) * 1024)), 65536)
        tokens = [*(token_s * (i + 1) * 1024 for i in range(16) for _ in range(2)), token_s * 65536]
    return StageCost(
        token_count=counts,
        token_seconds=tuple(seconds * (1.0 + head) for seconds in tokens),
        attention=attention,
        round_overhead_s=2e-4 * layers,
        final_s=head * 1e-3,
    )


def pipelines() -> dict[str, CostModel]:
    """Pipelines of 4 stages by what is uneven in them."""
    even = [8.0] * 4
    return {
        "equal, linear": CostModel(stages=tuple(stage(layers=n) for n in even)),
        "equal, tables": CostModel(stages=tuple(stage(layers=n, table=True) for n in even)),
        "equal, stairs": CostModel(stages=tuple(stage(layers=n, stairs=True) for n in even)),
        "head 5 %": CostModel(stages=(*(stage(layers=8) for _ in range(3)), stage(layers=8, head=0.05))),
        "head 10 %": CostModel(stages=(*(stage(layers=8) for _ in range(3)), stage(layers=8, head=0.1))),
        "head 5 %, tables": CostModel(
            stages=(*(stage(layers=8, table=True) for _ in range(3)), stage(layers=8, head=0.05, table=True))
        ),
        "7-8-8-7 layers, head 10 %": CostModel(
            stages=(stage(layers=7), stage(layers=8), stage(layers=8), stage(layers=7, head=0.1))
        ),
        "7-9-8-8 layers, tables": CostModel(stages=tuple(stage(layers=n, table=True) for n in (7, 9, 8, 8))),
        "4-8-8-4 layers": CostModel(stages=tuple(stage(layers=n) for n in (4, 8, 8, 4))),
        "2 stages, 8-9 layers": CostModel(stages=tuple(stage(layers=n) for n in (8, 9))),
        "8 stages, head 10 %": CostModel(stages=(*(stage(layers=4) for _ in range(7)), stage(layers=4, head=0.1))),
    }


def main() -> None:
    """Print the gap of each pipeline's plan for one short prompt, one long prompt and a mix."""
    rng = random.Random(0)
    mix = [int(1024 * 2 ** (6 * rng.random())) for _ in range(12)]
    batches = {"1 x 8K": [8192], "1 x 64K": [65536], "12 of 1K-64K": mix}
    print(f"{'pipeline':>28} " + " ".join(f"{name:>13}" for name in batches))
    for name, cost in pipelines().items():
        gaps = [plan_rounds(cost, prompts(lengths)).gap for lengths in batches.values()]
        print(f"{name:>28} " + " ".join(f"{gap:13.2%}" for gap in gaps), flush=True)


if __name__ == "__main__":
    main()
