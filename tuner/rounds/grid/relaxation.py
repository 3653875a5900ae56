"""The relaxation of a batch on the chunk grid, with the cost tables as they are: stairs, floors and several kernels.

`rounds.relaxation` puts one straight line under a table, so that every round costs a token what the best one does. Here
each chunk is charged what it costs itself. For a cap m on every round of a plan whose chunks end on the grid:

    sum over rounds of e(i)  >=  sum over requests of D(request, m)

D is the least over all cuts of a request of the sum over its chunks (c tokens after p) of A(c, p) + share, A being
what the chunk adds beside token-wise work. The share is its part, by tokens, of its round's overhead and token-wise
work w(T): c w(T) / T for a round of T >= c tokens. The cap is on e(i) and what handing on the round's tokens takes,
T hop_token. The chunk leaves the round m - A for w(T) + T hop_token, which never falls, so that T is at most some
t(m - A), and the share is at least c times the least w(T) / T for T from c to there. Where there is
one request a round is a chunk, T = c. Both only fall with a higher cap.

All functions are least over the stages of a set. w is linear between the points of all their tables, or above the
chord there, and w(T) / T of a chord is least at an end: points and both ends of the range are enough. D is a
shortest path over the grid, D(b) = min over a < b of D(a) + cost(a, b), for all caps and all requests with the same
cached tokens at once: only a prompt's last chunk may be off the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.stage_cost import Floats, StageCost, TableAttention
from tuner.rounds.grid.token_table import TokenTable
from tuner.rounds.relaxation import Work

NUM_PRICES, NUM_NUMBERS = 8, 600
"""Of a chunk, and of rounds, at which sums by their number are taken."""
MOST_STEPS = 3_000_000
"""(position, chunk) pairs, all cached lengths together, up to which the cuts are searched: about 0.1 s."""
LARGE = 0.4
"""Share of all tokens above which the longest request's cuts are searched on their own."""
SLACK = 1e-9


def is_curved(stages: Iterable[StageCost]) -> bool:
    """Whether straight lines lie well below these stages' tables."""
    return any(isinstance(stage.attention, TableAttention) or len(stage.token_count) > 2 for stage in stages)


def _grouped(work: Work) -> list[Group]:
    """By their cached tokens; a request with most of all tokens is a group of its own."""
    new = work.prompt - work.cached
    longest = int(np.argmax(new))
    key = work.cached.copy()
    if new[longest] > LARGE * new.sum():
        key[longest] = -1.0
    groups = []
    for each in np.unique(key):
        mine = key == each
        others = float(new.sum() - new[mine].min())
        groups.append(Group(float(work.cached[mine][0]), np.sort(work.prompt[mine]), others))
    return groups


def _least_between(places: Floats, values: Floats) -> Floats:
    """What a function that is convex and not negative is at least between its values at neighbouring places, given as
    [rows, places]: it lies above the chords on either side, carried on. Values are infinite up to some place."""
    step = np.diff(places)
    with np.errstate(invalid="ignore"):
        slope = np.diff(values, axis=1) / step  # nan and inf where a value is infinite
    from_left = values[:, 1:-1] + np.minimum(slope[:, :-1], 0.0) * step[1:]
    from_right = values[:, 1:-1] - np.maximum(slope[:, 1:], 0.0) * step[:-1]
    none = np.zeros((len(values), 1))
    sides = [np.concatenate([none, from_left], axis=1), np.concatenate([from_right, none], axis=1)]
    known = [np.where(np.isfinite(side), side, 0.0) for side in sides]
    return np.where(np.isinf(values[:, 1:]), np.inf, np.maximum(np.maximum(*known), 0.0))


@dataclass(frozen=True, slots=True)
class Group:
    """Requests whose cuts are searched at once: alike in their cached tokens, the longest last."""

    cached: float
    prompts: Floats
    others: float  # most tokens that all requests beside one of these have together


class GridRelaxation:
    """The least sums and the efficiency of rounds under caps, for a set of stages and a batch.

    longest_cap_s: of the caps that are asked for. hop_token_s: seconds in which a token is handed on.
    """

    def __init__(
        self, stages: Iterable[StageCost], work: Work, multiple: int, longest_cap_s: float, hop_token_s: float
    ) -> None:
        self._stages, self._work, self._multiple = list(stages), work, multiple
        self.longest_cap_s, self._hop_token_s = longest_cap_s, hop_token_s
        self._most = min(work.new_tokens, work.max_round_tokens)
        self._final_s = min(stage.final_s for stage in self._stages)
        units = np.arange(1, int(self._most // multiple) + 2, dtype=np.float64) * multiple
        alone = self._capped_s(units) + self._added_s(units, np.zeros_like(units))
        most_units = max(int(np.searchsorted(alone, longest_cap_s * (1.0 + SLACK), side="right")), 1)
        self._chunk = units[:most_units]  # [most_units]: tokens of the chunks that the caps may let through
        self._own = np.where(self._chunk <= self._most, self._own_s(self._chunk), np.inf)
        self._hop_s = hop_token_s * self._chunk
        self._base = self._added_s(self._chunk, np.zeros_like(self._chunk))
        self._slope = self._added_s(self._chunk, np.ones_like(self._chunk)) - self._base
        self._groups = _grouped(work)
        self._table: TokenTable | None = None
        if len(work.prompt) > 1 and self.num_steps <= MOST_STEPS:
            self._table = TokenTable.of(self._stages, max(self._most, 1.0), self._chunk, hop_token_s)
            self._at = np.searchsorted(self._table.count, self._chunk)

    @property
    def num_steps(self) -> float:
        """Pairs of a position and a chunk that are looked at for each cap."""
        longest = sum(group.prompts[-1] - group.cached for group in self._groups)
        return float(longest) / self._multiple * len(self._chunk) + len(self._work.prompt) * len(self._chunk)

    @property
    def is_single(self) -> bool:
        """Whether there is one request: its chunks are the rounds, in order."""
        return len(self._work.prompt) == 1

    @cached_property
    def free_paths(self) -> tuple[Floats, Floats]:
        """Of one request, under the longest cap: the least seconds up to each grid point and to its end, and from each
        to the end."""
        (group,) = self._groups
        num_units, free = self._units(group), np.array([np.inf])
        least = self._paths(group, free)[0]
        starts, _, last = self._last(group, group.prompts[-1], free)
        rest = np.full(num_units + 1, np.inf)
        rest[starts] = last[0]
        for end in range(num_units, 0, -1):
            width, cost = self._cost(group, end, free)
            before = slice(end - width, end)
            rest[before] = np.minimum(rest[before], cost[0][::-1] + rest[end])
        return np.append(least, rest[0]), rest

    @cached_property
    def alone(self) -> list[Floats]:
        """Of each group: the least seconds up to each grid point where every chunk has a round of its own, [points]."""
        found = []
        for group in self._groups:
            least = np.zeros(self._units(group) + 1)
            for end in range(1, len(least)):
                added = self._added_before(group, end)
                width = len(added)
                least[end] = (least[end - width : end][::-1] + self._own[:width] + added).min()
            found.append(least)
        return found

    def path_under(self, from_s: Floats, to_s: Floats) -> Floats:
        """Of one request: the least its rounds sum to, [num_rows], when each is capped by where it starts and ends.

        from_s: caps by the grid point of the start, [num_rows, points]. to_s: by that of the end, the prompt's end
        being the last, [num_rows, points + 1].
        """
        from_s, to_s = from_s * (1.0 + SLACK), to_s * (1.0 + SLACK)
        (group,) = self._groups
        num_units, free = self._units(group), np.array([np.inf])
        least = np.full((len(from_s), num_units + 1), np.inf)
        least[:, 0] = 0.0
        for end in range(1, num_units + 1):
            width, cost = self._cost(group, end, free)
            before, cost, capped_s = slice(end - width, end), cost[:, ::-1], (cost + self._hop_s[:width])[:, ::-1]
            allowed = (capped_s <= from_s[:, before]) & (capped_s <= to_s[:, end : end + 1])
            least[:, end] = np.where(allowed, least[:, before] + cost, np.inf).min(axis=1)
        starts, chunk, cost = self._last(group, group.prompts[-1], free)
        capped_s = cost + self._hop_token_s * chunk
        allowed = (capped_s <= from_s[:, starts]) & (capped_s <= to_s[:, -1:])
        found: Floats = np.where(allowed, least[:, starts] + cost, np.inf).min(axis=1) * (1.0 - SLACK)
        return found

    def sums(self, caps_s: Floats) -> Floats:
        """The least that all rounds can sum to when none exceeds the cap, inf where no plan is possible; [num_caps]."""
        caps_s = caps_s * (1.0 + SLACK)
        total = np.zeros(len(caps_s))
        for _, count, seconds in self._least_of_each(caps_s):
            total += count * seconds
        if not self.is_single:
            total = np.maximum(total, self._by_number(caps_s))
        return total * (1.0 - SLACK)

    def least_of_shortest(self, caps_s: Floats) -> Floats:
        """D of each request under every cap, the shortest prompt first; [requests, num_caps]."""
        found = list(self._least_of_each(caps_s * (1.0 + SLACK)))
        found.sort(key=lambda one: one[0])
        return np.repeat(np.stack([least for _, _, least in found]), [count for _, count, _ in found], axis=0)

    def _least_of_each(self, caps_s: Floats, chunk_s: Floats | None = None) -> Iterator[tuple[float, int, Floats]]:
        """The tokens of requests that are alike, how many they are, and D of each under every cap, [num_caps].

        chunk_s: what every chunk costs instead of its share of w, by cap.
        """
        for group in self._groups:
            least = self._paths(group, caps_s, chunk_s)
            for length, count in zip(*np.unique(group.prompts, return_counts=True), strict=True):
                starts, _, cost = self._last(group, length, caps_s, chunk_s)
                yield float(length), int(count), (least[:, starts] + cost).min(axis=1) + self._final_s

    def _by_number(self, caps_s: Floats) -> Floats:
        """The least sums by the number N of rounds: w of all of them is at least N times that of the mean round on the
        convex hull of w, and no request has more than N chunks; [num_caps].

        The least that a request's chunks add with at most N of them is at least D(p) - p N, D(p) being the least where
        each costs p more, for any p. And N rounds under a cap m sum to at most N m, with handing on all tokens.
        """
        prices, number = self.prices, self.numbers
        rows, price_of = np.repeat(caps_s, len(prices)), np.tile(prices, len(caps_s))
        added = np.zeros((len(caps_s), len(number)))
        for _, count, least in self._least_of_each(rows, price_of):
            added += count * self._added_by_number(least.reshape(len(caps_s), len(prices)))
        return self._least_of_numbers(self.own_by_number(caps_s), added, number * caps_s[:, None])

    @cached_property
    def prices(self) -> Floats:
        """What a chunk costs more when sums are taken by the number of rounds."""
        usual_s = float(np.median(self._base)) / max(len(self._chunk), 1) + float(self._own_s(self._chunk[:1])[0])
        return np.concatenate([[0.0], usual_s * np.geomspace(1e-3, 0.5, NUM_PRICES - 1)])

    @cached_property
    def numbers(self) -> Floats:
        """Numbers of rounds at which sums are taken; there is at most one round a token."""
        found: Floats = np.unique(np.geomspace(1.0, max(self._work.new_tokens, 1.0), NUM_NUMBERS).round())
        return found

    def own_by_number(self, caps_s: Floats) -> Floats:
        """w of so many equal rounds under each cap, inf where they cannot hold all tokens: [num_caps, numbers]."""
        return self.numbers * self._hull_s(caps_s, max(self._work.new_tokens, 1.0) / self.numbers)

    def _added_by_number(self, by_price: Floats) -> Floats:
        """What a request's chunks add at least when there are at most so many: [rows, numbers] from D(p), [rows,
        prices]."""
        with np.errstate(invalid="ignore"):
            bounds = by_price[:, :, None] - self.prices[:, None] * self.numbers
        found: Floats = np.maximum(bounds.max(axis=1), 0.0)
        return found

    def _least_of_numbers(self, own_s: Floats, added_s: Floats, reach_s: Floats) -> Floats:
        """The least sum, [rows], over all numbers of rounds that can sum to it: the columns are numbers of rounds.

        reach_s: what they sum to at most, with handing on. own_s is convex in the number, added_s falls, and reach_s
        rises. So between two numbers the sum is at least the least of own_s there and added_s of the larger one.
        """
        at = own_s + added_s
        between = _least_between(self.numbers, own_s) + added_s[:, 1:]
        between = np.where(np.diff(self.numbers) > 1.0, between, np.inf)
        reach_s = reach_s * (1.0 + SLACK) - self._hop_token_s * self._work.new_tokens
        possible = [np.where(at <= reach_s, at, np.inf), np.where(between <= reach_s[:, 1:], between, np.inf)]
        found: Floats = np.concatenate(possible, axis=1).min(axis=1)
        return found

    def _hull_s(self, caps_s: Floats, tokens: Floats) -> Floats:
        """The convex hull of w over the rounds that each cap allows, inf above them: [num_caps, len(tokens)]."""
        table = self._table
        assert table is not None
        found = np.full((len(caps_s), len(tokens)), np.inf)
        for row, cap_s in enumerate(caps_s):
            last = int(np.searchsorted(table.capped_s, cap_s, side="right"))
            count, seconds = table.count[: last + 1], table.seconds[: last + 1]  # one point beyond: the hull only falls
            keep: list[int] = []
            for i in range(len(count)):
                while len(keep) > 1 and (seconds[keep[-1]] - seconds[keep[-2]]) * (count[i] - count[keep[-1]]) >= (
                    seconds[i] - seconds[keep[-1]]
                ) * (count[keep[-1]] - count[keep[-2]]):
                    keep.pop()
                keep.append(i)
            found[row] = np.where(tokens <= count[-1], np.interp(tokens, count[keep], seconds[keep]), np.inf)
        return found

    def _units(self, group: Group, length: float | None = None) -> int:
        """Grid points after the cached tokens and before the end of a prompt, the longest if none is given."""
        return int(((group.prompts[-1] if length is None else length) - group.cached - 1) // self._multiple)

    def _own_s(self, tokens: Floats) -> Floats:
        """w of a round of these tokens."""
        found: Floats = np.min([stage.round_overhead_s + stage.tokens_s(tokens) for stage in self._stages], axis=0)
        return found

    def _capped_s(self, tokens: Floats) -> Floats:
        """And with handing it on."""
        return self._own_s(tokens) + self._hop_token_s * tokens

    def _added_s(self, tokens: Floats, context: Floats) -> Floats:
        """A of chunks of these tokens after so much context."""
        base = np.min([stage.attention.base(tokens) for stage in self._stages], axis=0)
        slope = np.min([stage.attention.slope(tokens) for stage in self._stages], axis=0)
        added: Floats = min(stage.chunk_s for stage in self._stages) + base + slope * context
        return added

    def _added_before(self, group: Group, end: int) -> Floats:
        """A of the chunks that end at a grid point, the shortest first."""
        chunk = self._chunk[: min(end, len(self._chunk))]
        context = group.cached + end * self._multiple - chunk
        return self._base[: len(chunk)] + self._slope[: len(chunk)] * context

    def _cost(self, group: Group, end: int, caps_s: Floats, chunk_s: Floats | None = None) -> tuple[int, Floats]:
        """How many chunks end at a grid point, and their costs, the shortest first: [caps, chunks]."""
        added = self._added_before(group, end)
        width = len(added)
        own, spare = self._own[:width], caps_s[:, None] - added
        fits = own + self._hop_s[:width] <= spare
        if chunk_s is not None:
            return width, np.where(fits, added + chunk_s[:, None], np.inf)
        if self._table is None:
            return width, np.where(fits, own + added, np.inf)
        spare = np.minimum(spare, self._capped_s(self._chunk[:width] + group.others))
        return width, added + self._table.shares(self._chunk[:width], self._at[:width], spare, own)

    def _paths(self, group: Group, caps_s: Floats, chunk_s: Floats | None = None) -> Floats:
        """D up to each grid point, [caps, num_units + 1]."""
        num_units = self._units(group)
        least = np.full((len(caps_s), num_units + 1), np.inf)
        least[:, 0] = 0.0
        for end in range(1, num_units + 1):
            width, cost = self._cost(group, end, caps_s, chunk_s)
            least[:, end] = (least[:, end - width : end][:, ::-1] + cost).min(axis=1)
        return least

    def _added_last(self, group: Group, length: float) -> tuple[Ints, Floats, Floats]:
        """Grid points from which a prompt's last chunk may go, its tokens and its A, what ending it costs left out.

        It may hold the most whole steps of the grid that the caps let through and a part of one beside them.
        """
        last = self._units(group, length)
        starts: Ints = np.arange(last, max(last - len(self._chunk) - 1, -1), -1, dtype=np.int64)
        before: Floats = starts.astype(np.float64) * self._multiple
        chunk: Floats = length - group.cached - before
        return starts, chunk, self._added_s(chunk, group.cached + before)

    def _last(
        self, group: Group, length: float, caps_s: Floats, chunk_s: Floats | None = None
    ) -> tuple[Ints, Floats, Floats]:
        """Grid points from which a prompt's last chunk may go, its tokens and its costs, [caps, points]; what ending
        the prompt costs leaves the round less, but is not counted."""
        starts, chunk, added = self._added_last(group, length)
        own = np.where(chunk <= self._most, self._own_s(chunk), np.inf)
        spare = caps_s[:, None] - added - self._final_s
        fits = own + self._hop_token_s * chunk <= spare
        if chunk_s is not None:
            return starts, chunk, np.where(fits, added + chunk_s[:, None], np.inf)
        if self._table is None:
            return starts, chunk, np.where(fits, own + added, np.inf)
        spare = np.minimum(spare, self._capped_s(chunk + group.others))
        at = np.minimum(np.searchsorted(self._table.count, chunk), len(self._table.count) - 1)
        return starts, chunk, added + self._table.shares(chunk, at, spare, own)
