from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from db.errors import UserError
from profiler.model import load_model_shape
from profiler.sequence.kind import SPKind
from tests.tuner.memory_sizes import stages, whole_rounds
from tuner.plan.layout import Pins, enumerate_layouts, layout_of
from tuner.plan.memory import MOST_RECORDED, SEND_BUFFER_BYTES, RankMemory, memory_refusal, rank_memory
from tuner.plan.plan import Parallel
from tuner.plan.stage_order import StageOrder

LLAMA = load_model_shape("llama-3-8b")


def test_weights_of_all_ranks_are_the_model() -> None:
    memory = rank_memory(LLAMA, stages(16, 16), whole_rounds(0, 0, 0), dtype="bfloat16", device_type="cuda")
    assert sum(stage.weights_bytes for stage in memory) == 2 * LLAMA.num_parameters


def test_kv_cache_of_a_long_prompt_is_counted_exactly() -> None:
    (stage,) = rank_memory(LLAMA, stages(32), whole_rounds(131072, 2048, 131072), dtype="bfloat16", device_type="cuda")
    assert stage.kv_bytes == 131072 * 2 * 32 * 8 * 128 * 2


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    def kv_bytes(tp_size: int) -> int:
        (stage,) = rank_memory(
            LLAMA, stages(32, tp_size=tp_size), whole_rounds(1024, 64, 1024), dtype="bfloat16", device_type="cuda"
        )
        return stage.kv_bytes

    assert kv_bytes(8) == kv_bytes(16) == kv_bytes(1) // 8


def test_ranks_of_a_host_share_its_memory() -> None:
    memory = rank_memory(
        LLAMA, stages(16, 16, tp_size=2), whole_rounds(1024, 64, 1024), dtype="float32", device_type="cpu"
    )
    enough = 2 * sum(stage.total_bytes for stage in memory)
    assert memory_refusal(memory, stage_size=2, device_type="cpu", memory_bytes=2 * enough) is None
    refusal = memory_refusal(memory, stage_size=2, device_type="cpu", memory_bytes=enough)
    assert refusal is not None
    assert "GiB" in refusal


def test_unfinished_sends_are_counted_where_there_is_a_stage_to_send_to() -> None:
    def unsent_bytes(device_type: str, all_tokens: int) -> list[int]:
        memory = rank_memory(
            LLAMA, stages(16, 16), whole_rounds(1024, 1024, all_tokens), dtype="float32", device_type=device_type
        )
        return [stage.unsent_bytes for stage in memory]

    row_bytes = LLAMA.hidden_size * 4
    assert unsent_bytes("cpu", 2000) == [2000 * row_bytes, 0]
    assert unsent_bytes("cpu", 10**7) == [SEND_BUFFER_BYTES + 1024 * row_bytes, 0]
    assert unsent_bytes("cuda", 10**7) == [0, 0]


def test_recorded_rounds_are_counted_on_cards() -> None:
    def stage(device_type: str, num_rounds: int) -> RankMemory:
        sizes = whole_rounds(1024, 1024, 10**6, num_rounds)
        (only,) = rank_memory(LLAMA, stages(32), sizes, dtype="bfloat16", device_type=device_type)
        return only

    assert stage("cpu", 10).total_bytes == stage("cpu", 1000).total_bytes
    few, many, too_many = (stage("cuda", count) for count in (10, MOST_RECORDED, MOST_RECORDED + 1))
    assert few.runtime_bytes < many.runtime_bytes == too_many.runtime_bytes
    assert 2 * many.activation_bytes == too_many.activation_bytes


def test_every_layout_of_four_ranks() -> None:
    plain = enumerate_layouts(LLAMA, 4, Pins(sp_kind=SPKind.NONE))
    layouts = {(layout.tp_size, layout.pp_size) for layout in plain}
    assert layouts == {(1, 4), (2, 2), (4, 1), (1, 2), (2, 1), (1, 1)}


def test_refusals_name_the_reason() -> None:
    refusals = {(x.tp_size, x.pp_size): x.refusal for x in enumerate_layouts(LLAMA, 48)}
    assert "num_attention_heads = 32" in (refusals[3, 16] or "")
    assert "more than the 32 layers" in (refusals[1, 48] or "")
    assert refusals[4, 12] is None


def test_every_scheme_is_enumerated_where_it_can_run() -> None:
    """Per (tp, sp, pp): kinds and groups of layers, by hand for 2 and 4 ranks."""
    one = {str(layout) for layout in enumerate_layouts(LLAMA, 2)}
    assert one == {
        "TP1 PP2", "TP1 PP2 x2 loop", "TP1 PP2 x2 v", "TP1 PP2 x4 loop", "TP1 PP2 x4 v", "TP2 PP1", "TP2 megatron PP1",
        "TP1 SP2 gather PP1", "TP1 SP2 ulysses PP1", "TP1 SP2 ring PP1", "TP1 PP1",
    }  # fmt: skip
    layouts = enumerate_layouts(LLAMA, 4)
    assert len(layouts) == len(set(layouts)) == len({str(layout) for layout in layouts})
    for layout in layouts:
        assert 4 % layout.world_size == 0
        assert layout.num_groups <= LLAMA.num_layers
        partition = (1,) * layout.num_groups  # what a plan allows is what is enumerated
        names = ("tp_size", "pp_size", "sp_size", "sp_kind", "virtual_stages", "stage_order", "weights")
        parallel = Parallel(layer_partition=partition, **{name: getattr(layout, name) for name in names})
        assert replace(layout_of(parallel), refusal=layout.refusal) == layout


@pytest.mark.parametrize(
    ("pins", "found"),
    [
        (Pins(sp_kind=SPKind.NONE, virtual_stages=1),
         {"TP1 PP4", "TP2 PP2", "TP4 PP1", "TP1 PP2", "TP2 PP1", "TP1 PP1"}),
        (Pins(sp_size=2, sp_kind=SPKind.GATHER, virtual_stages=1),
         {"TP1 SP2 gather PP2", "TP2 SP2 gather PP1", "TP1 SP2 gather PP1"}),
        (Pins(sp_kind=SPKind.MEGATRON, pp_size=1), {"TP4 megatron PP1", "TP2 megatron PP1"}),
        (Pins(tp_size=1, sp_size=1, pp_size=4, virtual_stages=3, stage_order=StageOrder.V), {"TP1 PP4 x3 v"}),
        (Pins(tp_size=1, sp_size=1, pp_size=4, stage_order=StageOrder.V), {"TP1 PP4", "TP1 PP4 x2 v", "TP1 PP4 x4 v"}),
    ],
)  # fmt: skip
def test_pins_leave_what_has_them(pins: Pins, found: set[str]) -> None:
    assert {str(layout) for layout in enumerate_layouts(LLAMA, 4, pins)} == found


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"sp_size": 64, "sp_kind": SPKind.ULYSSES}, "sp_size: 64; at most 32 with sp_kind ulysses, the query heads"),
        ({"pp_size": 8, "virtual_stages": 5}, "virtual_stages: 5; at most 4: llama-3-8b has 32 layers for 8 stages"),
        ({"pp_size": 64}, "pp_size 64 is more than the 32 layers"),
    ],
)
def test_pinned_layouts_that_cannot_run_say_why(pins: dict[str, Any], message: str) -> None:
    layouts = enumerate_layouts(LLAMA, 64, Pins(**pins))
    assert any(message in (layout.refusal or "") for layout in layouts)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"sp_size": 1, "sp_kind": SPKind.RING}, "sp_size: 1; 2 or more with sp_kind ring"),
        ({"sp_size": 2, "sp_kind": SPKind.NONE}, "sp_size: 2; 1 with sp_kind none"),
        ({"tp_size": 1, "sp_kind": SPKind.MEGATRON}, "sp_kind: megatron; cuts over the tensor-parallel group"),
        ({"pp_size": 1, "virtual_stages": 2}, "virtual_stages: 2; 1 with pp_size 1"),
    ],
)
def test_pins_that_contradict_each_other_are_an_error(pins: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Pins(**pins)


def test_of_many_layouts_only_those_that_run_are_kept() -> None:
    layouts = enumerate_layouts(LLAMA, 20_000)
    assert len(layouts) > 64
    assert [layout.refusal for layout in layouts if layout.refusal] == []


@pytest.mark.parametrize("world_size", [0, 100_001, 999_999_999_999])
def test_worlds_that_nobody_has_are_an_error(world_size: int) -> None:
    with pytest.raises(UserError, match=f"world_size: {world_size}; must be 1 or more, at most 100000"):
        enumerate_layouts(LLAMA, world_size)


def test_sizes_that_do_not_make_up_the_world_are_an_error() -> None:
    with pytest.raises(UserError, match="world_size: 4; must be a multiple"):
        enumerate_layouts(LLAMA, 4, Pins(tp_size=3))


def test_buffers_are_counted_for_each_neighbour_that_hands_on() -> None:
    def activation_rows(order: StageOrder, virtual_stages: int) -> list[int]:
        num_groups = 3 * virtual_stages
        parallel = Parallel(
            tp_size=1, pp_size=3, virtual_stages=virtual_stages, stage_order=order,
            layer_partition=(32 - num_groups + 1, *(1,) * (num_groups - 1)),
        )  # fmt: skip
        memory = rank_memory(LLAMA, parallel, whole_rounds(64, 64, 64), dtype="bfloat16", device_type="cuda")
        row_bytes = 64 * LLAMA.hidden_size * 2
        return [stage.activation_bytes // row_bytes for stage in memory]

    once = activation_rows(StageOrder.LOOP, 1)
    assert activation_rows(StageOrder.LOOP, 2) == once  # one stage before, one after, also around the loop
    # Up and down: both neighbours in the middle, and where a round turns it stays.
    assert [rows - before for rows, before in zip(activation_rows(StageOrder.V, 2), once, strict=True)] == [0, 4, 1]
