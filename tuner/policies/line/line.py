"""All tokens of a batch in one line, and what its stretches take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import Floats, StageCost


class TokenLine:
    """Requests one after another, with a place at each unit of the grid; a request's last unit may be shorter."""

    def __init__(self, requests: Sequence[Request], order: Sequence[int], unit: int) -> None:
        self._order, self._unit = order, unit
        self._cached = np.array([requests[index].cached_tokens for index in order], dtype=np.int64)
        self._prompt = np.array([requests[index].prompt_tokens for index in order], dtype=np.int64)
        units = -(-(self._prompt - self._cached) // unit)
        self._first = np.concatenate([[0], np.cumsum(units)])  # place at which each request begins
        self._of = np.repeat(np.arange(len(order)), units)  # request, by its place in the order
        self._start = self._cached[self._of] + (np.arange(len(self._of)) - self._first[self._of]) * unit
        self._end = np.minimum(self._start + unit, self._prompt[self._of])
        self._done = np.concatenate([[0], np.cumsum(self._end - self._start)])

    def __len__(self) -> int:
        return len(self._of)

    def round(self, first: int, end: int) -> Round:
        """The chunks of the places [first, end)."""
        places = range(int(self._of[first]), int(self._of[end - 1]) + 1)
        starts = [int(self._start[first]), *self._cached[places.start + 1 : places.stop].tolist()]
        ends = [*self._prompt[places.start : places.stop - 1].tolist(), int(self._end[end - 1])]
        return tuple(
            Chunk(self._order[place], start, upto - start)
            for place, start, upto in zip(places, starts, ends, strict=True)
        )

    def tokens(self, most: int) -> Ints:
        """Of the stretches of 1, 2, ... `most` places from each place on, as far as the line goes, [places, most]."""
        tokens: Ints = self._done[self._ends(most)] - self._done[:-1, None]
        return tokens

    def seconds(self, stage: StageCost, most: int) -> Floats:
        """The same stretches' seconds on a stage, [places, most]."""
        ends, of, cached, prompt = self._ends(most), self._of, self._cached, self._prompt
        steps = np.arange(1, most + 1) * self._unit
        inner_s = stage.attention.base(steps) + stage.chunk_s + stage.attention.slope(steps) * self._start[:, None]
        rest_s = stage.chunk_seconds(prompt[of] - self._start, self._start, True)[:, None]
        begun_s = stage.chunk_seconds(self._end - cached[of], cached[of], self._end == prompt[of])
        whole_s = np.concatenate([[0.0], np.cumsum(stage.chunk_seconds(prompt - cached, cached, True))])
        first, last = of[:, None], of[ends - 1]
        several_s = rest_s + whole_s[last] - whole_s[np.minimum(first + 1, last)] + begun_s[ends - 1]
        one_s = np.where(ends == self._first[of + 1][:, None], rest_s, inner_s)
        seconds: Floats = np.where(first == last, one_s, several_s)
        seconds += stage.round_overhead_s + stage.tokens_s(self.tokens(most))
        return seconds

    def _ends(self, most: int) -> Ints:
        ends: Ints = np.minimum(np.arange(len(self))[:, None] + np.arange(1, most + 1), len(self))
        return ends
