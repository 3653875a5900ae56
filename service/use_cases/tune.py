"""What `isochunk tune` does, from its options to its report: the tuner's parts put in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from db.errors import UserError
from db.files.numbers import whole_number
from db.files.replacement import check_writable, replace_file
from service.reasons.recommendation import Recommendation
from service.use_cases.contest import contest
from service.use_cases.options import chosen
from service.use_cases.tune_options import TuneOptions, next_command
from service.use_cases.tune_report import TuneReport
from tuner.fit.smoothing import load_measured_model
from tuner.plan.cost_model import CostModel
from tuner.plan.layout import layout_of
from tuner.plan.plan import MAX_WINDOW, Parallel, Request, save_plan
from tuner.plan.stage_cost import MAX_SECONDS, MAX_TOKENS
from tuner.rounds.problem import Limits, arrive_over_time
from tuner.rounds.round_plan import Alternative, rounds_to_plan
from tuner.search.rules import Rules
from tuner.workload.classes import describe_classes, parse_weights, weighted
from tuner.workload.objective import Objective
from tuner.workload.prompt_lens import parse_prompt_lens
from tuner.workload.trace_format import parse_format, parse_unit
from tuner.workload.workload import NO_CACHE, Workload, load_workload

DEFAULT_MULTIPLE = 64

Echo = Callable[[str], None] | None


def tune(options: TuneOptions, *, echo: Echo = None) -> TuneReport:
    """Plan as the options ask for, from a cost model file or from what was measured; write the plan.

    echo: called with a line for each measured run.
    """
    workload, rules = workload_of(options), rules_of(options)
    requests, notes = workload.requests, workload.notes
    if options.output is not None:
        check_writable("-o", Path(options.output))
    if options.plot is not None:
        check_writable("--plot", Path(options.plot))
    if options.cost_model is not None:
        cost, smoothed = load_measured_model(options.cost_model)
        report, notes = _tune_cost_model(cost, requests, rules, options), notes + smoothed
    else:
        from service.use_cases.tune_model import tune_model  # brings the fit and the database along

        report = tune_model(options, requests, rules, echo)
        notes += report.notes
    if options.output is not None:
        save_plan(options.output, report.plan)
    if options.plot is not None and report.explanation is not None:
        from service.reasons.layout_map import drawing

        replace_file(Path(options.plot), drawing(report.explanation).encode())
    return replace(report, output=options.output, notes=notes)


def workload_of(options: TuneOptions) -> Workload:
    """The batch or the trace that is planned."""
    if options.workload is not None:
        workload = load_workload(
            options.workload,
            rate=options.rate,
            limit=options.num_requests,
            format=parse_format(options.workload_format),
            unit=parse_unit(options.time_unit),
            cache_tokens=_cache_tokens(options.prefix_cache),
        )
    else:
        assert options.prompt_lens is not None
        requests = parse_prompt_lens(options.prompt_lens)
        workload = Workload(requests=requests, output_tokens=(None,) * len(requests), notes=())
    requests = workload.requests
    if options.sla_ttft_s is not None:
        if options.sla_ttft_s > MAX_SECONDS:
            raise UserError("--sla-ttft-s", options.sla_ttft_s, f"must be at most {MAX_SECONDS:g}")
        requests = tuple(replace(each, sla_ttft_s=options.sla_ttft_s) for each in requests)
    notes = workload.notes
    if options.decode == "beside":
        requests = _decoding(requests, workload.output_tokens, options)
        notes += (_decode_note(requests),)
    if options.priority is not None:
        requests = weighted(requests, parse_weights(options.priority))
    objective = Objective(options.objective)
    has_deadlines = any(each.sla_ttft_s is not None for each in requests)
    has_limits = objective is Objective.SLA and any(each.sla_tpot_s is not None for each in requests)
    if objective.needs_deadlines and not has_deadlines and not has_limits:
        allowed = f"the objective {options.objective} needs deadlines: sla_ttft_s in the workload, or this option"
        raise UserError("--sla-ttft-s", "missing", allowed)
    if options.max_makespan_increase is not None and arrive_over_time(requests):
        allowed = "has no meaning for requests that arrive over time: most of their makespan is waiting for the last"
        raise UserError("--max-makespan-increase", options.max_makespan_increase, allowed)
    return replace(workload, requests=requests, notes=(*notes, *describe_classes(requests)))


def _decoding(
    requests: tuple[Request, ...], output_tokens: tuple[int | None, ...], options: TuneOptions
) -> tuple[Request, ...]:
    """Requests whose answers are decoded in the rounds of others' prompts."""
    if not any(output_tokens):
        raise UserError("--decode", options.decode, "the workload must say output_length, and none of its lines does")
    return tuple(
        replace(one, output_tokens=max(tokens or 1, 1), sla_tpot_s=options.sla_tpot_s or one.sla_tpot_s)
        for one, tokens in zip(requests, output_tokens, strict=True)
    )


def _decode_note(requests: tuple[Request, ...]) -> str:
    tokens = sum(request.output_tokens for request in requests)
    silent = sum(request.output_tokens == 1 for request in requests)
    without = f"; {silent} have no more than their first" if silent else ""
    return f"Decoded beside prefill: {tokens} tokens of {len(requests)} answers{without}."


def _cache_tokens(text: str) -> int | None:
    """Tokens of the prefix cache, None where it has no limit."""
    words = {"infinite": None, "off": NO_CACHE}
    name = text.strip().lower()
    return words[name] if name in words else whole_number("--prefix-cache", text, most=MAX_TOKENS)


def rules_of(options: TuneOptions) -> Rules:
    """How rounds are made."""
    return Rules(
        policy=options.policy,
        window=_window(options.window),
        chunk_multiple=DEFAULT_MULTIPLE if options.chunk_multiple is None else options.chunk_multiple,
        limits=Limits(max_round_tokens=options.max_round_tokens, max_kv_tokens=options.max_kv_tokens),
        objective=Objective(options.objective),
        max_makespan_increase=options.most_makespan_increase,
        num_trials=options.num_trials or 0,
    )


def _tune_cost_model(cost: CostModel, requests: tuple[Request, ...], rules: Rules, options: TuneOptions) -> TuneReport:
    if options.pp_size is None and cost.pp_size == 1:
        raise UserError("--pp-size", "missing", "a cost model with one stage for all needs the number of stages")
    cost = cost.for_pp_size(options.pp_size or cost.pp_size)
    found = contest(cost, requests, rules, compare=options.compare)
    plan = rounds_to_plan(
        found.planned,
        requests=requests,
        model={},
        precision="unknown",
        parallel=Parallel(
            tp_size=options.tp_size or 1,
            pp_size=cost.pp_size,
            virtual_stages=cost.virtual_stages,
            stage_order=cost.stage_order,
            layer_partition=(1,) * len(cost.stages),
        ),
        window=rules.window,
        cost_model=cost.to_json(),
        tuned_for=rules.tuned_for(requests),
    )
    simple = next((one for one in found.policies if one.policy.startswith("fixed:")), None)
    recommendation = Recommendation(
        plan=plan,
        evaluation=found.planned.evaluation,
        objective=rules.objective,
        price_per_gpu_hour=options.price_per_gpu_hour,
        simple=None if simple is None else Alternative(layout=layout_of(plan.parallel), rounds=simple),
        next_command=next_command(options),
    )
    return TuneReport(
        plan=plan,
        recommendation=recommendation,
        options=chosen(options),
        policies=found.policies,
        replays=found.replays,
        impossible=found.impossible,
        mean_ttft_bound_s=found.mean_ttft_bound_s,
    )


def _window(text: str) -> int | None:
    if text.lower() == "none":
        return None
    return whole_number("--window", text, most=MAX_WINDOW)
