"""The names of the attention kernels and which is the usual best: what plans and fits need without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # plans and fits need no torch
    import torch


MASKED_SCORES = 1 << 23  # of a strip under a mask of its own at once
EXPANDED_NUMBERS = 1 << 23  # of keys and values made of latents at once, as many heads as that leaves; one at least


class Latents(Protocol):
    """Attention of H heads over rows that stand for the keys and the values of all of them."""

    def attend(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last c of p + c positions; q: [H, c, D], rows: [p + c, kept] -> [H, c, value]."""

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [H, c, D] -> queries of the rows themselves [H, c, kept]."""

    def attend_absorbed(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """As `attend` for what `absorb` gives -> sums of rows [H, c, rank]."""

    def restore(self, mixed: torch.Tensor) -> torch.Tensor:
        """Sums of rows [H, c, rank] -> values of each head [H, c, value]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masking:
    """What besides the causal mask decides which keys count and how much, and what they are made of.

    window: keys that a query sees at most, its own included. softcap: scores s are bent to softcap * tanh(s / softcap).
    sinks: [H], a score of each query head that takes its share of the softmax and goes to nothing. latents: what makes
    keys and values of the rows that are kept, where these are latents.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    latents: Latents | None = None

    def is_plain(self, num_keys: int) -> bool:
        """Whether the causal mask is all there is, for queries that have so many keys at most."""
        return self.softcap is None and self.sinks is None and (self.window is None or num_keys <= self.window)

    def first_seen(self, num_keys: int, num_queries: int) -> int:
        """Of so many keys, the last of them the queries' own, the first that any query sees."""
        return 0 if self.window is None else max(num_keys - num_queries + 1 - self.window, 0)


CAUSAL = Masking()


class AttentionKernel(StrEnum):
    """The kernels that can be chosen; which is fastest for a (chunk, context) is measured."""

    CPU_FLASH = "cpu-flash"  # two calls merged by log-sum-exp
    CPU_MASKED = "cpu-masked"  # whole rows of scores over the keys that a strip sees: windows, softcaps, sinks, latents
    CPU_FOLDED = "cpu-folded"  # flash over the context, heads of a group folded; the diagonal in strips
    SDPA = "sdpa"  # one call with a bottom-right mask: flash on CUDA, a dense mask on a CPU
    CUDNN = "cudnn"  # two cuDNN calls merged by log-sum-exp
    CUDNN_GRAPH = "cudnn-graph"  # one cuDNN kernel with a bottom-right mask; needs nvidia-cudnn-frontend
    FLASH3 = "flash3"  # FlashAttention-3 on Hopper, with nothing to build for new sizes; needs fa3-fwd


# The usual best of those that a device has comes first.
PREFERENCE = (
    AttentionKernel.FLASH3,
    AttentionKernel.CUDNN_GRAPH,
    AttentionKernel.CUDNN,
    AttentionKernel.CPU_FOLDED,
    AttentionKernel.CPU_FLASH,
    AttentionKernel.SDPA,
    AttentionKernel.CPU_MASKED,
)


def worth_measuring(kernels: Sequence[AttentionKernel]) -> list[AttentionKernel]:
    """Without two calls of an engine and their merge where one call does the same."""
    return [
        kernel
        for kernel in kernels
        if kernel is not AttentionKernel.CUDNN or AttentionKernel.CUDNN_GRAPH not in kernels
    ]
