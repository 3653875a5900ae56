"""Costs of each kind of sequence parallelism against counts over the shares of all ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from profiler.points.point import Op
from profiler.sequence.cut import Share, cut_round, rows_per_rank
from profiler.sequence.kind import CUTS, SequenceCut, SPKind
from tuner.fit.curve import Curve, Floats
from tuner.fit.sequence.cut_costs import CutCosts, UncutCosts
from tuner.fit.sequence.kinds import COSTS
from tuner.fit.sequence.overlap import APART, ON_A_CARD, Overlap
from tuner.fit.sequence.parts import ExchangeParts, LayerParts, RowBytes

PAIR_S, LAUNCH_S = 2e-12, 5e-6
CUT = [(kind, cut) for kind, cuts in CUTS.items() for cut in cuts if cut is not SequenceCut.WHOLE]
NOTHING = RowBytes(hidden=0, kv=0, ulysses_in=0, attended=0, attended_float32=0)
BYTES = RowBytes(hidden=8192, kv=4096, ulysses_in=12288, attended=8192, attended_float32=16384)


def line(start: float, rate: float) -> Curve:
    return Curve(knots=np.array([0.0, 1.0]), seconds=np.array([start, start + rate]))


def parts(
    size: int, *, row_bytes: RowBytes = BYTES, launch_s: float = LAUNCH_S, overlap: Overlap = ON_A_CARD
) -> LayerParts:
    """Parts whose times are known: attention in proportion to pairs, and a launch a call."""
    latency = 1e-5 if row_bytes is BYTES else 0.0
    messages = {op: line(latency, 3e-12 * (1 + index)) for index, op in enumerate(Op)}
    return LayerParts(
        size=size,
        token_wise_s=lambda rows: 2e-5 + 3e-7 * rows,
        elementwise_s=lambda rows: 1e-5 + 5e-8 * rows,
        queries_s=lambda rows: 2e-6 + 3e-8 * rows,
        reduce_s=np.zeros_like,
        squares_s=np.zeros_like,
        base_s=lambda chunk: launch_s + PAIR_S * chunk**2 / 2,
        slope_s=lambda chunk: PAIR_S * chunk,
        messages=messages,
        row_bytes=row_bytes,
        norms_share=0.2 if row_bytes is BYTES else 0.0,
        traffic_bytes=100_000,
        overlap=overlap,
        gather_overlap=overlap,
    )


def costs(kind: SPKind, cut: SequenceCut, given: LayerParts) -> CutCosts:
    return COSTS[kind, cut](given)


def at(value: float) -> Floats:
    return np.array([value], dtype=np.float64)


def share_s(given: LayerParts, share: Share, contexts: tuple[int, ...]) -> float:
    """Attention of one rank's pieces, call by call."""
    return sum(
        float(given.base_s(at(piece.tokens))[0])
        + float(given.slope_s(at(piece.tokens))[0]) * (contexts[piece.chunk] + piece.start)
        for piece in share
    )


@pytest.mark.parametrize(("chunk", "context", "size"), list(product((64, 4096, 49152), (0, 3000, 100_000), (2, 4, 8))))
def test_zigzag_attention_is_alike_on_all_ranks_and_as_counted(chunk: int, context: int, size: int) -> None:
    given = parts(size)
    zigzag = costs(SPKind.GATHER, SequenceCut.ZIGZAG, given)
    counted = [share_s(given, share, (context,)) for share in cut_round([chunk], SequenceCut.ZIGZAG, size)]
    assert counted == pytest.approx([counted[0]] * size)
    assert zigzag.base_s(at(chunk)) + zigzag.slope_s(at(chunk)) * context == pytest.approx(counted[0])


@pytest.mark.parametrize("chunk", [65, 1000, 4099])
def test_blocks_that_do_not_divide_cost_a_token_more_or_less(chunk: int) -> None:
    given = parts(4)
    zigzag = costs(SPKind.GATHER, SequenceCut.ZIGZAG, given)
    counted = max(share_s(given, share, (20_000,)) for share in cut_round([chunk], SequenceCut.ZIGZAG, 4))
    predicted = float((zigzag.base_s(at(chunk)) + zigzag.slope_s(at(chunk)) * 20_000)[0])
    assert abs(counted - predicted) <= 2 * PAIR_S * (20_000 + chunk)


@pytest.mark.parametrize(("chunk", "context", "size"), list(product((64, 4096, 49152), (0, 3000, 100_000), (2, 4, 8))))
def test_contiguous_attention_is_that_of_the_last_rank(chunk: int, context: int, size: int) -> None:
    given = parts(size)
    contiguous = costs(SPKind.GATHER, SequenceCut.CONTIGUOUS, given)
    counted = [share_s(given, share, (context,)) for share in cut_round([chunk], SequenceCut.CONTIGUOUS, size)]
    assert max(counted) == counted[-1]
    assert contiguous.base_s(at(chunk)) + contiguous.slope_s(at(chunk)) * context == pytest.approx(counted[-1])


@pytest.mark.parametrize(
    ("chunks", "contexts"),
    [((1500, 1500), (0, 0)), ((1500, 1500), (100_000, 0)), ((100, 37, 3000, 1), (0, 5000, 64, 90_000))],
)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_chunks_in_one_run_of_rows_cost_what_the_slowest_rank_takes(
    chunks: tuple[int, ...], contexts: tuple[int, ...], size: int
) -> None:
    given = parts(size)
    contiguous = costs(SPKind.GATHER, SequenceCut.CONTIGUOUS, given)
    tokens, before = np.array(chunks, dtype=np.float64), np.array(contexts, dtype=np.float64)
    total = float((contiguous.base_s(tokens) + contiguous.slope_s(tokens) * before).sum())
    counted = max(share_s(given, share, contexts) for share in cut_round(chunks, SequenceCut.CONTIGUOUS, size))
    assert contiguous.share_of_sum(chunks, contexts) * total == pytest.approx(counted)


@pytest.mark.parametrize(("kind", "cut"), CUT)
def test_rows_are_those_of_the_largest_share(kind: SPKind, cut: SequenceCut) -> None:
    for size, tokens in product((2, 3, 4, 8), (1, 5, 64, 100, 4097, 49152)):
        counted = rows_per_rank([tokens], cut, size)
        assert abs(float(parts(size).rows(at(tokens))[0]) - counted) <= 1


def test_a_gather_sends_the_keys_and_values_of_all_ranks_beside_the_queries() -> None:
    given = parts(4, overlap=APART)
    gather = costs(SPKind.GATHER, SequenceCut.ZIGZAG, given)
    all_bytes = 4 * rows_per_rank([1000], SequenceCut.ZIGZAG, 4) * BYTES.kv
    assert gather.sent_s(at(1000)) == pytest.approx(given.messages[Op.ALL_GATHER](all_bytes))
    beside = costs(SPKind.GATHER, SequenceCut.ZIGZAG, parts(4, overlap=Overlap(work_loss=0.0, message_loss=0.0)))
    hidden_s = min(float(given.queries_s(at(250))[0]), float(gather.sent_s(at(1000))[0]))
    assert gather.sent_s(at(1000)) - beside.sent_s(at(1000)) == pytest.approx(hidden_s)


def test_an_all_to_all_moves_a_ranks_own_rows_there_and_back() -> None:
    given = parts(4)
    ulysses = costs(SPKind.ULYSSES, SequenceCut.CONTIGUOUS, given)
    there, back = (given.messages[Op.ALL_TO_ALL](251 * size) for size in (BYTES.ulysses_in, BYTES.attended))
    assert ulysses.sent_s(at(1003)) == pytest.approx(there + back)
    assert ulysses.base_s(at(1003)) == given.base_s(at(1003))


def test_megatron_gathers_and_scatters_twice_and_norms_its_own_rows() -> None:
    given = parts(4)
    megatron, tensor = costs(SPKind.MEGATRON, SequenceCut.CONTIGUOUS, given), UncutCosts(given)
    message = 4 * 251 * BYTES.hidden
    pair_s = given.messages[Op.ALL_GATHER](message) + given.messages[Op.REDUCE_SCATTER](message)
    assert megatron.sent_s(at(1003)) == pytest.approx(2 * pair_s)
    saved = tensor.compute_s(at(10_000)) - megatron.compute_s(at(10_000))
    assert saved == pytest.approx(0.2 * 0.75 * given.elementwise_s(at(10_000)))


@pytest.mark.parametrize("is_beside", [False, True])
def test_rows_that_are_sent_to_experts_are_not_gathered_for_them(is_beside: bool) -> None:
    plain, rows = parts(4), 1003
    exchange = ExchangeParts(
        experts_s=lambda rows: 1e-7 * rows, own_rows_s=lambda rows: 2e-8 * rows, row_bytes=0.4 * BYTES.hidden,
        choice_bytes=12.8, is_beside=is_beside,
    )  # fmt: skip
    given, messages = replace(plain, exchange=exchange), plain.messages
    kind, cut = (SPKind.GATHER, SequenceCut.ZIGZAG) if is_beside else (SPKind.MEGATRON, SequenceCut.CONTIGUOUS)
    sizes = (32.0, rows * 12.8, *(rows * 0.4 * BYTES.hidden,) * 2)  # counts, choices, there and back
    expected = 1e-7 * rows + sum(float(messages[Op.ALL_TO_ALL](size)) for size in sizes)
    if not is_beside:
        padded = 4 * 251 * BYTES.hidden
        expected -= float(messages[Op.ALL_GATHER](padded) + messages[Op.REDUCE_SCATTER](padded))
        expected -= 2e-8 * (rows - 251)  # the router's and shared experts' products of other ranks' rows
    added = costs(kind, cut, given).tokens_s(at(rows)) - costs(kind, cut, plain).tokens_s(at(rows))
    assert float(added[0]) == pytest.approx(expected)
    whole, without = (costs(kind, SequenceCut.WHOLE, one).tokens_s(at(rows)) for one in (given, plain))
    summed = float(messages[Op.ALL_REDUCE](rows * BYTES.hidden)) if is_beside else 0.0
    assert float((whole - without)[0]) == pytest.approx(1e-7 * rows + summed)


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_passes_context_and_chunk_around_beside_attention(size: int) -> None:
    chunk, context = 4096, 60_000
    given = parts(size, overlap=Overlap(work_loss=0.0, message_loss=0.0))
    ring = costs(SPKind.RING, SequenceCut.ZIGZAG, given)
    byte_s = float((given.messages[Op.SEND_RECV](at(1e6)) - given.messages[Op.SEND_RECV](at(0)))[0]) / 1e6
    passed_s = (size - 1) * (chunk + context) / size * BYTES.kv * byte_s
    counted = share_s(given, cut_round([chunk], SequenceCut.ZIGZAG, size)[0], (context,))
    launches_s = (size - 1) * float(given.base_s(at(1))[0])
    rows = 2.0**17
    copied_s = float(given.moved_s(at(rows), 2 * BYTES.kv)[0]) / rows / size * context
    predicted = float((ring.base_s(at(chunk)) + ring.slope_s(at(chunk)) * context)[0]) - copied_s
    # Where either takes longer in both the chunk's own part and the context's, the sum is exact; never below.
    assert max(counted, passed_s) * (1 - 1e-9) <= predicted <= (counted + launches_s + passed_s) * (1 + 1e-9)
    slow_link = parts(size, overlap=APART)
    added = costs(SPKind.RING, SequenceCut.ZIGZAG, slow_link)
    assert float((added.base_s(at(chunk)) + added.slope_s(at(chunk)) * context)[0]) == pytest.approx(
        counted + launches_s + passed_s + copied_s
    )


@pytest.mark.parametrize(("kind", "cut"), CUT)
def test_one_rank_costs_what_a_rank_without_a_group_does(kind: SPKind, cut: SequenceCut) -> None:
    given = parts(1, row_bytes=NOTHING, launch_s=0.0)
    alone, found = UncutCosts(given), costs(kind, cut, given)
    tokens = np.array([1.0, 64.0, 100.0, 4096.0])
    assert found.tokens_s(tokens) == pytest.approx(alone.tokens_s(tokens))
    assert found.base_s(tokens) == pytest.approx(alone.base_s(tokens))
    assert found.slope_s(tokens) == pytest.approx(alone.slope_s(tokens))


@pytest.mark.parametrize(("kind", "cut"), CUT)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_no_cost_falls_with_more_tokens(kind: SPKind, cut: SequenceCut, size: int) -> None:
    found, tokens = costs(kind, cut, parts(size)), np.arange(1.0, 20_000.0, 7.0)
    for seconds in (found.tokens_s(tokens), found.base_s(tokens), found.slope_s(tokens)):
        assert (np.diff(seconds) >= -1e-15).all()
        assert (seconds >= 0).all()


@pytest.mark.parametrize(("kind", "cut"), CUT)
def test_more_ranks_do_less_each(kind: SPKind, cut: SequenceCut) -> None:
    found = [costs(kind, cut, parts(size)) for size in (2, 4, 8)]
    computed = [float(one.compute_s(at(65_536))[0]) for one in found]
    assert computed == sorted(computed, reverse=True)


def test_what_runs_side_by_side_takes_as_long_as_the_slower_and_at_most_as_both() -> None:
    sizes = np.geomspace(1e-6, 1e-2, 9)
    work_s, message_s = sizes[:, None], sizes[None, :]
    for overlap in (
        ON_A_CARD,
        Overlap.of_stretches(work=1.5, message=1.0),
        Overlap.of_stretches(work=3.0, message=3.0),
    ):
        together = overlap.together(work_s, message_s)
        assert (together >= np.maximum(work_s, message_s)).all()
        assert (together <= (work_s + message_s) * (1 + 1e-12)).all()
        assert (overlap.exposed(work_s, message_s) >= 0).all()
    assert APART.together(work_s, message_s) == pytest.approx(work_s + message_s)


def test_stretches_are_what_each_takes_while_the_other_lasts() -> None:
    overlap = Overlap.of_stretches(work=1.25, message=1.1)
    # Work that outlasts the message runs at 1 / 1.25 for 1.1 times the message's own time.
    assert overlap.together(at(10.0), at(1.0)) == pytest.approx(1.1 + (10.0 - 1.1 / 1.25))
    assert overlap.together(at(1.0), at(10.0)) == pytest.approx(1.25 + (10.0 - 1.25 / 1.1))
