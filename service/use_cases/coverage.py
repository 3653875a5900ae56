"""What of a model was measured on a hardware, and what a profile would still measure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from db.rows.hardware import get_hardware
from db.rows.measurements import load_measurements
from db.store.engine import Database
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import load_model_shape
from profiler.model.shape import default_dtype
from profiler.points.grid import Grid, tp_sizes_of
from profiler.points.point import Op

CONTEXTS = {"cpu": 8192, "cuda": 131072}
"""The longest prompts that a profile covers unless others are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCoverage:
    """Points of one operation: how many a profile has, and how many of them are kept."""

    op: str
    num_points: int
    num_kept: int
    num_coarse_missing: int
    """Of the coarse points, which every fit needs."""


def coverage(database: Database, hardware_id: int, model: str) -> list[OpCoverage]:
    """Coverage of a profile of the usual extent. Of attention only the kernels that were tried count.

    Raises UserError for an unknown hardware.
    """
    hardware = get_hardware(database, hardware_id)
    shape = load_model_shape(model)
    kept = {row.key: row for row in load_measurements(database, hardware)}
    tried = {row.variant for row in kept.values() if row.op == Op.ATTENTION}
    kernels = tuple(kernel for kernel in AttentionKernel if kernel.value in tried) or tuple(AttentionKernel)[:1]
    world_size = hardware.device_count
    points = Grid(
        shape=shape,
        dtype=default_dtype(shape, hardware.device_type),
        tp_sizes=tp_sizes_of(shape, world_size),
        world_size=world_size,
        context_length=min(shape.max_positions, CONTEXTS[hardware.device_type]),
        device_type=hardware.device_type,
        kernels=kernels,
    ).points()
    all_points = Counter(point.op for point in points)
    found = Counter(point.op for point in points if point.key in kept)
    coarse = Counter(point.op for point in points if point.level == 0 and point.key not in kept)
    return [
        OpCoverage(op=op.value, num_points=count, num_kept=found[op], num_coarse_missing=coarse[op])
        for op, count in all_points.items()
    ]
