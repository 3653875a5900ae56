"""Pictures of a plan's rounds as predicted, and of a run's rounds beside them."""

from __future__ import annotations

from collections.abc import Sequence

from db.rows.runs import RoundTime
from runtime.run.prediction import read_prediction
from service.pictures.accuracy import AccuracyPair, accuracy_panel
from service.pictures.svg import Panel
from service.pictures.timeline import Bars, timeline_panel
from tuner.plan.plan import Plan


def predicted_panels(plan: Plan, *, title: str = "Predicted", end_s: float = 0.0) -> list[Panel]:
    """The timeline that the plan predicts; none where it predicts nothing. end_s: where the axis ends at least."""
    timeline = read_prediction(plan).timeline
    if timeline is None:
        return []
    rows, columns = timeline.start_s.shape
    bars = [
        (i, k, float(timeline.start_s[i, k]), float(timeline.finish_s[i, k]))
        for i in range(rows)
        for k in range(columns)
    ]
    return [timeline_panel(plan, Bars(title, bars, max(end_s, timeline.makespan_s)))]


def run_panels(plan: Plan, rounds: Sequence[RoundTime]) -> list[Panel]:
    """The measured timeline, the predicted one on the same axis, and each round's predicted and measured seconds."""
    bars = [(one.round, one.stage, one.start_s, one.finish_s) for one in rounds]
    timeline = read_prediction(plan).timeline
    end_s = max([finish for *_, finish in bars] + ([] if timeline is None else [timeline.makespan_s]))
    measured = timeline_panel(plan, Bars("Measured", bars, end_s))
    pairs = [
        AccuracyPair(f"stage {one.stage}", one.predicted_s, one.finish_s - one.start_s, f"round {one.round}")
        for one in rounds
        if one.predicted_s is not None
    ]
    return [measured, *predicted_panels(plan, end_s=end_s), *accuracy_panel(pairs, "rounds")]
