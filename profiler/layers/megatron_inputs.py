"""A round whose norms and residual stream the tensor-parallel group cuts by rows.

Sequence parallelism of Megatron-LM (Korthikanti et al., 2022): an all-gather before the products and a reduce-scatter
after them move as much as an all-reduce; norms, additions and what goes to the next stage are divided by the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from profiler.kernels.entry import Operand
from profiler.kernels.quantized.kv import KV
from profiler.kernels.quantized.rows import QuantizedRows
from profiler.layers.layer_inputs import AttentionLayer, LayerInputs, Reduce
from profiler.layers.prefill_inputs import RoundInputs
from profiler.layers.row_group import RowGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronInputs(LayerInputs):
    """A round of which this rank keeps a contiguous part of the rows between its products."""

    cuts_rows: ClassVar[bool] = True
    whole: RoundInputs  # the whole round, padded to as many rows as all ranks keep together
    group: RowGroup

    def own_tokens(self, rows: int) -> int:
        """See `LayerInputs`: the last rank or ranks have fewer."""
        return min(max(self.whole.num_tokens - self.group.rank * rows, 0), rows)

    def product_tokens(self, rows: int) -> int:
        """See `LayerInputs`."""
        return self.whole.num_tokens

    def mix(self, layer: AttentionLayer, normed: Operand, keys: KV, values: KV) -> torch.Tensor:
        """See `LayerInputs`: of all rows, which the reduce-scatter after o takes."""
        qkv = layer.project(self.spread(normed))[: self.whole.num_tokens]
        return layer.attend(layer.rotate(qkv, self.whole, keys, values), self.whole, keys, values)

    def spread(self, normed: Operand) -> Operand:
        """See `LayerInputs`: the rows of all ranks, sent in the format in which products take them."""
        if isinstance(normed, QuantizedRows):
            return normed.gathered(self.group.gather)
        return self.group.gather(normed).flatten(0, 1)

    def join(self, reduce: Reduce, partial: torch.Tensor) -> torch.Tensor:
        """See `LayerInputs`."""
        return reduce.scatter(partial)
