"""Makes a plan for a remote caller: contents of files come in the request, the answer is JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.errors import UserError

MOST_BARS = 40_000
"""Rounds times stages of a timeline that is given whole; of a longer one the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The options of `isochunk tune` with the content of its files."""

    options: Mapping[str, Any]
    cost_model: Mapping[str, Any] | None = None
    requests: tuple[Mapping[str, Any], ...] | None = None
    """Lines of a trace."""
    db_url: str | None = None
    keep: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MadePlan:
    """A plan, how it compares, when its rounds run, and its id where it was kept."""

    plan_id: int | None
    report: dict[str, Any] = field(repr=False)
    timeline: dict[str, Any] | None = field(repr=False)


def make_plan(request: PlanRequest) -> MadePlan:
    """Plan as `isochunk tune` does. Raises UserError as it does, the names of files left out."""
    from service.use_cases.tune import tune
    from service.use_cases.tune_options import TuneOptions

    with tempfile.TemporaryDirectory(prefix="planned-") as folder:
        files: dict[str, Any] = {}
        if request.cost_model is not None:
            files["cost_model"] = f"{folder}/cost_model"
            Path(files["cost_model"]).write_text(json.dumps(request.cost_model))
        if request.requests is not None:
            files["workload"] = f"{folder}/requests"
            Path(files["workload"]).write_text("\n".join(json.dumps(line) for line in request.requests))
        try:
            options = TuneOptions(**request.options, **files, db_url=request.db_url, keep=request.keep)
            report = tune(options)
        except UserError as error:
            value = str(error.value).replace(f"{folder}/", "")
            raise UserError(error.field.replace(f"{folder}/", ""), value, error.allowed) from None
    plan = report.plan.to_json()
    plan_id = _kept(request, plan) if request.keep else None
    return MadePlan(plan_id=plan_id, report=report.to_json(), timeline=timeline_of(plan))


def timeline_of(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """When each round of a plan file starts and ends on each stage, in seconds; None where it predicts nothing."""
    from runtime.run.prediction import read_prediction
    from tuner.plan.plan import Plan

    plan = Plan.from_json(dict(content))
    timeline = read_prediction(plan).timeline
    if timeline is None:
        return None
    num_rounds = max(1, MOST_BARS // plan.parallel.pp_size)
    return {
        "num_rounds": len(plan.rounds),
        "start_s": timeline.start_s[:num_rounds].round(9).tolist(),
        "finish_s": timeline.finish_s[:num_rounds].round(9).tolist(),
    }


def _kept(request: PlanRequest, plan: dict[str, Any]) -> int:
    from db.rows.plans import save_plan_row
    from db.store.engine import open_database

    with open_database(request.db_url) as database:
        return save_plan_row(database, plan)
