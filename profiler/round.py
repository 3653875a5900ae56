"""What a stage needs to run a round: the packed order of its chunks, their positions, and their rows in the KV slab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from profiler.attention import AttentionKernel
from profiler.layer import Span
from profiler.rotary import Rotary

ChooseKernel = Callable[[int, int], AttentionKernel]  # (chunk tokens, context) -> kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundInputs:
    """A round made ready: spans in packed order and the rotary pair [T, head_dim / 2] that all layers share."""

    spans: tuple[Span, ...]
    rotary: tuple[torch.Tensor, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        """Rows of the packed round."""
        return sum(span.num_tokens for span in self.spans)


def prepare_round(
    chunks: Sequence[tuple[int, int, int]],
    *,
    rotary: Rotary,
    choose_kernel: ChooseKernel,
    device: torch.device,
    dtype: torch.dtype,
) -> RoundInputs:
    """chunks: (slab_start, context, num_tokens) of each chunk, in the order in which their tokens are packed."""
    spans, first_row = [], 0
    for slab_start, context, num_tokens in chunks:
        spans.append(
            Span(
                first_row=first_row,
                num_tokens=num_tokens,
                slab_start=slab_start,
                context=context,
                kernel=choose_kernel(num_tokens, context),
            )
        )
        first_row += num_tokens
    positions = torch.cat([torch.arange(s.context, s.context + s.num_tokens, device=device) for s in spans])
    return RoundInputs(spans=tuple(spans), rotary=rotary(positions, dtype))
