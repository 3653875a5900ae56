"""What `isochunk tune` does, from its options to its report: the tuner's parts put in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import click

from db.engine import Database, open_database
from db.errors import UserError
from db.files import check_writable
from db.fits import save_fit
from db.hardware import Hardware, get_hardware, list_hardware, save_hardware
from db.measurements import load_measurements
from db.numbers import whole_number
from db.plans import save_plan_row
from db.provenance import now
from profiler.device import default_device_type, default_dtype, default_num_threads, describe_hardware
from profiler.model import load_model_shape, precision_of
from service.tune_report import TuneReport
from tuner.autotune import Choice, autotune
from tuner.correction import fit_correction, load_measured_rounds
from tuner.cost_model import MAX_TOKENS, CostModel, load_cost_model
from tuner.fit import LayerCosts, fit_layer_costs
from tuner.holdout import HeldOutError, held_out_errors
from tuner.layout import enumerate_layouts
from tuner.plan import MAX_WINDOW, Parallel, Plan, Request, save_plan
from tuner.planner import Limits, Objective, RoundPlan
from tuner.replay import Replay
from tuner.rows import RankWork
from tuner.search import Candidate, Rules, Target, rounds_to_plan, search_layouts, to_plan
from tuner.uncertainty import makespan_uncertainty
from tuner.workload import load_workload

# Rows that a card's products are tiled by: between multiples their rate falls, and so finely they are measured.
CHUNK_MULTIPLE = {"cpu": 64, "cuda": 256}

Echo = Callable[[str], None] | None


def tune(
    model: str | None,
    *,
    world_size: int | None,
    prompt_lens: str | None,
    workload: str | None,
    rate: float,
    cost_model: str | None,
    tp_size: int | None,
    pp_size: int | None,
    policy: str,
    window: str,
    chunk_multiple: int | None,
    max_round_tokens: int | None,
    max_kv_tokens: int | None,
    objective: str,
    sla_ttft_s: float | None,
    max_new_tokens: int,
    dtype: str | None,
    device_type: str | None,
    threads_per_rank: int | None,
    hardware_id: int | None,
    measure: int | None,
    repeat: int,
    correct: bool,
    output: str | None,
    db_url: str | None,
    echo: Echo,
) -> TuneReport:
    """Plan as `isochunk tune` is asked to; the arguments are its options."""
    _check_positive(
        world_size=world_size, tp_size=tp_size, pp_size=pp_size, threads_per_rank=threads_per_rank,
        max_new_tokens=max_new_tokens, measure=measure, repeat=repeat, sla_ttft_s=sla_ttft_s,
    )  # fmt: skip
    if objective == Objective.SLA and sla_ttft_s is None:
        raise UserError("--sla-ttft-s", "missing", "the objective sla needs a deadline in seconds")
    requests = _requests(prompt_lens, workload, rate, sla_ttft_s)
    rules = Rules(
        policy=policy,
        window=_window(window),
        chunk_multiple=CHUNK_MULTIPLE["cpu"] if chunk_multiple is None else chunk_multiple,
        limits=Limits(max_round_tokens=max_round_tokens, max_kv_tokens=max_kv_tokens),
        objective=Objective(objective),
    )
    if output is not None:
        check_writable("-o", Path(output))
    if cost_model is not None:
        if measure is not None:
            raise UserError("--measure", measure, "a cost model alone cannot be run; give MODEL")
        if model is not None:
            raise UserError("--cost-model", cost_model, "stands instead of a model; give one of the two")
        report = _tune_cost_model(load_cost_model(cost_model), requests, rules, tp_size or 1, pp_size)
        return _write(report, output, None, None)
    if model is None:
        raise UserError("MODEL", "missing", "give a model, or a cost model with --cost-model FILE --pp-size K")
    shape = load_model_shape(model)
    if dtype is not None:
        precision_of(dtype, field="--dtype")
    world = world_size or (tp_size or 1) * (pp_size or 1)
    layouts = enumerate_layouts(shape, world, tp_size=tp_size, pp_size=pp_size)
    database = open_database(db_url)
    hardware = _hardware(database, hardware_id, device_type, threads_per_rank, world)
    planned_device = "cuda" if hardware.backend == "nccl" else "cpu"
    if chunk_multiple is None:
        rules = replace(rules, chunk_multiple=CHUNK_MULTIPLE[planned_device])
    target = Target(
        shape=shape,
        dtype=dtype or default_dtype(shape, planned_device),
        requests=requests,
        device_type=planned_device,
        memory_bytes=hardware.memory_bytes,
        max_new_tokens=max_new_tokens,
        threads_per_rank=hardware.num_threads,
    )
    rows = load_measurements(database, hardware, dtype=target.dtype)
    if not rows:
        allowed = f"measure them first: isochunk profile {model} --world-size {world} --dtype {target.dtype}"
        raise UserError("measurements", f"none in {target.dtype} on {hardware.device}", allowed)

    @cache
    def fit(tp_size: int, busy_ranks: int) -> LayerCosts:
        work = RankWork.on(hardware, shape=shape, dtype=target.dtype, tp_size=tp_size)
        costs = fit_layer_costs(rows, work, busy_ranks=busy_ranks)
        measured = load_measured_rounds(database, hardware, work, cost_model=costs.cost_model)
        return replace(costs, correction=fit_correction(measured)) if correct else costs

    candidates = search_layouts(target, layouts, rules, lambda layout: fit(layout.tp_size, layout.world_size))
    best = candidates[0]
    if best.refusal or best.rounds is None or best.costs is None:
        raise UserError("layouts", "", "none can run: " + "; ".join(f"{c.layout}: {c.refusal}" for c in candidates))
    held_out = held_out_errors(rows, best.costs.work, busy_ranks=best.layout.world_size)
    plan = to_plan(target, best, rules, uncertainty=_uncertainty(held_out, best))
    policies, replays = _compare(best.costs.cost_model(best.layer_partition), requests, rules)
    if plan.cost_model is not None:
        details = {"held_out": [error.to_json() for error in held_out], "layout": str(best.layout)}
        save_fit(database, hardware, shape.name, target.dtype, plan.cost_model, details)
    report = TuneReport(
        plan=plan,
        policies=policies,
        replays=replays,
        candidates=candidates,
        held_out=held_out,
        correction=best.costs.correction,
        pace=best.costs.pace,
        hardware=hardware,
    )
    if measure is not None:
        report = _measure(report, target, rules, measure, repeat, hardware, db_url, echo)
    return _write(report, output, database, hardware)


def _check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not value > 0:  # NaN is not either
            raise UserError(f"--{name.replace('_', '-')}", value, "must be more than 0")


def _requests(
    prompt_lens: str | None, workload: str | None, rate: float, sla_ttft_s: float | None
) -> tuple[Request, ...]:
    if (prompt_lens is None) == (workload is None):
        raise UserError("--prompt-lens", prompt_lens or "missing", "give either --prompt-lens or --workload")
    if workload is not None:
        requests = tuple(load_workload(workload, rate=rate))
    else:
        assert prompt_lens is not None
        requests = tuple(
            Request(id=f"r{index}", prompt_tokens=_length(text)) for index, text in enumerate(prompt_lens.split(","))
        )
    return tuple(replace(request, sla_ttft_s=sla_ttft_s) for request in requests) if sla_ttft_s else requests


def _length(text: str) -> int:
    return whole_number("--prompt-lens", text, most=MAX_TOKENS)


def _window(text: str) -> int | None:
    if text.lower() == "none":
        return None
    return whole_number("--window", text, most=MAX_WINDOW)


def _hardware(
    database: Database, hardware_id: int | None, device_type: str | None, threads: int | None, world_size: int
) -> Hardware:
    """The hardware asked for, this machine where it was measured, or the only one that was."""
    if hardware_id is not None:
        return get_hardware(database, hardware_id)
    device_type = device_type or default_device_type()
    here = describe_hardware(device_type, num_threads=threads or default_num_threads(device_type, world_size))
    known = [stored.hardware for stored in list_hardware(database) if stored.num_measurements]
    if any(hardware.fingerprint == here.fingerprint for hardware in known) or len(known) != 1:
        return here
    click.echo(f"Nothing was measured on this machine; planning for {known[0].device}", err=True)
    return known[0]


def _uncertainty(held_out: list[HeldOutError], candidate: Candidate) -> float:
    assert candidate.costs is not None
    return makespan_uncertainty(held_out, candidate.costs.correction, extrapolates=candidate.extrapolates)


def _tune_cost_model(
    cost: CostModel, requests: tuple[Request, ...], rules: Rules, tp_size: int, pp_size: int | None
) -> TuneReport:
    if pp_size is None and cost.pp_size == 1:
        raise UserError("--pp-size", "missing", "a cost model with one stage for all needs the number of stages")
    cost = cost.for_pp_size(pp_size or cost.pp_size)
    planned = rules.plan(cost, requests)
    plan = rounds_to_plan(
        planned,
        requests=requests,
        model={},
        precision="unknown",
        parallel=Parallel(tp_size=tp_size, pp_size=cost.pp_size, layer_partition=(1,) * cost.pp_size),
        window=rules.window,
        cost_model=cost.to_json(),
    )
    policies, replays = _compare(cost, requests, rules)
    return TuneReport(plan=plan, policies=policies, replays=replays)


def _compare(cost: CostModel, requests: tuple[Request, ...], rules: Rules) -> tuple[list[RoundPlan], list[Replay]]:
    """A batch is planned by every policy; requests that arrive over time are replayed under every policy."""
    if any(request.arrival_s > 0.0 for request in requests):
        return [], rules.replay(cost, requests)
    return rules.compare(cost, requests), []


def _measure(
    report: TuneReport,
    target: Target,
    rules: Rules,
    num_trials: int,
    repeat: int,
    hardware: Hardware,
    db_url: str | None,
    echo: Echo,
) -> TuneReport:
    """Run the best of layouts x policies on this machine."""
    from runtime.run import run_plan

    here = describe_hardware(target.device_type, num_threads=hardware.num_threads)
    if here.fingerprint != hardware.fingerprint:
        raise UserError("--measure", num_trials, f"needs the hardware that is planned for, {hardware.device}")
    study = f"{target.shape.name}-{now():%Y%m%dT%H%M%S}"
    choices = []
    for candidate in report.candidates:
        if candidate.refusal or candidate.costs is None:
            continue
        for planned in rules.compare(candidate.costs.cost_model(candidate.layer_partition), target.requests):
            chosen = replace(candidate, rounds=planned)
            one = to_plan(target, chosen, rules, uncertainty=_uncertainty(report.held_out, chosen))
            expected = planned.evaluation
            predicted_s = expected.makespan_s if rules.objective is Objective.MAKESPAN else expected.mean_ttft_s
            choices.append(
                Choice(layout=str(candidate.layout), policy=planned.policy, plan=one, predicted_s=predicted_s)
            )

    def run(plan: Plan) -> float:
        result = run_plan(
            plan,
            random_weights=True,
            max_new_tokens=target.max_new_tokens,
            device_type=target.device_type,
            num_threads=hardware.num_threads,
            repeat=repeat,
            db_url=db_url,
            kind="tune-trial",
            study=study,
        )
        if echo:
            parallel = plan.parallel
            echo(f"TP{parallel.tp_size} PP{parallel.pp_size} {plan.policy}: {result.makespan_s:.3f} s measured")
        if rules.objective is Objective.MAKESPAN:
            return result.makespan_s
        return sum(request.ttft_s for request in result.requests) / len(result.requests)

    trials = autotune(choices, run, num_trials=num_trials)
    if trials[0].measured_s is None:
        raise UserError("--measure", num_trials, f"every run failed, the first with: {trials[0].error}")
    return replace(report, trials=trials, plan=trials[0].choice.plan)


def _write(report: TuneReport, output: str | None, database: Database | None, hardware: Hardware | None) -> TuneReport:
    if output is not None:
        save_plan(output, report.plan)
    if database is not None:
        hardware_id = None if hardware is None else save_hardware(database, hardware)
        save_plan_row(database, report.plan.to_json(), hardware_id=hardware_id)
    return replace(report, output=output)
