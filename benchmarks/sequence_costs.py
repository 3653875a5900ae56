"""What a profile says of one stage under each kind of sequence parallelism: time, and where it goes.

    python -m benchmarks.sequence_costs PROFILE --model llama-3-8b --ranks 4 --prompts 49152 [131072 ...]

PROFILE is an archive as `isochunk db export` writes it. One stage holds all layers; the prompts are one batch, planned
for the kind. Nothing is run: predictions alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from db.errors import UserError
from db.rows.archive import Profile, read_profile
from profiler.model import ModelShape, load_model_shape
from profiler.sequence.kind import SPKind
from service.cli.output import print_table
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.layout import Layout
from tuner.plan.plan import Request, Weights
from tuner.rounds.round_plan import RoundPlan
from tuner.rounds.schedule import FlatRounds
from tuner.search.cuts import with_cuts
from tuner.search.planner import plan_rounds

OWN_RANKS = (SPKind.GATHER, SPKind.ULYSSES, SPKind.RING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the seconds of a plan in its kind's usual cut go."""

    compute_s: float
    attention_s: float
    sent_s: float

    @classmethod
    def of(cls, costs: LayerCosts, rounds: RoundPlan) -> Split:
        """Of all layers on one stage."""
        layers, flat, in_layer = costs.work.shape.num_layers, FlatRounds.of(rounds.rounds), costs.cut_costs()
        tokens = np.bincount(flat.round_index, weights=flat.tokens).astype(np.float64)
        chunk, context = flat.tokens.astype(np.float64), flat.start.astype(np.float64)
        compute_s = in_layer.compute_s(tokens)
        return cls(
            compute_s=layers * float(compute_s.sum()),
            attention_s=layers * float((in_layer.base_s(chunk) + in_layer.slope_s(chunk) * context).sum()),
            sent_s=layers * float((costs.tokens_s(tokens) - compute_s).sum()),
        )


def layouts(num_ranks: int) -> Iterator[Layout]:
    """All of one stage: tensor parallelism with and without rows cut, and each kind beside each degree of it."""
    for tp_size in (size for size in range(1, num_ranks + 1) if num_ranks % size == 0):
        sp_size = num_ranks // tp_size
        if sp_size > 1:
            for kind in OWN_RANKS:
                for weights in Weights if kind is SPKind.GATHER else (Weights.WHOLE,):
                    yield Layout(tp_size=tp_size, pp_size=1, sp_size=sp_size, sp_kind=kind, weights=weights)
        else:
            yield Layout(tp_size=tp_size, pp_size=1)
            if tp_size > 1:
                yield Layout(tp_size=tp_size, pp_size=1, sp_kind=SPKind.MEGATRON)


def predict(
    profile: Profile, shape: ModelShape, dtype: str, layout: Layout, requests: tuple[Request, ...]
) -> tuple[object, ...]:
    """A row of the table."""
    work = RankWork.on(
        profile.hardware,
        shape=shape,
        dtype=dtype,
        tp_size=layout.tp_size,
        sp_size=layout.sp_size,
        sp_kind=layout.sp_kind,
        weights=layout.weights,
    )
    try:
        costs = fit_layer_costs(profile.measurements, work, busy_ranks=layout.world_size)
    except UserError as error:
        return (str(layout), str(error), *[None] * 5)
    partition = (shape.num_layers,)
    planned = plan_rounds(costs.cost_model(partition), requests)
    found, cuts = with_cuts(planned, costs, partition, requests, window=None)
    split = Split.of(costs, planned)
    tokens = " ".join(str(sum(chunk.tokens for chunk in chunks)) for chunks in found.rounds[:4])
    return (
        str(layout), found.makespan_s, split.compute_s, split.attention_s, split.sent_s,
        tokens + (" ..." if len(found.rounds) > 4 else ""), " ".join(sorted(set(cuts))),
    )  # fmt: skip


def main() -> None:
    """Print a table a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[49152])
    options = parser.parse_args()
    profile, shape = read_profile(options.profile), load_model_shape(options.model)
    requests = tuple(Request(id=str(index), prompt_tokens=tokens) for index, tokens in enumerate(options.prompts))
    print_table(
        ("layout", "seconds", "compute_s", "attention_s", "sent_s", "rounds", "cuts"),
        [predict(profile, shape, options.dtype, layout, requests) for layout in layouts(options.ranks)],
        title=f"{shape.name} {options.dtype} on {options.ranks} x {profile.hardware.device}: {options.prompts}",
    )


if __name__ == "__main__":
    main()
