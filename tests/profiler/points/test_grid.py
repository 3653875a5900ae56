"""Which points a profile has, and in which order."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from profiler.comm.links.mesh import Mesh
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import load_model_shape
from profiler.points.grid import Grid, bisection_levels, rank_groups
from profiler.points.order import ENOUGH
from profiler.points.point import BESIDE, COLLECTIVES, Op, Point, stride_of, strided
from profiler.points.rank_groups import RankGroups


def make_grid(**changes: Any) -> Grid:
    asked: dict[str, Any] = {
        "shape": load_model_shape("llama-3.2-1b"),
        "dtype": "float32",
        "tp_sizes": (1, 2),
        "world_size": 2,
        "context_length": 4096,
        "device_type": "cpu",
        "kernels": (AttentionKernel.CPU_FLASH, AttentionKernel.SDPA),
    }
    return Grid(**(asked | changes))


SIZES = ("m", "chunk", "tokens", "bytes", "rows", "chunks", "context")


def of(points: Sequence[Point], op: Op) -> list[Point]:
    return [point for point in points if point.op is op]


def test_levels_bisect() -> None:
    assert list(bisection_levels(range(9)).values()) == [0, 2, 1, 2, 0, 2, 1, 2, 0]
    assert bisection_levels([5]) == {5: 0} and bisection_levels([]) == {}


@pytest.mark.parametrize("context_length", [1, 10, 16, 100, 4096, 131072])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_operation_is_covered_first(context_length: int, world_size: int) -> None:
    tp_sizes = tuple(size for size in (1, 2, 4) if size <= world_size)
    points = make_grid(context_length=context_length, world_size=world_size, tp_sizes=tp_sizes).points()
    curves = Counter[object]()
    for point in points:
        work = {name: size for name, size in point.shape.items() if name not in SIZES}
        curves[point.op, point.group_size, point.busy_ranks, point.variant, *sorted(work.items())] += 1
    begun = {point.op for point in points[: 2 * ENOUGH * len(curves)]}
    assert begun == {point.op for point in points}
    assert len({point.key for point in points}) == len(points)
    expected = [op for op in Op if op is not Op.EXPERTS and (world_size > 1 or op not in COLLECTIVES)]
    assert {point.op for point in points if point.level == 0} == set(expected)


def test_sizes_that_rounds_have_come_first() -> None:
    """Of every curve the ends of the usual rounds, then each size the farthest from those before."""
    points = make_grid(context_length=131072, device_type="cuda").points()
    sizes = {(p.shape["n"], p.shape["k"]): list[int]() for p in of(points, Op.MATMUL)}
    for point in of(points, Op.MATMUL):
        sizes[point.shape["n"], point.shape["k"]].append(point.shape["m"])
    for measured in sizes.values():
        order = list(dict.fromkeys(measured))
        assert {256, 8192} <= set(order[:5])
    chunks = [(p.shape["chunk"], p.shape["context"]) for p in of(points, Op.ATTENTION) if p.shape["heads"] == 32]
    pairs = [at for at in chunks if at[0] == 2048]
    assert pairs[:2] == [(2048, 0), (2048, 131072 - 2048)]  # a line needs both


def test_the_far_end_is_reached_at_the_coarsest_level() -> None:
    coarse = [point for point in make_grid().points() if point.level == 0]
    for op in (Op.ATTENTION, Op.LAYER):
        ends = {point.shape["chunk"] + point.shape["context"] for point in of(coarse, op)}
        assert max(ends) == 4096 and all(end <= 4096 for end in ends)
        assert {(4096, 0), (16, 4080)} <= {(p.shape["chunk"], p.shape["context"]) for p in of(coarse, op)}
    assert {point.shape["m"] for point in of(coarse, Op.MATMUL)} >= {16, 4096}


def test_matmuls_are_the_projections_of_each_tensor_parallel_degree() -> None:
    points = of(make_grid().points(), Op.MATMUL)
    # hidden 2048, FFN 8192, 32 heads and 8 KV heads of 64
    assert {(point.shape["n"], point.shape["k"]) for point in points} == {
        (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192),
        (1536, 2048), (2048, 1024), (8192, 2048), (2048, 4096),
    }  # fmt: skip


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    shape = load_model_shape("llama-3.2-1b")
    grid = make_grid(shape=shape, tp_sizes=(16,), world_size=16)
    heads = {(point.shape["heads"], point.shape["kv_heads"]) for point in of(grid.points(), Op.ATTENTION)}
    assert heads == {(2, 1)}


def test_a_plan_for_one_rank_is_covered_beside_all_ranks_at_work() -> None:
    points = make_grid().points()
    for op in (Op.MATMUL, Op.ATTENTION, Op.ELEMENTWISE, Op.LAYER):
        assert {point.busy_ranks for point in of(points, op)} == {1, 2}
    alone = make_grid(world_size=1, tp_sizes=(1,)).points()
    assert {point.busy_ranks for point in alone} == {1}


def test_cards_measure_waves_finely_and_one_load_alone() -> None:
    cards = make_grid(device_type="cuda", dtype="bfloat16", context_length=8192, kernels=(AttentionKernel.CUDNN_GRAPH,))
    points = cards.points()
    assert {point.busy_ranks for point in of(points, Op.LAYER)} == {2}
    layers = of(points, Op.LAYER)
    assert {256, 512, 1024, 2048, 4096, 8192} <= {point.shape["chunk"] for point in layers}
    assert max(point.level for point in layers) == 2
    soon = [point for point in of(points, Op.ATTENTION) if point.level <= 2]
    reach = {point.shape["chunk"] for point in soon if point.shape["chunk"] + point.shape["context"] == 8192}
    assert {256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096} <= reach
    coarse = {point.shape["chunk"] for point in of(make_grid(context_length=8192).points(), Op.ATTENTION)}
    assert not {768, 1280} & coarse


def test_messages_are_hidden_states_that_every_group_can_split() -> None:
    points = make_grid(world_size=4, tp_sizes=(1, 4)).points()
    for point in points:
        if point.op in COLLECTIVES:
            assert point.shape["bytes"] % (point.group_size * 4) == 0
            assert point.busy_ranks % point.group_size == 0
    assert {point.group_size for point in points if point.op is Op.ALL_REDUCE} == {2, 4}
    assert {point.group_size for point in points if point.op is Op.SEND_RECV} == {2}
    assert max(p.shape["bytes"] for p in of(points, Op.SEND_RECV)) == 4096 * 2048 * 4


def test_groups() -> None:
    assert rank_groups((1,), (), 1) == []
    assert rank_groups((1, 2), (), 2) == [RankGroups(2)]
    assert rank_groups((1, 4), (), 8) == [RankGroups(2), RankGroups(4), RankGroups(8)]
    shared = [RankGroups(2), RankGroups(2, 2), RankGroups(2, 4), RankGroups(4), RankGroups(4, 2), RankGroups(8)]
    assert rank_groups((1, 2, 4), (2, 4), 8) == shared  # 4 x 4 ranks are not there


@pytest.mark.parametrize(("tp_size", "sp_size", "world_size"), [(2, 2, 4), (2, 3, 13), (1, 4, 8), (4, 2, 8)])
def test_ranks_that_share_rows_stand_as_in_a_layout(tp_size: int, sp_size: int, world_size: int) -> None:
    form = RankGroups(sp_size, tp_size)
    mesh = Mesh(pp_size=world_size // (sp_size * tp_size), sp_size=sp_size, tp_size=tp_size)
    assert form.of(world_size) == list(mesh.sequence_groups())
    assert sorted(sum(form.of(world_size), ())) == list(range(form.busy(world_size)))


def test_sharing_rows_adds_points_where_it_is_asked_for() -> None:
    def points_of(*sp_sizes: int) -> list[Point]:
        return make_grid(
            world_size=4, tp_sizes=(1, 2, 4), device_type="cuda", context_length=8192, sp_sizes=sp_sizes
        ).points()

    plain = {point.key for point in points_of()}
    added = [point for point in points_of(2, 4) if point.key not in plain]
    assert plain < {point.key for point in points_of(2, 4)}
    assert of(added, Op.ATTENTION) == []  # 16 and 8 heads are those of tensor parallelism
    alone = make_grid(world_size=4, tp_sizes=(1,), device_type="cuda", context_length=8192, sp_sizes=(2, 3, 4))
    # 32 heads on 3 ranks are 11 at most, of 4 KV heads: two calls of different groups.
    assert {point.shape["heads"] for point in of(alone.points(), Op.ATTENTION)} == {32, 16, 8}
    strided_points = {(p.op, p.group_size, p.busy_ranks) for p in added if p.variant == "stride-2"}
    assert strided_points == {(Op.ALL_GATHER, 2, 4), (Op.ALL_TO_ALL, 2, 4)}
    beside = {(point.op, point.group_size) for point in added if point.variant == BESIDE}
    assert beside == {(Op.ALL_GATHER, 2), (Op.ALL_GATHER, 4), (Op.MATMUL, 2), (Op.MATMUL, 4)}
    gathers, sums = (
        {p.shape["bytes"] for p in of(points_of(4), op) if p.group_size == 4 and not p.variant}
        for op in (Op.ALL_GATHER, Op.ALL_REDUCE)
    )
    assert gathers == sums


def test_variants_tell_how_far_apart_ranks_stand() -> None:
    assert strided("", 1) == "" and stride_of("") == stride_of(BESIDE) == 1
    assert stride_of(strided("", 4)) == 4


def test_no_dense_mask_of_a_long_context_on_a_cpu() -> None:
    points = of(make_grid(context_length=131072).points(), Op.ATTENTION)
    dense = [p for p in points if p.variant == AttentionKernel.SDPA and p.shape["context"]]
    assert dense and max(p.shape["chunk"] * (p.shape["chunk"] + p.shape["context"]) for p in dense) <= 2**24
