"""Bytes that a layer needs while it runs a round, and keeps after it, by the kind of sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from profiler.comm.links.buffers import GATHER_SLOTS
from profiler.kernels.attention_kernel import EXPANDED_NUMBERS, MASKED_SCORES
from profiler.model import LayerSpec, Precision, WholeLayer
from profiler.model.experts import Dispatch
from profiler.model.precision import FLOAT32
from profiler.sequence.heads import most_heads
from profiler.sequence.kind import SPKind
from tuner.plan.plan import Parallel
from tuner.plan.round_sizes import RoundSizes

_STREAM_ROWS = 5  # the residual before and after a block, its output, its norm, and the hidden states that came in
RING_KEPT = 0.75  # of what a ring passes in its longest round: two buffers, in rounds of growing context
_MERGED = 3  # attention of a ring's pieces in float32: that merged so far, the next, and the sum
_SUMMED_ROWS = 4  # hidden states beside them where ranks sum partial ones: as sent, as received, and in pieces


def kept_bytes(layer: LayerSpec | WholeLayer, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Bytes that a rank keeps in a layer of all requests: those of each row of its slab, of a window, of a state."""
    if isinstance(layer, WholeLayer):
        rows = min(sizes.slab_rows, sizes.num_requests * layer.kept_tokens(sizes.slab_rows))
        return precision.kv.num_bytes(rows * layer.kv_numbers + sizes.num_requests * layer.state_numbers)
    return precision.kv_bytes(sizes.slab_rows * kv_elements(layer, parallel), layer.attention.head_dim)


def kv_elements(layer: LayerSpec, parallel: Parallel) -> int:
    """Numbers that a rank keeps of a token in its slab: key and value of its KV heads, or its latent."""
    _, kv_heads = _attending_heads(layer, parallel)
    return kv_heads * sum(layer.attention.kept_widths)


def scratch_bytes(layer: LayerSpec | WholeLayer, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Bytes of the largest round within a layer: the larger block, the residual stream, and what messages need."""
    if isinstance(layer, WholeLayer):
        return _whole(layer, sizes, precision)
    scratch = _KINDS[parallel.sp_kind](layer, parallel, sizes, precision)
    if precision.has_kv_scales:  # what a chunk attends to is plain while it does
        scratch += sizes.most_passed * precision.activations.num_bytes(kv_elements(layer, parallel))
    return scratch


def _whole(layer: WholeLayer, sizes: RoundSizes, precision: Precision) -> int:
    """One chunk at a time: its stream, the widest of its products four times, each token as often as it goes to
    experts, keys and values of all its context once more, and a mask."""
    rows, per_token = sizes.most_rows, layer.experts.per_token if layer.experts else 1
    widest = max((size[-2] for _, size in layer.tensors if len(size) > 1), default=0)
    row = precision.activations.num_bytes(
        _STREAM_ROWS * layer.hidden_size + 4 * per_token * (widest + layer.hidden_size)
    )
    context = layer.kept_tokens(sizes.slab_rows) + rows
    return rows * row + precision.kv.num_bytes(context * layer.attended_numbers) + 2 * rows * sizes.slab_rows


def gathered_bytes(layers: Iterable[LayerSpec], parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Bytes of the shared memory that cards of a host gather keys and values in, of all ranks, two layers in turn."""
    if parallel.sp_kind is not SPKind.GATHER:
        return 0
    row = max(precision.activations.num_bytes(layer.attention.kv_elements(parallel.tp_size)) for layer in layers)
    return GATHER_SLOTS * parallel.sp_size * sizes.most_rows * row


def ring_bytes(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Bytes that a recorded round keeps of the keys and values that go around the ranks, in the mean over rounds whose
    context grows from none to the longest."""
    if parallel.sp_kind is not SPKind.RING:
        return 0
    row = precision.kv.num_bytes(layer.attention.kv_elements(parallel.tp_size))
    return int(RING_KEPT * -(-sizes.most_passed // parallel.sp_size) * row)


def _own_rows(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes, precision: Precision, messages: int = 0) -> int:
    """A rank runs its rows alone. messages: bytes beside attention."""
    rows = sizes.most_rows
    attention = rows * _attention_row_bytes(layer, precision, *_own_heads(layer, parallel)) + messages
    attention += _latent_bytes(layer, parallel, sizes)
    summed = _SUMMED_ROWS * layer.hidden_size if parallel.tp_size > 1 else 0
    stream = _stream(layer, precision, rows) + rows * precision.activations.num_bytes(summed)
    return max(attention, _mlp_bytes(layer, precision, parallel, rows)) + stream


def _gather(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Beside attention its own new keys and values, and those of all ranks."""
    row = precision.activations.num_bytes(layer.attention.kv_elements(parallel.tp_size))
    return _own_rows(layer, parallel, sizes, precision, (1 + parallel.sp_size) * sizes.most_rows * row)


def _ulysses(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """All rows with a share of the heads, or around it q|k|v of the own rows four times: as they are, sorted by rank,
    sent and received."""
    heads, kv_heads = _attending_heads(layer, parallel)
    rows, all_rows = sizes.most_rows, max(sizes.most_tokens, sizes.most_rows)
    attention = all_rows * _attention_row_bytes(layer, precision, heads, kv_heads)
    repeated = parallel.sp_size * (heads + 2 * kv_heads) * layer.attention.head_dim
    exchange = rows * precision.activations.num_bytes(4 * repeated)
    mlp = _mlp_bytes(layer, precision, parallel, rows)
    # What the exchanges give lies beside what they took.
    received = all_rows * precision.activations.num_bytes(_SUMMED_ROWS * layer.hidden_size)
    return max(attention, exchange, mlp) + received + _stream(layer, precision, rows)


def _ring(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Beside attention the keys and values that it sees, and those that arrive meanwhile."""
    row = precision.kv.num_bytes(layer.attention.kv_elements(parallel.tp_size))
    passed = -(-sizes.most_passed // parallel.sp_size)
    heads, _ = _own_heads(layer, parallel)
    merged = sizes.most_rows * FLOAT32.num_bytes(_MERGED * heads * layer.attention.head_dim)
    return _own_rows(layer, parallel, sizes, precision, 2 * passed * row + merged)


def _megatron(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes, precision: Precision) -> int:
    """Products of all rows: beside them the gathered norm and the partial output; the rest of the stream is cut."""
    padded = max(sizes.most_rows * parallel.tp_size, sizes.most_tokens)
    if sizes.most_rows == sizes.most_tokens:  # no round is cut
        return _own_rows(layer, parallel, sizes, precision)
    attention = _attention_row_bytes(layer, precision, *_own_heads(layer, parallel))
    sends = layer.experts is not None and layer.experts.dispatch is Dispatch.ALL_TO_ALL
    mlp = _mlp_bytes(layer, precision, parallel, sizes.most_rows if sends else padded)
    whole = padded * precision.activations.num_bytes(2 * layer.hidden_size)
    stream = _stream(layer, precision, sizes.most_rows)
    return max(padded * attention, mlp) + whole + stream + _latent_bytes(layer, parallel, sizes)


_KINDS: dict[SPKind, Callable[[LayerSpec, Parallel, RoundSizes, Precision], int]] = {
    SPKind.NONE: _own_rows,
    SPKind.GATHER: _gather,
    SPKind.ULYSSES: _ulysses,
    SPKind.RING: _ring,
    SPKind.MEGATRON: _megatron,
}


def _own_heads(layer: LayerSpec, parallel: Parallel) -> tuple[int, int]:
    """Query and KV heads that a rank projects to."""
    sizes = layer.attention.sizes(parallel.tp_size)
    return sizes["heads"], sizes["kv_heads"]


def _attending_heads(layer: LayerSpec, parallel: Parallel) -> tuple[int, int]:
    """Query and KV heads that a rank attends with, the most that any does."""
    heads, kv_heads = _own_heads(layer, parallel)
    return most_heads(heads, kv_heads, parallel.sp_size) if parallel.sp_kind is SPKind.ULYSSES else (heads, kv_heads)


def _stream(layer: LayerSpec, precision: Precision, rows: int) -> int:
    return rows * precision.activations.num_bytes(_STREAM_ROWS * layer.hidden_size)


def _attention_row_bytes(layer: LayerSpec, precision: Precision, heads: int, kv_heads: int) -> int:
    """q, k, v before and after rotation with both partial attentions in float32; with latents q and what is kept as
    products give them and side by side, scaled queries, and what is attended."""
    if layer.attention.latent:
        first, _ = layer.attention.qkv.sizes()
        of_heads = heads * (3 * layer.attention.head_dim + 2 * layer.attention.latent.value)
        return precision.activations.num_bytes(2 * first + of_heads)
    attended = heads * layer.attention.head_dim
    qkv = attended + 2 * kv_heads * layer.attention.head_dim
    return precision.activations.num_bytes(2 * qkv + attended) + FLOAT32.num_bytes(3 * attended)


def _latent_bytes(layer: LayerSpec, parallel: Parallel, sizes: RoundSizes) -> int:
    """Keys and values of some heads, made of all latents of a request, with a copy of the keys, or the queries of a
    chunk that attends to latents as they are; and a strip's scores and weights."""
    latent = layer.attention.latent
    if latent is None:
        return 0
    heads, pair = layer.attention.heads.per_rank(parallel.tp_size), layer.attention.pair_width
    expanded = max(min(EXPANDED_NUMBERS, heads * sizes.most_passed * pair), sizes.most_passed * pair)
    absorbed = heads * min(latent.longest_absorbed, sizes.most_tokens) * (3 * latent.kept + latent.rank)
    scores = min(MASKED_SCORES, heads * sizes.most_tokens * sizes.most_passed)
    return FLOAT32.num_bytes(max(2 * expanded, absorbed) + 3 * scores)


def _mlp_bytes(layer: LayerSpec, precision: Precision, parallel: Parallel, rows: int) -> int:
    """Of a rank with so many rows of its own; experts that rows are sent to may get those of all ranks, and hold each
    as it came and as it goes back."""
    row = _mlp_row_bytes(layer, precision, parallel.tp_size)
    if layer.experts is None or layer.experts.dispatch is Dispatch.NONE:
        return rows * row
    return parallel.sequence_size * rows * (row + precision.activations.num_bytes(2 * layer.hidden_size))


def _mlp_row_bytes(layer: LayerSpec, precision: Precision, tp_size: int) -> int:
    """gate, up and their product; of experts as often as a token goes to one, with its row before and after them."""
    if layer.experts is None:
        return precision.activations.num_bytes(3 * layer.dense.intermediate.per_rank(tp_size))
    sizes, shared = layer.experts.sizes(tp_size), layer.sizes(tp_size)["intermediate"]
    here = min(sizes["per_token"], sizes["held"])
    routed = here * (2 * layer.hidden_size + 3 * sizes["features"])
    return precision.activations.num_bytes(routed + 3 * shared + layer.hidden_size)
