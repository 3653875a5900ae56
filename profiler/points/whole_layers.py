"""Points of layers that are run as wholes: each kind over chunks and contexts, and what a forward does before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from profiler.model import ModelShape, Precision, WholeLayer
from profiler.points.point import BEFORE_LAYERS, Op, Point

_FEW = 0.2  # of all layers
WAY = 2
"""In the variant of whole layers' rows: raised whenever such layers are run or timed in another way, so that rows of
before are not taken for them."""


def whole_sizes(layer: WholeLayer) -> dict[str, int]:
    """Sizes that the rows of a kind of layer name beside chunk and context."""
    return {"hidden": layer.hidden_size, "parameters": layer.num_elements()}


def whole_variant(layer: WholeLayer) -> str:
    """The variant of a kind's rows."""
    return f"transformers/{WAY}: {layer.kind}"


def whole_layer_points(
    shape: ModelShape, precision: Precision, *, chunks: dict[int, int], context_length: int, busy_ranks: int
) -> Iterator[Point]:
    """chunks: with the level at which each is wanted; of kinds that few layers are of, later."""
    counts = Counter(layer for layer in shape.every_layer if isinstance(layer, WholeLayer))
    later = {layer: int(count < _FEW * shape.num_layers) for layer, count in counts.items()}
    num_bytes = precision.activations.num_bytes
    for chunk, level in chunks.items():
        rest = context_length - chunk
        for context, more in {rest // 4: 2, rest // 2: 1, 0: 0, rest: 0}.items():
            at = {"chunk": chunk, "context": context}
            mask = 2 * chunk * (context + chunk)
            for layer in counts:
                seen = layer.attention_flops(chunk, context)
                stream = num_bytes(8 * chunk * layer.hidden_size)
                numbers = layer.kv_numbers + layer.attended_numbers
                kept = num_bytes(numbers * (layer.kept_tokens(context) + chunk))
                yield Point(
                    op=Op.LAYER, dtype=precision.name, shape=at | whole_sizes(layer), variant=whole_variant(layer),
                    busy_ranks=busy_ranks, level=min(level + more + (later[layer] if level else 0), 4),
                    flops=2.0 * chunk * layer.product_elements() + seen,
                    size_bytes=layer.weights_bytes(precision) + kept + mask + stream,
                )  # fmt: skip
            if context not in (0, rest):  # at most a mask of them all
                continue
            yield Point(
                op=Op.LAYER, dtype=precision.name, shape=at | {"hidden": shape.hidden_size}, variant=BEFORE_LAYERS,
                busy_ranks=busy_ranks, level=min(level + more, 4), flops=10.0 * mask,
                size_bytes=next(iter(counts)).weights_bytes(precision) + mask,
            )  # fmt: skip
