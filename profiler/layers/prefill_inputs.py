"""What a stage needs to run a round: the packed order of its chunks, their positions, and their rows in the KV slab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from profiler.kernels.attention import attend
from profiler.kernels.attention_kernel import CAUSAL, AttentionKernel, Masking
from profiler.kernels.quantized.kv import KV, QuantizedKV, read_rows
from profiler.kernels.rotary import Rotary, Turns
from profiler.layers.layer_inputs import LayerInputs

ChooseKernel = Callable[[int, int], AttentionKernel]  # (chunk tokens, context) -> kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpan:
    """Where consecutive tokens of one request lie: rows of the packed round, and rows of the KV slab."""

    first_row: int  # of the tokens in the round
    num_tokens: int
    slab_start: int  # row of the request's token 0 in the slab
    context: int  # tokens of the request before these
    kernel: AttentionKernel

    @property
    def rows(self) -> slice:
        """Rows of the packed round."""
        return slice(self.first_row, self.first_row + self.num_tokens)

    @property
    def places(self) -> slice:
        """Rows of the slab that the tokens' keys and values are written to."""
        return slice(self.slab_start + self.context, self.slab_start + self.context + self.num_tokens)

    def seen_through(self, masking: Masking) -> slice:
        """Rows of the slab that any of the tokens attends to."""
        end = self.context + self.num_tokens
        return slice(self.slab_start + masking.first_seen(end, self.num_tokens), self.slab_start + end)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundInputs(LayerInputs):
    """A round, or one rank's rows of it, made ready for all layers.

    spans: in packed order; for each of their T tokens rotation and place. Rows of padding may follow them.
    """

    spans: tuple[RequestSpan, ...]
    rotary: Turns  # cos and sin, [T, head_dim / 2]
    slab_rows: torch.Tensor  # [T] int64
    padding: int = 0  # rows after the tokens, which no one reads

    @property
    def num_tokens(self) -> int:
        """Rows of the packed round, without padding."""
        return sum(span.num_tokens for span in self.spans)

    def own_tokens(self, rows: int) -> int:
        """See `LayerInputs`."""
        return rows - self.padding

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """Copy the round's rows [T, KV, D] to each request's place in the slab [KV, rows, D]."""
        for span in self.spans:
            new = rows[span.rows].transpose(0, 1)
            if isinstance(slab, QuantizedKV):
                slab.write(span.places, new)
            else:
                slab[:, span.places] = new

    def attend(self, q: torch.Tensor, keys: KV, values: KV, masking: Masking = CAUSAL) -> torch.Tensor:
        """Attend each span of q [T, H, D] over its request's rows of the slab -> [T + padding, H D]."""
        outputs = []
        for span in self.spans:
            seen = span.seen_through(masking)
            k, v = read_rows(keys, seen), read_rows(values, seen)
            outputs.append(attend(span.kernel, q[span.rows].transpose(0, 1), k, v, masking).transpose(0, 1))
        if self.padding:
            # A rank without tokens has padding alone. Of latents, whose values have another width than queries, every
            # rank has all tokens.
            outputs.append(q.new_zeros(self.padding, *(outputs[0] if outputs else q).shape[1:]))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.reshape(mixed.shape[0], -1)


def make_spans(tokens: Sequence[tuple[int, int, int]], choose_kernel: ChooseKernel) -> tuple[RequestSpan, ...]:
    """tokens: (slab_start, context, num_tokens) of consecutive tokens of a request each, in packed order."""
    ends = accumulate(count for _, _, count in tokens)
    return tuple(
        RequestSpan(
            first_row=end - count,
            num_tokens=count,
            slab_start=slab_start,
            context=context,
            kernel=choose_kernel(count, context),
        )
        for (slab_start, context, count), end in zip(tokens, ends, strict=True)
    )


def positions(spans: Sequence[RequestSpan], device: torch.device, *, padding: int = 0) -> torch.Tensor:
    """The position of each token in its request, [T + padding] int64; 0 in the padding."""
    ranges = [torch.arange(span.context, span.context + span.num_tokens, device=device) for span in spans]
    return torch.cat([*ranges, torch.zeros(padding, device=device, dtype=torch.int64)])


def prepare_round(
    chunks: Sequence[tuple[int, int, int]],
    *,
    rotary: Rotary,
    choose_kernel: ChooseKernel,
    device: torch.device,
    dtype: torch.dtype,
    padding: int = 0,
) -> RoundInputs:
    """chunks: (slab_start, context, num_tokens) of each chunk, in the order in which their tokens are packed."""
    spans = make_spans(chunks, choose_kernel)
    rows = [torch.arange(span.places.start, span.places.stop, device=device) for span in spans]
    return RoundInputs(
        spans=spans,
        rotary=rotary(positions(spans, device), dtype),
        slab_rows=torch.cat(rows),
        padding=padding,
    )
