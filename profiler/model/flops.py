"""FLOPs of a prefill, counted exactly, so that MFU does not depend on how the prompts were cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from profiler.model.shape import ModelShape

if TYPE_CHECKING:  # planning from a cost model file needs no database
    from db.rows.measurements import Measurement


def prefill_flops(shape: ModelShape, chunks: Iterable[tuple[int, int]], num_logits: int) -> float:
    """FLOPs of running `chunks`, each (tokens m, context p), and `num_logits` rows of the head.

    Per layer and token two for each number in its matrices; per layer 4Hd for each (query, key) pair that the causal
    mask keeps, m*p + m(m+1)/2 for a chunk; 2DV for a logit row. Norms, rotary embedding and softmax are left out, as is
    the custom (PaLM, appendix B).
    """
    tokens, pairs = 0, 0
    for num_tokens, context in chunks:
        tokens += num_tokens
        pairs += causal_pairs(num_tokens, context)
    layers = sum(
        2 * tokens * layer.product_elements() + 4 * layer.attention.heads.size * pairs for layer in shape.layers
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


def causal_pairs(chunk: int, context: int) -> int:
    """(query, key) pairs that the causal mask keeps."""
    return chunk * context + chunk * (chunk + 1) // 2
