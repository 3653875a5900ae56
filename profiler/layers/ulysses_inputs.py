"""A round cut by rows outside attention and by heads inside it, with an all-to-all before and after.

DeepSpeed-Ulysses (Jacobs et al., 2023). KV is kept by heads, so that a chunk never sends its context again. Heads need
not divide evenly, and ranks may keep a KV head in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from profiler.kernels.entry import Operand
from profiler.kernels.quantized.kv import KV
from profiler.layers.layer_inputs import AttentionLayer, LayerInputs
from profiler.layers.row_group import RowGroup
from profiler.sequence.heads import HeadShare


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadColumns:
    """How the columns of q|k|v and of attention's output are shared out among the ranks of a group."""

    shares: tuple[HeadShare, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def of_rank(self, qkv: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's columns of q|k|v [T, (H + 2 KV) D] -> [T, (h + 2 kv) D]."""
        share, values = self.shares[rank], self.num_heads + self.num_kv_heads
        ranges = (
            (share.heads.start, share.heads.stop),
            (self.num_heads + share.kv_heads.start, self.num_heads + share.kv_heads.stop),
            (values + share.kv_heads.start, values + share.kv_heads.stop),
        )
        return torch.cat([qkv[:, first * self.head_dim : end * self.head_dim] for first, end in ranges], dim=1)

    def width(self, rank: int) -> int:
        """Columns of q|k|v that a rank has."""
        share = self.shares[rank]
        return (share.num_heads + 2 * share.num_kv_heads) * self.head_dim

    def output_width(self, rank: int) -> int:
        """Columns of attention's output that a rank makes."""
        return self.shares[rank].num_heads * self.head_dim


def attend_share(
    share: HeadShare,
    layer: AttentionLayer,
    q: torch.Tensor,
    inputs: LayerInputs,
    keys: KV,
    values: KV,
) -> torch.Tensor:
    """Attend q [T, h, D] over keys and values [kv, rows, D] of one rank's heads -> [T, h D]."""
    parts = [layer.attend(q[:, heads], inputs, keys[kv], values[kv]) for heads, kv in share.groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class UlyssesInputs(LayerInputs):
    """A round of which this rank runs a contiguous part of the rows, P with padding, and all rows of its heads."""

    cuts_rows: ClassVar[bool] = True

    whole: LayerInputs  # the whole round
    num_tokens: int  # of the whole round
    num_rows: int  # P
    columns: HeadColumns
    group: RowGroup

    def own_tokens(self, rows: int) -> int:
        """See `LayerInputs`: the last rank or ranks have fewer."""
        return min(max(self.num_tokens - self.group.rank * rows, 0), rows)

    def mix(self, layer: AttentionLayer, normed: Operand, keys: KV, values: KV) -> torch.Tensor:
        """See `LayerInputs`."""
        share = self.columns.shares[self.group.rank]
        keys, values = keys[: share.num_kv_heads], values[: share.num_kv_heads]  # the slab has as many on every rank
        qkv = self._to_heads(layer.project(normed))
        q = layer.rotate(qkv, self.whole, keys, values, num_heads=share.num_heads)
        return self._to_rows(attend_share(share, layer, q, self.whole, keys, values))

    def _to_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """q|k|v of this rank's rows and all heads -> of all rows and this rank's heads."""
        ranks, width = range(self.group.size), self.columns.width(self.group.rank)
        parts = [self.columns.of_rank(qkv, rank) for rank in ranks]
        received = self.group.exchange(parts, [self.num_rows * width] * self.group.size)
        return torch.cat([part.view(-1, width) for part in received])[: self.num_tokens]

    def _to_rows(self, mixed: torch.Tensor) -> torch.Tensor:
        """Attention's output of all rows and this rank's heads -> of this rank's rows and all heads."""
        ranks, rows = range(self.group.size), self.num_rows
        padding = rows * self.group.size - self.num_tokens
        if padding:
            mixed = torch.cat([mixed, mixed.new_zeros(padding, mixed.shape[1])])
        widths: Sequence[int] = [self.columns.output_width(rank) for rank in ranks]
        received = self.group.exchange(mixed.split(rows), [rows * width for width in widths])
        return torch.cat([part.view(rows, width) for part, width in zip(received, widths, strict=True)], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeUlyssesInputs(LayerInputs):
    """A round or a step all of whose rows every rank runs, each attending with its own heads."""

    whole: LayerInputs
    columns: HeadColumns
    group: RowGroup

    def mix(self, layer: AttentionLayer, normed: Operand, keys: KV, values: KV) -> torch.Tensor:
        """See `LayerInputs`."""
        rank, ranks = self.group.rank, range(self.group.size)
        share = self.columns.shares[rank]
        keys, values = keys[: share.num_kv_heads], values[: share.num_kv_heads]
        qkv = self.columns.of_rank(layer.project(normed), rank)
        q = layer.rotate(qkv, self.whole, keys, values, num_heads=share.num_heads)
        mixed = attend_share(share, layer, q, self.whole, keys, values)
        widths = [self.columns.output_width(rank) for rank in ranks]
        padded = mixed.new_zeros(mixed.shape[0], max(widths))
        padded[:, : mixed.shape[1]] = mixed
        gathered = self.group.gather(padded)
        return torch.cat([gathered[rank, :, : widths[rank]] for rank in ranks], dim=1)
