"""A round cut by rows whose new keys and values are gathered: KV whole on each rank, queries on their own.

Only the round's new keys and values move, whatever the context; with a zigzag cut every rank sees as many pairs of
query and key. Llama 3's context parallelism gathers so (Dubey et al., 2024, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from profiler.kernels.elementwise import GatheredRun, write_gathered
from profiler.kernels.entry import Operand
from profiler.kernels.quantized.kv import KV
from profiler.kernels.rotary import Turns
from profiler.layers.layer_inputs import AttentionLayer
from profiler.layers.prefill_inputs import RoundInputs
from profiler.layers.row_group import RowGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedRows:
    """The places of this rank's P rows in the tensor that is gathered: one after the other."""

    rotary: Turns
    slab_rows: torch.Tensor

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """Copy rows [P, KV, D] to [KV, P, D]."""
        assert isinstance(slab, torch.Tensor)  # plans are checked for it
        slab.copy_(rows.transpose(0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherInputs(RoundInputs):
    """This rank's rows of a round. See `RoundInputs`, whose spans are this rank's pieces."""

    cuts_rows: ClassVar[bool] = True
    group: RowGroup
    staged: StagedRows
    runs: tuple[GatheredRun, ...]  # of all ranks' rows
    gathered_rows: torch.Tensor  # [size * P] int64: the slab's row of each gathered row, -1 for padding
    overlaps: bool
    """Whether the gather runs beside the projection of the queries, which is a product of its own then."""

    def mix(self, layer: AttentionLayer, normed: Operand, keys: KV, values: KV) -> torch.Tensor:
        """See `LayerInputs`."""
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)  # plans are checked for it
        num_kv_heads, _, head_dim = keys.shape
        new = self.group.new_part(keys, (2, num_kv_heads, normed.shape[0], head_dim))
        apart = layer.project_apart(normed) if self.overlaps else None
        if apart is None:
            q = layer.rotate(layer.project(normed), self.staged, new[0], new[1])
            gathered = self.group.gather(new)
        else:
            kv, project_q = apart
            layer.rotate(kv, self.staged, new[0], new[1], num_heads=0)
            wait = self.group.begin_gather(new)
            q = layer.rotate(project_q(), self.staged, new[0, :0], new[1, :0])
            gathered = wait()
        write_gathered(gathered, self.gathered_rows, self.runs, keys, values)
        self.group.release()
        return layer.attend(q, self, keys, values)
