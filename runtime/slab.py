"""The KV cache of one rank, allocated once for all requests of a plan."""

from __future__ import annotations

import torch

from profiler.model import ModelShape
from tuner.kv_rows import KVRows


class KVSlab:
    """Keys and values, each [layers, KV heads, rows, head_dim]; a request's rows lie together, prompt first."""

    def __init__(
        self,
        shape: ModelShape,
        rows: KVRows,
        *,
        num_layers: int,
        tp_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.start = rows.start
        """Row of each request's first token."""
        size = (num_layers, shape.kv_heads_per_rank(tp_size), rows.total, shape.head_dim)
        # Zeros and not empty: on a CPU this touches the pages before the clock starts.
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros(size, device=device, dtype=dtype)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [KV heads, rows, head_dim]."""
        return self.keys[layer], self.values[layer]
