"""Plans rounds for the waiting requests: packed in running order under several caps, the best by the recurrence.

Caps come in lists, one cap a request (`rounds.round_budgets`); each list is tried at several scales. Where the
makespan is limited, caps for the makespan alone say first how short it can be, and lists of several weights of the
makespan are tried under that limit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.online.to_come.outlook import NONE_TO_COME, Outlook
from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import Floats
from tuner.recurrence.timeline import simulate
from tuner.rounds.packing.packer import Packer, fill_rounds
from tuner.rounds.schedule import FlatRounds
from tuner.serving.clock import Clock
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective

ROUNDING = 1e-9
"""A round's own time as its cap lets it in again."""
ROUNDS_SWEPT = 320
"""Rounds over all caps of one sweep: with many rounds, their whole number matters less and fewer caps do."""
LEAST_CAPS, MOST_CAPS = 8, 24
SCALES_IN_PASSING = (0.7, 1.0, 1.4)
SLACKS = (1.0, 1.01, 1.03)
"""What the caps of even rounds are scaled by: chunks end on a grid, and what is left over should not need a round."""
FEW_ROUNDS = 8
"""With more rounds their whole number matters less."""
WIDTH = 2.5
"""Caps up to so many times longer and shorter are tried; with many rounds only its square root."""
MOST_PASSES, ROUNDS_VARIED = 6, 40
"""How often single rounds are varied, and over how many rounds in all: in long plans one round matters little."""
LATE = 10.0
"""What a second after a request's limit of waiting counts, beside one before it."""
LOOSENESS = (1.005, 1.0, 1.002, 1.01)
"""Shares of the makespan's limit whose best plans are varied, as many as ROUNDS_VARIED allows."""
FACTORS = (0.7, 0.85, 0.95, 0.98, 1.02, 1.05, 1.15, 1.4)
"""What a single round's cap is scaled by."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Rounds, when the last ends, and the weighted sum of when each request ends, with the wait of those to come."""

    makespan_s: float
    ends_s: float
    rounds: list[Round]

    def score(self, objective: Objective, limit_s: float = math.inf) -> tuple[float, ...]:
        """What to minimise: how far the makespan is over its limit first."""
        if objective is Objective.MAKESPAN:
            return (self.makespan_s, self.ends_s)
        return (max(self.makespan_s - limit_s, 0.0), self.ends_s, self.makespan_s)


@dataclass(frozen=True, slots=True)
class _Fill:
    """Rounds filled up to caps, and where each begins: place of the span, and its token."""

    caps_s: Sequence[float]
    rounds: list[Round]
    opens: list[tuple[int, int]]


def _changed(caps_s: Sequence[float], i: int, factor: float) -> Iterator[list[float]]:
    """Caps of all rounds when round i is so many times as long: what no longer fits moves on to the last round, or the
    next one makes up for it."""
    if i + 1 < len(caps_s):
        longer_s = factor * caps_s[i]
        yield [*caps_s[:i], longer_s, *caps_s[i + 1 :]]
        yield [*caps_s[:i], longer_s, caps_s[i] + caps_s[i + 1] - longer_s, *caps_s[i + 2 :]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """What waits and the pipeline that it will run on."""

    packer: Packer
    requests: Sequence[Request]
    spans: Sequence[tuple[int, int, int]]
    """(request, first token, end) in running order."""
    free_s: Sequence[float]
    """When each stage is free."""
    start_s: float
    """Now; the next round starts no earlier."""
    window: int | None
    objective: Objective
    max_makespan_increase: float = MAX_MAKESPAN_INCREASE
    outlook: Outlook = NONE_TO_COME
    patience_s: float = 0.0
    """Seconds from its arrival after which a request's end counts LATE times; 0 for none."""
    clock: Clock
    _by_caps: dict[tuple[float, ...], _Found] = field(default_factory=dict)
    """What was found under which caps: one list of them is swept for several figures."""
    _by_shape: dict[bytes, _Found] = field(default_factory=dict)

    def rounds(self, caps_s: Sequence[float], least_s: float) -> list[Round]:
        """The best rounds under scaled caps (one a span), none below `least_s`."""
        found = self._sweep(caps_s, least_s, self.objective)
        return min(found, key=lambda each: each.score(self.objective)).rounds

    def rounds_in_passing(
        self, caps_s: Sequence[float], even_s: Mapping[int, float], sizes: Sequence[int], least_s: float
    ) -> list[Round]:
        """The best rounds under a few caps: `caps_s` (one a span) at a few scales, and one of `even_s` for all.

        even_s: the cap for each of a few numbers of rounds. sizes: tokens a round that are tried as well.
        """
        choices = [[scale * cap for cap in caps_s] for scale in SCALES_IN_PASSING]
        for num_rounds, cap_s in even_s.items():
            slacks = SLACKS if num_rounds <= FEW_ROUNDS else SLACKS[:1]
            choices += [[slack * cap_s] * len(caps_s) for slack in slacks]
        seen: set[tuple[int, ...]] = set()
        best: _Found | None = None
        at_least = dict.fromkeys(tuple([max(cap, least_s) for cap in caps]) for caps in choices)
        capped = (
            fill_rounds(
                self.packer,
                self.requests,
                self.spans,
                {span[0]: cap for span, cap in zip(self.spans, caps, strict=True)},
            )
            for caps in at_least
        )
        for rounds in itertools.chain(map(self._of_size, sizes), capped):
            shape = tuple(chunk.tokens for chunks in rounds for chunk in chunks)
            if shape in seen:
                continue
            seen.add(shape)
            found = self._found_quickly(rounds)
            if best is None or found.score(self.objective) < best.score(self.objective):
                best = found
        assert best is not None
        return best.rounds

    def _of_size(self, num_tokens: int) -> list[Round]:
        """Rounds of so many tokens, in running order."""
        multiple, rounds, chunks = self.packer.multiple, list[Round](), list[Chunk]()
        num_tokens = max(min(num_tokens, self.packer.max_round_tokens), multiple)
        room = num_tokens
        for index, first, end in self.spans:
            start = first
            while start < end:
                tokens = end - start if end - start <= room else room // multiple * multiple
                if not tokens:
                    rounds.append(tuple(chunks))
                    chunks, room = [], num_tokens
                    continue
                chunks.append(Chunk(index, start, tokens))
                start, room = start + tokens, room - tokens
        return [*rounds, tuple(chunks)]

    def _found_quickly(self, rounds: list[Round]) -> _Found:
        """As `_found`, round by round: sooner for few rounds."""
        clock, requests = self.clock.copy(), self.requests
        ends_s, weights, plain_s = 0.0, 0.0, 0.0
        for chunks in rounds:
            end_s = clock.run(chunks, requests, self.start_s) - self.start_s
            for chunk in chunks:
                request = requests[chunk.request]
                if chunk.end == request.prompt_tokens:
                    ends_s += request.weight * end_s
                    weights += request.weight
                    plain_s += end_s
                    if self.patience_s:
                        late_s = self.start_s + end_s - request.arrival_s - self.patience_s
                        ends_s += LATE * max(late_s, 0.0)
        busy_s = clock.finish_s[0] - self.start_s
        to_come_s = self.outlook.cost_s(busy_s, clock.finish_s[-1] - clock.finish_s[0])
        return _Found(end_s, (ends_s if weights else plain_s) + to_come_s, rounds)

    def limited_rounds(
        self, fastest_caps_s: Sequence[float], choices: Sequence[Sequence[float]], least_s: float
    ) -> list[Round]:
        """The best rounds under any choice of caps whose makespan is within the limit of the best found under the
        fastest caps.

        Plans a little over the limit are starts too: varying single rounds may bring them back under it.
        """
        found = self._sweep(fastest_caps_s, least_s, Objective.MAKESPAN)
        limit_s = (1.0 + self.max_makespan_increase) * min(each.makespan_s for each in found)
        for caps_s in choices:
            found.extend(self._sweep(caps_s, least_s, self.objective, limit_s))
        best = min(found, key=lambda each: each.score(self.objective, limit_s))
        for share in LOOSENESS[: max(ROUNDS_VARIED // len(best.rounds), 1)]:
            start = min(found, key=lambda each: each.score(self.objective, share * limit_s))
            best = min(best, self._varied(start, limit_s), key=lambda each: each.score(self.objective, limit_s))
        return best.rounds

    def _sweep(
        self, caps_s: Sequence[float], least_s: float, objective: Objective, limit_s: float = math.inf
    ) -> list[_Found]:
        """Plans under scaled caps: a wide sweep, then a closer one around its best."""
        tried: dict[float, _Found] = {}

        def attempt(scale: float) -> None:
            caps = tuple([max(scale * cap, least_s) for cap in caps_s])
            if caps not in self._by_caps:
                spans = zip(self.spans, caps, strict=True)
                rounds = fill_rounds(self.packer, self.requests, self.spans, {span[0]: cap for span, cap in spans})
                self._by_caps[caps] = self._found(rounds)
            tried[scale] = self._by_caps[caps]

        attempt(1.0)
        num_caps = min(max(ROUNDS_SWEPT // len(tried[1.0].rounds), LEAST_CAPS), MOST_CAPS)
        width = WIDTH if num_caps == MOST_CAPS else math.sqrt(WIDTH)
        for reach, count in ((width, num_caps), (width ** (2.0 / num_caps), num_caps // 2)):
            centre = min(tried, key=lambda scale: tried[scale].score(objective, limit_s))
            for scale in np.geomspace(centre / reach, centre * reach, count):
                attempt(float(scale))
        return list(tried.values())

    def _varied(self, start: _Found, limit_s: float) -> _Found:
        """Make single rounds longer or shorter while that helps."""
        best, like = start, self._like(start.rounds)
        for _ in range(min(ROUNDS_VARIED // len(start.rounds), MOST_PASSES)):
            before = best
            for i in range(len(before.rounds)):
                for factor in FACTORS:
                    fills = (self._filled(caps_s, like, i) for caps_s in _changed(like.caps_s, i, factor))
                    others = [self._found(fill.rounds) for fill in fills]
                    better = min([best, *others], key=lambda each: each.score(self.objective, limit_s))
                    if better is not best:
                        best, like = better, self._like(better.rounds)
            if best is before:
                break
        return best

    def _like(self, rounds: Sequence[Round]) -> _Fill:
        """The spans filled up to what these rounds take."""
        return self._filled([self.packer.seconds(chunks, self.requests) for chunks in rounds[:-1]] + [math.inf])

    def _filled(self, caps_s: Sequence[float], like: _Fill | None = None, changed: int = 0) -> _Fill:
        """The spans in running order, each round filled up to its own cap, the last one with all that is left.

        like: a fill whose caps differ in round `changed` and the next one alone: what comes before is taken over from
        it, and what comes after as soon as a round begins at the same token.
        """
        rounds, opens = list[Round](), [(0, self.spans[0][1])]
        if like is not None:
            if changed >= len(like.rounds):
                return like
            rounds, opens = like.rounds[:changed], like.opens[: changed + 1]
        current = self.packer.open_round()
        begun, start = opens[-1]
        for place in range(begun, len(self.spans)):
            index, first, end = self.spans[place]
            start = start if place == begun else first
            while start < end:
                cap_s = caps_s[min(len(rounds), len(caps_s) - 1)] * (1.0 + ROUNDING)
                tokens = self.packer.longest(current, start, end - start, cap_s)
                if not tokens and not current.chunks:
                    tokens = min(self.packer.multiple, end - start)
                if tokens:
                    self.packer.add(current, index, start, tokens, start + tokens == end)
                    start += tokens
                if start < end:
                    rounds.append(tuple(current.chunks))
                    opens.append((place, start))
                    at = len(rounds)
                    if like is not None and at > changed + 1 and like.opens[at : at + 1] == opens[-1:]:
                        return _Fill(caps_s, rounds + like.rounds[at:], opens + like.opens[at + 1 :])
                    current = self.packer.open_round()
        return _Fill(caps_s, [*rounds, tuple(current.chunks)], opens)

    def _found(self, rounds: list[Round]) -> _Found:
        """What the recurrence makes of rounds."""
        flat = FlatRounds.of(rounds)
        shape = flat.tobytes()
        if shape not in self._by_shape:
            self._by_shape[shape] = self._judged(rounds, flat)
        return self._by_shape[shape]

    def _judged(self, rounds: list[Round], flat: FlatRounds) -> _Found:
        cost = self.packer.cost
        prompt = np.array([self.requests[index].prompt_tokens for index in flat.request.tolist()])
        final = flat.start + flat.tokens == prompt
        stage_s = cost.round_seconds(flat.round_index, flat.tokens, flat.start, final)
        hop_s = cost.hop_seconds(np.bincount(flat.round_index, weights=flat.tokens))
        free_s: Floats = np.maximum(np.asarray(self.free_s) - self.start_s, 0.0)
        finish = simulate(stage_s, hop_s, self.window, cost.return_s, free_s=free_s).finish_s[:, -1]
        weights = np.array([self.requests[index].weight for index in flat.request[final].tolist()])
        ends = finish[flat.round_index[final]]
        ends_s = float(ends @ weights) if weights.any() else float(ends.sum())
        return _Found(float(finish[-1]), ends_s, rounds)
