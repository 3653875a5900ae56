"""A run as a Chrome Trace file: groups of layers as rows, rounds as bars, measured and predicted, for Perfetto."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from db.files.documents import write_json
from db.rows.runs import RoundTime
from runtime.run.prediction import read_prediction
from runtime.run.result import RunResult
from tuner.plan.plan import Plan, Round

MEASURED, PREDICTED = 1, 2  # process ids of the two groups of rows


def write_trace(path: Path, plan: Plan, result: RunResult) -> None:
    """Write the trace of a run, atomically. Format: Trace Event Format, JSON object form, times in microseconds."""
    write_json(path, trace_of(plan, result.rounds))


def trace_of(plan: Plan, rounds: Sequence[RoundTime]) -> dict[str, Any]:
    """The trace of a plan whose rounds took these times; of one that was not run (none) what it predicts."""
    return {"traceEvents": list(trace_events(plan, rounds)), "displayTimeUnit": "ms"}


def trace_events(plan: Plan, rounds: Sequence[RoundTime]) -> Iterator[dict[str, Any]]:
    """One complete event (`ph` X) for each round in each group (on each stage), and the names of the rows."""
    if rounds:
        yield from _rows(MEASURED, "measured", plan)
        yield from _bars(MEASURED, plan, ((time.round, time.stage, time.start_s, time.finish_s) for time in rounds))
    timeline = read_prediction(plan).timeline
    if timeline is not None:
        yield from _rows(PREDICTED, "predicted", plan)
        indices = np.ndindex(timeline.start_s.shape)
        predicted = ((i, k, float(timeline.start_s[i, k]), float(timeline.finish_s[i, k])) for i, k in indices)
        yield from _bars(PREDICTED, plan, predicted)


def _rows(process: int, name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    parallel = plan.parallel
    for group, (stage, layers) in enumerate(zip(parallel.stage_of_group, parallel.layer_partition, strict=True)):
        where = f"stage {stage}" if parallel.virtual_stages == 1 else f"group {group} on stage {stage}"
        label = {"name": f"{where} ({layers} layers)"}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": group, "args": label}


def _bars(process: int, plan: Plan, times: Iterable[tuple[int, int, float, float]]) -> Iterator[dict[str, Any]]:
    for index, stage, start_s, finish_s in times:
        yield {
            "ph": "X",
            "name": f"round {index}",
            "pid": process,
            "tid": stage,
            "ts": start_s * 1e6,
            "dur": (finish_s - start_s) * 1e6,
            "args": {"tokens": sum(c.tokens for c in plan.rounds[index]), "chunks": _chunks(plan, plan.rounds[index])},
        }


def _chunks(plan: Plan, chunks: Round) -> str:
    return ", ".join(f"{plan.requests[chunk.request].id}[{chunk.start}:{chunk.end}]" for chunk in chunks)
