"""Measurements of an imaginary machine whose true times are known, to fit and to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from db.rows.measurements import Measurement
from profiler.measure.point_rows import rows_of
from profiler.measure.timing import Samples, summarize
from profiler.model import ModelShape, load_model_shape
from profiler.points.point import MASKS, Op, Point
from tuner.fit.rows import RankWork

SHAPE = load_model_shape("llama-3.2-1b")
FLOPS_PER_US = 50e3
PAIR_US = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """True microseconds of each operation; `layer_factor` is what a whole layer takes beyond its parts."""

    launch_us: float = 20.0
    layer_factor: float = 1.0

    def matmul_us(self, m: int, n: int, k: int) -> float:
        """A launch, or the work, whichever is longer."""
        return self.launch_us + max(30.0, 2.0 * m * n * k / FLOPS_PER_US)

    def attention_us(self, chunk: int, context: int) -> float:
        """Linear in the pairs that the causal mask keeps."""
        return self.launch_us + PAIR_US * (chunk * context + chunk * (chunk + 1) / 2)

    def elementwise_us(self, tokens: int) -> float:
        """Linear in the tokens."""
        return 5.0 + 0.5 * tokens

    def message_us(self, op: str, rows: float) -> float:
        """Of so many hidden states."""
        start_us, row_us = {
            "all_reduce": (50.0, 0.1),
            "all_gather": (40.0, 0.06),
            "reduce_scatter": (42.0, 0.055),
            "all_to_all": (35.0, 0.04),
            "send_recv": (30.0, 0.05),
        }[op]
        return start_us + row_us * rows

    def layer_us(self, work: RankWork, chunk: int, context: int) -> float:
        """A whole layer without collectives."""
        matmuls = sum(self.matmul_us(chunk, n, k) for n, k in work.projections)
        token_wise = self.layer_factor * (matmuls + self.elementwise_us(chunk))
        return token_wise + self.attention_us(chunk, context)


CHUNKS = (16, 64, 256, 512, 1024, 2048, 4096)


def measure(
    machine: Machine, *, shape: ModelShape = SHAPE, tp_size: int = 1, sp_size: int = 1, busy_ranks: int = 2
) -> list[Measurement]:
    """Every row that a fit needs, with collectives over groups of `sp_size`."""
    work = RankWork(shape=shape, dtype="float32", tp_size=tp_size)
    rows: list[Measurement] = []

    def add(op: str, us: float, group_size: int = 1, variant: str = "", **sizes: int) -> None:
        named = {name: size for name, size in sizes.items() if size or name not in MASKS}
        rows.append(row(op, us, named, group_size, busy_ranks, variant))

    for m in CHUNKS:
        for n, k in work.projections:
            add("matmul", machine.matmul_us(m, n, k), m=m, n=n, k=k)
        add("elementwise", machine.elementwise_us(m), tokens=m, **work.layer_sizes)
        add("embedding", 1.0 + 0.01 * m, tokens=m, hidden=shape.hidden_size, vocab=shape.vocab_size)
        for context in (0, 2048, 8192 - m):
            add("attention", machine.attention_us(m, context), variant="cpu-folded", chunk=m, context=context,
                **work.attention_sizes)  # fmt: skip
            add("attention", 2 * machine.attention_us(m, context), variant="cpu-flash", chunk=m, context=context,
                **work.attention_sizes)  # fmt: skip
        add("layer", machine.layer_us(work, m, 0), chunk=m, context=0, **work.layer_sizes)
        for group_size in {2, tp_size, sp_size} - {1}:
            for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"):
                add(op, machine.message_us(op, m), group_size, bytes=m * work.hidden_bytes)
    add("head", 400.0, rows=1, hidden=shape.hidden_size, vocab=work.vocab_slice)
    for chunks in (1, 2, 4):
        add("round_overhead", 100.0 + 10.0 * (chunks - 1), chunks=chunks, tokens=64)
    return rows


def with_ranks(rows: list[Measurement], *factors: float, layers: int = 99) -> list[Measurement]:
    """The rows, and those of so many ranks for the first layers, as the profiler writes them."""
    found = []
    for row in [row for row in rows if row.op == "layer"][:layers]:
        point = Point(op=Op.LAYER, dtype=row.dtype, shape=row.shape, busy_ranks=row.busy_ranks, variant=row.variant)
        samples = [Samples([factor * row.median_us] * 3, [False] * 3) for factor in factors]
        slowest = max(map(summarize, samples), key=lambda timing: timing.median_us)
        found += rows_of(point, samples, slowest, own_load=True)[1:]
    return rows + found


def relative(found: float, true: float) -> float:
    """|found / true - 1|."""
    return abs(found / true - 1.0)


def row(op: str, us: float, sizes: dict[str, int], group_size: int, busy_ranks: int, variant: str) -> Measurement:
    return Measurement(
        op=op, dtype="float32", shape=sizes, group_size=group_size, busy_ranks=busy_ranks, variant=variant,
        num_samples=10, median_us=us, p10_us=us, p90_us=us, min_us=us, std_us=0.0, noisy=False,
        measured_at=datetime(2026, 1, 1, tzinfo=UTC), code_version="test",
    )  # fmt: skip
