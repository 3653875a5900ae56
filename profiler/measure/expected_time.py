"""How long a point is expected to take, for progress, the end of a budget, and when ranks count as stalled."""

from __future__ import annotations

from profiler.measure.operations.operators import has_own_load
from profiler.measure.timing import plan_own_load, plan_sampling
from profiler.points.point import Point

POINT_S = {"cpu": 0.25, "cuda": 0.2}  # what sampling a point may take, unless three samples take longer
ROUGH_FLOPS = {"cpu": 5e10, "cuda": 3e14}  # a second; on a CPU for each thread
_POINT_OVERHEAD_S = {"cpu": 0.03, "cuda": 0.18}  # on a card mostly load before and between the samples


def expected_seconds(point: Point, device_type: str, num_threads: int) -> float:
    """Roughly how long a point takes, to tell how much time is left."""
    rate = ROUGH_FLOPS[device_type] * (num_threads if device_type == "cpu" else 1)
    call_s = point.flops / rate
    if has_own_load(point, device_type):
        sampling = plan_own_load(call_s)
    else:
        sampling = plan_sampling(call_s, device_type=device_type, budget_s=POINT_S[device_type])
    settle_s = max(sampling.settle_s, call_s) if sampling.settle_s else 0.0
    return _POINT_OVERHEAD_S[device_type] + settle_s + (sampling.num_calls + 2) * call_s
