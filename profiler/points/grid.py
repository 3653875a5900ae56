"""The points of a profile and their levels; stopped at any time, a profile covers every operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from db.errors import UserError
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import PRECISIONS, Backend, LayerSpec, ModelShape, Precision
from profiler.model.experts import Dispatch
from profiler.model.whole.layer import seen_pairs
from profiler.points.order import by_need
from profiler.points.point import BESIDE, COLLECTIVES, EVEN, KEPT, SKEWED, WARM, Op, Point, strided
from profiler.points.rank_groups import RankGroups
from profiler.points.whole_layers import whole_layer_points
from profiler.sequence.heads import most_heads

SMALLEST_CHUNK = 16
OFF_GRID_CHUNKS = (1, 48, 100, 384, 1000, 3000, 12288)  # the last chunks of requests are never powers of two
LAST_LEVEL = 4
# A card's products run in waves of tiles: their rate moves by ten percent from one multiple of 128 tokens to the next.
TILE_TOKENS = 128
_WAVE_STEP, _WAVES_END = 256, 4096
_LAYERS_FROM = 256
_BETWEEN = (768, 1536, 3072, 6144, 12288)
_KNEE = 192  # where products bend between their cost of reading weights, flat in the rows, and that of arithmetic
_FINE_END, _FINE_STEP, _MIDDLE_END, _MIDDLE_STEP = 2048, 128, 8192, 512
# What today's plans use of the collectives is measured more finely than the others.
_OFTEN = (Op.ALL_REDUCE, Op.SEND_RECV)
# What ranks that share rows exchange, and what of it those do that stand apart: rows beside tensor parallelism.
_BETWEEN_ROWS = (Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL)
_APART = (Op.ALL_GATHER, Op.ALL_TO_ALL)
_BESIDE_FROM = 512  # tokens: shorter work than the start of a message says nothing of the two side by side
BESIDE_BYTES = 64 << 20  # of the messages that go on while products are measured
# Kernels that build a dense mask on a CPU are not tried beyond this many pairs.
_MAX_DENSE_PAIRS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What a profile covers: model, context length, parallel sizes and kernels."""

    shape: ModelShape
    dtype: str
    tp_sizes: tuple[int, ...]
    world_size: int
    context_length: int
    device_type: str
    kernels: tuple[AttentionKernel, ...]  # the usual best first
    sp_sizes: tuple[int, ...] = ()
    """Ranks that share the rows of a round beside each tensor-parallel degree: what they exchange, and attention with a
    share of the heads. Without any only coarse points of collectives tell of it."""

    @property
    def precision(self) -> Precision:
        """The formats that `dtype` names."""
        return PRECISIONS[self.dtype]

    def points(self) -> list[Point]:
        """All points, each key once, in the order in which predictions need them."""
        unique = {point.key: point for point in sorted(self._all(), key=lambda p: p.level, reverse=True)}
        return by_need(
            sorted(unique.values(), key=lambda point: (point.level, point.flops)),
            device_type=self.device_type,
            hidden_bytes=self._bytes(self.shape.hidden_size),
            usual_kernel=self.kernels[0],
        )

    @property
    def chunk_levels(self) -> dict[int, int]:
        """Chunk sizes with the level at which each is wanted."""
        powers = []
        size = SMALLEST_CHUNK
        while size < self.context_length:
            powers.append(size)
            size *= 2
        levels = bisection_levels([*powers, self.context_length])
        return levels | {size: LAST_LEVEL for size in OFF_GRID_CHUNKS if size < self.context_length}

    @property
    def product_levels(self) -> dict[int, int]:
        """Rows of products with the level at which each is wanted: on a card finer than other work."""
        if self.device_type != "cuda":
            return self.chunk_levels
        fine = [*range(_FINE_STEP, _FINE_END, _FINE_STEP), *range(_FINE_END, _MIDDLE_END, _MIDDLE_STEP)]
        return self._with_levels({size: 3 if size % (2 * TILE_TOKENS) else 2 for size in (_KNEE, *fine)})

    @property
    def attention_levels(self) -> dict[int, int]:
        """Chunks of attention with the level at which each is wanted: on a card finer, for its blocks come in waves."""
        if self.device_type != "cuda":
            return self.chunk_levels
        steps = [*range(_WAVE_STEP, _FINE_END, _WAVE_STEP), *range(_FINE_END, _WAVES_END + 1, 2 * _WAVE_STEP)]
        return self._with_levels(dict.fromkeys(steps, 2))

    @property
    def layer_levels(self) -> dict[int, int]:
        """Chunks of whole layers with the level at which each is wanted: on a card all powers of two that plans use."""
        fine = _LAYERS_FROM if self.device_type == "cuda" else self.context_length
        return {
            size: min(level, 2)
            for size, level in self.chunk_levels.items()
            if level <= 1 or (size >= fine and size not in OFF_GRID_CHUNKS)
        }

    @property
    def whole_levels(self) -> dict[int, int]:
        """Chunks of layers that are run as wholes: nothing but these tells of what lies between them."""
        levels = {chunk: level for chunk, level in self.chunk_levels.items() if level < LAST_LEVEL}
        if self.device_type == "cuda":
            levels |= {size: 2 for size in _BETWEEN if size < self.context_length}
        return dict(sorted(levels.items()))

    def _with_levels(self, fine: Mapping[int, int]) -> dict[int, int]:
        """Sizes below the context with their levels; of the usual levels and the given ones the lower counts."""
        levels = self.chunk_levels
        for size, level in fine.items():
            if size < self.context_length:
                levels[size] = min(level, levels.get(size, level))
        return dict(sorted(levels.items()))

    def context_levels(self, chunk: int, window: int | None = None) -> dict[int, int]:
        """Contexts before a chunk: at a fixed chunk attention is linear in them, so that few do; constant behind a
        window."""
        rest = self.context_length - chunk
        if window is not None and window < rest:
            return {0: 0, window: 0, rest: 2}
        levels = {rest * 1 // 4: 2, rest // 2: 1, 0: 0, rest: 0}
        return dict(sorted(levels.items()))

    def _all(self) -> Iterator[Point]:
        if self.shape.backend is Backend.OWN:
            yield from self._parts()
        else:
            yield from whole_layer_points(
                self.shape,
                self.precision,
                chunks=self.whole_levels,
                context_length=self.context_length,
                busy_ranks=self.world_size,
            )
            yield from self._end_points(1)
            yield from self._ceiling()
            if self.world_size > 1:
                yield from (
                    point
                    for groups in rank_groups((1,), (), self.world_size)
                    for point in self._collectives(groups)
                    if point.op is Op.SEND_RECV
                )

    def _parts(self) -> Iterator[Point]:
        """Parts of layers, whole layers and all that ranks do together, for kernels here."""
        for tp_size in self.tp_sizes:
            for layer in dict.fromkeys(layer for shape in self._spread(tp_size) for layer in shape.layer_kinds):
                yield from self._layer_points(layer, tp_size)
            yield from self._end_points(tp_size)
        yield from self._round_overhead()
        yield from self._ceiling()
        for groups in rank_groups(self.tp_sizes, self.sp_sizes, self.world_size):
            yield from self._collectives(groups)
        if self.device_type == "cuda":
            for sp_size in self.sp_sizes:
                yield from self._side_by_side(RankGroups(sp_size))

    def _spread(self, tp_size: int) -> Iterator[ModelShape]:
        """The model with its experts everywhere that they may lie; beside the group where ranks are to share rows."""
        for ep_size in self.shape.spread_sizes(tp_size):
            yield self.shape.spread(ep_size)
            if ep_size == tp_size:
                yield self.shape.spread(ep_size, dispatch=Dispatch.ALL_TO_ALL)
        for sp_size in self.sp_sizes:
            if self.shape.has_experts and sp_size * tp_size <= self.world_size:
                yield self.shape.spread(1, beside=sp_size, dispatch=Dispatch.ALL_TO_ALL)

    def _layer_points(self, layer: LayerSpec, tp_size: int) -> Iterator[Point]:
        """The parts of a layer and whole layers: with all ranks at work, and on a CPU coarsely with one.

        Cards share nothing that a kernel uses, so that one alone needs no points of its own.
        """
        parts = [
            *self._matmuls(layer, tp_size),
            *self._experts(layer, tp_size),
            *self._attention(layer, tp_size),
            *self._elementwise(layer, tp_size),
            *self._layers(layer, tp_size),
        ]
        yield from (replace(point, busy_ranks=self.world_size) for point in parts)
        # A plan for one rank leaves the others idle.
        usual = ("", KEPT, EVEN, *self.kernels[:1], AttentionKernel.CPU_MASKED, layer.variant)
        if tp_size == 1 and self.world_size > 1 and self.device_type == "cpu":
            yield from (
                replace(point, busy_ranks=1, level=point.level + 1)
                for point in parts
                if point.level <= 1 and point.variant in usual
            )

    def _matmuls(self, layer: LayerSpec, tp_size: int) -> Iterator[Point]:
        for linear in layer.linears:
            n, k = linear.sizes(tp_size)
            weights = self.precision.matrix_bytes(n, k, kept=linear.kept)
            for m, level in self.product_levels.items():
                point = Point(
                    op=Op.MATMUL, dtype=self.dtype, shape={"m": m, "n": n, "k": k}, level=level,
                    variant=KEPT if linear.kept else "",
                    flops=2.0 * m * n * k, size_bytes=2 * weights + self._bytes(m * (n + k)),
                )  # fmt: skip
                yield point
                if self.device_type == "cuda" and level <= 1 and not linear.kept:
                    yield replace(point, variant=WARM, level=LAST_LEVEL)

    def _experts(self, layer: LayerSpec, tp_size: int) -> Iterator[Point]:
        if layer.experts is None:
            return
        sizes, weights = layer.experts.sizes(tp_size), layer.experts.matrix_bytes(self.precision, tp_size)
        width = sizes["per_token"] * (2 * layer.hidden_size + 3 * sizes["features"])
        for tokens, level in self.product_levels.items():
            for variant in (EVEN, SKEWED):
                yield Point(
                    op=Op.EXPERTS, dtype=self.dtype, shape={"tokens": tokens, "hidden": layer.hidden_size} | sizes,
                    variant=variant, level=min(level + (variant == SKEWED), LAST_LEVEL),
                    flops=2.0 * tokens * layer.experts.active_elements(tp_size),
                    size_bytes=2 * weights + self._bytes(tokens * width),
                )  # fmt: skip

    def _attention(self, layer: LayerSpec, tp_size: int) -> Iterator[Point]:
        own = layer.attention.sizes(tp_size)
        yield from self._attention_of(own, layer)
        for sp_size in self.sp_sizes:
            if sp_size * tp_size > self.world_size or sp_size > own["heads"] or layer.attention.latent:
                continue
            heads, kv_heads = most_heads(own["heads"], own["kv_heads"], sp_size)
            if heads % kv_heads == 0:  # others run as several calls
                yield from self._attention_of(own | {"heads": heads, "kv_heads": kv_heads}, layer)

    def _attention_of(self, heads: Mapping[str, int], layer: LayerSpec) -> Iterator[Point]:
        attention = layer.attention
        kept = heads["kv_heads"] * sum(attention.kept_widths) * self.context_length
        slab = self.precision.kv_bytes(kept, attention.head_dim)
        masked = attention.masking or attention.latent
        for chunk, chunk_level in self.attention_levels.items():
            for context, context_level in self.context_levels(chunk, layer.window).items():
                for kernel in (AttentionKernel.CPU_MASKED,) if masked else self.kernels:
                    if self._dense_mask(kernel, chunk, context):
                        continue
                    yield Point(
                        op=Op.ATTENTION,
                        dtype=self.dtype,
                        shape={**heads, **attention.masking, "chunk": chunk, "context": context},
                        variant=kernel.value,
                        level=min(chunk_level + context_level, LAST_LEVEL),
                        flops=2.0 * heads["heads"] * attention.pair_width * seen_pairs(chunk, context, layer.window),
                        size_bytes=slab + self._bytes(3 * chunk * heads["heads"] * heads["head_dim"]),
                    )

    def _elementwise(self, layer: LayerSpec, tp_size: int) -> Iterator[Point]:
        sizes = layer.sizes(tp_size)
        width = 4 * sizes["hidden"] + 3 * sizes["intermediate"] + 3 * sizes["heads"] * sizes["head_dim"]
        for tokens, level in self.chunk_levels.items():
            yield Point(
                op=Op.ELEMENTWISE, dtype=self.dtype, shape={"tokens": tokens} | sizes,
                variant=layer.variant, level=level, flops=25.0 * tokens * width,
                size_bytes=self._bytes(tokens * width) + self._slab(layer, tp_size),
            )  # fmt: skip

    def _layers(self, layer: LayerSpec, tp_size: int) -> Iterator[Point]:
        sizes, weights = layer.sizes(tp_size), layer.product_elements(tp_size)
        attention = 2.0 * sizes["heads"] * layer.attention.pair_width
        width = 4 * sizes["hidden"] + 5 * sizes["intermediate"] + 4 * sizes["heads"] * sizes["head_dim"]
        fixed_bytes = 3 * layer.weights_bytes(self.precision, tp_size) + 2 * self._slab(layer, tp_size)
        for chunk, chunk_level in self.layer_levels.items():
            for context, context_level in self.context_levels(chunk, layer.window).items():
                if context_level > 1 or (chunk_level and context_level):
                    continue
                yield Point(
                    op=Op.LAYER, dtype=self.dtype,
                    shape={"chunk": chunk, "context": context} | sizes | layer.traits(tp_size),
                    variant=layer.variant, level=chunk_level + context_level,
                    flops=2.0 * chunk * weights + attention * seen_pairs(chunk, context, layer.window),
                    size_bytes=fixed_bytes + self._bytes(chunk * width),
                )  # fmt: skip

    def _end_points(self, tp_size: int) -> Iterator[Point]:
        hidden, vocab = self.shape.hidden_size, self.shape.vocab_size
        for tokens, level in self.chunk_levels.items():
            if level <= 2:
                yield Point(
                    op=Op.EMBEDDING, dtype=self.dtype, shape={"tokens": tokens, "hidden": hidden, "vocab": vocab},
                    busy_ranks=self.world_size, level=level, flops=10.0 * tokens * hidden,
                    size_bytes=self._weights(vocab * hidden) + self._bytes(tokens * hidden),
                )  # fmt: skip
        vocab_per_rank, _ = self.shape.head.sizes(tp_size)
        for rows, level in {1: 0, 2: 2, 4: 1, 8: 2, 16: 3}.items():
            yield Point(
                op=Op.HEAD, dtype=self.dtype, shape={"rows": rows, "hidden": hidden, "vocab": vocab_per_rank},
                busy_ranks=self.world_size, level=level, flops=20.0 * vocab_per_rank * hidden,
                size_bytes=self._weights(2 * vocab_per_rank * hidden),
            )  # fmt: skip

    def _round_overhead(self) -> Iterator[Point]:
        for chunks, level in {1: 0, 2: 2, 4: 1, 8: 2}.items():
            yield Point(
                op=Op.ROUND_OVERHEAD, dtype=self.dtype, shape={"chunks": chunks, "tokens": 64},
                busy_ranks=self.world_size, level=level, flops=1e5,
            )  # fmt: skip

    def _ceiling(self) -> Iterator[Point]:
        size = 8192 if self.device_type == "cuda" else 1024
        yield Point(
            op=Op.MATMUL_CEILING, dtype=self.dtype, shape={"m": size, "n": size, "k": size},
            busy_ranks=self.world_size, flops=2.0 * size**3, size_bytes=self._bytes(4 * size * size),
        )  # fmt: skip

    def _collectives(self, groups: RankGroups) -> Iterator[Point]:
        """Messages of hidden states; `bytes` counts the whole one, before it is scattered or after it is gathered.

        Groups of ranks apart do what shares rows does, coarsely: on one host they are as quick as neighbours.
        """
        finest = 3 if self.device_type == "cuda" else 2
        often = (*_OFTEN, *_BETWEEN_ROWS) if groups.size in (*self.sp_sizes, *self._megatron_sizes) else _OFTEN
        for tokens, level in self.chunk_levels.items():
            for op in COLLECTIVES if groups.stride == 1 else _APART:
                if (op is Op.SEND_RECV and groups.size != 2) or level > (
                    finest if op in often and groups.stride == 1 else 1
                ):
                    continue
                yield self._message(op, groups, tokens, level=level, variant=strided("", groups.stride))

    def _side_by_side(self, groups: RankGroups) -> Iterator[Point]:
        """Gathers while products run, and products while gathers run."""
        for tokens, level in self.chunk_levels.items():
            if level > 1 or tokens < _BESIDE_FROM:
                continue
            yield self._message(Op.ALL_GATHER, groups, tokens, level=2, variant=BESIDE)
            n, k = self.shape.layers[0].products(1)["qkv"]
            yield Point(
                op=Op.MATMUL, dtype=self.dtype, shape={"m": tokens, "n": n, "k": k}, group_size=groups.size,
                busy_ranks=groups.busy(self.world_size), variant=BESIDE, level=2, flops=4.0 * tokens * n * k,
                size_bytes=self._weights(2 * n * k) + self._bytes(tokens * (n + k)) + 3 * BESIDE_BYTES,
            )  # fmt: skip

    def _message(self, op: Op, groups: RankGroups, tokens: int, *, level: int, variant: str) -> Point:
        message = round_up(tokens * self._bytes(self.shape.hidden_size), groups.size * self._bytes(1))
        return Point(
            op=op, dtype=self.dtype, shape={"bytes": message}, group_size=groups.size,
            busy_ranks=groups.busy(self.world_size), variant=variant, level=level, flops=10.0 * message,
            size_bytes=3 * message,
        )  # fmt: skip

    @property
    def _megatron_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel groups that may share rows, where sharing rows is asked for."""
        return tuple(size for size in self.tp_sizes if size > 1) if self.sp_sizes else ()

    def _bytes(self, num_activations: int) -> int:
        return self.precision.activations.num_bytes(num_activations)

    def _weights(self, num_weights: int) -> int:
        return self.precision.weights.num_bytes(num_weights)

    def _slab(self, layer: LayerSpec, tp_size: int) -> int:
        return self.precision.kv_bytes(
            layer.attention.kv_elements(tp_size) * self.context_length, layer.attention.head_dim
        )

    def _dense_mask(self, kernel: AttentionKernel, chunk: int, context: int) -> bool:
        dense = self.device_type == "cpu" and kernel is AttentionKernel.SDPA and context > 0
        return dense and chunk * (chunk + context) > _MAX_DENSE_PAIRS


def rank_groups(tp_sizes: Iterable[int], sp_sizes: Iterable[int], world_size: int) -> list[RankGroups]:
    """Groups whose collectives are measured: neighbours, each tensor-parallel degree, and all ranks; ranks that share
    rows, beside each tensor-parallel degree."""
    tp_sizes, sp_sizes = tuple(tp_sizes), tuple(sp_sizes)
    neighbours = {RankGroups(size) for size in (2, *tp_sizes, *sp_sizes, world_size) if 1 < size <= world_size}
    apart = {RankGroups(sp_size, tp_size) for sp_size in sp_sizes for tp_size in tp_sizes if tp_size > 1}
    return sorted(neighbours | {groups for groups in apart if groups.busy(world_size)})


def bisection_levels(values: Sequence[int]) -> dict[int, int]:
    """Level 0 for both ends and the middle, the next level for each halving: nine values get 0 2 1 2 0 2 1 2 0."""
    levels: dict[int, int] = {}
    if values:
        levels[values[0]] = levels[values[-1]] = 0
        _bisect(values, 0, len(values) - 1, 0, levels)
    return {value: levels[value] for value in values}


def _bisect(values: Sequence[int], low: int, high: int, level: int, levels: dict[int, int]) -> None:
    if high - low < 2:
        return
    middle = (low + high + 1) // 2
    levels[values[middle]] = level
    _bisect(values, low, middle, level + 1, levels)
    _bisect(values, middle, high, level + 1, levels)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-value // multiple) * multiple


def tp_sizes_of(shape: ModelShape, world_size: int) -> tuple[int, ...]:
    """Sizes of tensor-parallel groups that the ranks and the model can be divided into."""

    def splits(size: int) -> bool:
        try:
            shape.check_tp_size(size)
        except UserError:
            return False
        return True

    return tuple(size for size in range(1, world_size + 1) if world_size % size == 0 and splits(size))
