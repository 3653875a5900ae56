"""Chooses the cheapest cut of each round among the ranks of a sequence-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from profiler.sequence.kind import CUTS, SequenceCut, usual_cut
from tuner.fit.whole.costs import Costs, WholeCosts
from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import Floats
from tuner.rounds.round_plan import RoundPlan
from tuner.rounds.schedule import FlatRounds, evaluate

LEAST_GAIN = 1e-3
"""Share of a round that another cut than the usual one must save."""


def choose_cuts(
    costs: Costs, layer_partition: Sequence[int], requests: Sequence[Request], rounds: Sequence[Round]
) -> tuple[SequenceCut, ...]:
    """The cheapest cut of each round, the usual one unless another is cheaper on every stage.

    So no round takes longer on any stage than planned, nor does anything that follows from them.
    """
    usual, *others = CUTS[costs.work.sp_kind]
    chosen = [usual] * len(rounds)
    if not others:
        return tuple(chosen)
    best = _seconds(costs, layer_partition, requests, rounds, usual) * (1.0 - LEAST_GAIN)
    for cut in others:
        seconds = _seconds(costs, layer_partition, requests, rounds, cut)
        for index in np.flatnonzero((seconds < best).all(axis=1)).tolist():
            chosen[index], best[index] = cut, seconds[index]
    return tuple(chosen)


def cut_seconds(
    costs: Costs,
    layer_partition: Sequence[int],
    requests: Sequence[Request],
    rounds: Sequence[Round],
    cuts: Sequence[SequenceCut],
) -> Floats:
    """Seconds of each round in each group of layers [num_rounds, num_groups] in the cut that it has.

    Where a cut hands on more rows than the usual one, what that takes counts to the round.
    """
    by_cut = {cut: _seconds(costs, layer_partition, requests, rounds, cut) for cut in set(cuts)}
    return np.stack([by_cut[cut][index] for index, cut in enumerate(cuts)])


def with_cuts(
    planned: RoundPlan,
    costs: Costs,
    layer_partition: Sequence[int],
    requests: Sequence[Request],
    *,
    window: int | None,
) -> tuple[RoundPlan, tuple[SequenceCut, ...]]:
    """A plan made for the usual cut, predicted in the cuts that are chosen for its rounds; and these cuts."""
    cuts = choose_cuts(costs, layer_partition, requests, planned.rounds)
    if all(cut is usual_cut(costs.work.sp_kind) for cut in cuts):
        return planned, cuts
    round_s = cut_seconds(costs, layer_partition, requests, planned.rounds, cuts)
    evaluation = evaluate(costs.cost_model(layer_partition), requests, planned.rounds, window, round_s)
    return replace(planned, evaluation=evaluation), cuts


def _seconds(
    costs: Costs,
    layer_partition: Sequence[int],
    requests: Sequence[Request],
    rounds: Sequence[Round],
    cut: SequenceCut,
) -> Floats:
    """Seconds of all rounds in one cut, [num_rounds, num_groups]."""
    flat = FlatRounds.of(rounds)
    prompts = np.array([request.prompt_tokens for request in requests], dtype=np.int64)
    columns = (flat.round_index, flat.tokens, flat.start, flat.start + flat.tokens == prompts[flat.request])
    model, usual = costs.cost_model(layer_partition, cut), usual_cut(costs.work.sp_kind)
    seconds = model.round_seconds(*columns)
    if cut is usual:
        return seconds
    assert not isinstance(costs, WholeCosts)  # its ranks share no rows
    in_layer = costs.cut_costs(cut)
    shares = np.array([in_layer.share_of_sum(*_columns(chunks)) for chunks in rounds])
    attention_s = seconds - model.without_attention().round_seconds(*columns)
    seconds = seconds - (1.0 - shares)[:, None] * attention_s
    tokens = np.bincount(flat.round_index, weights=flat.tokens)
    later_s = model.hop_seconds(tokens) - costs.cost_model(layer_partition, usual).hop_seconds(tokens)
    if len(layer_partition) > 1:
        seconds = seconds + np.maximum(later_s, 0.0)[:, None]
    return seconds


def _columns(chunks: Round) -> tuple[list[int], list[int]]:
    """Tokens and contexts of a round's chunks."""
    return [chunk.tokens for chunk in chunks], [chunk.start for chunk in chunks]
