"""The KV cache of one rank, allocated once for all requests of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from profiler.kernels.quantized.kv import KV, QuantizedKV
from tuner.plan.kv_rows import KVRows


class KVSlab:
    """Keys and values of each layer, [KV heads, rows, features]; a request's rows lie together, prompt first.

    Of latents values have no features: keys are all that is kept.
    """

    def __init__(
        self,
        heads: Sequence[tuple[int, tuple[int, int]]],
        rows: KVRows,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
        static: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        """heads: how many of each layer, and the features of one as a key and as a value.

        dtype: of the numbers that are written and read. kept: of 8 bits, in which they are kept, if not as they are;
        static: then the scales of each layer's keys and values, where they are known.
        """
        sizes = [[(num_heads, rows.total, widths[which]) for num_heads, widths in heads] for which in range(2)]
        self.keys: Sequence[KV]
        self.values: Sequence[KV]
        if kept is not None:
            self.keys, self.values = (
                [
                    QuantizedKV.zeros(
                        size, kept=kept, dtype=dtype, device=device, static=static[layer][which] if static else None
                    )
                    for layer, size in enumerate(sizes[which])
                ]
                for which in range(2)
            )
            return
        # Zeros and not empty: on a CPU this touches the pages before the clock starts.
        lengths = [[math.prod(size) for size in of_kind] for of_kind in sizes]
        numbers = torch.zeros(sum(map(sum, lengths)), device=device, dtype=dtype).split([*map(sum, lengths)])
        self.keys, self.values = (
            [part.view(size) for part, size in zip(numbers[which].split(lengths[which]), sizes[which], strict=True)]
            for which in range(2)
        )

    def __getitem__(self, layer: int) -> tuple[KV, KV]:
        """Keys and values of one layer, [KV heads, rows, features]."""
        return self.keys[layer], self.values[layer]
