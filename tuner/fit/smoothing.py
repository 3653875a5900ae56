"""Smooths measured cost tables so that times never fall with more tokens, and reports the changes.

Time may not fall with more tokens, for planner and bound rely on it; what is measured falls by noise. The nearest
table that never falls is an isotonic regression, here least squares of relative errors (pool adjacent violators;
Barlow et al., Statistical Inference under Order Restrictions, 1972).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from db.errors import UserError
from db.files.documents import located, read_json
from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import MAX_SECONDS

MOST_NOISE = 0.10
"""A value that would change by more is not noise: the table is refused."""
COLUMNS = {"tokens": ("seconds",), "attention": ("base_s", "context_s")}


def load_measured_model(path: str | Path) -> tuple[CostModel, tuple[str, ...]]:
    """Read an isochunk.cost-model file, falling times made level, and say in a sentence a column what was changed.

    Raises UserError naming the field, its value and what is allowed.
    """
    content = read_json(path, field="cost model")
    notes = []
    with located(path):
        for where, table, column in _tables(content):
            if note := _smooth(where, table, column):
                notes.append(note)
        return CostModel.from_json(content), tuple(notes)


def _tables(content: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """All columns of seconds in the file; malformed ones are left to the parser."""
    stages = content.get("stages") if isinstance(content, dict) else None
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        for name, columns in COLUMNS.items():
            table = stage.get(name) if isinstance(stage, dict) else None
            if isinstance(table, dict):
                for column in columns:
                    yield f"stages[{index}].{name}.{column}", table, column


def _smooth(where: str, table: dict[str, Any], column: str) -> str | None:
    values = table.get(column)
    if not isinstance(values, list) or not all(type(each) in (int, float) for each in values):
        return None
    seconds = np.array(values, dtype=np.float64)
    if len(seconds) < 2 or not ((seconds >= 0.0) & (seconds <= MAX_SECONDS)).all() or (np.diff(seconds) >= 0.0).all():
        return None
    from scipy.optimize import isotonic_regression  # takes a second to import

    scale = np.maximum(seconds, 1e-6 * seconds.max())
    level = np.maximum.accumulate(isotonic_regression(seconds, weights=1.0 / scale**2).x)
    changed = np.abs(level - seconds) / scale
    worst = int(changed.argmax())
    if changed[worst] > MOST_NOISE:
        allowed = (
            f"time may not fall with more tokens; up to {MOST_NOISE:.0%} is smoothed as noise, "
            f"this would have to become {level[worst]:.4g}"
        )
        raise UserError(f"{where}[{worst}]", values[worst], allowed)
    table[column] = level.tolist()
    return (
        f"Smoothed {where}: {int((changed > 0.0).sum())} of {len(seconds)} values fell with more tokens and were "
        f"changed by {changed[worst]:.2%} at most."
    )
