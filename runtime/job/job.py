"""The job that every rank of a run receives, and the report that it returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from profiler.model import ModelShape
from profiler.sequence.kind import SequenceCut, round_cuts
from runtime.job.probe import Probe
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import Chunk, Parallel, Request, Round

Interval = tuple[float, float]
"""Start and finish, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJob:
    """A checked plan with its prompts and the location of its weights."""

    shape: ModelShape
    parallel: Parallel
    requests: tuple[Request, ...]
    rounds: tuple[Round, ...]
    window: int | None
    prompts: tuple[tuple[int, ...], ...]  # token ids of each request
    weights: Path | None  # None: random weights
    dtype: str
    max_new_tokens: int
    repeat: int
    kernels: AttentionKernels
    cuts: tuple[SequenceCut, ...] = ()  # of each round; none: as usual for the kind
    overlaps: bool = True  # whether exchanges run beside compute where they can; off to measure what that gives
    probe: Probe | None = None  # tells how fast the machine is; None: its profile has none
    settle_s: float = 0.0  # passes before the measured ones take at least so long together: clocks fall under load

    @property
    def round_tokens(self) -> tuple[int, ...]:
        """Tokens of each round."""
        return tuple(sum(chunk.tokens for chunk in chunks) for chunks in self.rounds)

    @property
    def round_cuts(self) -> tuple[SequenceCut, ...]:
        """How each round is cut among the ranks that share its rows."""
        return round_cuts(self.parallel.sp_kind, self.cuts, len(self.rounds))

    @property
    def cached_rounds(self) -> list[Round]:
        """Rounds that fill the KV of cached tokens, no larger than the plan's own; they run before the clock starts."""
        most = max(self.round_tokens)
        return [
            (Chunk(index, start, min(most, request.cached_tokens - start)),)
            for index, request in enumerate(self.requests)
            for start in range(0, request.cached_tokens, most)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over the rounds on one rank, in seconds after `origin_s` of the host's clock.

    Where the rank's stage holds several groups of layers, each round's groups follow one another.
    """

    origin_s: float
    rounds: tuple[Interval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank measured; token ids come from the first rank of the last stage."""

    stage: int
    groups: tuple[int, ...]  # of layers, that the stage holds
    host: str
    warm_up_s: float  # kernels, connections and recordings of the plan's rounds, cached tokens
    first: Pass | None  # from rest, where passes that do not count came before the others
    passes: tuple[Pass, ...]
    decode: Pass
    slowdown: float | None = None  # of the machine since its profile, beside the run
    memory_bytes: int | None = None  # of the card in use at most, by whatever holds it; None on a CPU
    token_ids: tuple[tuple[int, ...], ...] | None  # the new ones of each request
