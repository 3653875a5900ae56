"""One stage's costs on the grid, as lists.

Packing takes one short decision after another, for which lists are several times faster than small numpy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.plan.stage_cost import Floats, StageCost

THRIFTY = 1.005
"""Costs of a token that differ by less are alike."""


@dataclass(slots=True)
class StageTable:
    """One stage's costs on the grid, as lists: a chunk's base and slope by its units, a round's seconds by its
    units."""

    stage: StageCost
    multiple: int
    base: list[float]
    slope: list[float]
    tokens: list[float]
    """Round overhead and token-wise seconds."""
    thrifty: list[int]
    """For each number of units the largest up to it that no smaller one undercuts in the cost of context a token."""

    @classmethod
    def of(cls, stage: StageCost, multiple: int, chunk_units: int, round_units: int) -> StageTable:
        """Tables for chunks up to `chunk_units` and rounds up to `round_units` grid units."""
        chunk = np.arange(chunk_units + 2, dtype=np.float64) * multiple
        total = np.arange(round_units + 2, dtype=np.float64) * multiple
        slope = stage.attention.slope(chunk)
        return cls(
            stage,
            multiple,
            (stage.attention.base(chunk) + stage.chunk_s).tolist(),
            slope.tolist(),
            (stage.round_overhead_s + stage.tokens_s(total)).tolist(),
            _thrifty(slope),
        )

    def round_s(self, tokens: int) -> float:
        """Overhead and token-wise seconds of a round of `tokens`, linear between grid points."""
        unit, rest = divmod(tokens, self.multiple)
        if unit + 1 >= len(self.tokens):
            return self.stage.round_overhead_s + float(self.stage.tokens_s(tokens))
        low = self.tokens[unit]
        return low + (self.tokens[unit + 1] - low) * rest / self.multiple if rest else low

    def chunk_s(self, tokens: int, context: int) -> float:
        """Seconds a chunk adds to its round beside token-wise work; exact on the grid, linear between its points."""
        unit, rest = divmod(tokens, self.multiple)
        if unit + 1 >= len(self.base):
            return float(self.stage.chunk_seconds(tokens, context))
        base, slope = self.base[unit], self.slope[unit]
        if rest:
            share = rest / self.multiple
            base += (self.base[unit + 1] - base) * share
            slope += (self.slope[unit + 1] - slope) * share
        return base + slope * context

    def most_units(self, start: int, first: int, share: float, highest: int, spare_s: float, near: int) -> int:
        """Most units up to `highest` that a chunk after `start` tokens may have in a round that holds `first` units and
        a `share` of one, its seconds at most `spare_s`; looks near a guess first."""
        base, slope, tokens = self.base, self.slope, self.tokens
        low, high, step, probe = 0, highest, 1, near if near < highest else highest
        while low < high:
            at = first + probe
            seconds = base[probe] + slope[probe] * start + tokens[at]
            if share:
                seconds += share * (tokens[at + 1] - tokens[at])
            if seconds <= spare_s:
                low = probe
                probe = probe + step if step and probe + step < high else high
            else:
                high = probe - 1
                probe -= step
            step *= 4
            if not step or probe <= low:  # the guess is used up: halve what is left
                step, probe = 0, (low + high + 1) >> 1
        return low

    def most_units_before(self, end: int, rest: int, highest: int, spare_s: float, near: int) -> int:
        """The same of a chunk that ends at token `end`, alone in its round, with `rest` tokens beside its units."""
        base, slope, tokens, multiple = self.base, self.slope, self.tokens, self.multiple
        low, high, step, probe = 0, highest, 1, near if near < highest else highest
        end, share = end - rest, rest / multiple
        while low < high:
            context = end - probe * multiple
            seconds = base[probe] + slope[probe] * context + tokens[probe]
            if share:
                after = probe + 1
                more = base[after] - base[probe] + (slope[after] - slope[probe]) * context
                seconds += share * (more + tokens[after] - tokens[probe])
            if seconds <= spare_s:
                low = probe
                probe = probe + step if step and probe + step < high else high
            else:
                high = probe - 1
                probe -= step
            step *= 4
            if not step or probe <= low:
                step, probe = 0, (low + high + 1) >> 1
        return low

    def thriftier(self, units: int, start: int, first: int, before_s: float) -> int:
        """The thrifty number of units up to `units` if a token costs less with it beside `first` units in the round,
        whose own seconds are `before_s`; kernels fill a card in steps."""
        fewer = self.thrifty[units]
        if not fewer or fewer == units:
            return units
        base, slope, tokens = self.base, self.slope, self.tokens
        fewer_s = base[fewer] + slope[fewer] * start + tokens[first + fewer] - before_s
        units_s = base[units] + slope[units] * start + tokens[first + units] - before_s
        return fewer if fewer_s * units < units_s * fewer else units

    def thriftier_before(self, units: int, end: int) -> int:
        """The same of a chunk that ends at token `end`, alone in its round."""
        fewer = self.thrifty[units]
        if not fewer or fewer == units:
            return units
        base, slope, tokens, multiple = self.base, self.slope, self.tokens, self.multiple
        fewer_s = base[fewer] + slope[fewer] * (end - fewer * multiple) + tokens[fewer]
        units_s = base[units] + slope[units] * (end - units * multiple) + tokens[units]
        return fewer if fewer_s * units < units_s * fewer else units


def undominated(tables: list[StageTable]) -> list[StageTable]:
    """The tables that are above every other one somewhere."""
    columns = [np.concatenate([t.base, t.slope, t.tokens, [t.stage.final_s]]) for t in tables]
    kept: list[int] = []
    for i, mine in enumerate(columns):
        if not any(np.all(mine <= other) for j, other in enumerate(columns) if j in kept or j > i):
            kept.append(i)
    return [tables[i] for i in kept]


def _thrifty(slope: Floats) -> list[int]:
    units = np.arange(len(slope))
    rate = slope / np.maximum(units, 1)
    least = np.minimum.accumulate(np.concatenate([[np.inf], rate[1:]]))
    thrifty: list[int] = np.maximum.accumulate(np.where(rate <= THRIFTY * least, units, 0)).tolist()
    return thrifty
