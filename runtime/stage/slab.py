"""The KV cache of one rank, allocated once for all requests of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from profiler.kernels.quantized.kv import KV, QuantizedKV
from tuner.plan.kv_rows import KVRows


class KVSlab:
    """Keys and values of each layer, [KV heads, rows, head_dim]; a request's rows lie together, prompt first."""

    def __init__(
        self,
        heads: Sequence[tuple[int, int]],
        rows: KVRows,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
        static: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        """heads: how many of each layer, and their head_dim.

        dtype: of the numbers that are written and read. kept: of 8 bits, in which they are kept, if not as they are;
        static: then the scales of each layer's keys and values, where they are known.
        """
        sizes = [(num_heads, rows.total, head_dim) for num_heads, head_dim in heads]
        self.keys: Sequence[KV]
        self.values: Sequence[KV]
        if kept is not None:
            self.keys, self.values = (
                [
                    QuantizedKV.zeros(
                        size, kept=kept, dtype=dtype, device=device, static=static[layer][which] if static else None
                    )
                    for layer, size in enumerate(sizes)
                ]
                for which in range(2)
            )
            return
        # Zeros and not empty: on a CPU this touches the pages before the clock starts.
        lengths = [math.prod(size) for size in sizes]
        keys, values = torch.zeros(2, sum(lengths), device=device, dtype=dtype)
        self.keys = [part.view(size) for part, size in zip(keys.split(lengths), sizes, strict=True)]
        self.values = [part.view(size) for part, size in zip(values.split(lengths), sizes, strict=True)]

    def __getitem__(self, layer: int) -> tuple[KV, KV]:
        """Keys and values of one layer, [KV heads, rows, head_dim]."""
        return self.keys[layer], self.values[layer]
