"""`isochunk tune MODEL`: from measured rows over fitted costs and all layouts to the best plan."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import click

from db.errors import UserError
from db.files.numbers import whole_number
from db.rows.fits import save_fit
from db.rows.hardware import Hardware, get_hardware, list_hardware, save_hardware
from db.rows.measurements import Measurement, load_measurements, measured_dtypes
from db.rows.plans import save_plan_row
from db.rows.processes import process_row
from db.rows.runs import RunStatus, list_runs
from db.store.engine import Database, open_database
from profiler.hardware.device import default_device_type, default_num_threads, describe_hardware
from profiler.model import PRECISIONS, Backend, ModelShape, load_model_shape, precision_of
from profiler.model.architectures.architecture import MAX_LAYERS
from profiler.model.flops import fastest_product_flops, prefill_flops
from profiler.model.shape import default_dtype
from profiler.sequence.kind import SPKind
from service.reasons.precision import AUTO, best_precision, compare_precisions, read_losses
from service.reasons.recommendation import Recommendation
from service.reasons.words import refusals_in_words
from service.use_cases.contest import contest
from service.use_cases.options import chosen, flag_of
from service.use_cases.tune_options import TuneOptions, next_command
from service.use_cases.tune_report import TuneReport
from tuner.fit.correction import PlansRun, fit_correction, load_measured_rounds
from tuner.fit.coverage import plan_coverage
from tuner.fit.holdout import held_out_errors
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork, Rows
from tuner.fit.uncertainty import share_missing, widened_uncertainty
from tuner.fit.whole.costs import Costs, fit_whole_costs, whole_held_out
from tuner.plan.layout import ANY, Layout, Pins, check_experts_fit, check_precision_fits, enumerate_layouts, layout_of
from tuner.plan.plan import Plan, Request
from tuner.plan.stage_order import StageOrder
from tuner.plan.topology import load_topology
from tuner.rounds.schedule import Evaluation
from tuner.search.alternatives import best_simple, one_card
from tuner.search.explanation import explain
from tuner.search.layouts import Candidate, search_layouts, to_plan, with_rounds
from tuner.search.links import Links
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.waterfall.kinds import with_kinds
from tuner.waterfall.moves import moves
from tuner.workload.objective import Objective

# Rows that a card's products are tiled by: between multiples their rate falls, and so finely they are measured.
CHUNK_MULTIPLE = {"cpu": 64, "cuda": 256}
CONVERTED = {"bf16": "bfloat16", "fp8": "fp8"}


def tune_model(
    options: TuneOptions, requests: tuple[Request, ...], rules: Rules, echo: Callable[[str], None] | None
) -> TuneReport:
    """Plan a model's prefill on measured hardware; the fit and the plan are kept in the database."""
    assert options.model is not None
    shape = load_model_shape(options.model, backend=options.backend)
    if options.precision == AUTO:
        return _tune_precisions(options, shape, requests, rules, echo)
    shape, dtype, notes = _as_planned(options, shape)
    pins = pins_of(options)
    topology = None if options.topology is None else load_topology(options.topology)
    world_size = options.world_size or (topology.num_cards if topology and pins == ANY else pins.num_ranks)
    if topology is not None:
        topology.check_world(world_size)
    with open_database(options.db_url) as database:
        hardware = _hardware(database, options, world_size)
        device_type = hardware.device_type
        if options.chunk_multiple is None:
            rules = replace(rules, chunk_multiple=CHUNK_MULTIPLE[device_type])
        if shape.backend is Backend.OWN and options.backend == "auto":
            on_device = load_model_shape(options.model, backend=options.backend, device_type=device_type)
            shape = on_device if on_device.backend is not Backend.OWN else shape
        layouts = enumerate_layouts(shape, world_size, pins)
        target = Target(
            shape=shape,
            dtype=dtype or default_dtype(shape, device_type),
            requests=requests,
            device_type=device_type,
            memory_bytes=options.memory_bytes or hardware.memory_bytes,
            max_new_tokens=options.max_new_tokens,
            threads_per_rank=hardware.num_threads,
            layer_partition=layer_partition_of(options),
        )
        timed = target.dtype
        if shape.backend is not Backend.OWN and PRECISIONS[timed].linears is not None:
            timed = PRECISIONS[timed].activations.name
            notes.append(f"Memory is that of {target.dtype}, times are those of {timed}: no others are measured")
        rows = load_measurements(database, hardware, dtype=timed)
        if not rows:
            allowed = f"measure them first: isochunk profile {options.model} --world-size {world_size} --dtype {timed}"
            raise UserError("measurements", f"none in {timed} on {hardware.device}", allowed)
        num_cards = hardware.device_count if device_type == "cuda" else None
        links = Links(Rows(rows), topology, num_cards=num_cards)
        fit = _fitter(database, hardware, target, links, correct=options.correct)
        candidates = search_layouts(target, layouts, rules, fit)
        candidates = [
            replace(one, assumed=links.assumed(one.layout), alike=links.alike(one.layout)) if one.rounds else one
            for one in candidates
        ]
        precisions = _other_precisions(database, hardware, target, candidates[0].layout)
        report = _report(target, candidates, rules, hardware, rows, options, precisions)
        why = explain(target, report.candidates, rules, with_map=options.plot is not None)
        report = replace(report, explanation=why, plot=options.plot, notes=tuple(notes))
        alone, simple = one_card(target, rules, fit), best_simple(target, candidates, rules)
        if options.measure is not None:
            from service.use_cases.tune_measured import tune_measured  # brings the runtime along

            with process_row(database, "tune --measure") as process_id:
                planned = replace(report, hardware=hardware)
                report = tune_measured(database, process_id, planned, target, rules, options, echo)
        compared = replace(
            report.recommendation,
            plan=report.plan,
            evaluation=report.trials[0].choice.evaluation if report.trials else report.recommendation.evaluation,
            explanation=why,
            one_card=alone,
            simple=simple,
            close=close_layouts(report, rules.objective),
            measured=_measured(report, rules.objective),
        )
        report = replace(report, hardware=hardware, recommendation=_with_mfu(compared, target, hardware, rows))
        if options.keep:
            _keep(database, hardware, target, report)
        return report


def _as_planned(options: TuneOptions, shape: ModelShape) -> tuple[ModelShape, str | None, list[str]]:
    """The model as it is planned, the precision asked for, and notes on how either differs from the checkpoint."""
    dtype, notes = options.dtype, list[str]()
    if dtype is not None:
        precision_of(dtype, field=flag_of(options, "dtype"))
    if options.precision is not None or shape.unread is not None:
        dtype = CONVERTED[options.precision or "bf16"] if dtype is None else dtype
        notes.append(f"Planned as if the weights, {shape.weight_format or shape.dtype}, were converted to {dtype}")
        shape = replace(shape, quantization=None, unread=None)
    if shape.unrun is not None:
        notes.append(f"Planned only: {shape.unrun}")
    return shape, dtype, notes


def _tune_precisions(
    options: TuneOptions,
    shape: ModelShape,
    requests: tuple[Request, ...],
    rules: Rules,
    echo: Callable[[str], None] | None,
) -> TuneReport:
    """In each precision that the hardware was measured in."""
    pins = pins_of(options)
    with open_database(options.db_url) as database:
        hardware = _hardware(database, options, options.world_size or pins.num_ranks)
        measured = sorted(measured_dtypes(database, hardware) & set(PRECISIONS))
    own = default_dtype(shape, hardware.device_type)
    losses = read_losses([path for path in (options.quantize_reports or "").split(",") if path])

    def planned(dtype: str, **changes: Any) -> TuneReport:
        chosen = replace(options, dtype=dtype, precision=None, max_loss=None, quantize_reports=None, **changes)
        return tune_model(chosen, requests, rules, echo)

    trial = {"keep": False, "measure": None, "study": None, "plot": None, "compare": False}

    def tried(dtype: str) -> tuple[Plan, Evaluation]:
        report = planned(dtype, **trial)
        return report.plan, report.recommendation.evaluation

    steps = tuple(compare_precisions(shape, own, measured, losses, options.most_loss, tried))
    return replace(planned(best_precision(steps, rules.objective)), precisions=steps)


def pins_of(options: TuneOptions) -> Pins:
    """What the options keep fixed of the layout; layers of each group say how many groups there are."""
    partition, pp_size, virtual_stages = layer_partition_of(options), options.pp_size, options.virtual_stages
    if partition is not None:
        per_stage = virtual_stages or (max(1, len(partition) // pp_size) if pp_size else 1)
        pp_size, virtual_stages = pp_size or max(1, len(partition) // per_stage), per_stage
        if pp_size * virtual_stages != len(partition):
            allowed = f"{pp_size * virtual_stages} numbers: one a stage (--pp-size) or group (--virtual-stages)"
            raise UserError("--layer-partition", options.layer_partition, allowed)
    return Pins(
        tp_size=options.tp_size,
        ep_size=options.ep_size,
        pp_size=pp_size,
        sp_size=options.sp_size,
        sp_kind=None if options.sp_kind == "auto" else SPKind(options.sp_kind),
        virtual_stages=virtual_stages,
        stage_order=None if options.stage_order == "auto" else StageOrder(options.stage_order),
    )


def layer_partition_of(options: TuneOptions) -> tuple[int, ...] | None:
    """The layers of each group that the user keeps."""
    if options.layer_partition is None:
        return None
    return tuple(
        whole_number("--layer-partition", text, most=MAX_LAYERS) for text in options.layer_partition.split(",")
    )


def _hardware(database: Database, options: TuneOptions, world_size: int) -> Hardware:
    """The hardware asked for, the only one of its kind that was measured, or this machine."""
    if options.hardware_id is not None:
        named = get_hardware(database, options.hardware_id)
        if options.device_type not in (None, named.device_type):
            allowed = f"--hardware {options.hardware_id} is {named.device}, of --device {named.device_type}"
            raise UserError("--device", options.device_type, allowed)
        return named
    known = [stored.hardware for stored in list_hardware(database) if stored.num_measurements]
    asked = options.device_type
    if asked is None or (asked == "cuda" and default_device_type() != "cuda"):  # no device here is meant
        known = [one for one in known if asked in (None, one.device_type)]
        if len(known) == 1:
            click.echo(f"Planning for {known[0].device}, the only hardware measured", err=True)
            return known[0]
    device_type = asked or default_device_type()
    num_threads = options.threads_per_rank or default_num_threads(device_type, world_size)
    return describe_hardware(device_type, num_threads=num_threads)


def _fitter(
    database: Database, hardware: Hardware, target: Target, links: Links, *, correct: bool
) -> Callable[[Layout], Costs]:
    """Costs of a layout: fitted once for all layouts of the same work, load and messages, corrected by earlier runs."""

    fits: dict[object, Costs | UserError] = {}
    plans = PlansRun(database)
    has_runs = bool(list_runs(database, status=RunStatus.DONE, limit=1))

    def fit(layout: Layout) -> Costs:
        check_precision_fits(precision_of(target.dtype), layout.sp_kind, layout.weights)
        check_experts_fit(target.shape, precision_of(target.dtype), layout.weights)
        work = RankWork.on(
            hardware,
            shape=target.shape.spread(**layout.spread),
            dtype=target.dtype,
            tp_size=layout.tp_size,
            sp_size=layout.sp_size,
            sp_kind=layout.sp_kind,
            weights=layout.weights,
            longest_prompt=max(request.prompt_tokens for request in target.requests),
        )
        if links.leaves_host(layout):
            work = replace(work, has_peer_memory=False)
        fit_costs = fit_layer_costs if target.shape.backend is Backend.OWN else fit_whole_costs
        costs: Costs = fit_costs(links.rows_for(layout), work, busy_ranks=layout.world_size)
        if not (correct and has_runs):
            return costs
        rounds = load_measured_rounds(database, hardware, work, cost_model=costs.cost_model, plans=plans)
        return replace(costs, correction=fit_correction(rounds))

    def fit_layout(layout: Layout) -> Costs:
        key = (
            layout.tp_size,
            layout.sp_size,
            layout.sp_kind,
            layout.weights,
            layout.ep_size,
            layout.dispatch,
            layout.pp_size > 1,
            *links.key(layout),
        )
        if key not in fits:
            try:
                fits[key] = fit(layout)
            except UserError as error:
                fits[key] = error
        found = fits[key]
        if isinstance(found, UserError):
            raise found
        return found

    return fit_layout


def _other_precisions(database: Database, hardware: Hardware, target: Target, layout: Layout) -> dict[str, Costs]:
    """Costs of the layout in the other precisions that the model was measured in."""
    found = dict[str, Costs]()
    for dtype in sorted(measured_dtypes(database, hardware) - {target.dtype}):
        rows = load_measurements(database, hardware, dtype=dtype)
        other = replace(target, dtype=dtype)
        with suppress(UserError):
            fit = _fitter(database, hardware, other, Links(Rows(rows), None), correct=False)
            found[dtype] = fit(layout)
    return found


def _report(
    target: Target,
    candidates: list[Candidate],
    rules: Rules,
    hardware: Hardware,
    rows: list[Measurement],
    options: TuneOptions,
    precisions: Mapping[str, Costs],
) -> TuneReport:
    """The best candidate's plan with its rivals and its uncertainty. Raises UserError when every layout is refused."""
    best = candidates[0]
    if best.refusal or best.rounds is None:
        raise UserError("layouts", "", "none can run: " + "; ".join(refusals_in_words(candidates)))
    cost = best.layout_costs.cost_model(best.layer_partition)
    found = contest(cost, target.requests, best.rules(rules), compare=options.compare, planned=best.rounds)
    if found.planned is not best.rounds:
        other = with_rounds(target, best, found.planned, rules)
        best = best if other.refusal else other
    assert best.rounds is not None
    work, layout = best.layout_costs.work, best.layout
    errors_of = held_out_errors if target.shape.backend is Backend.OWN else whole_held_out
    held_out = errors_of(rows, work, busy_ranks=layout.world_size)
    covered = plan_coverage(rows, work, layout, best.rounds.rounds, device_type=target.device_type)
    width = widened_uncertainty(best.uncertainty(held_out), share_missing(covered))
    plan = with_kinds(to_plan(target, best, rules, uncertainty=width), best)
    assert plan.predicted is not None
    plan = replace(
        plan, predicted=replace(plan.predicted, moves=moves(target, best, rules, precisions=precisions))
    )  # fmt: skip
    return TuneReport(
        plan=plan,
        recommendation=Recommendation(
            plan=plan,
            evaluation=best.rounds.evaluation,
            objective=rules.objective,
            hardware=hardware,
            price_per_gpu_hour=options.price_per_gpu_hour,
            coverage=tuple(covered),
            profile_command=_profile_command(options, target, layout),
            next_command=next_command(options),
        ),
        options=chosen(options),
        policies=found.policies,
        replays=found.replays,
        impossible=found.impossible,
        # Other cuts of shared rounds may cost less than the bound knows.
        mean_ttft_bound_s=found.mean_ttft_bound_s if layout.sp_kind is SPKind.NONE else None,
        candidates=[best, *candidates[1:]],
        held_out=held_out,
    )


def _measured(report: TuneReport, objective: Objective) -> float | None:
    """The figure sought of the best run, where plans were run."""
    measured = report.trials[0].measured_s if report.trials else None
    return -measured if measured is not None and objective is Objective.SLA else measured


def close_layouts(report: TuneReport, objective: Objective) -> tuple[str, ...]:
    """Layouts that may be as good as the plan in what is sought, by the width of its prediction."""
    predicted, requests = report.plan.predicted, report.plan.requests
    if predicted is None or predicted.uncertainty is None:
        return ()
    own, best = layout_of(report.plan.parallel), report.recommendation.evaluation
    sign = -1.0 if objective is Objective.SLA else 1.0

    def least(evaluation: Evaluation) -> float:
        """What is made least, were all seconds less by the width."""
        assert predicted is not None and predicted.uncertainty is not None
        return sign * evaluation.quicker(1.0 + predicted.uncertainty, requests).sought(objective)

    return tuple(
        str(candidate.layout)
        for candidate in report.candidates
        if candidate.rounds and not candidate.refusal and candidate.layout != own
        and least(candidate.rounds.evaluation) <= sign * best.sought(objective)
    )  # fmt: skip


def _profile_command(options: TuneOptions, target: Target, layout: Layout) -> str:
    """Measures what the plan leans on."""
    longest = max(request.prompt_tokens for request in target.requests)
    words = ["isochunk", "profile", str(options.model), "--world-size", str(layout.world_size)]
    words += ["--tp-sizes", str(layout.tp_size), "--context-length", str(longest), "--dtype", target.dtype]
    return shlex.join([*words, *(("--sp-sizes", str(layout.sp_size)) if layout.sp_size > 1 else ())])


def _with_mfu(made: Recommendation, target: Target, hardware: Hardware, rows: list[Measurement]) -> Recommendation:
    """With the utilisation of the cards: of the published peak, or of the fastest product measured where none is."""
    chunks = ((chunk.tokens, chunk.start) for chunks in made.plan.rounds for chunk in chunks)
    flops = prefill_flops(target.shape, chunks, len(target.requests))
    rate = flops / made.makespan_s / made.plan.parallel.world_size
    peak = PRECISIONS[target.dtype].peak_flops(hardware.device)
    if peak:
        return replace(made, mfu=rate / peak, mfu_of="the published peak")
    measured = fastest_product_flops(rows, target.dtype)
    return replace(made, mfu=min(1.0, rate / measured), mfu_of="the fastest product measured") if measured else made


def _keep(database: Database, hardware: Hardware, target: Target, report: TuneReport) -> None:
    """Rows of the fit and of the plan."""
    if report.plan.cost_model is not None:
        best = report.candidates[0]
        details = {"held_out": [error.to_json() for error in report.held_out], "layout": str(best.layout)}
        save_fit(database, hardware, target.shape.name, target.dtype, report.plan.cost_model, details)
    save_plan_row(database, report.plan.to_json(), hardware_id=save_hardware(database, hardware))
