"""The result of a run: seconds of each round, request and pass, tokens, and the error of the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median_low
from typing import Any

from db.rows.runs import RoundTime
from runtime.job.job import Interval, Pass, RankReport, RunJob
from runtime.run.prediction import Prediction
from tuner.plan.plan import WhatIf
from tuner.waterfall.steps import Waterfall


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """One request's outcome."""

    id: str
    token_ids: tuple[int, ...]  # the new ones
    ttft_s: float  # from its arrival to its first token on the last stage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A run. With several passes, rounds and TTFTs are those of the pass with the median makespan (lower of two)."""

    requests: tuple[RequestResult, ...]
    makespan_s: float
    makespans_s: tuple[float, ...]  # of every pass
    rounds: tuple[RoundTime, ...]
    decode_s: tuple[float, ...]  # of each token after the first: from token to token
    rested_makespan_s: float | None = None  # of a pass from rest, where the others were run on settled devices
    memory_bytes: int | None = None  # in use on the fullest card at most
    warm_up_s: float = 0.0  # on the slowest rank, before the first pass
    predicted_makespan_s: float | None = None
    slowdown: float | None = None  # of the machine since its profile: 1.2 is a fifth slower; None: not known
    mfu: float | None = None  # of the published peak of all devices
    mfu_of_ceiling: float | None = None  # of the fastest matmul measured on this hardware
    planned_waterfall: Waterfall | None = None  # from the chip's peak to the makespan, as predicted
    waterfall: Waterfall | None = None  # and as measured
    moves: tuple[WhatIf, ...] = ()  # what would make the plan quicker, as predicted
    run_id: int | None = None

    @property
    def error(self) -> float | None:
        """Relative error of the predicted makespan."""
        if self.predicted_makespan_s is None:
            return None
        return self.predicted_makespan_s / self.makespan_s - 1.0

    @property
    def error_at_profiled_speed(self) -> float | None:
        """Relative error of the prediction, had the machine been as fast as in its profile."""
        if self.predicted_makespan_s is None or self.slowdown is None:
            return None
        return self.predicted_makespan_s * self.slowdown / self.makespan_s - 1.0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token after the first."""
        return sum(self.decode_s) / len(self.decode_s) if self.decode_s else None

    def to_json(self) -> dict[str, Any]:
        """The content of an output file."""
        return {
            "requests": [asdict(request) for request in self.requests],
            "makespan_s": self.makespan_s,
            "makespans_s": self.makespans_s,
            "rested_makespan_s": self.rested_makespan_s,
            "predicted_makespan_s": self.predicted_makespan_s,
            "error": self.error,
            "slowdown": self.slowdown,
            "error_at_profiled_speed": self.error_at_profiled_speed,
            "mfu": self.mfu,
            "mfu_of_ceiling": self.mfu_of_ceiling,
            "decode_s": self.decode_s,
            "warm_up_s": self.warm_up_s,
            "memory_bytes": self.memory_bytes,
            "waterfall": {
                "predicted": self.planned_waterfall and self.planned_waterfall.to_json(),
                "measured": self.waterfall and self.waterfall.to_json(),
            },
            "moves": [asdict(move) for move in self.moves],
            "run_id": self.run_id,
            "rounds": [asdict(time) for time in self.rounds],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTimeline:
    """Start and finish of each round in each group of layers (on each stage, where it holds one), [round][group], in
    seconds from the common start of a pass.
    """

    intervals: tuple[tuple[Interval, ...], ...]

    @property
    def makespan_s(self) -> float:
        """Seconds until the last round leaves the last group."""
        return self.intervals[-1][-1][1]


def merge_passes(passes: Sequence[tuple[int, str, Pass]]) -> MeasuredTimeline:
    """Join one pass of all ranks, (group, host, pass in that group) each.

    Ranks of one host read one clock: their passes are laid on it, from the first rank that left the barrier. Over
    several hosts each rank's own start stands for the common one. Of a group's ranks the first start and the last
    finish count.
    """
    one_host = len({host for _, host, _ in passes}) == 1
    first = min(one.origin_s for _, _, one in passes)
    stages: dict[int, list[list[Interval]]] = {}
    for stage, _, one in passes:
        shift = one.origin_s - first if one_host else 0.0
        stages.setdefault(stage, []).append([(start + shift, finish + shift) for start, finish in one.rounds])
    merged = [
        [(min(start for start, _ in ranks), max(finish for _, finish in ranks)) for ranks in zip(*rows, strict=True)]
        for _, rows in sorted(stages.items())
    ]
    return MeasuredTimeline(intervals=tuple(zip(*merged, strict=True)))


def make_result(
    job: RunJob,
    reports: Sequence[RankReport],
    *,
    prediction: Prediction,
    end_ids: frozenset[int],
) -> RunResult:
    """Turn the ranks' reports into a result; tokens after one of `end_ids` are cut off, as `generate` stops there."""
    timelines = [
        merge_passes([part for report in reports for part in _parts(report, report.passes[index])])
        for index in range(job.repeat)
    ]
    firsts = [part for report in reports if report.first is not None for part in _parts(report, report.first)]
    makespans = [timeline.makespan_s for timeline in timelines]
    timeline = timelines[makespans.index(median_low(makespans))]
    done, round_s = _first_token_s(job, timeline), prediction.round_s
    token_ids = next(report.token_ids for report in reports if report.token_ids is not None)
    return RunResult(
        requests=tuple(
            RequestResult(id=request.id, token_ids=cut_at_end(ids, end_ids), ttft_s=at - request.arrival_s)
            for request, ids, at in zip(job.requests, token_ids, done, strict=True)
        ),
        makespan_s=timeline.makespan_s,
        makespans_s=tuple(makespans),
        rounds=tuple(
            RoundTime(
                round=index,
                stage=stage,
                predicted_s=round_s[index][stage] if round_s else None,
                start_s=start,
                finish_s=finish,
            )
            for index, stages in enumerate(timeline.intervals)
            for stage, (start, finish) in enumerate(stages)
        ),
        decode_s=_decode_s(reports),
        rested_makespan_s=merge_passes(firsts).makespan_s if firsts else None,
        warm_up_s=max(report.warm_up_s for report in reports),
        memory_bytes=max((report.memory_bytes for report in reports if report.memory_bytes is not None), default=None),
        predicted_makespan_s=prediction.makespan_s,
        slowdown=_mean([report.slowdown for report in reports if report.slowdown is not None]),
    )


def _parts(report: RankReport, one: Pass) -> Iterator[tuple[int, str, Pass]]:
    """A rank's pass, by group."""
    for place, group in enumerate(report.groups):
        yield group, report.host, Pass(origin_s=one.origin_s, rounds=one.rounds[place :: len(report.groups)])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def cut_at_end(token_ids: Sequence[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    """Token ids up to and with the first that ends a text."""
    for index, token in enumerate(token_ids):
        if token in end_ids:
            return tuple(token_ids[: index + 1])
    return tuple(token_ids)


def _first_token_s(job: RunJob, timeline: MeasuredTimeline) -> list[float]:
    done = [0.0] * len(job.requests)
    for chunks, stages in zip(job.rounds, timeline.intervals, strict=True):
        for chunk in chunks:
            if chunk.end == job.requests[chunk.request].prompt_tokens:
                done[chunk.request] = stages[-1][1]
    return done


def _decode_s(reports: Sequence[RankReport]) -> tuple[float, ...]:
    if not reports[0].decode.rounds:
        return ()
    timeline = merge_passes([part for report in reports for part in _parts(report, report.decode)])
    finishes = [0.0, *(stages[-1][1] for stages in timeline.intervals)]
    return tuple(after - before for before, after in pairwise(finishes))
