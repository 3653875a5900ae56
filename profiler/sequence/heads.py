"""Which attention heads each rank of a sequence-parallel group takes when heads are cut instead of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """One rank's consecutive query heads, and the KV heads that these attend to; ranks may have a KV head in common.

    groups: (query heads, KV heads) counted within the share, in order; of each group every KV head serves as many query
    heads.
    """

    heads: slice
    kv_heads: slice
    groups: tuple[tuple[slice, slice], ...]

    @property
    def num_heads(self) -> int:
        """Query heads of the rank."""
        return int(self.heads.stop - self.heads.start)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the rank."""
        return int(self.kv_heads.stop - self.kv_heads.start)


def share_heads(num_heads: int, num_kv_heads: int, size: int) -> tuple[HeadShare, ...]:
    """The share of each of `size` ranks, at most as many as query heads; shares differ by one query head at most."""
    per_kv = num_heads // num_kv_heads
    shares = []
    for rank in range(size):
        first, end = num_heads * rank // size, num_heads * (rank + 1) // size
        first_kv, end_kv = first // per_kv, (end - 1) // per_kv + 1
        ends = [min((kv + 1) * per_kv, end) - first for kv in range(first_kv, end_kv)]
        counts = [after - before for before, after in zip([0, *ends], ends, strict=False)]
        shares.append(
            HeadShare(heads=slice(first, end), kv_heads=slice(first_kv, end_kv), groups=tuple(_groups(counts)))
        )
    return tuple(shares)


def most_heads(num_heads: int, num_kv_heads: int, size: int) -> tuple[int, int]:
    """Query heads and KV heads of the rank that has most of each."""
    shares = share_heads(num_heads, num_kv_heads, size)
    return max(share.num_heads for share in shares), max(share.num_kv_heads for share in shares)


def _groups(counts: list[int]) -> Iterator[tuple[slice, slice]]:
    """Runs of KV heads that serve as many query heads each."""
    row = first = 0
    for index, count in enumerate(counts):
        if index + 1 == len(counts) or counts[index + 1] != count:
            num_kv = index + 1 - first
            yield slice(row, row + num_kv * count), slice(first, index + 1)
            row, first = row + num_kv * count, index + 1
