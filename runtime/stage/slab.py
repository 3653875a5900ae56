"""The KV cache of one rank, allocated once for all requests of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

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
    ) -> None:
        """heads: how many of each layer, and their head_dim."""
        sizes = [(num_heads, rows.total, head_dim) for num_heads, head_dim in heads]
        # Zeros and not empty: on a CPU this touches the pages before the clock starts.
        lengths = [math.prod(size) for size in sizes]
        keys, values = torch.zeros(2, sum(lengths), device=device, dtype=dtype)
        self.keys = [part.view(size) for part, size in zip(keys.split(lengths), sizes, strict=True)]
        self.values = [part.view(size) for part, size in zip(values.split(lengths), sizes, strict=True)]

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [KV heads, rows, head_dim]."""
        return self.keys[layer], self.values[layer]
