"""The content of reports: of a plan, of a run, and of a hardware."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from db.errors import UserError
from db.rows.hardware import Hardware, get_hardware
from db.rows.measurements import Measurement, load_measurements
from db.rows.plans import list_plan_rows
from db.rows.runs import RunStatus, list_runs
from db.store.engine import Database
from profiler.hardware.datasheet import published_peak_flops
from profiler.model import PRECISIONS
from runtime.run.preparation import model_shape
from service.pictures.accuracy import AccuracyPair, accuracy_panel
from service.pictures.rounds import predicted_panels, run_panels
from service.pictures.svg import document
from service.reasons.recommendation import gap_in_words, layout_in_words
from service.reasons.run_words import RunDetails, run_in_words
from service.reasons.waterfall_chart import drawing
from service.reports.charts import curves, triangle
from service.reports.page import Section
from service.use_cases.runs import profile_command
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan
from tuner.waterfall.steps import waterfalls

MOST_CURVES = 8
LEAST_POINTS = 3
MOST_LISTED = 30


def plan_sections(plan: Plan) -> list[Section]:
    """What the plan is, when its rounds run by its prediction, and which tokens each of them has."""
    layout, predicted = layout_of(plan.parallel), plan.predicted
    partition = "-".join(map(str, plan.parallel.layer_partition))
    facts = [
        ("model", plan.model.get("name")), ("precision", plan.precision), ("layout", str(layout)),
        ("that is", layout_in_words(layout)), ("layers of each group", partition),
        ("policy", plan.policy), ("rounds", len(plan.rounds)), ("in flight at most", plan.window),
        ("prompts", len(plan.requests)), ("tokens", sum(request.new_tokens for request in plan.requests)),
    ]  # fmt: skip
    if predicted is not None:
        width = None if predicted.uncertainty is None else f"{predicted.uncertainty:.1%}"
        facts += [("predicted", f"{predicted.makespan_s:.4g} s"), ("give or take", width)]
    found = [Section(title="The plan", rows=facts, words=gap_in_words(plan) or "")]
    panels = predicted_panels(plan)
    if panels:
        found.append(Section(title="When rounds run, as predicted", picture=document(panels)))
    return [*found, _attention(plan)]


def run_sections(database: Database, details: RunDetails) -> list[Section]:
    """What the run took and why, where its seconds went, its rounds beside those predicted, and the plan's sections."""
    words = run_in_words(details, profile_command(details), "isochunk run-plan")
    found = [Section(title=f"Run {details.run.id}", rows=words), *_waterfall(database, details)]
    if details.rounds:
        found.append(Section(title="When rounds ran", picture=document(run_panels(details.plan, details.rounds))))
    return [*found, *plan_sections(details.plan)]


def _waterfall(database: Database, details: RunDetails) -> list[Section]:
    """From the published peak of the ranks' devices to the makespan; nothing where no peak is published."""
    hardware = get_hardware(database, details.run.hardware_id)
    precision = PRECISIONS.get(details.plan.precision)
    peak_flops = precision.peak_flops(hardware.device) if precision else None
    if not peak_flops or not details.rounds or details.run.makespan_s is None:
        return []
    try:
        shape = model_shape(details.plan.model, None)
    except UserError:  # its configuration is not on this machine
        return []
    predicted, measured = waterfalls(
        details.plan,
        shape,
        details.rounds,
        details.run.makespan_s,
        details.run.predicted_makespan_s,
        peak_flops=peak_flops,
        slowdown=details.run.slowdown or 1.0,
    )
    picture = drawing(predicted, measured, f"{details.name}: {details.run.makespan_s:.4g} s")
    return [Section(title="Where the seconds went", picture=picture)]


def hardware_sections(database: Database, hardware_id: int) -> list[Section]:
    """What the hardware is and reaches, what is kept of it, and how its plans were predicted and ran."""
    hardware = get_hardware(database, hardware_id)
    rows = load_measurements(database, hardware)
    counts: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for row in rows:
        counts[row.op, row.dtype].append(row)
    kept = [(op, dtype, len(mine), sum(row.noisy for row in mine)) for (op, dtype), mine in sorted(counts.items())]
    facts = [(name, getattr(hardware, name)) for name in ("device", "device_count", "link", "backend", "driver",
                                                          "torch_version", "num_threads")]  # fmt: skip
    found = [
        Section(title="The hardware", rows=facts),
        Section(title="What was measured", columns=("operation", "precision", "points", "noisy"), rows=kept),
    ]
    for dtype in sorted({row.dtype for row in rows}):
        found += _reached(hardware, [row for row in rows if row.dtype == dtype], dtype)
    return found + _plans_and_runs(database, hardware)


def _reached(hardware: Hardware, rows: Sequence[Measurement], dtype: str) -> list[Section]:
    """FLOP/s of products by their rows, and of attention by its chunk, both of one rank."""
    peak = published_peak_flops(hardware.device, dtype)
    products: dict[str, dict[int, float]] = defaultdict(dict)
    attention: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        shape, seconds = row.shape, 1e-6 * row.median_us
        if row.op == "matmul" and not row.variant and seconds:
            rate = 2e-12 * shape["m"] * shape["n"] * shape["k"] / seconds
            products[f"{shape['k']} to {shape['n']}"][shape["m"]] = rate
        elif row.op == "attention" and seconds and {"heads", "head_dim"} <= shape.keys():
            pairs = shape["chunk"] * shape["context"] + shape["chunk"] * (shape["chunk"] + 1) / 2
            rate = 4e-12 * shape["heads"] * shape["head_dim"] * pairs / seconds
            line = attention[f"{shape['heads']} heads, context {shape['context']}"]
            line[shape["chunk"]] = max(rate, line.get(shape["chunk"], 0.0))  # of the kernel that is run
    limit = peak and 1e-12 * peak
    found = []
    for title, lines, x_name in (("Products", products, "rows"), ("Attention", attention, "chunk")):
        longest = sorted(lines.items(), key=lambda item: -len(item[1]))[:MOST_CURVES]
        most = {name: list(line.items()) for name, line in longest if len(line) >= LEAST_POINTS}
        if most:
            picture = curves(most, x_name, "TFLOP/s of a rank", limit)
            found.append(Section(title=f"{title} in {dtype}: what is reached of the peak", picture=picture))
    return found


def _plans_and_runs(database: Database, hardware: Hardware) -> list[Section]:
    runs = [run for run in list_runs(database, hardware=hardware, status=RunStatus.DONE) if run.predicted_makespan_s]
    pairs = [
        AccuracyPair("this hardware", run.predicted_makespan_s, run.makespan_s, f"run {run.id}")
        for run in runs
        if run.predicted_makespan_s is not None and run.makespan_s is not None
    ]
    plans = []
    for row in list_plan_rows(database, hardware=hardware, limit=MOST_LISTED):
        plan = Plan.from_json(row.plan)
        if plan.predicted is not None:
            name = f"{row.id}: {plan.model.get('name')} {layout_of(plan.parallel)} {plan.policy or ''}"
            plans.append((name, f"{plan.predicted.makespan_s:.4g} s"))
    found = []
    if pairs:
        found.append(Section(title="Runs, predicted and measured", picture=document(accuracy_panel(pairs, "runs"))))
    if plans:
        found.append(Section(title="Plans, as predicted", columns=("plan", "makespan"), rows=plans))
    return found


def _attention(plan: Plan) -> Section:
    lengths = [request.prompt_tokens for request in plan.requests]
    longest = lengths.index(max(lengths))
    chunks_of = [[(each.start, each.end) for each in chunks if each.request == longest] for chunks in plan.rounds]
    title = f"Which tokens of prompt {plan.requests[longest].id} each round runs over which keys"
    return Section(title=title, picture=triangle(chunks_of, lengths[longest]))
