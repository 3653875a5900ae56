"""An estimate of the least makespan on tables as they are, without a plan: which layouts are worth one.

It is the relaxation S(m) + bubbles (`rounds.bound`) with three simplifications. Whole numbers are left out, so that
S(m) is an integral over the prompts' tokens of what a token costs in the round that is cheapest there of those below
the cap m. Prompts shorter than a round share it with prompts of their own length. And the caps are a few.

It is no bound. Plans are usually a few percent above it: rounds are whole, and differ at the ends of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.plan.stage_cost import Floats, StageCost
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


class LayerRounds:
    """What rounds of several sizes take in one layer, at places spread over a batch's tokens.

    layers: the costs of the layer in each way to cut a round among ranks; the cheapest is taken.
    """

    def __init__(self, layers: Sequence[StageCost], work: Work, multiple: int) -> None:
        self._most = work.new_tokens
        smallest = min(float(multiple), self._most)
        sizes = np.geomspace(smallest, self._most, NUM_SIZES)
        self._sizes = np.unique(np.minimum(np.ceil(sizes / multiple) * multiple, self._most))
        differing, alike = np.unique(np.stack((work.prompt, work.cached)), axis=1, return_counts=True)
        new, cached = differing[0] - differing[1], differing[1]
        each = max(1, NUM_SAMPLES // len(new))
        share = (np.arange(each) + 0.5) / each
        place = (cached[:, None] + new[:, None] * share).ravel()
        new, cached, alike = (np.repeat(column, each) for column in (new, cached, alike))
        self._tokens = alike * new / each  # that each place stands for
        chunk = np.minimum(self._sizes[:, None], new)
        self._chunks = self._sizes[:, None] / chunk  # of a round
        # A token stands in the middle of its chunk, but at the ends of its prompt.
        context = np.clip(place - chunk / 2.0, cached, cached + new - chunk)
        in_each_cut = [
            layer.tokens_s(self._sizes)[:, None] + self._chunks * (layer.chunk_seconds(chunk, context) - layer.chunk_s)
            for layer in layers
        ]
        self._layer_s: Floats = np.min(in_each_cut, axis=0)  # [sizes, places]

    def likely_makespan_s(self, group: LayerGroup, *, passes: int, bubbles: int, max_round_tokens: float) -> float:
        """The estimate where each stage holds `passes` such groups, and the longest round goes through `bubbles` of
        them while the pipeline fills and drains."""
        sizes = self._sizes[self._sizes <= max(max_round_tokens, self._sizes[0])]
        group_s = (
            group.layers * self._layer_s[: len(sizes)] + group.round_s + group.chunk_s * self._chunks[: len(sizes)]
        )
        token_s = np.minimum.accumulate(group_s / sizes[:, None], axis=0)
        if not bubbles:
            return float(passes * (token_s[-1] @ self._tokens))
        group_s = np.maximum.accumulate(group_s, axis=0)
        least_s, most_s = float(group_s[0].max()), float(group_s[-1].max())
        caps_s = np.geomspace(least_s, most_s, NUM_CAPS)
        sums_s, mean_size = np.zeros(NUM_CAPS), np.zeros(NUM_CAPS)
        for place, tokens in enumerate(self._tokens):
            largest = np.searchsorted(group_s[:, place], caps_s * (1.0 + ROUNDING), side="right") - 1
            sums_s += tokens * token_s[largest, place]
            mean_size += tokens / self._most * sizes[largest]
        hop_s = group.hop_latency_s + group.hop_token_s * mean_size
        return float((passes * sums_s + bubbles * (caps_s + hop_s)).min())
