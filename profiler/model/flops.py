"""FLOPs of a prefill, counted exactly, so that MFU does not depend on how the prompts were cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from profiler.model.shape import ModelShape

if TYPE_CHECKING:  # planning from a cost model file needs no database
    from db.rows.measurements import Measurement


def prefill_flops(shape: ModelShape, chunks: Iterable[tuple[int, int]], num_logits: int) -> float:
    """FLOPs of running `chunks`, each (tokens m, context p), and `num_logits` rows of the head.

    Per layer and token two for each number in its matrices, of routed experts those that a token goes to; per layer
    4Hd for each (query, key) pair that the mask keeps, m*p + m(m+1)/2 for a chunk under the causal mask and fewer with
    a window; 2DV for a logit row. Norms, rotary embedding and softmax are left out, as is
    the custom (PaLM, appendix B).
    """
    chunks, kinds = list(chunks), Counter(shape.every_layer)
    tokens = sum(num_tokens for num_tokens, _ in chunks)
    layers = sum(
        count * (2 * tokens * layer.product_elements() + sum(layer.attention_flops(*chunk) for chunk in chunks))
        for layer, count in kinds.items()
    )
    vocab, hidden = shape.head.sizes()
    return float(layers + 2 * num_logits * hidden * vocab)


def fastest_product_flops(rows: Iterable[Measurement], dtype: str) -> float | None:
    """FLOP/s of one rank in the fastest product measured in `dtype`; None without any."""
    rates = (
        2.0 * row.shape["m"] * row.shape["n"] * row.shape["k"] / (row.median_us * 1e-6)
        for row in rows
        if row.op in ("matmul", "matmul_ceiling") and row.dtype == dtype and row.median_us > 0.0
    )
    return max(rates, default=None)
