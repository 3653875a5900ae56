"""The order in which points are measured: first what every prediction needs, then what reduces errors most.

Points of the same work at other sizes make a curve. Of each curve the points are taken one by one, each the farthest
from those taken before, in octaves of tokens; sizes that rounds seldom have count for less. Over all curves the point
comes first whose distance weighs most in the time of a layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

from profiler.kernels.attention_kernel import AttentionKernel
from profiler.points.point import BESIDE, COLLECTIVES, Op, Point

ROUNDS = {"cpu": (64, 2048), "cuda": (256, 8192)}  # tokens of the rounds that most plans consist of
OUTSIDE = 0.35  # of the weight of a distance beyond these
ENOUGH = 3  # points of a curve that come before all others: without them it is no curve
ENDS, BETWEEN = 2, 0.3  # contexts of a chunk that are needed, and what others count for beside them
LEAST_WEIGHT, MESSAGE_WEIGHT, LAYER_WEIGHT, SHARED_WEIGHT = 0.02, 0.25, 1.0, 0.1
_SIZES = ("m", "chunk", "tokens", "bytes", "rows", "chunks")


def by_need(points: Sequence[Point], *, device_type: str, hidden_bytes: int, usual_kernel: str) -> list[Point]:
    """The points in the order in which they are worth their time.

    hidden_bytes: of a token's hidden state, which messages are counted in; usual_kernel: of attention.
    """
    curves = defaultdict[Hashable, list[Point]](list)
    for point in points:
        curves[_work(point)].append(point)
    layer_flops = sum(
        max((p.flops for p in mine), default=0.0) for mine in curves.values() if mine[0].op in (Op.MATMUL, Op.EXPERTS)
    )
    first, later = list[tuple[float, Point]](), list[tuple[float, Point]]()
    for curve in curves.values():
        weight = _weight(curve, layer_flops, usual_kernel)
        for index, distance, point in _taken(curve, device_type, hidden_bytes):
            if index < ENOUGH:
                first.append((point.flops, point))  # the cheap ones first: an early end leaves some of everything
            else:
                later.append((-distance * weight, point))
    return [point for some in (first, later) for _, point in sorted(some, key=lambda entry: entry[0])]


def _work(point: Point) -> Hashable:
    """What points of one curve share."""
    rest = tuple(sorted((name, size) for name, size in point.shape.items() if name not in (*_SIZES, "context")))
    return point.op, point.dtype, point.group_size, point.busy_ranks, point.variant, rest


def _weight(curve: Sequence[Point], layer_flops: float, usual_kernel: str) -> float:
    """Roughly the share of a layer's time that the curve stands for."""
    op, variant = curve[0].op, curve[0].variant
    if variant == BESIDE:
        return SHARED_WEIGHT
    if op in COLLECTIVES:
        return MESSAGE_WEIGHT if curve[0].group_size > 1 else LEAST_WEIGHT
    if op is Op.LAYER:
        return LAYER_WEIGHT
    if op is Op.ATTENTION:
        return LAYER_WEIGHT / 2 if variant in (usual_kernel, AttentionKernel.CPU_MASKED) else LEAST_WEIGHT
    if op in (Op.MATMUL, Op.EXPERTS) and layer_flops:
        return max(LEAST_WEIGHT, max(point.flops for point in curve) / layer_flops)
    return SHARED_WEIGHT if op is Op.ELEMENTWISE else LEAST_WEIGHT


def _taken(curve: Sequence[Point], device_type: str, hidden_bytes: int) -> Iterator[tuple[int, float, Point]]:
    """(how many sizes came before, octaves to the nearest of them, point), the ends of the usual rounds first.

    Of a size without context and after the longest one come together, for between them time is linear in the context;
    other contexts count for less.
    """
    least, most = (math.log2(size) for size in ROUNDS[device_type])
    by_size = defaultdict[int, list[Point]](list)
    for point in curve:
        by_size[next(point.shape[name] for name in _SIZES if name in point.shape)].append(point)
    in_bytes = "bytes" in curve[0].shape

    def place(size: int) -> float:
        octaves = math.log2(max(size / (hidden_bytes if in_bytes else 1), 1.0))
        inside = min(max(octaves, least), most)
        return inside + OUTSIDE * (octaves - inside)

    waiting = {size: place(size) for size in sorted(by_size)}
    taken, wanted = list[float](), [most, least]
    while waiting:
        if wanted:
            first = wanted.pop(0)
            size = min(waiting, key=lambda size: abs(waiting[size] - first))
        else:
            size = max(waiting, key=lambda size: min(abs(waiting[size] - at) for at in taken))
        at = waiting.pop(size)
        distance = min((abs(at - other) for other in taken), default=most)
        contexts = sorted(by_size[size], key=lambda point: point.shape.get("context", 0))
        for place_of_context, point in enumerate([*contexts[:1], *contexts[:0:-1]]):
            share = 1.0 if place_of_context < ENDS else BETWEEN
            yield len(taken) if share == 1.0 else ENOUGH, share * distance, point
        taken.append(at)
