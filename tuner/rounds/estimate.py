"""An estimate of what a plan reaches on tables as they are, without a plan: which layouts are worth one.

It is the relaxation S(m) + bubbles (`rounds.bound`) with three simplifications. Whole numbers are left out, so that
S(m) is an integral over the prompts' tokens of what a token costs in the round that is cheapest there of those below
the cap m. Prompts shorter than a round share it with prompts of their own length. And the caps are a few.

It is no bound. Plans are usually a few percent above it: rounds are whole, and differ at the ends of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.ends.one_machine import by_weight
from tuner.rounds.relaxation import Work

NUM_SIZES, NUM_SAMPLES, NUM_CAPS = 64, 24, 48
"""Sizes of rounds, places in the prompts (more where there are more prompts that differ), and caps that are looked
at."""
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """A group of layers on one stage, and what a round costs beside them."""

    layers: float
    round_s: float
    chunk_s: float
    hop_latency_s: float
    """Of the hand-off to the next group."""
    hop_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedWork:
    """What prompts take on a stage when no round is longer than a cap, and what the pipeline adds."""

    caps_s: Floats
    """Of a round in one group, ascending, [num_caps]."""
    prompt_s: Floats
    """Of one prompt of each kind, in all groups of the stage, [num_caps, num_kinds]."""
    shared: Floats
    """Prompts of each kind that share a round, [num_caps, num_kinds]."""
    fill_s: Floats
    """From the end of a request's work on the first stage to its end on the last one, [num_caps]."""
    behind_s: Floats
    """Of stages of several groups, what a round waits for others that pass before its last pass, [num_caps]."""
    kind_of: Ints
    """Of each request."""

    def makespan_s(self) -> float:
        """An estimate of the least makespan."""
        work_s = self.prompt_s @ np.bincount(self.kind_of, minlength=self.prompt_s.shape[1])
        return float((work_s + self.fill_s).min())

    def ends_s(self, order: Ints) -> Floats:
        """Of all requests when they run in this order and all rounds have one cap, [num_caps, num_requests]."""
        request_s, later_s = self._of_requests(order)
        ends = np.empty_like(request_s)
        ends[:, order] = np.cumsum(request_s, axis=1) + later_s
        return ends

    def mean_end_s(self, order: Ints, weights: Floats) -> float:
        """The least weighted mean of ends in this order, where rounds may grow from request to request.

        On equal stages a round waits behind the longest before it, so that they need not shrink.
        """
        request_s, later_s = self._of_requests(order)
        own = weights[order]
        left = np.cumsum(own[::-1])[::-1]  # of the request and of all that end after it
        reached = np.zeros(len(self.caps_s))
        for added in (request_s * left + later_s * own).T:
            reached = np.minimum.accumulate(reached) + added
        return float(reached.min() / left[0])

    def order(self, weights: Floats) -> Ints:
        """Least work for its weight first."""
        return by_weight(self.prompt_s[len(self.caps_s) // 2, self.kind_of], weights)

    def _of_requests(self, order: Ints) -> tuple[Floats, Floats]:
        """In running order, both [num_caps, num_requests]: work, and seconds from its end to the request's."""
        kinds = self.kind_of[order]
        request_s = self.prompt_s[:, kinds]
        # In a round that several share, the mean one ends with half of the others' work still to do.
        later_s = (self.shared[:, kinds] - 1.0) / 2.0 * request_s + self.fill_s[:, None]
        later_s[:, :-1] += self.behind_s[:, None]
        return request_s, later_s


class LayerRounds:
    """What rounds of several sizes take in one layer, at places spread over a batch's tokens.

    layers: the costs of the layer in each way to cut a round among ranks; the cheapest is taken.
    """

    def __init__(self, layers: Sequence[StageCost], work: Work, multiple: int) -> None:
        self._most = work.new_tokens
        smallest = min(float(multiple), self._most)
        sizes = np.geomspace(smallest, self._most, NUM_SIZES)
        self._sizes = np.unique(np.minimum(np.ceil(sizes / multiple) * multiple, self._most))
        differing, kind_of, alike = np.unique(
            np.stack((work.prompt, work.cached)), axis=1, return_inverse=True, return_counts=True
        )
        self._kind_of, self._alike = kind_of.ravel(), alike
        new, cached = differing[0] - differing[1], differing[1]
        each = max(1, NUM_SAMPLES // len(new))
        share = (np.arange(each) + 0.5) / each
        place = (cached[:, None] + new[:, None] * share).ravel()
        self._kinds = np.repeat(np.arange(len(new)), each)  # that each place is in
        new, cached = np.repeat(new, each), np.repeat(cached, each)
        self._tokens = new / each  # of its prompt that a place stands for
        chunk = np.minimum(self._sizes[:, None], new)
        self._chunks = self._sizes[:, None] / chunk  # of a round
        # A token stands in the middle of its chunk, but at the ends of its prompt. There it attends to less or more
        # than the chunk does in the mean.
        context = np.clip(place - chunk / 2.0, cached, cached + new - chunk)
        share = place / (context + chunk / 2.0)
        in_each_cut = [
            layer.tokens_s(self._sizes)[:, None]
            + self._chunks * share * (layer.chunk_seconds(chunk, context) - layer.chunk_s)
            for layer in layers
        ]
        self._layer_s: Floats = np.min(in_each_cut, axis=0)  # [sizes, places]

    def under_caps(self, group: LayerGroup, *, passes: int, bubbles: int, max_round_tokens: float) -> CappedWork:
        """Where each stage holds `passes` such groups, and the longest round goes through `bubbles` of them while the
        pipeline fills and drains."""
        sizes = self._sizes[self._sizes <= max(max_round_tokens, self._sizes[0])]
        chunks = self._chunks[: len(sizes)]
        group_s = group.layers * self._layer_s[: len(sizes)] + group.round_s + group.chunk_s * chunks
        each_s = group_s / sizes[:, None]
        token_s = np.minimum.accumulate(each_s, axis=0)
        cheapest = np.maximum.accumulate(np.where(each_s == token_s, np.arange(len(sizes))[:, None], 0), axis=0)
        group_s = np.maximum.accumulate(group_s, axis=0)
        least_s, most_s = float(group_s[0].max()), float(group_s[-1].max())
        caps_s = np.geomspace(least_s, most_s, NUM_CAPS)
        prompt_s = np.zeros((NUM_CAPS, len(self._alike)))
        shared, mean_size = np.ones_like(prompt_s), np.zeros(NUM_CAPS)
        for place, (kind, tokens) in enumerate(zip(self._kinds.tolist(), self._tokens.tolist(), strict=True)):
            largest = np.searchsorted(group_s[:, place], caps_s * (1.0 + ROUNDING), side="right") - 1
            prompt_s[:, kind] += passes * tokens * token_s[largest, place]
            shared[:, kind] = chunks[cheapest[largest, place], place]
            mean_size += tokens * self._alike[kind] / self._most * sizes[largest]
        return CappedWork(
            caps_s=caps_s,
            prompt_s=prompt_s,
            shared=np.minimum(shared, float(len(self._kind_of))),
            fill_s=bubbles * (caps_s + group.hop_latency_s + group.hop_token_s * mean_size),
            behind_s=bubbles * (passes - 1) / 2.0 * caps_s,
            kind_of=self._kind_of,
        )
