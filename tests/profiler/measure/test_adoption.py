"""Rows that another link leaves as they are."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from db.rows.hardware import Hardware
from db.rows.measurements import Measurement, load_measurements, save_measurements
from db.store.engine import open_database
from profiler.measure.profile import adopt_kernels

NVLINK = Hardware(
    device="card", device_count=2, memory_bytes=80 * 2**30, driver="1", torch_version="2", backend="nccl",
    num_threads=1, link="nvlink",
)  # fmt: skip


def row(op: str, group_size: int, median_us: float = 5.0) -> Measurement:
    return Measurement(
        op=op, dtype="bfloat16", shape={"m": 1, "n": 2, "k": 3}, group_size=group_size, busy_ranks=2, num_samples=3,
        median_us=median_us, p10_us=median_us, p90_us=median_us, min_us=median_us, std_us=0.0, noisy=False,
        measured_at=datetime.now(UTC), code_version="test", variant="",
    )  # fmt: skip


def test_kernels_are_taken_over_from_the_same_cards_on_another_link(tmp_path: Path) -> None:
    socket, other = replace(NVLINK, link="socket/lo"), replace(NVLINK, device="another card")
    with open_database(f"sqlite:///{tmp_path / 'kept.db'}") as database:
        save_measurements(database, NVLINK, [row("matmul", 1), row("head", 1), row("all_reduce", 2)])
        save_measurements(database, other, [row("embedding", 1)])
        save_measurements(database, socket, [row("head", 1, median_us=7.0)])
        adopt_kernels(database, socket)
        found = {one.op: one.median_us for one in load_measurements(database, socket)}
        assert found == {"matmul": 5.0, "head": 7.0}  # its own row stays; messages and other cards are not taken
        adopt_kernels(database, socket)
        assert len(load_measurements(database, socket)) == 2
        assert len(load_measurements(database, NVLINK)) == 3
