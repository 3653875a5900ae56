"""What remains to be measured, and which attention kernel is worth it."""

from dataclasses import replace
from datetime import UTC, datetime

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.points.kernel_choice import Contests, KernelTime
from profiler.points.point import Op, Point
from profiler.points.worklist import Worklist

FLASH, SDPA = AttentionKernel.CPU_FLASH, AttentionKernel.SDPA
HEADS = {"heads": 8, "kv_heads": 4, "head_dim": 64}


def point(kernel: AttentionKernel, chunk: int, context: int, level: int = 0) -> Point:
    shape = HEADS | {"chunk": chunk, "context": context}
    return Point(op=Op.ATTENTION, dtype="float32", shape=shape, variant=kernel.value, level=level)


def row(of: Point, median_us: float, spread: float = 0.0) -> Measurement:
    return Measurement(
        op=of.op, dtype=of.dtype, shape=of.shape, variant=of.variant, num_samples=5, median_us=median_us,
        p10_us=median_us, p90_us=median_us * (1 + spread), min_us=median_us, std_us=0.0, noisy=spread > 0.2,
        measured_at=datetime.now(UTC), code_version="test",
    )  # fmt: skip


def test_only_points_without_a_row_are_missing() -> None:
    points = [point(FLASH, chunk, 0) for chunk in (16, 64, 256)]
    worklist = Worklist(points, [row(points[1], 10.0)], usual_kernel=FLASH)
    assert list(worklist.missing()) == [points[0], points[2]]
    worklist.add(row(points[0], 10.0))
    assert list(worklist.missing()) == [points[2]]


def test_the_less_spread_of_two_rows_stays() -> None:
    worklist = Worklist([], [], usual_kernel=FLASH)
    of = point(FLASH, 16, 0)
    for median_us, spread in ((10.0, 0.3), (11.0, 0.1), (12.0, 0.5)):
        worklist.add(row(of, median_us, spread))
    assert worklist.rows[of.key].median_us == 11.0


def test_a_kernel_that_loses_nearby_is_not_followed() -> None:
    coarse = {(kernel, at): point(kernel, *at) for kernel in (FLASH, SDPA) for at in ((16, 4080), (4096, 0))}
    times = {(FLASH, (16, 4080)): 10.0, (SDPA, (16, 4080)): 20.0, (FLASH, (4096, 0)): 100.0, (SDPA, (4096, 0)): 60.0}
    fine = [point(kernel, *at, level=1) for kernel in (FLASH, SDPA) for at in ((32, 3000), (3000, 100))]
    worklist = Worklist(
        [*coarse.values(), *fine], [row(coarse[key], us) for key, us in times.items()], usual_kernel=FLASH
    )
    assert list(worklist.missing()) == [point(FLASH, 32, 3000, 1), point(SDPA, 3000, 100, 1)]


def test_rows_of_other_heads_decide_nothing() -> None:
    other = replace(point(FLASH, 16, 0), shape={"heads": 4, "kv_heads": 2, "head_dim": 64, "chunk": 16, "context": 0})
    rows = [row(replace(other, variant=SDPA.value), 1.0), row(other, 9.0)]
    worklist = Worklist([point(FLASH, 64, 0, level=1)], rows, usual_kernel=FLASH)
    assert len(list(worklist.missing())) == 1


def test_far_from_every_contest_each_kernel_has_its_chance() -> None:
    coarse = [point(kernel, chunk, 0) for kernel in (FLASH, SDPA) for chunk in (16, 2048)]
    rows = [row(at, 10.0 if at.variant == FLASH else 99.0) for at in coarse]
    near, far = (point(SDPA, chunk, 0, level=2) for chunk in (512, 128))
    assert list(Worklist([*coarse, near, far], rows, usual_kernel=FLASH).missing()) == [far]


def test_the_contest_that_is_nearest() -> None:
    def time(kernel: AttentionKernel, at: tuple[int, int], us: float) -> KernelTime:
        return KernelTime(kernel=kernel, chunk=at[0], context=at[1], median_us=us)

    near, far, lone = (64, 0), (4096, 8192), (128, 0)
    contests = Contests(
        [time(FLASH, near, 5.0), time(SDPA, near, 4.0), time(FLASH, far, 7.0), time(SDPA, far, 9.0),
         time(FLASH, lone, 1.0)]
    )  # fmt: skip
    assert contests.nearest(100, 10) == near and contests.nearest(2048, 8000) == far
    assert contests.at[near] == {FLASH: 5.0, SDPA: 4.0}
    assert Contests([]).nearest(1, 1) is None
