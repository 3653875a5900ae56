"""What a stage needs to run a round: the packed order of its chunks, their positions, and their rows in the KV slab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from profiler.kernels.attention import attend
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.kernels.rotary import Rotary

ChooseKernel = Callable[[int, int], AttentionKernel]  # (chunk tokens, context) -> kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where one request's chunk lies: rows of the packed round, and rows of the KV slab."""

    first_row: int  # of the chunk in the round
    num_tokens: int
    slab_start: int  # row of the request's token 0 in the slab
    context: int  # tokens of the request before the chunk
    kernel: AttentionKernel


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundInputs:
    """A round made ready, for all layers: spans in packed order, and for each of its T tokens rotation and place."""

    spans: tuple[Span, ...]
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos and sin, [T, head_dim / 2]
    slab_rows: torch.Tensor  # [T] int64

    @property
    def num_tokens(self) -> int:
        """Rows of the packed round."""
        return sum(span.num_tokens for span in self.spans)

    def write(self, rows: torch.Tensor, slab: torch.Tensor) -> None:
        """Copy the round's rows [T, KV, D] to each request's place in the slab [KV, rows, D]."""
        for span in self.spans:
            first = span.slab_start + span.context
            packed = rows[span.first_row : span.first_row + span.num_tokens]
            slab[:, first : first + span.num_tokens] = packed.transpose(0, 1)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend each chunk of q [T, H, D] over its request's rows of the slab -> [T, H D]."""
        outputs = []
        for span in self.spans:
            rows = slice(span.first_row, span.first_row + span.num_tokens)
            seen = slice(span.slab_start, span.slab_start + span.context + span.num_tokens)
            out = attend(span.kernel, q[rows].transpose(0, 1), keys[:, seen], values[:, seen])
            outputs.append(out.transpose(0, 1))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.reshape(q.shape[0], -1)


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
    ranges = [torch.arange(span.context, span.context + span.num_tokens, device=device) for span in spans]
    rows = [at + span.slab_start for at, span in zip(ranges, spans, strict=True)]
    return RoundInputs(spans=tuple(spans), rotary=rotary(torch.cat(ranges), dtype), slab_rows=torch.cat(rows))
