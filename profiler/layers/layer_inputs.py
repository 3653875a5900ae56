"""What a layer asks of the round or step it runs: where its tokens lie, and what ranks that share its rows exchange.

A layer's own code is the same however a round is cut. What differs stands in the inputs of the round, one class a kind
of sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch

from profiler.kernels.attention_kernel import CAUSAL, Masking
from profiler.kernels.elementwise import TokenPlaces
from profiler.kernels.entry import Operand
from profiler.kernels.quantized.kv import KV
from profiler.kernels.rotary import Turns


class Reduce(Protocol):
    """Sums the partial results of a tensor-parallel group, and adds a row-parallel bias once."""

    def __call__(self, partial: torch.Tensor) -> torch.Tensor:
        """partial: [T, N] -> the sum on every rank [T, N]."""

    def scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """partial: [ranks * P, N] -> this rank's rows of the sum [P, N]."""


class AttentionLayer(Protocol):
    """What inputs ask of the layer that runs them."""

    num_heads: int  # query heads of this rank

    def project(self, normed: Operand) -> torch.Tensor:
        """normed: [T, hidden] -> q|k|v [T, (H + 2 KV) D]."""

    def project_apart(self, normed: Operand) -> tuple[torch.Tensor, Callable[[], torch.Tensor]] | None:
        """k|v [T, 2 KV D] at once and q [T, H D] when it is called for; None where they are one product."""

    def rotate(
        self,
        qkv: torch.Tensor,
        places: TokenPlaces,
        keys: KV,
        values: KV,
        *,
        num_heads: int | None = None,
    ) -> torch.Tensor:
        """Rotate q|k|v [T, (H + 2 KV) D], write k and v to [KV, rows, D] -> q [T, H, D]; num_heads: if not all."""

    def attend(self, q: torch.Tensor, inputs: LayerInputs, keys: KV, values: KV) -> torch.Tensor:
        """Attend q [T, H, D] over the slab -> [T, H D]."""


class LayerInputs:
    """A round or a step made ready for all layers: by default each rank of the group runs all of its rows."""

    __slots__ = ()

    cuts_rows: ClassVar[bool] = False
    """Whether each rank of the group that shares the round's rows has some of its own."""
    rotary: Turns
    slab_rows: torch.Tensor

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """Copy rows [T, KV, D] to the tokens' places in the slab [KV, rows, D]."""
        raise NotImplementedError

    def attend(self, q: torch.Tensor, keys: KV, values: KV, masking: Masking = CAUSAL) -> torch.Tensor:
        """Attend q [T, H, D] over each token's request in the slab -> [T, H D]."""
        raise NotImplementedError

    def mix(self, layer: AttentionLayer, normed: Operand, keys: KV, values: KV) -> torch.Tensor:
        """Normed hidden states [rows, hidden] through projection and attention, before o: [rows, H D].

        keys, values: this layer's slab [KV, rows, D], to which the new ones are written.
        """
        return layer.attend(layer.rotate(layer.project(normed), self, keys, values), self, keys, values)

    def own_tokens(self, rows: int) -> int:
        """How many of this rank's rows are tokens; the others, behind them, only fill its share."""
        return rows

    def product_tokens(self, rows: int) -> int:
        """The same of the rows that its products run on."""
        return self.own_tokens(rows)

    def spread(self, normed: Operand) -> Operand:
        """This rank's rows -> the rows that its products run on."""
        return normed

    def join(self, reduce: Reduce, partial: torch.Tensor) -> torch.Tensor:
        """Partial results of those rows -> this rank's rows, summed over the tensor-parallel group."""
        return reduce(partial)
