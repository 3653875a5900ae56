"""How many points of a profile, and seconds, predictions need, by the order in which they are measured.

    python -m benchmarks.profile_order [--profile FILE] [--runs FILE] [--seconds N,...] [--output FILE]

A whole profile is measured again on paper: its rows come one by one in each order, and after so many seconds what is
there is fitted and predicts plans that were run on the same cards. Compared are the whole profile's predictions and
what the runs took.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from db.errors import UserError
from db.files.documents import read_json, write_json
from db.files.numbers import whole_number
from db.rows.archive import import_hardware
from db.rows.hardware import Hardware, get_hardware
from db.rows.measurements import Measurement, load_measurements
from db.store.engine import open_database
from profiler.kernels.attention_kernel import PREFERENCE, AttentionKernel
from profiler.measure.expected_time import expected_seconds
from profiler.model import ModelShape, load_model_shape
from profiler.points.grid import Grid
from profiler.points.point import Op, Point
from service.cli.output import print_table
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.layout import Layout
from tuner.plan.plan import Request, Round
from tuner.rounds.schedule import evaluate
from tuner.search.layouts import search_layouts
from tuner.search.rules import Rules
from tuner.search.target import Target

RESULTS = Path(__file__).parent / "results"
DTYPE, CHUNK_MULTIPLE, CONTEXT_LENGTH = "bfloat16", 256, 131072
SECONDS = (20, 30, 45, 60, 90, 120, 180, 240, 400)
BATCHES: dict[str, Sequence[int]] = {
    "one32k": [32768], "one48k": [49152], "one128k": [131072], "short40": [3000] * 40,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A plan that was run, with the rounds that the whole profile leads to."""

    name: str
    layout: Layout
    layer_partition: tuple[int, ...]
    requests: tuple[Request, ...]
    rounds: tuple[Round, ...]
    told_s: float
    measured_s: float


class Cards:
    """A profile of some cards, and plans that were run there."""

    def __init__(self, profile: Path, runs: Path) -> None:
        with TemporaryDirectory() as folder, open_database(f"sqlite:///{folder}/rows.db") as database:
            imported = import_hardware(database, profile)
            self.hardware: Hardware = get_hardware(database, imported.hardware_id)
            self.rows = load_measurements(database, self.hardware, dtype=DTYPE)
        content = read_json(runs, field="runs")
        assert isinstance(content, dict)
        self.shape: ModelShape = load_model_shape(str(content["model"]))
        self.runs = [self.run_of(row) for row in content["rows"] if row["workload"] in BATCHES]

    def costs(self, rows: Sequence[Measurement], layout: Layout) -> LayerCosts:
        """Fitted to these rows."""
        work = RankWork.on(self.hardware, shape=self.shape, dtype=DTYPE, tp_size=layout.tp_size)
        return fit_layer_costs(rows, work, busy_ranks=layout.world_size)

    def run_of(self, row: Mapping[str, object]) -> Run:
        """The plan of a run, made anew from the whole profile."""
        layout = Layout(tp_size=int(str(row["tp"])), pp_size=int(str(row["pp"])))
        lengths = BATCHES[str(row["workload"])]
        requests = tuple(Request(id=f"r{index}", prompt_tokens=length) for index, length in enumerate(lengths))
        target = Target(
            shape=self.shape, dtype=DTYPE, requests=requests, device_type="cuda",
            memory_bytes=self.hardware.memory_bytes,
        )  # fmt: skip
        rules = Rules(policy=str(row["policy"]), chunk_multiple=CHUNK_MULTIPLE)
        costs = self.costs(self.rows, layout)
        (found,) = search_layouts(target, [layout], rules, lambda _: costs)
        assert found.rounds is not None
        return Run(
            name=f"{row['workload']} {row['policy']} {layout}",
            layout=layout,
            layer_partition=found.layer_partition,
            requests=requests,
            rounds=found.rounds.rounds,
            told_s=found.rounds.makespan_s,
            measured_s=float(str(row["measured"])),
        )

    def predict_s(self, rows: Sequence[Measurement], run: Run) -> float | None:
        """What these rows say of the run; None where they say nothing."""
        try:
            costs = self.costs(rows, run.layout)
        except UserError:
            return None
        return evaluate(costs.cost_model(run.layer_partition), run.requests, run.rounds).makespan_s

    def points(self) -> list[Point]:
        """Points of the profile's grid that have a row."""
        kernels = {row.variant for row in self.rows if row.op == Op.ATTENTION}
        grid = Grid(
            shape=self.shape, dtype=DTYPE, tp_sizes=(1, 2, 4), world_size=self.hardware.device_count,
            context_length=CONTEXT_LENGTH, device_type="cuda",
            kernels=tuple(kernel for kernel in PREFERENCE if kernel in kernels) or (AttentionKernel.CUDNN_GRAPH,),
        )  # fmt: skip
        keys = {row.key for row in self.rows}
        return [point for point in grid.points() if point.key in keys]


def orders(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The orders that are compared."""
    shuffled = list(points)
    random.Random(3).shuffle(shuffled)
    by_level = sorted(points, key=lambda point: (point.level, point.flops))
    return {"by need": list(points), "by level": by_level, "at random": shuffled}


def seconds_of(point: Point, *, cards: int = 1) -> float:
    """Roughly what a point takes; what needs one card alone is shared out among so many."""
    seconds = expected_seconds(point, "cuda", 1)
    alone = point.group_size == 1 and point.op not in (Op.LAYER, Op.ROUND_OVERHEAD)
    return seconds / cards if alone else seconds


def curve(
    cards: Cards, order: Sequence[Point], seconds: Sequence[int], cost: Callable[[Point], float]
) -> list[dict[str, float | int | None]]:
    """After each of so many seconds: points, and errors of the predictions."""
    row_of: dict[object, list[Measurement]] = {row.key: [row] for row in cards.rows}
    of_ranks = [row for row in cards.rows if row.op == "rank_layer"]
    ends, found = np.cumsum([cost(point) for point in order]), list[dict[str, float | int | None]]()
    for limit_s in seconds:
        count = int(np.searchsorted(ends, limit_s, side="right"))
        rows = [row for point in order[:count] for row in row_of[point.key]]
        layers = {(row.shape["chunk"], row.shape["context"]) for row in rows if row.op == Op.LAYER}
        rows += [row for row in of_ranks if (row.shape["chunk"], row.shape["context"]) in layers]
        told = [(run, cards.predict_s(rows, run)) for run in cards.runs]
        known = [(run, seconds) for run, seconds in told if seconds is not None]
        off = [abs(seconds / run.told_s - 1.0) for run, seconds in known]
        errors = [abs(seconds / run.measured_s - 1.0) for run, seconds in known]
        found.append(
            {"seconds": limit_s, "points": count, "predicted": len(known),
             "off_median": float(np.median(off)) if off else None, "off_worst": max(off, default=None),
             "error_median": float(np.median(errors)) if errors else None, "error_worst": max(errors, default=None)}
        )  # fmt: skip
        if count == len(order):
            break
    return found


def main() -> None:
    """Print the curve of each order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", type=Path, default=RESULTS / "h100x4.json.gz")
    parser.add_argument("--runs", type=Path, default=RESULTS / "h100x4-llama-3-8b.runs.json")
    parser.add_argument("--seconds", default=",".join(map(str, SECONDS)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seconds = [whole_number("--seconds", word, most=10**6) for word in options.seconds.split(",")]
    cards = Cards(options.profile, options.runs)
    points = cards.points()
    curves: dict[str, list[dict[str, float | int | None]]] = {}
    for name, order in orders(points).items():
        curves[name] = curve(cards, order, seconds, seconds_of)
    shared = orders(points)["by need"]
    num_cards = cards.hardware.device_count
    curves["by need, each card its own points"] = curve(
        cards, shared, seconds, lambda point: seconds_of(point, cards=num_cards)
    )
    columns = ["order", "s", "points", "plans told", "off the whole profile: median %", "worst %",
               "off the runs: median %", "worst %"]  # fmt: skip
    table = [
        [name, at["seconds"], at["points"], at["predicted"], *(None if at[key] is None else 100 * float(at[key] or 0)
         for key in ("off_median", "off_worst", "error_median", "error_worst"))]
        for name, found in curves.items()
        for at in found
    ]  # fmt: skip
    title = f"{cards.shape.name}: {len(points)} points, {sum(map(seconds_of, points)):.0f} s; {len(cards.runs)} runs"
    print_table(columns, table, title=title)
    if options.output:
        write_json(options.output, curves)


if __name__ == "__main__":
    main()
