"""Reads an engine's measurements of a plan's batch, from its benchmark's file or its metrics.

Read are JSON lines of SGLang's `bench_serving --output-file F --output-details`, JSON of `vllm bench serve
--save-result --save-detailed`, and Prometheus's text with `time_to_first_token_seconds` of either.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from db.errors import UserError
from db.files.documents import located, parse, read_utf8
from tuner.plan.plan import Plan

_MOST_BYTES = 256 << 20
_FAMILY = "time_to_first_token_seconds"
_QUANTILES = (0.5, 0.9, 0.99)
Seconds = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]


class _Bench(BaseModel):
    """What both engines' benchmarks write of one run; the lists only with details."""

    model_config = ConfigDict(extra="ignore")

    backend: str | None = None
    completed: int = Field(ge=0)
    input_lens: list[Annotated[int, Field(ge=0)]] | None = None
    ttfts: list[Seconds] | None = None
    start_times: list[Seconds] | None = None
    errors: list[str | None] | None = None
    mean_ttft_ms: Seconds | None = None
    median_ttft_ms: Seconds | None = None
    p99_ttft_ms: Seconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of the batch, predicted and measured, in seconds."""

    name: str
    predicted_s: float | None
    measured_s: float

    @property
    def error(self) -> float | None:
        """How far the prediction was off; 0.1 is 10 % too long."""
        return self.predicted_s / self.measured_s - 1 if self.predicted_s and self.measured_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of an engine."""

    source: str
    """The engine, as the file says, and the kind of file."""
    num_requests: int
    figures: tuple[Figure, ...]
    ttft_s: tuple[float, ...] | None
    """Of each request of the plan, in its order; None where the file does not tell them apart."""
    makespan_s: float | None
    """From the first request's start to the last first token."""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": self.source,
            "num_requests": self.num_requests,
            "figures": [
                {"name": one.name, "predicted_s": one.predicted_s, "measured_s": one.measured_s, "error": one.error}
                for one in self.figures
            ],
            "ttft_s": self.ttft_s,
            "makespan_s": self.makespan_s,
        }


def read_measured(path: Path, plan: Plan) -> Measured:
    """Read a file. Raises UserError for one of another kind, and for one that is of another batch than the plan's."""
    text = read_utf8(path, field="FILE", max_bytes=_MOST_BYTES)
    if not text.lstrip().startswith("{"):
        return _of_metrics(text, path, plan)
    with located(path):
        return _of_bench(parse(_Bench, _last_object(text, path)), path, plan)


def _last_object(text: str, path: Path) -> object:
    """A JSON file's object, or that of the last line of JSON lines: a run is added at the end."""
    lines = [line for line in text.splitlines() if line.strip()]
    for candidate in (text, lines[-1]):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    raise UserError("FILE", path, "must be JSON, JSON lines or Prometheus's text")


def _of_bench(bench: _Bench, path: Path, plan: Plan) -> Measured:
    predicted = _predicted(plan)
    source = f"{bench.backend or 'an engine'}, benchmark"
    if bench.ttfts is None or bench.input_lens is None:
        means_ms = {"mean": bench.mean_ttft_ms, "p50": bench.median_ttft_ms, "p99": bench.p99_ttft_ms}
        summary = {name: 1e-3 * value for name, value in means_ms.items() if value is not None}
        if not summary:
            raise UserError("FILE", path, "must tell TTFT: run the benchmark with --output-details or --save-detailed")
        return Measured(
            source=source,
            num_requests=bench.completed,
            figures=_figures(predicted, summary),
            ttft_s=None,
            makespan_s=None,
        )
    if not len(bench.ttfts) == len(bench.input_lens):
        raise UserError("ttfts", len(bench.ttfts), f"must be as many as input_lens ({len(bench.input_lens)})")
    if bench.errors and any(bench.errors):
        raise UserError("errors", next(filter(None, bench.errors)), "must be empty: a failed request has no TTFT")
    order = _matched(bench.input_lens, plan)
    ttft_s = tuple(bench.ttfts[index] for index in order)
    makespan_s = None
    if bench.start_times is not None and len(bench.start_times) == len(bench.ttfts):
        begun = min(bench.start_times)
        makespan_s = max(start + ttft for start, ttft in zip(bench.start_times, bench.ttfts, strict=True)) - begun
    elif all(request.arrival_s == 0 for request in plan.requests):
        makespan_s = max(ttft_s)  # all were sent at once
    figures = list(_figures(predicted, _summary(ttft_s)))
    if makespan_s:
        predicted_s = plan.predicted.makespan_s if plan.predicted else None
        figures.insert(0, Figure(name="makespan", predicted_s=predicted_s, measured_s=makespan_s))
    return Measured(
        source=source, num_requests=len(ttft_s), figures=tuple(figures), ttft_s=ttft_s, makespan_s=makespan_s
    )


def _matched(lengths: Sequence[int], plan: Plan) -> list[int]:
    """For each request of the plan the place of the measured one of its length; equal ones in the order sent."""
    if len(lengths) != len(plan.requests):
        raise UserError("input_lens", len(lengths), f"must be the plan's {len(plan.requests)} requests")
    places: dict[int, deque[int]] = defaultdict(deque)
    for place, length in enumerate(lengths):
        places[length].append(place)
    found = []
    for request in plan.requests:
        if not places[request.prompt_tokens]:
            raise UserError("input_lens", "other lengths", f"must hold {request.prompt_tokens} for {request.id}")
        found.append(places[request.prompt_tokens].popleft())
    return found


def _of_metrics(text: str, path: Path, plan: Plan) -> Measured:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ModuleNotFoundError as error:
        raise UserError("FILE", path, f"needs {error.name}: pip install 'isochunk[service]'") from None
    buckets: dict[float, float] = defaultdict(float)
    total, count, engine = 0.0, 0.0, ""
    try:
        for family in text_string_to_metric_families(text):
            if family.name.partition(":")[2] != _FAMILY:
                continue
            engine = family.name.partition(":")[0]
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    buckets[float(sample.labels["le"])] += sample.value
                elif sample.name.endswith("_sum"):
                    total += sample.value
                elif sample.name.endswith("_count"):
                    count += sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise UserError("FILE", path, f"must be JSON, JSON lines or Prometheus's text ({error})") from None
    if not count > 0 or not math.isfinite(total):
        raise UserError("FILE", path, f"must hold a histogram vllm:{_FAMILY} or sglang:{_FAMILY} that counted requests")
    summary = {"mean": total / count} | {
        f"p{100 * share:g}": _quantile(sorted(buckets.items()), share * count) for share in _QUANTILES
    }
    measured = {name: value for name, value in summary.items() if value is not None}
    return Measured(
        source=f"{engine}, metrics since its start; quantiles within a bucket",
        num_requests=round(count),
        figures=_figures(_predicted(plan), measured),
        ttft_s=None,
        makespan_s=None,
    )


def _quantile(buckets: Sequence[tuple[float, float]], rank: float) -> float | None:
    """Where so many of the samples lie below, linear within a bucket; None beyond the last bucket that ends."""
    below, seen = 0.0, 0.0
    for end, count in buckets:
        if count >= rank:
            if not math.isfinite(end):
                return None
            return below + (end - below) * (rank - seen) / (count - seen) if count > seen else end
        below, seen = end, count
    return None


def _predicted(plan: Plan) -> dict[str, float]:
    return _summary(plan.predicted.ttft_s) if plan.predicted and plan.predicted.ttft_s else {}


def _summary(ttft_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(ttft_s)
    ranks = {f"p{100 * share:g}": ordered[math.ceil(share * len(ordered)) - 1] for share in _QUANTILES}
    return {"mean": sum(ordered) / len(ordered)} | ranks


def _figures(predicted: dict[str, float], measured: dict[str, float]) -> tuple[Figure, ...]:
    return tuple(
        Figure(name=f"TTFT {name}", predicted_s=predicted.get(name), measured_s=value)
        for name, value in measured.items()
    )
