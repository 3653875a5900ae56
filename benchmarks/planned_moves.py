"""What a change of plan promised and what it gained, from plans that were run and kept: `tune` names such moves.

    python -m benchmarks.planned_moves [ROWS.json]

ROWS.json is what `benchmarks.gpu_parallel` keeps; by default the two H200's in `benchmarks/results`. A move leaves one
thing of a plan different: its layout or its precision. Moves that promise less than 3 % say little beside a run's noise
of 1 % and are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from db.files.documents import read_json
from service.cli.output import print_table

ROWS = Path(__file__).parent / "results" / "plans-h200x2.json"
LAYOUTS = (  # from, to
    ("TP2 PP1", "TP1 SP2 gather PP1"),
    ("TP1 SP2 ulysses PP1", "TP1 SP2 gather PP1"),
    ("TP1 PP2", "TP1 PP2 x2 v"),
    ("TP2 PP1", "TP1 PP2"),
)
PRECISIONS = ("bfloat16", "fp8")
LEAST = 0.03
A_THIRD = 1.0 / 3.0


def moves(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Workload, what changes, and the rows before and after."""
    found = {(row["workload"], row["precision"], row["layout"]): row for row in rows}
    for workload, precision, layout in found:
        here = found[workload, precision, layout]
        for before, after in LAYOUTS:
            if layout == before and (workload, precision, after) in found:
                yield f"{workload}, {precision}", f"{before} -> {after}", here, found[workload, precision, after]
        if precision == PRECISIONS[0] and (workload, PRECISIONS[1], layout) in found:
            yield f"{workload}, {layout}", " -> ".join(PRECISIONS), here, found[workload, PRECISIONS[1], layout]


def main(paths: Sequence[str]) -> None:
    """Print each move, and of each kind how many gained what they promised, within a third."""
    rows = read_json(Path(paths[0]) if paths else ROWS, field="ROWS.json")
    table = []
    for workload, what, before, after in moves(rows):
        promised_s = before["predicted_s"] - after["predicted_s"]
        gained_s = before["measured_s"] - after["measured_s"]
        if promised_s >= LEAST * before["predicted_s"]:
            table.append((what, workload, before["measured_s"], promised_s, gained_s, gained_s / promised_s))
    table.sort(key=lambda row: row[:2])
    columns = ("move", "workload", "before s", "promised s", "gained s", "gained / promised")
    print_table(columns, table, title="What moves promised and gained")
    for what, group in groupby(table, key=lambda row: row[0]):
        shares = [row[-1] for row in group]
        kept = sum(abs(share - 1.0) <= A_THIRD for share in shares)
        print(f"{what}: {kept} of {len(shares)} within a third, {min(shares):.2f} to {max(shares):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
