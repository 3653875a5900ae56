"""Seconds of the parts of a layer on one rank, from which the kinds of sequence parallelism add up their costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from profiler.points.point import Op
from tuner.fit.curve import Curve, Floats
from tuner.fit.sequence.overlap import Overlap

Seconds = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """Bytes of one row of a rank that messages between the ranks of a group carry."""

    hidden: int
    """Its hidden state."""
    kv: int
    """Key and value of the rank's KV heads."""
    ulysses_in: int
    """Queries, keys and values of the rank's heads, KV heads repeated where there are fewer than ranks."""
    attended: int
    """What attention gives of the rank's query heads."""
    attended_float32: int
    """The same as partial results have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParts:
    """Routed experts on ranks that share the rows, where rows are sent to them."""

    experts_s: Seconds
    """Those of the rank that gets most, for so many rows of all ranks."""
    own_rows_s: Seconds
    """Products of the router and of shared experts, which run on a rank's own rows."""
    row_bytes: float
    """Bytes of an all-to-all of hidden states for each row of all ranks."""
    choice_bytes: float
    """The same of the experts of each row and their weights."""
    is_beside: bool
    """Whether the ranks stand beside a tensor-parallel group: what is not cut takes a sum of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """Calibrated seconds of the parts of a layer on a rank, each a function of an array of sizes.

    size: ranks that share the rows of a round.
    """

    size: int
    token_wise_s: Seconds
    """Products and element-wise work of so many rows; without experts that rows are sent to."""
    elementwise_s: Seconds
    """Of that the element-wise work."""
    queries_s: Seconds
    """Of that the projection to queries."""
    reduce_s: Seconds
    """Sums over the tensor-parallel group for so many rows; nothing without one."""
    squares_s: Seconds
    """Of that the sums of squares, where a norm spans the heads of all ranks."""
    base_s: Seconds
    """Attention of chunks to themselves, with the heads that the rank attends with."""
    slope_s: Seconds
    """What each token of context adds to chunks."""
    messages: Mapping[Op, Curve]
    """Collectives over the ranks that share the rows, by bytes of the whole message; SEND_RECV to the next of them."""
    row_bytes: RowBytes
    norms_share: float
    """Of the element-wise traffic that of norms and residual, which every rank of a tensor-parallel group repeats."""
    traffic_bytes: int
    """What the element-wise work reads and writes of a row."""
    overlap: Overlap
    """Of collectives beside work."""
    gather_overlap: Overlap
    """Of the gather of keys and values, where copy engines may do it."""
    exchange: ExchangeParts | None = None

    def rows(self, tokens: Floats) -> Floats:
        """Rows of a rank where `tokens` are cut: the largest share."""
        share: Floats = np.ceil(tokens / self.size)
        return share

    def moved_s(self, rows: Floats, size_bytes: int) -> Floats:
        """Reading and writing so many bytes a row: memory bounds it as it does the element-wise work."""
        return self.elementwise_s(rows) * (size_bytes / self.traffic_bytes)

    def message_s(self, op: Op, size_bytes: Floats) -> Floats:
        """Seconds of a collective; those that move nothing take none."""
        return np.where(size_bytes > 0, self.messages[op](size_bytes), 0.0)
