"""When rounds start and finish, one round at a time: what a scheduler knows when it decides on the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round
from tuner.serving.answers import NOTHING_BESIDE, Beside

MOST_KEPT = 1 << 16
"""Chunk lengths and round sizes whose seconds are kept."""


@dataclass(slots=True)
class Clock:
    """The exact recurrence, one round at a time."""

    cost: CostModel
    window: int | None
    finish_s: list[float] = field(default_factory=list)
    """Last round's finish on each stage."""
    left_s: deque[float] = field(default_factory=deque)
    """Finish on the last stage of the last `window` rounds."""
    round_seconds: list[float] = field(default_factory=list)
    """Of the last round, on each kind of stage."""
    _kinds: list[int] = field(default_factory=list)
    _chunk: dict[int, list[tuple[float, float, float]]] = field(default_factory=dict)
    _round: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.finish_s:
            return
        self.finish_s = [0.0] * self.cost.pp_size
        self.left_s = deque(maxlen=self.window)
        self._kinds = self.cost.kind_of_stage.tolist()

    def copy(self) -> Clock:
        """The same time and costs, to look ahead."""
        other = replace(self)
        other.finish_s, other.left_s = self.finish_s.copy(), self.left_s.copy()
        return other

    def ready_s(self) -> float:
        """When stage 0 can take the next round."""
        if self.window is None or len(self.left_s) < self.window:
            return self.finish_s[0]
        return max(self.finish_s[0], self.left_s[0] + self.cost.return_s)

    def run(self, chunks: Round, requests: Sequence[Request], ready_s: float, beside: Beside = NOTHING_BESIDE) -> float:
        """Run a round that starts on stage 0 at `ready_s` or later; return its finish on the last stage."""
        total, known = beside.tokens, self._chunk
        for chunk in chunks:
            total += chunk.tokens
        seconds = self.round_s(total).copy()
        for chunk in chunks:
            tokens, start = chunk.tokens, chunk.start
            added = known.get(tokens)
            if added is None:
                added = self._chunk_s(tokens)
            final = start + tokens == requests[chunk.request].prompt_tokens
            for i, (base_s, context_s, final_s) in enumerate(added):
                seconds[i] += base_s + context_s * start
                if final:
                    seconds[i] += final_s
        if beside.tokens:
            for i, kind in enumerate(self.cost.kinds):
                seconds[i] += beside.seconds(kind)
        self.round_seconds = seconds
        return self.run_seconds(seconds, total, ready_s)

    def run_seconds(self, seconds: Sequence[float], tokens: int, ready_s: float) -> float:
        """Run a round of so many tokens that takes these seconds on each kind of stage; return its last finish."""
        hop = self.cost.hop_latency_s + self.cost.hop_token_s * tokens
        earliest, finish_s = max(self.ready_s(), ready_s), self.finish_s
        for k, kind_index in enumerate(self._kinds):
            before = finish_s[k]
            done = (before if before > earliest else earliest) + seconds[kind_index]
            finish_s[k] = done
            earliest = done + hop
        self.left_s.append(done)
        return done

    def round_s(self, tokens: int) -> list[float]:
        """Overhead and token-wise seconds of a round of so many tokens on each kind of stage."""
        kept = self._round.get(tokens)
        if kept is None:
            if len(self._round) >= MOST_KEPT:
                self._round.clear()
            kept = [kind.round_overhead_s + float(kind.tokens_s(tokens)) for kind in self.cost.kinds]
            self._round[tokens] = kept
        return kept

    def _chunk_s(self, tokens: int) -> list[tuple[float, float, float]]:
        """What a chunk of so many tokens adds on each kind of stage: seconds, seconds a context token, and seconds
        where it ends its prompt."""
        if len(self._chunk) >= MOST_KEPT:
            self._chunk.clear()
        self._chunk[tokens] = [
            (float(kind.attention.base(tokens) + kind.chunk_s), float(kind.attention.slope(tokens)), kind.final_s)
            for kind in self.cost.kinds
        ]
        return self._chunk[tokens]
