"""Kernels that no fit has seen: random products and attention, measured as a profile does, against the fitted model.

    python -m benchmarks.gpu_kernels [--model NAME] [--db URL] [--points N] [--world-size N] [--output FILE]

The database must hold the profile that is judged; what is measured here goes to a file of its own.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from db.files.documents import write_json
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.comm.ranks.launch import run_ranks
from profiler.hardware.device import describe_hardware
from profiler.kernels.attention import available_kernels
from profiler.kernels.attention_kernel import worth_measuring
from profiler.measure.leader import profile_rank
from profiler.measure.session import ProfileJob
from profiler.model import load_model_shape, precision_of
from profiler.points.grid import Grid
from profiler.points.point import Op, Point
from service.cli.output import print_table
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork, expected_s

TILE, LEAST_CHUNK, MOST_CHUNK, MOST_CONTEXT = 128, 256, 8192, 65536


def random_points(grid: Grid, num_points: int, *, seed: int = 5) -> list[Point]:
    """Half products, half attention, over the sizes that plans use, off the profile's own grid."""
    source = random.Random(seed)
    points = []
    for index in range(num_points):
        tp_size = source.choice(grid.tp_sizes)
        chunk = TILE * source.randrange(LEAST_CHUNK // TILE, min(MOST_CHUNK, grid.context_length) // TILE + 1)
        if index % 2:
            n, k = source.choice(list(grid.shape.layer.products(tp_size).values()))
            shape = {"m": chunk, "n": n, "k": k}
            points.append(Point(op=Op.MATMUL, dtype=grid.dtype, shape=shape, busy_ranks=grid.world_size))
        else:
            context = source.randrange(0, min(MOST_CONTEXT, grid.context_length - chunk) + 1)
            shape = grid.shape.layer.attention.sizes(tp_size) | {"chunk": chunk, "context": context}
            variant = grid.kernels[0].value
            points.append(
                Point(op=Op.ATTENTION, dtype=grid.dtype, shape=shape, busy_ranks=grid.world_size, variant=variant)
            )
    profiled = {point.key for point in grid.points()}
    return [point for point in {point.key: point for point in points}.values() if point.key not in profiled]


def predict_s(costs: dict[int, LayerCosts], point: Point) -> float:
    """What the fit of the point's tensor-parallel degree says; only one degree has products of its size."""
    for cost in costs.values():
        if point.op is Op.MATMUL:
            sizes = cost.work.projections
            if (point.shape["n"], point.shape["k"]) in sizes:
                curve = cost.projections[sizes.index((point.shape["n"], point.shape["k"]))]
                return float(curve(point.shape["m"]))
        elif all(point.shape[name] == value for name, value in cost.work.attention_sizes.items()):
            return float(cost.attention(point.shape["chunk"], point.shape["context"]))
    raise AssertionError(point)


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--db", default="sqlite:///gpu.db")
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--world-size", type=int, default=2, choices=[1, 2])
    parser.add_argument("--context-length", type=int, default=131072)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=Path("gpu-kernels.json"))
    options = parser.parse_args()
    ranks, tp_sizes = options.world_size, (1, 2)[: options.world_size]
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    shape = load_model_shape(options.model)
    kernels = tuple(
        worth_measuring(available_kernels(torch.device(options.device), precision_of(dtype).activations.torch_dtype))
    )
    grid = Grid(
        shape=shape, dtype=dtype, tp_sizes=tp_sizes, world_size=ranks, context_length=options.context_length,
        device_type=options.device, kernels=kernels,
    )  # fmt: skip
    hardware = describe_hardware(options.device, num_threads=1)
    with open_database(options.db) as database:
        rows = load_measurements(database, hardware, dtype=dtype)
    works = [RankWork.on(hardware, shape=shape, dtype=dtype, tp_size=tp_size) for tp_size in grid.tp_sizes]
    costs = {work.tp_size: fit_layer_costs(rows, work, busy_ranks=ranks) for work in works}
    points = random_points(grid, options.points)
    with TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/unseen.db"
        job = ProfileJob(
            grid=grid, points=tuple(points), rows=(), hardware=hardware, database_url=url,
            budget_s=600.0,
        )  # fmt: skip
        with open_database(url):
            pass
        run_ranks(profile_rank, job, world_size=ranks, device_type=options.device, num_threads=1)
        with open_database(url) as database:
            measured = {row.key: row for row in load_measurements(database, hardware)}
    found = [
        {"op": point.op.value, "shape": dict(point.shape), "measured_us": 1e6 * expected_s(measured[point.key]),
         "predicted_us": 1e6 * predict_s(costs, point)}
        for point in points
        if point.key in measured
    ]  # fmt: skip
    write_json(options.output, {"model": options.model, "device": hardware.device, "points": found})
    table: list[list[object]] = []
    for name, ops in ((Op.MATMUL, {Op.MATMUL}), (Op.ATTENTION, {Op.ATTENTION}), ("all", {Op.MATMUL, Op.ATTENTION})):
        errors = np.array(
            [float(str(one["predicted_us"])) / float(str(one["measured_us"])) - 1 for one in found if one["op"] in ops]
        )
        size = np.abs(errors)
        table.append([name, len(size), *(100 * float(np.quantile(size, q)) for q in (0.5, 0.9, 1.0)),
                      100 * float(errors.mean())])  # fmt: skip
    print_table(["kernel", "points", "median error %", "p90 %", "worst %", "mean %"], table, title="Unseen kernels")


if __name__ == "__main__":
    main()
