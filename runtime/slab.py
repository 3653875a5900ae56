"""The KV cache of one rank, allocated once for all requests of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from profiler.model import ModelShape
from tuner.plan import Request


class KVSlab:
    """Keys and values, each [layers, KV heads, rows, head_dim]; a request's rows lie together, prompt first."""

    def __init__(
        self,
        shape: ModelShape,
        requests: Sequence[Request],
        *,
        num_layers: int,
        tp_size: int,
        max_new_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        rows = [request.prompt_tokens + max_new_tokens for request in requests]
        self.start = tuple(accumulate(rows[:-1], initial=0))
        """Row of each request's first token."""
        size = (num_layers, shape.kv_heads_per_rank(tp_size), sum(rows), shape.head_dim)
        # Zeros and not empty: on a CPU this touches the pages before the clock starts.
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros(size, device=device, dtype=dtype)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [KV heads, rows, head_dim]."""
        return self.keys[layer], self.values[layer]
