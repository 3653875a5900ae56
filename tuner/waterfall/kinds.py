"""What the seconds of each round consist of, by kind of work: predicted from the costs of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from profiler.sequence.kind import SequenceCut
from tuner.fit.curve import Curve
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.whole.costs import WholeCosts
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan, Request, Round
from tuner.plan.stage_cost import Floats, PairAttention
from tuner.rounds.schedule import evaluate
from tuner.search.cuts import cut_seconds
from tuner.search.layouts import Candidate
from tuner.waterfall.steps import Kind


def round_kinds(
    costs: LayerCosts,
    layer_partition: Sequence[int],
    requests: Sequence[Request],
    rounds: Sequence[Round],
    cuts: Sequence[SequenceCut],
) -> dict[Kind, Floats]:
    """Seconds of each round by kind, the mean over the stages, [num_rounds]; they add up to the round's.

    A kind is what the round takes longer than without it, one after another: messages first, since work hides them.
    """
    no_links = costs.with_links(math.inf)
    no_elementwise = no_links.changed(lambda kind: replace(kind, elementwise=_nothing(kind.elementwise)))
    no_products = no_elementwise.changed(
        lambda kind: replace(kind, projections=tuple(map(_nothing, kind.projections)))
    )  # fmt: skip
    models = [
        costs.cost_model(layer_partition),
        no_links.cost_model(layer_partition),
        no_links.cost_model(layer_partition).without_attention(),
        no_elementwise.cost_model(layer_partition).without_attention(),
        no_products.cost_model(layer_partition).without_attention(),
        _without_launches(no_products.cost_model(layer_partition).without_attention()),
    ]
    totals = [_stage_mean_s(model, requests, rounds) for model in models]
    steps = [np.maximum(before - after, 0.0) for before, after in pairwise(totals)]
    kinds = [Kind.COLLECTIVES, Kind.ATTENTION, Kind.ELEMENTWISE, Kind.PRODUCTS, Kind.LAUNCHES]
    found = dict(zip(kinds, steps, strict=True)) | {Kind.ENDS: totals[-1]}
    # Other cuts than the usual one save some of every kind.
    cut_s = cut_seconds(costs, layer_partition, requests, rounds, cuts).sum(axis=1) / models[0].pp_size
    usual = np.asarray(sum(found.values()))
    factor = np.divide(cut_s, usual, out=np.ones_like(cut_s), where=usual > 0)
    return {kind: factor * seconds for kind, seconds in found.items()}


def with_kinds(plan: Plan, candidate: Candidate) -> Plan:
    """The candidate's plan that also says what its rounds consist of."""
    assert plan.predicted is not None
    if isinstance(candidate.layout_costs, WholeCosts):  # its layers' parts were not measured
        return plan
    kinds = round_kinds(
        candidate.layout_costs, candidate.layer_partition, plan.requests, plan.rounds, candidate.cuts
    )  # fmt: skip
    lists = {kind.value: tuple(seconds.tolist()) for kind, seconds in kinds.items()}
    return replace(plan, predicted=replace(plan.predicted, round_kinds=lists))


def _stage_mean_s(model: CostModel, requests: Sequence[Request], rounds: Sequence[Round]) -> Floats:
    seconds: Floats = evaluate(model, requests, rounds).round_s.sum(axis=1) / model.pp_size
    return seconds


def _nothing(curve: Curve) -> Curve:
    return replace(curve, seconds=0.0 * curve.seconds)


def _without_launches(model: CostModel) -> CostModel:
    stages = tuple(
        replace(stage, round_overhead_s=0.0, chunk_s=0.0, attention=PairAttention()) for stage in model.stages
    )  # fmt: skip
    return replace(model, stages=stages)
