"""FLOPs of a prefill, counted exactly, so that MFU does not depend on how the prompts were cut."""

from __future__ import annotations

from collections.abc import Iterable

from profiler.model import ModelShape


def prefill_flops(shape: ModelShape, chunks: Iterable[tuple[int, int]], num_logits: int) -> float:
    """FLOPs of running `chunks`, each (tokens m, context p), and `num_logits` rows of the head.

    Per layer and token 2[D(H+2KV)d + HdD + 3DF] for the matmuls; per layer 4Hd for each (query, key) pair that the
    causal mask keeps, m*p + m(m+1)/2 for a chunk; 2DV for a logit row. Norms, rotary embedding and softmax are left
    out, as is the custom (PaLM, appendix B).
    """
    d, heads, kv_heads, hidden = shape.head_dim, shape.num_heads, shape.num_kv_heads, shape.hidden_size
    weights = hidden * (heads + 2 * kv_heads) * d + heads * d * hidden + 3 * hidden * shape.intermediate_size
    tokens, pairs = 0, 0
    for num_tokens, context in chunks:
        tokens += num_tokens
        pairs += num_tokens * context + num_tokens * (num_tokens + 1) // 2
    layers = 2 * shape.num_layers * tokens * weights + 4 * shape.num_layers * heads * d * pairs
    return float(layers + 2 * num_logits * hidden * shape.vocab_size)
