"""What `isochunk runs` does: runs with their plans and rounds, explained, compared and cleared."""

from __future__ import annotations

import shlex

from db.errors import UserError
from db.rows.hardware import get_hardware
from db.rows.plans import get_plan_row
from db.rows.runs import RunStatus, StoredRun, find_run, list_runs, load_round_times
from db.store.engine import Database
from service.reasons.run_words import RunDetails
from tuner.plan.plan import Plan

MOST_OTHERS = 50


def run_details(database: Database, run_id: int | None) -> RunDetails:
    """A run, the newest that ended well without an id, with all that explains it. Raises UserError without any."""
    run = _newest(database) if run_id is None else find_run(database, run_id)
    if run is None:
        allowed = "must be the id of one (isochunk runs)" if run_id is not None else "there is none yet"
        raise UserError("run", "newest" if run_id is None else run_id, allowed)
    plan = Plan.from_json(get_plan_row(database, run.plan_id))
    hardware = get_hardware(database, run.hardware_id)
    others = list_runs(database, plan_id=run.plan_id, status=RunStatus.DONE, hardware=hardware, limit=MOST_OTHERS)
    return RunDetails(
        run=run,
        plan=plan,
        rounds=load_round_times(database, run.id),
        others_s=[one.makespan_s for one in others if one.id != run.id and one.makespan_s is not None],
    )


def profile_command(details: RunDetails) -> str:
    """Measures anew what the run's plan was made from."""
    model = str(details.plan.model.get("name") or "MODEL")
    words = ["isochunk", "profile", model, "--world-size", str(details.plan.parallel.world_size), "--remeasure", "all"]
    return shlex.join(words)


def _newest(database: Database) -> StoredRun | None:
    return next(iter(list_runs(database, status=RunStatus.DONE, limit=1)), None)
