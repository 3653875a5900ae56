"""What a stage needs to run a decode step, one token of every request in order: kept and advanced on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from profiler.kernels.attention import attend_tokens
from profiler.kernels.attention_kernel import CAUSAL, Masking
from profiler.kernels.quantized.kv import KV, QuantizedKV
from profiler.kernels.rotary import Rotary, Turns
from profiler.layers.layer_inputs import LayerInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs(LayerInputs):
    """A step made ready, for all layers: each of R requests' rotation, place and length. Nothing is on the host."""

    rotary: Turns  # cos and sin, [R, head_dim / 2]
    slab_rows: torch.Tensor  # [R] int64, of each new token
    starts: torch.Tensor  # [R] int64, row of each request's token 0 in the slab
    lengths: torch.Tensor  # [R] int64, tokens of each request, the new one included

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """Copy rows [R, KV, D] to the new tokens' places in the slab [KV, rows, D]."""
        new = rows.transpose(0, 1)
        if isinstance(slab, QuantizedKV):
            slab.write(self.slab_rows, new)
        else:
            slab.index_copy_(1, self.slab_rows, new)

    def attend(self, q: torch.Tensor, keys: KV, values: KV, masking: Masking = CAUSAL) -> torch.Tensor:
        """Attend each row of q [R, H, D] over its request's rows of the slab -> [R, H D]."""
        return attend_tokens(q, keys, values, self.starts, self.lengths, masking).flatten(1)


class DecodeState:
    """Where the requests stand between two steps. Its tensors keep their addresses: a recorded step moves them on."""

    def __init__(self, *, starts: Sequence[int], prompt_tokens: Sequence[int], device: torch.device) -> None:
        self.starts = torch.tensor(starts, device=device)
        self.prompt_tokens = torch.tensor(prompt_tokens, device=device)
        self.positions = self.prompt_tokens.clone()  # [R] int64, of each request's next token

    def restart(self) -> None:
        """The next step is the first after the prompts."""
        self.positions.copy_(self.prompt_tokens)

    def advance(self) -> None:
        """The step has run: every request is a token longer."""
        self.positions.add_(1)

    def inputs(self, rotary: Rotary, dtype: torch.dtype) -> StepInputs:
        """Of the step at the positions as they are when the device comes to it."""
        return StepInputs(
            rotary=rotary(self.positions, dtype),
            slab_rows=self.starts + self.positions,
            starts=self.starts,
            lengths=self.positions + 1,
        )
