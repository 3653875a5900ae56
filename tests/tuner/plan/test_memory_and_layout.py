from __future__ import annotations

import pytest

from db.errors import UserError
from profiler.model import load_model_shape
from tests.tuner.memory_sizes import stages, whole_rounds
from tuner.plan.layout import enumerate_layouts
from tuner.plan.memory import MOST_RECORDED, SEND_BUFFER_BYTES, RankMemory, memory_refusal, rank_memory

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
    layouts = {(layout.tp_size, layout.pp_size) for layout in enumerate_layouts(LLAMA, 4)}
    assert layouts == {(1, 4), (2, 2), (4, 1), (1, 2), (2, 1), (1, 1)}


def test_refusals_name_the_reason() -> None:
    refusals = {(x.tp_size, x.pp_size): x.refusal for x in enumerate_layouts(LLAMA, 48)}
    assert "num_attention_heads = 32" in (refusals[3, 16] or "")
    assert "more than the 32 layers" in (refusals[1, 48] or "")
    assert refusals[4, 12] is None


def test_of_many_layouts_only_those_that_run_are_kept() -> None:
    layouts = enumerate_layouts(LLAMA, 20_000)
    assert 0 < len(layouts) < 64
    assert [layout.refusal for layout in layouts if layout.refusal] == []


@pytest.mark.parametrize("world_size", [0, 100_001, 999_999_999_999])
def test_worlds_that_nobody_has_are_an_error(world_size: int) -> None:
    with pytest.raises(UserError, match=f"world_size: {world_size}; must be 1 or more, at most 100000"):
        enumerate_layouts(LLAMA, world_size)


def test_sizes_that_do_not_make_up_the_world_are_an_error() -> None:
    with pytest.raises(UserError, match="world_size: 4; must be a multiple"):
        enumerate_layouts(LLAMA, 4, tp_size=3)
