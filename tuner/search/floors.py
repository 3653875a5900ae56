"""Lower bounds of layouts: they hold for every layer partition, all rounds, orders and windows.

A layout holds L layers in v groups on each of K = pp_size stages. On the stage where layers cost most a round costs a
layer t(i) and every group of layers o beside them; on stage k it costs a layer at least r(k) t(i), r(k) <= 1. No round
costs a layer less than one token does on the cheapest stage, t1, so that T(k) = max(t1, r(k) sum t(i)) is a bound, too.

1. **Work.** A stage with L(k) layers in v groups does one thing at a time, in whatever order:
   makespan >= L(k) T(k) + v o N for N rounds, and all stages together hold L layers. So it is at least the least
   over all partitions of the largest of these, which dealing the layers out one by one to the stage that then has
   least finds (no partition can leave all stages below that).
2. **Way in and out**, one group a stage: the first round passes the stages before k, the last round those after it.
   They hold L - L(k) layers in K - 1 groups: makespan >= L(k) (T(k) - t1) + L t1 + o N + (K - 1)(o + latency of a
   hop), and T(k) >= t1, so that dealing out as in 1. finds the least here, too. With several groups a stage, in
   a loop, stage k starts after the k groups before its first one, and K - 1 - k groups follow its last one: K - 1
   groups of at least one layer. Up and down, the stage where all starts may also be where all ends: nothing is added.
3. **Longest round**, one group a stage and L a multiple of K: either all stages hold l = L / K layers, and the path
   that runs on the first stage up to the longest round m, goes down with it and stays on the last gives
   S(m) + (K - 1) m + hops (`rounds.bound`), where S is what all rounds sum to on the cheapest stage. With F all that is
   paid beside o, F <= N (m - o): S >= F + o F / (m - o), and the sum is least at m = o + sqrt(o F / (K - 1)). Or some
   stage holds at least l + 1 layers, for which 1. and 2. are asked. The smaller of the two bounds every partition.

The sum of t(i) is bounded by straight lines under the tables (`rounds.relaxation.envelopes`), prompts cut nowhere.
Every path ends with a round that ends a prompt on the last stage; what that costs on top is added once.
Arrivals and windows only delay rounds, so all of it holds with them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tuner.fit.whole.costs import Costs
from tuner.plan.layout import Layout
from tuner.plan.plan import Request
from tuner.plan.stage_cost import Floats
from tuner.plan.stage_order import StageOrder
from tuner.rounds.ends.one_machine import least_ends_s, least_lateness_s, most_in_time, most_on_time
from tuner.rounds.estimate import CappedWork, LayerGroup, LayerRounds
from tuner.rounds.problem import check_chunk_multiple
from tuner.rounds.relaxation import Envelope, Work, envelopes
from tuner.rounds.uneven import least_ratio
from tuner.workload.objective import Objective

ROUNDING = 1e-9
"""Share taken off a bound for the rounding of floating-point sums."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests as columns, for all layouts at once."""

    work: Work
    weights: Floats
    arrival_s: Floats
    deadline_s: Floats
    """Of the TTFT; infinite where there is none."""
    counted: Floats
    """Weights of the requests that have a limit of TTFT or TPOT."""
    chunk_multiple: int

    @classmethod
    def of(cls, requests: Sequence[Request], max_round_tokens: int | None, chunk_multiple: int = 64) -> Batch:
        """The columns of these requests, whose chunks end on multiples of so many tokens."""
        check_chunk_multiple(chunk_multiple)
        given = np.array([request.weight for request in requests])
        limited = np.array([(one.sla_ttft_s, one.sla_tpot_s) != (None, None) for one in requests])
        return cls(
            Work.of(requests, max_round_tokens),
            given if given.any() else np.ones(len(given)),
            np.array([request.arrival_s for request in requests]),
            np.array([math.inf if request.sla_ttft_s is None else request.sla_ttft_s for request in requests]),
            np.where(limited, given if (given * limited).any() else 1.0, 0.0),
            chunk_multiple,
        )

    def least_score(self, objective: Objective, seconds: Floats, makespan_s: float) -> tuple[float, ...]:
        """No plan's score is below it where some stage takes so many seconds for each request's work, and no plan
        has a smaller makespan."""
        if objective is Objective.MAKESPAN:
            return (makespan_s,)
        arrival_s, weights = self.arrival_s, self.weights
        mean_s = (least_ends_s(arrival_s, seconds, weights) - float(arrival_s @ weights)) / float(weights.sum())
        if objective is Objective.MEAN_TTFT:
            return (mean_s, makespan_s)
        if objective is Objective.P99_TTFT:
            ttft_s = seconds if arrival_s.any() else np.cumsum(np.sort(seconds))
            return (float(np.percentile(ttft_s, 99)), mean_s, makespan_s)
        if objective is Objective.LATENESS:
            return (least_lateness_s(arrival_s, seconds, arrival_s + self.deadline_s), mean_s, makespan_s)
        met = float(self.counted @ (seconds <= self.deadline_s))
        if not arrival_s.any():
            met = min(met, most_in_time(seconds, self.deadline_s, self.counted))
        return (-self._share(met), mean_s, makespan_s)

    def likely_score(self, objective: Objective, work: CappedWork, quicker: float = 1.0) -> tuple[float, ...]:
        """An estimate of the least score, were all seconds so many times less; of requests there from the start."""
        makespan_s = work.makespan_s() / quicker
        if objective is Objective.MAKESPAN:
            return (makespan_s,)
        order = work.order(self.weights)
        if objective is Objective.MEAN_TTFT:
            return (work.mean_end_s(order, self.weights) / quicker, makespan_s)
        if objective is Objective.P99_TTFT:
            order = work.order(np.ones(len(order)))
            ttft_s = work.ends_s(order) / quicker
            return (float(np.percentile(ttft_s, 99, axis=1).min()), *self._least_mean(ttft_s), makespan_s)
        by_deadline = np.argsort(self.deadline_s, kind="stable")
        if objective is Objective.LATENESS:
            ttft_s = work.ends_s(by_deadline) / quicker
            return (float((ttft_s - self.deadline_s).max(axis=1).min()), *self._least_mean(ttft_s), makespan_s)
        seconds = work.prompt_s[len(work.caps_s) // 2, work.kind_of] / quicker
        in_time = most_on_time(by_deadline.tolist(), seconds.tolist(), self.deadline_s.tolist())
        scores = []
        for each in (order, by_deadline, np.array(in_time)):
            ttft_s = work.ends_s(each) / quicker
            met = (ttft_s <= self.deadline_s) @ self.counted
            means = ttft_s @ self.weights / self.weights.sum()
            scores += [(-self._share(one), mean) for one, mean in zip(met.tolist(), means.tolist(), strict=True)]
        return (*min(scores), makespan_s)

    def _least_mean(self, ttft_s: Floats) -> tuple[float]:
        return (float((ttft_s @ self.weights).min() / self.weights.sum()),)

    def _share(self, met: float) -> float:
        """Of the limits, as an evaluation counts it."""
        return met / float(self.counted.sum()) if self.counted.any() else 1.0


class LayerFloor:
    """What a batch costs at least in one layer of these costs, and beside the layers."""

    def __init__(self, costs: Costs, pp_size: int, batch: Batch) -> None:
        work = batch.work
        self.batch = batch
        self._costs, self._pp_size = costs, pp_size
        self._capped: dict[tuple[int, int, float], CappedWork] = {}
        stages = costs.least_layers(pp_size)
        kinds = list(dict.fromkeys(stages))
        bare = [replace(stage, round_overhead_s=0.0, chunk_s=0.0, final_s=0.0) for stage in kinds]
        slowest = max(bare, key=lambda each: float(each.tokens_s(work.new_tokens)))
        ratio_of = {stage: least_ratio(each, slowest, work.new_tokens) for stage, each in zip(kinds, bare, strict=True)}
        self.lines = envelopes([slowest], work)
        self.ratios = tuple(ratio_of[stage] for stage in stages)
        self.group_s = min(stage.round_overhead_s for stage in stages)
        self.chunk_s = min(stage.chunk_s for stage in stages)
        self.final_s = min(stage.final_s for stage in stages)
        self.token_s = min(float(each.tokens_s(1)) for each in bare)
        self.hop_s = costs.hop_latency_s
        self.hop_token_s = costs.hop_byte_s * costs.work.hidden_bytes / costs.work.sequence_size
        self.request_s = np.max([self.requests_s(line) for line in self.lines], axis=0)
        self.num_rounds = max(1, math.ceil(work.new_tokens / work.max_round_tokens))
        held = [float(self.requests_s(line).sum()) + self.num_rounds * line.round_s for line in self.lines]
        self.layer_s = max(held)
        self.layer_of_stage_s = tuple(max(ratio * self.layer_s, self.token_s) for ratio in self.ratios)

    @cached_property
    def layer_rounds(self) -> LayerRounds:
        """What rounds of several sizes take in a layer of the slowest stage."""
        layers = self._costs.cut_layers(self._pp_size, int(np.argmax(self.ratios)))
        return LayerRounds(layers, self.batch.work, self.batch.chunk_multiple)

    def capped(self, num_layers: int, virtual_stages: int, max_round_tokens: float) -> CappedWork:
        """What prompts take of so many layers when no round is longer than a cap, in a loop and in V order alike."""
        asked = (num_layers, virtual_stages, max_round_tokens)
        if asked not in self._capped:
            group = LayerGroup(
                layers=least_fullest(self.ratios, num_layers) / virtual_stages,
                round_s=self.group_s,
                chunk_s=self.chunk_s,
                hop_latency_s=self.hop_s,
                hop_token_s=self.hop_token_s,
            )
            self._capped[asked] = self.layer_rounds.under_caps(
                group, passes=virtual_stages, bubbles=len(self.ratios) - 1, max_round_tokens=max_round_tokens
            )
        return self._capped[asked]

    def requests_s(self, line: Envelope) -> Floats:
        """Least seconds of each request in a layer, cut nowhere, beside what each round costs."""
        prompt, cached = self.batch.work.prompt, self.batch.work.cached
        pairs = (prompt * (prompt + 1.0) - cached * (cached + 1.0)) / 2.0
        seconds: Floats = (
            line.token_s * (prompt - cached) + line.pair_s * pairs + line.context_token_s * cached + line.chunk_s
        )
        return seconds

    def overhead_s(self, num_groups: int) -> float:
        """What a stage pays for its groups beside the layers."""
        return num_groups * (self.num_rounds * self.group_s + len(self.batch.work.prompt) * self.chunk_s)


def least_fullest(seconds: Sequence[float], num_layers: int) -> float:
    """The least over all partitions of the largest of layers x seconds, one entry of `seconds` a stage."""
    if len(set(seconds)) == 1:
        return -(-num_layers // len(seconds)) * seconds[0]
    stages = [(each, each) for each in seconds]  # with one layer more, a layer's
    heapq.heapify(stages)
    largest = 0.0
    for _ in range(num_layers):
        largest, each = stages[0]
        heapq.heapreplace(stages, (largest + each, each))
    return largest


@dataclass(frozen=True, slots=True)
class LayoutFloor:
    """Lower bounds of one layout's plans."""

    layer: LayerFloor
    num_layers: int
    layout: Layout

    @property
    def most_layers(self) -> int:
        """The least that the fullest stage of a partition holds."""
        return -(-self.num_layers // self.layout.pp_size)

    def quick_s(self) -> float:
        """1. and 2.: seconds that no makespan is below."""
        layer, layout = self.layer, self.layout
        beside_s, each_s = self._beside_s()
        fullest = least_fullest([seconds - each_s for seconds in layer.layer_of_stage_s], self.num_layers)
        return (fullest + beside_s + layer.overhead_s(layout.virtual_stages) + layer.final_s) * (1.0 - ROUNDING)

    def _beside_s(self) -> tuple[float, float]:
        """What is added to the fullest stage's work, and what is taken off each of its layers in turn."""
        layer, layout = self.layer, self.layout
        others = layout.pp_size - 1
        if layout.virtual_stages == 1:
            return self.num_layers * layer.token_s + others * (layer.group_s + layer.hop_s), layer.token_s
        if layout.stage_order is StageOrder.LOOP:
            return others * (layer.group_s + layer.token_s + layer.hop_s), 0.0
        return 0.0, 0.0

    def close_s(self) -> float:
        """3. where it applies; seconds that no makespan is below."""
        layer, layout, quick = self.layer, self.layout, self.quick_s()
        if layout.virtual_stages > 1 or layout.pp_size == 1 or self.num_layers % layout.pp_size:
            return quick
        others, (beside_s, each_s) = layout.pp_size - 1, self._beside_s()
        even = max(self._even_s(line) for line in layer.lines) + others * layer.hop_s
        uneven = (self.most_layers + 1) * (min(layer.layer_of_stage_s) - each_s) + beside_s + layer.overhead_s(1)
        return max(quick, (min(even, uneven) + layer.final_s) * (1.0 - ROUNDING))

    def _even_s(self, line: Envelope) -> float:
        """The least of S(m) + (K - 1) m on stages all alike.

        A round holds a chunk at least, so that what a chunk costs is part of o.
        """
        others, lowest = self.layout.pp_size - 1, min(self.layer.ratios)
        held = self.most_layers * lowest * float((self.layer.requests_s(line) - line.chunk_s).sum())
        overhead = self.most_layers * lowest * (line.round_s + line.chunk_s) + self.layer.group_s + self.layer.chunk_s
        return held + others * overhead + 2.0 * math.sqrt(others * overhead * held)

    def score(self, objective: Objective, *, close: bool) -> tuple[float, ...]:
        """No plan's score by the objective is below it.

        The fullest stage does one thing at a time, and a request ends after its own work is done there
        (`rounds.ends.one_machine`). What rounds cost beside the requests is left out.
        """
        makespan_s = self.close_s() if close else self.quick_s()
        if objective is Objective.MAKESPAN:
            return (makespan_s,)
        seconds = least_fullest(self.layer.ratios, self.num_layers) * self.layer.request_s * (1.0 - ROUNDING)
        return self.layer.batch.least_score(objective, seconds, makespan_s)

    def likely_score(
        self, objective: Objective, max_round_tokens: int | None = None, quicker: float = 1.0
    ) -> tuple[float, ...]:
        """An estimate of the least score, no bound: usually a few percent below what plans reach (`rounds.estimate`).

        max_round_tokens: what memory allows, where it is known. quicker: by which all seconds are divided.
        """
        layer = self.layer
        given = layer.batch.work.max_round_tokens
        most_tokens = given if max_round_tokens is None else min(given, max_round_tokens)
        capped = layer.capped(self.num_layers, self.layout.virtual_stages, most_tokens)
        return layer.batch.likely_score(objective, capped, quicker)


class Floors:
    """Floors of many layouts for one batch: what a layer costs is bounded once for all that share it."""

    def __init__(self, batch: Batch, num_layers: int) -> None:
        self._batch, self._num_layers = batch, num_layers
        self._layers: dict[tuple[int, int], tuple[Costs, LayerFloor]] = {}

    def of(self, layout: Layout, costs: Costs) -> LayoutFloor:
        """The floor of a layout with these costs."""
        key = (id(costs), layout.pp_size)
        if key not in self._layers:  # with the costs, so that their id stays theirs
            self._layers[key] = (costs, LayerFloor(costs, layout.pp_size, self._batch))
        return LayoutFloor(self._layers[key][1], self._num_layers, layout)
