"""Memory under sequence parallelism: what each kind keeps, against counts of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profiler.model import load_model_shape
from profiler.sequence.kind import SequenceCut, SPKind
from tuner.plan.memory import RankMemory, rounds_memory
from tuner.plan.plan import Chunk, Parallel, Request, Weights
from tuner.plan.round_sizes import RoundSizes
from tuner.plan.stage_order import StageOrder

LLAMA = load_model_shape("llama-3-8b")
HIDDEN, KV_ROW, LAYERS = 4096, 2 * 8 * 128 * 2, 32  # bfloat16: bytes of a token's key and value in a layer
REQUESTS = (Request(id="a", prompt_tokens=12000), Request(id="b", prompt_tokens=4000))
ROUNDS = ((Chunk(0, 0, 8000), Chunk(1, 0, 4000)), (Chunk(0, 8000, 4000),))
ONE = Parallel(tp_size=1, pp_size=1, layer_partition=(LAYERS,))
KINDS = (SPKind.GATHER, SPKind.ULYSSES, SPKind.RING)


def of(parallel: Parallel, cuts: tuple[SequenceCut, ...] = (), *, stage: int = 0) -> RankMemory:
    """Of a stage's rank, on cards."""
    return rounds_memory(
        LLAMA, parallel, REQUESTS, ROUNDS, dtype="bfloat16", max_new_tokens=1, device_type="cuda", cuts=cuts
    )[stage]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_kv_is_whole_or_cut_by_heads_or_by_rows(size: int) -> None:
    whole = of(ONE).kv_bytes
    assert whole == LAYERS * KV_ROW * (12001 + 4001)
    gather, ulysses, ring = (of(replace(ONE, sp_size=size, sp_kind=kind)).kv_bytes for kind in KINDS)
    assert gather == whole
    assert ulysses == whole // size
    # Each block ends a row early or late, each request has a row for its next token, the slab one that none reads.
    assert whole // size <= ring <= whole // size + LAYERS * KV_ROW * (2 * 3 + 2 + 1)


def test_heads_that_do_not_divide_count_as_on_the_rank_with_most() -> None:
    # 32 query heads on 3 ranks: 10, 11 and 11, of which the second attends to KV heads 2 to 5.
    assert of(replace(ONE, sp_size=3, sp_kind=SPKind.ULYSSES)).kv_bytes == of(ONE).kv_bytes * 4 // 8
    assert of(replace(ONE, sp_size=16, sp_kind=SPKind.ULYSSES)).kv_bytes == of(ONE).kv_bytes // 8


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_weights_are_a_share_and_two_layers(kind: SPKind) -> None:
    whole = replace(ONE, sp_size=4, sp_kind=kind)
    layer = 2 * LLAMA.layer.num_elements()
    ends = of(whole).weights_bytes - LAYERS * layer
    assert of(whole).weights_bytes == 2 * LLAMA.num_parameters
    assert of(replace(whole, weights=Weights.GATHERED)).weights_bytes == LAYERS * layer // 4 + 2 * layer + ends


def test_activations_shrink_with_the_rows_of_a_rank() -> None:
    one = of(ONE).activation_bytes
    for kind in KINDS:
        found = [of(replace(ONE, sp_size=size, sp_kind=kind)).activation_bytes for size in (2, 4, 8)]
        assert one > found[0] > found[1] > found[2] >= one // 8
    # Gathered are the round's own keys and values of all ranks, and this rank's.
    mlp, attention = 2 * 3 * 14336, 2 * (2 * (4096 + 2048) + 4096) + 4 * 3 * 4096
    rows = max(8000 // 4 + 4000 // 4, 4000 // 4)
    gathered = max(rows * mlp, rows * attention + 5 * rows * KV_ROW)
    stream = (5 + 4) * rows * 2 * HIDDEN  # five of its own, two received and two sent
    shared = 2 * 4 * rows * KV_ROW  # of two layers, all ranks' in memory that they write into
    assert of(replace(ONE, sp_size=4, sp_kind=SPKind.GATHER)).activation_bytes == gathered + stream + shared


def test_a_round_that_is_not_cut_has_all_rows_on_every_rank() -> None:
    gather = replace(ONE, sp_size=4, sp_kind=SPKind.GATHER)
    whole = (SequenceCut.WHOLE, SequenceCut.WHOLE)
    assert of(gather).activation_bytes < of(gather, whole).activation_bytes
    assert RoundSizes.of(gather, REQUESTS, ROUNDS, cuts=whole, max_new_tokens=1).most_rows == 12000


def test_megatron_cuts_the_stream_and_keeps_the_rest() -> None:
    tensor = Parallel(tp_size=4, pp_size=1, layer_partition=(LAYERS,))
    cut = replace(tensor, sp_kind=SPKind.MEGATRON)
    assert (of(cut).kv_bytes, of(cut).weights_bytes) == (of(tensor).kv_bytes, of(tensor).weights_bytes)
    # Of nine hidden states two are whole for a moment, and four beside them are summed.
    saved = ((9 + 4) * 12000 - 9 * 3000 - 2 * 12000) * 2 * HIDDEN
    assert of(tensor).activation_bytes - of(cut).activation_bytes == saved


@pytest.mark.parametrize(("order", "last"), [(StageOrder.LOOP, 1), (StageOrder.V, 0)])
def test_a_stage_holds_all_its_groups_of_layers(order: StageOrder, last: int) -> None:
    parallel = Parallel(tp_size=1, pp_size=2, virtual_stages=2, stage_order=order, layer_partition=(7, 8, 9, 8))
    memory = rounds_memory(LLAMA, parallel, REQUESTS, ROUNDS, dtype="bfloat16", max_new_tokens=1, device_type="cpu")
    num_layers = [7 + 9, 8 + 8] if order is StageOrder.LOOP else [7 + 8, 8 + 9]
    head, embedding = LLAMA.head.num_elements() + HIDDEN, LLAMA.embedding.num_elements()
    for stage, found in enumerate(memory):
        ends = (embedding if stage == 0 else 0) + (head if stage == last else 0)
        assert found.weights_bytes == 2 * (num_layers[stage] * LLAMA.layer.num_elements() + ends)
        assert found.kv_bytes == num_layers[stage] * KV_ROW * 16002
        assert found.unsent_bytes > 0


def test_stages_in_the_middle_of_a_v_hand_on_both_ways() -> None:
    def activations(order: StageOrder) -> int:
        return of(
            Parallel(tp_size=1, pp_size=4, virtual_stages=2, stage_order=order, layer_partition=(4,) * 8), stage=1
        ).activation_bytes

    buffers = 4 * 12000 * 2 * HIDDEN  # received and sent, of the largest round
    assert activations(StageOrder.V) - activations(StageOrder.LOOP) == buffers
