"""A profile from a user's options to its summary: checks them, finds what is missing, starts the ranks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from db.errors import UserError
from db.files.numbers import whole_number
from db.rows.hardware import Hardware, list_hardware
from db.rows.measurements import Measurement, load_measurements, save_measurements
from db.rows.processes import process_row
from db.store.engine import Database, default_url, open_database
from db.store.provenance import now
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.stall import LEAST_LIMIT_S
from profiler.hardware.device import (
    check_device_type,
    check_world_size,
    default_device_type,
    default_num_threads,
    default_world_size,
    describe_hardware,
    free_bytes,
)
from profiler.kernels.attention import available_kernels
from profiler.kernels.attention_kernel import worth_measuring
from profiler.kernels.quantized.support import check_precision
from profiler.measure.expected_time import expected_seconds
from profiler.measure.leader import profile_rank
from profiler.measure.session import ProfileJob
from profiler.measure.summary import ProfileSummary, summarize_ops
from profiler.model import Backend, ModelShape, load_model_shape, precision_of
from profiler.model.shape import default_dtype
from profiler.points.grid import Grid, tp_sizes_of
from profiler.points.point import Point
from profiler.points.worklist import Worklist

MAX_DEFAULT_CONTEXT = {"cpu": 8192, "cuda": 131072}
_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """Options of a profile; None means a default that suits the model and the machine.

    tp_sizes, sp_sizes: numbers with commas between. budget_s: seconds of measuring after which no point is begun.
    remeasure: "noisy", "all" or None. stall_timeout_s: the profile fails when no rank moved for so long.
    """

    model: str
    backend: str = "auto"
    world_size: int | None = None
    tp_sizes: str | None = None
    sp_sizes: str | None = None
    context_length: int | None = None
    dtype: str | None = None
    device_type: str | None = None
    threads_per_rank: int | None = None
    budget_s: float
    remeasure: str | None = None
    db_url: str | None = None
    stall_timeout_s: float = LEAST_LIMIT_S


def profile_model(options: ProfileOptions) -> ProfileSummary:
    """Measure what the database lacks. Raises `UserError` for options that this model or machine cannot serve."""
    started, since = time.monotonic(), now()
    grid = make_grid(options)
    threads = options.threads_per_rank or default_num_threads(grid.device_type, grid.world_size)
    hardware = describe_hardware(grid.device_type, num_threads=threads)
    url = options.db_url or default_url()
    with open_database(url) as database:
        adopt_kernels(database, hardware)
        points, too_large = _split_by_memory(grid)
        rows = _kept_rows(database, hardware, points, options.remeasure)
        interrupted = False
        if next(Worklist(points, rows, usual_kernel=grid.kernels[0]).missing(), None) is not None:
            job = ProfileJob(
                grid=grid,
                points=points,
                rows=tuple(rows),
                hardware=hardware,
                database_url=url,
                budget_s=options.budget_s,
            )
            try:
                with process_row(database, "profile"):
                    run_ranks(
                        profile_rank,
                        job,
                        world_size=grid.world_size,
                        device_type=grid.device_type,
                        num_threads=threads,
                        stall_timeout_s=options.stall_timeout_s,
                    )
            except KeyboardInterrupt:
                interrupted = True
        found = _kept_rows(database, hardware, points)
        if not interrupted and len(found) == len(rows):
            _check_begun(grid, Worklist(points, found, usual_kernel=grid.kernels[0]), options)
        location = database.location
    ops = summarize_ops(Worklist(points, found, usual_kernel=grid.kernels[0]), since=since)
    num_missing, num_new = sum(op.num_missing for op in ops), sum(op.num_new for op in ops)
    return ProfileSummary(
        model=grid.shape.name,
        dtype=grid.dtype,
        world_size=grid.world_size,
        tp_sizes=grid.tp_sizes,
        context_length=grid.context_length,
        hardware=hardware,
        fingerprint=hardware.fingerprint,
        database=location,
        elapsed_s=time.monotonic() - started,
        interrupted=interrupted,
        num_new=num_new,
        num_missing=num_missing,
        num_noisy=sum(op.num_noisy for op in ops),
        ops=ops,
        notes=tuple(_notes(interrupted, num_missing, too_large, num_new, options.budget_s)),
    )


def _check_begun(grid: Grid, worklist: Worklist, options: ProfileOptions) -> None:
    """Raise UserError where points are missing and the time did not suffice to begin one."""
    point = next(worklist.missing(), None)
    if point is None or options.budget_s <= 0.0:
        return
    threads = options.threads_per_rank or default_num_threads(grid.device_type, grid.world_size)
    point_s = expected_seconds(point, grid.device_type, threads)
    if 0.5 * point_s > options.budget_s:
        raise UserError("--budget-s", f"{options.budget_s:.3g}", f"at least {math.ceil(2 * point_s)} for one point")


def make_grid(options: ProfileOptions) -> Grid:
    """The grid that the options ask for, checked against the model and the machine."""
    device_type = options.device_type or default_device_type()
    check_device_type(device_type)
    shape = load_model_shape(options.model, backend=options.backend, device_type=device_type)
    if shape.backend is Backend.PLANNING:
        raise UserError("MODEL", shape.architecture, f"is planned only: {shape.unrun}")
    precision = precision_of(options.dtype or default_dtype(shape, device_type))
    check_precision(precision, device_type)
    if shape.backend is Backend.TRANSFORMERS and precision.linears is not None:
        raise UserError("--dtype", precision.name, "must be a plain one in a model that Transformers runs")
    shape.check_precision(precision, field="--dtype")
    activations = precision.activations.torch_dtype
    world_size = options.world_size or default_world_size(device_type)
    check_world_size(world_size, device_type)
    return Grid(
        shape=shape,
        dtype=precision.name,
        tp_sizes=_tp_sizes(options.tp_sizes, shape, world_size),
        sp_sizes=_sp_sizes(options.sp_sizes, world_size),
        world_size=world_size,
        context_length=_context_length(options.context_length, shape, device_type),
        device_type=device_type,
        kernels=tuple(worth_measuring(available_kernels(torch.device(device_type), activations))),
    )


def _tp_sizes(text: str | None, shape: ModelShape, world_size: int) -> tuple[int, ...]:
    if text is None:
        return tp_sizes_of(shape, world_size)
    sizes = tuple(sorted({whole_number("--tp-sizes", word, most=2**20) for word in text.split(",")}))
    for size in sizes:
        shape.check_tp_size(size)
        if world_size % size:
            raise UserError("tp_size", size, f"must divide world_size = {world_size}")
    return sizes


def _sp_sizes(text: str | None, world_size: int) -> tuple[int, ...]:
    """Without any asked for none: the coarse points of collectives tell of sequence parallelism, too."""
    sizes = tuple(sorted({whole_number("--sp-sizes", word, most=2**20) for word in (text or "").split(",") if word}))
    for size in sizes:
        if size < 2 or world_size % size:
            raise UserError("sp_size", size, f"must be 2 or more and divide world_size = {world_size}")
    return sizes


def _context_length(asked: int | None, shape: ModelShape, device_type: str) -> int:
    if asked is None:
        return min(shape.max_positions, MAX_DEFAULT_CONTEXT[device_type])
    if not 1 <= asked <= shape.max_positions:
        allowed = f"must be at least 1 and at most {shape.max_positions}: {shape.positions_words}"
        raise UserError("context_length", asked, allowed)
    return asked


def _split_by_memory(grid: Grid) -> tuple[tuple[Point, ...], int]:
    """The points that a rank's share of the memory holds, and how many it does not."""
    ranks_on_device = grid.world_size if grid.device_type == "cpu" else 1
    limit = _MEMORY_SHARE * free_bytes(torch.device(grid.device_type)) / ranks_on_device
    points = grid.points()
    fitting = tuple(point for point in points if point.size_bytes <= limit)
    return fitting, len(points) - len(fitting)


def adopt_kernels(database: Database, hardware: Hardware) -> None:
    """Keep as this hardware's own what one rank measured alone where all but the link between the devices is equal."""
    mine = {row.key for row in load_measurements(database, hardware)}
    for stored in list_hardware(database):
        if stored.hardware.computes_like(hardware) and stored.hardware.link != hardware.link:
            rows = load_measurements(database, stored.hardware, group_size=1)
            save_measurements(database, hardware, [row for row in rows if row.key not in mine])


def _kept_rows(
    database: Database, hardware: Hardware, points: tuple[Point, ...], remeasure: str | None = None
) -> list[Measurement]:
    """Rows of the points that need not be measured again."""
    if remeasure == "all":
        return []
    wanted = {point.key for point in points}
    rows = [row for row in load_measurements(database, hardware) if row.key in wanted]
    return [row for row in rows if not (row.noisy and remeasure == "noisy")]


def _notes(interrupted: bool, num_missing: int, too_large: int, num_new: int, budget_s: float) -> list[str]:
    notes = []
    if num_missing and not num_new and not interrupted:
        notes.append(f"Nothing new was measured: within {budget_s:g} s no point could be begun; give more --budget-s.")
    elif not num_missing and not num_new:
        notes.append("Nothing was missing.")
    if interrupted:
        notes.append("Interrupted; what was measured is kept.")
    if num_missing:
        notes.append(f"{num_missing} points are missing; the same command goes on with them.")
    if too_large:
        notes.append(f"{too_large} points were left out: a rank's share of the memory does not hold them.")
    return notes
