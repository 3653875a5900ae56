"""What `isochunk plot` does: pictures of a plan, of a run of it, of a trace under every policy, or of ranges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from db.errors import UserError
from db.files.documents import located, parse, read_json
from db.files.replacement import check_writable, replace_file
from service.use_cases.options import check_options, option
from tuner.workload.trace import is_trace
from tuner.workload.trace_format import AUTO, TimeUnit, TraceFormat, parse_format, parse_unit

SUFFIXES = (".svg", ".png")
PNG_WIDTH = 1720
"""Pixels: twice the picture's units, for dense screens."""
MOST_RATES = 12
DRAWN = "a plan, a run's --output, a quantize report or a trace"
MOST_KEYS = 4
"""Of a file that is refused: how many are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotOptions:
    """Options of `isochunk plot`. Raises UserError for values that are not allowed, alone or together."""

    file: str | None = option(None, f"{DRAWN.capitalize()}.", flags=("FILE",))
    output: str | None = option(None, "Write the picture here: .svg or .png.", flags=("-o", "--output"), is_file=True)
    plan: str | None = option(None, "Of a run: its plan. Of a trace: a plan whose costs to take.", is_file=True)
    cost_model: str | None = option(None, "Of a trace: the cost model.", is_file=True)
    pp_size: int | None = option(None, "Number of stages, for a cost model of one.", above=0)
    window: int | None = option(None, "Rounds that may be in flight.", above=0)
    rates: str = option("0.5,1,1.5", "Speeds at which a trace is replayed.", metavar="X,X,...")
    workload_format: str = option(AUTO, "How a trace is written.", choices=(AUTO, *TraceFormat))
    time_unit: str = option(AUTO, "What a trace's times count.", choices=(AUTO, *TimeUnit))
    num_requests: int | None = option(200, "Read only so many lines of a trace.", metavar="N", above=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.file is None:
            raise UserError("FILE", "missing", f"give {DRAWN}")
        if self.output is None or Path(self.output).suffix not in SUFFIXES:
            raise UserError("-o", self.output or "missing", "a file that ends in .svg or .png is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plotted:
    """A picture that was written."""

    output: Path
    notes: tuple[str, ...] = ()
    """How a trace was read, a sentence each."""


def plot(options: PlotOptions) -> Plotted:
    """Draw what the file holds and write the picture. Raises UserError for a file that is none of them."""
    assert options.file is not None and options.output is not None
    output = Path(options.output)
    check_writable("-o", output)
    content, notes = _content(options), tuple[str, ...]()
    if content is None:
        picture, notes = _trace_picture(options)
    elif str(content.get("schema", "")).startswith("isochunk.plan/"):
        picture = _plan_picture(options.file)
    elif "makespans_s" in content:
        picture = _run_picture(options.file, content, options.plan)
    elif "linears" in content and "precision" in content:
        picture = _range_picture(options.file, content)
    else:
        named = ", ".join(list(content)[:MOST_KEYS]) + ("..." if len(content) > MOST_KEYS else "")
        what = f"of schema {content['schema']}" if "schema" in content else f"an object with {named or 'nothing in it'}"
        raise UserError("FILE", options.file, f"is {what}; {DRAWN} is needed")
    replace_file(output, _png(picture) if output.suffix == ".png" else picture.encode())
    return Plotted(output=output, notes=notes)


def _content(options: PlotOptions) -> dict[str, Any] | None:
    """The file's object; None for a trace, whose lines are one each."""
    path = options.file
    assert path is not None
    if options.workload_format != AUTO:
        return None
    try:
        content = read_json(path, field="FILE")
    except UserError as refused:
        if is_trace(path, field="FILE"):
            return None
        raise UserError("FILE", path, f"{DRAWN} is needed; {refused.allowed}") from None
    if not isinstance(content, dict):
        raise UserError("FILE", path, f"is JSON, but no object; {DRAWN} is needed")
    return None if "input_length" in content else content


def _plan_picture(path: str) -> str:
    from service.pictures.rounds import predicted_panels
    from service.pictures.svg import document
    from service.pictures.token_cost import token_cost_panel
    from tuner.plan.cost_model import CostModel
    from tuner.plan.plan import load_plan

    plan = load_plan(path)
    panels = predicted_panels(plan, title=f"{plan.policy or 'The plan'}, predicted")
    if not panels:
        raise UserError("FILE", path, "predicts nothing: it has neither round_s nor a cost_model to draw")
    if plan.cost_model is not None:
        panels.append(token_cost_panel(plan, CostModel.from_json(plan.cost_model)))
    return document(panels)


def _run_picture(path: str, content: dict[str, Any], plan_path: str | None) -> str:
    from db.rows.runs import RoundTime
    from service.pictures.rounds import run_panels
    from service.pictures.svg import document
    from tuner.plan.plan import load_plan

    if plan_path is None:
        raise UserError("--plan", "missing", "a run's output does not say what its rounds hold; give its plan")
    plan = load_plan(plan_path)
    with located(path):
        rounds = parse(tuple[RoundTime, ...], content.get("rounds"))
    ran = {(one.round, one.stage) for one in rounds}
    if ran != {(index, group) for index in range(len(plan.rounds)) for group in range(plan.parallel.num_groups)}:
        raise UserError("--plan", plan_path, f"has other rounds or stages than {path}")
    return document(run_panels(plan, rounds))


def _range_picture(path: str, content: dict[str, Any]) -> str:
    from service.pictures.ranges import RangedLinear, range_panels
    from service.pictures.svg import document

    with located(path):
        linears = parse(tuple[RangedLinear, ...], content["linears"])
    seen = [linear for linear in linears if linear.seen is not None]
    if not seen:
        raise UserError("FILE", path, "tells no ranges: quantize with --calibration")
    title = (
        f"{content.get('model')} in {content.get('precision')}: ranges on {content.get('calibration_tokens')} tokens"
    )
    return document(range_panels(seen, title))


def _trace_picture(options: PlotOptions) -> tuple[str, tuple[str, ...]]:
    from service.pictures.latency import load_panel, ttft_panel
    from service.pictures.svg import document
    from tuner.replays.comparison import compare_replays
    from tuner.workload.workload import load_workload

    assert options.file is not None
    cost = _cost_of(options)
    by_rate, notes = {}, tuple[str, ...]()
    for rate in _rates(options.rates):
        workload = load_workload(
            options.file,
            rate=rate,
            limit=options.num_requests,
            format=parse_format(options.workload_format),
            unit=parse_unit(options.time_unit),
        )
        replays = compare_replays(cost, workload.requests, everything=False, window=options.window)
        fixed = [one for one in replays if one.policy.startswith("fixed:")]
        best = min(fixed, key=lambda one: one.evaluation.mean_ttft_s)
        by_rate[rate] = [
            replace(one, policy="fixed, best") if one is best else one
            for one in replays
            if one not in fixed or one is best
        ]
        notes = notes if rate != 1.0 and notes else workload.notes
    shown = 1.0 if 1.0 in by_rate else next(iter(by_rate))
    title = f"{Path(options.file).name} at {shown:g} times its rate"
    return document([ttft_panel(by_rate[shown], title), load_panel(by_rate)]), notes


def _cost_of(options: PlotOptions) -> Any:
    from tuner.fit.smoothing import load_measured_model
    from tuner.plan.cost_model import CostModel
    from tuner.plan.plan import load_plan

    if options.cost_model is not None:
        cost, _ = load_measured_model(options.cost_model)
        if options.pp_size is None and cost.pp_size == 1:
            raise UserError("--pp-size", "missing", "a cost model with one stage for all needs the number of stages")
        return cost.for_pp_size(options.pp_size or cost.pp_size)
    if options.plan is None:
        raise UserError("--cost-model", "missing", f"{options.file} is drawn as a trace; give --cost-model or --plan")
    plan = load_plan(options.plan)
    if plan.cost_model is None:
        raise UserError("--plan", options.plan, "has no cost_model")
    return CostModel.from_json(plan.cost_model).for_pp_size(plan.parallel.pp_size)


def _rates(texts: str) -> list[float]:
    parts = texts.split(",")
    if len(parts) > MOST_RATES:
        raise UserError("--rates", texts, f"at most {MOST_RATES} rates")
    rates = []
    for part in parts:
        try:
            rate = float(part)
        except ValueError:
            rate = 0.0
        if not 0.0 < rate < 1e6:
            raise UserError("--rates", part, "numbers above 0 between commas")
        rates.append(rate)
    return rates


def _png(picture: str) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "-o", ".png", "needs the package resvg-py (pip install isochunk[png]); .svg needs none"
        ) from None
    return bytes(resvg_py.svg_to_bytes(svg_string=picture, width=PNG_WIDTH, background="white"))
