"""A round cut by rows whose KV is cut with them: keys and values go around a ring, partial attention is merged.

Ring attention (Liu et al., 2023) with the zigzag cut of Megatron-LM. Each rank keeps the KV of the rows it ran, so that
the context goes around again for every chunk: for prompts whose KV no rank can hold.

A rank's rows of a request lie in its slab in the order of their positions. What a piece of queries may see of another
rank's rows is thus a prefix of them: the context, then that rank's pieces of this round that lie before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from profiler.kernels.attention import PartialAttention, attend_partial, attend_tokens_partial
from profiler.kernels.attention_kernel import CAUSAL, Masking
from profiler.kernels.entry import Operand
from profiler.kernels.quantized.kv import KV
from profiler.kernels.rotary import Rotary, Turns
from profiler.layers.layer_inputs import AttentionLayer, LayerInputs
from profiler.layers.row_group import RowGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RingPiece:
    """Consecutive rows of this rank, and what they see."""

    rows: slice  # of this rank's packed rows
    visible: tuple[slice, ...]  # by rank, of the rows that it passes on; of this rank's the last ones are its own


class Merging:
    """A piece's partial attention as it comes, step by step; `end` writes what all of it gives.

    out: [H, c, D]. The last two parts are merged into it at once.
    """

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out
        self.parts: list[PartialAttention] = []

    def add(self, part: PartialAttention) -> None:
        """One more part."""
        if len(self.parts) == 2:
            self.parts = [self.parts[0].merged(self.parts[1])]
        self.parts.append(part)

    def end(self) -> None:
        """Every piece sees its own rows at least."""
        first, *second = self.parts
        if second:
            first.merge_into(second[0], self.out)
        else:
            self.out.copy_(first.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingInputs(LayerInputs):
    """This rank's rows of a round; for each of its T tokens rotation and place in this rank's slab."""

    cuts_rows: ClassVar[bool] = True

    pieces: tuple[RingPiece, ...]
    rotary: Turns
    slab_rows: torch.Tensor
    places: tuple[tuple[slice, slice], ...]  # rows of the round, rows of the slab
    passed: tuple[slice, ...]  # rows of the slab that go around: of each chunk context and new tokens
    most_passed: int  # rows that go around at once, the most of any rank
    num_rows: int  # T and padding
    buffers: tuple[torch.Tensor, torch.Tensor]
    """Flat, of what goes around; kept by the caller: what a layer allocates for messages is not free again within a
    recording."""
    group: RowGroup

    def own_tokens(self, rows: int) -> int:
        """See `LayerInputs`."""
        return self.slab_rows.shape[0]

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """See `LayerInputs`."""
        assert isinstance(slab, torch.Tensor)  # plans are checked for it
        for mine, places in self.places:
            slab[:, places] = rows[mine].transpose(0, 1)

    def mix(self, layer: AttentionLayer, normed: Operand, keys: KV, values: KV) -> torch.Tensor:
        """See `LayerInputs`."""
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)  # plans are checked for it
        num_tokens = self.slab_rows.shape[0]
        q: torch.Tensor | None = None
        qkv = layer.project(normed)
        if num_tokens:
            q = layer.rotate(qkv[:num_tokens], self, keys, values)
        del qkv
        passed = self._passed(keys, values)
        mixed = keys.new_zeros(self.num_rows, layer.num_heads, keys.shape[2])
        found = [Merging(mixed[piece.rows].transpose(0, 1)) for piece in self.pieces]
        for step in range(self.group.size):
            wait = None
            if step + 1 < self.group.size:
                wait = self.group.begin_pass_on(passed, self._buffer(step + 1, keys))
            if q is not None:
                source = (self.group.rank - step) % self.group.size
                self._attend(q, passed, source, found, is_own=step == 0)
            if wait is not None:
                passed = wait()
        for merging in found:
            merging.end()
        return mixed.flatten(1)

    def _passed(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What goes around: [2, KV, most_passed, D], each chunk's rows one after the other."""
        passed = self._buffer(0, keys)
        row = 0
        for rows in self.passed:
            end = row + rows.stop - rows.start
            passed[0, :, row:end] = keys[:, rows]
            passed[1, :, row:end] = values[:, rows]
            row = end
        return passed

    def _buffer(self, step: int, keys: torch.Tensor) -> torch.Tensor:
        size = torch.Size((2, keys.shape[0], self.most_passed, keys.shape[2]))
        return self.buffers[step % 2][: size.numel()].view(size)

    def _attend(
        self, q: torch.Tensor, passed: torch.Tensor, source: int, found: Sequence[Merging], *, is_own: bool
    ) -> None:
        """Add what the pieces see of the rows that `source` passed on."""
        for piece, merging in zip(self.pieces, found, strict=True):
            rows = piece.visible[source]
            if rows.stop > rows.start:
                queries = q[piece.rows].transpose(0, 1)
                merging.add(attend_partial(queries, passed[0, :, rows], passed[1, :, rows], causal=is_own))


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStepInputs(LayerInputs):
    """One token of each of R requests on every rank; one of them keeps its KV. Nothing is on the host."""

    rotary: Turns  # cos and sin, [R, head_dim / 2]
    slab_rows: torch.Tensor  # [R] int64; of tokens that another rank keeps, a row that no one reads
    starts: torch.Tensor  # [R] int64
    lengths: torch.Tensor  # [R] int64, tokens of each request on this rank, 0 possible
    group: RowGroup

    def write(self, rows: torch.Tensor, slab: KV) -> None:
        """See `LayerInputs`."""
        assert isinstance(slab, torch.Tensor)  # plans are checked for it
        slab.index_copy_(1, self.slab_rows, rows.transpose(0, 1))

    def attend(self, q: torch.Tensor, keys: KV, values: KV, masking: Masking = CAUSAL) -> torch.Tensor:
        """See `LayerInputs`: the ranks' partial results, merged alike on each."""
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)  # plans are checked for it
        assert masking is CAUSAL  # plans are checked for it
        partial = attend_tokens_partial(q, keys, values, self.starts, self.lengths)
        gathered = self.group.gather(torch.cat([partial.out, partial.lse], dim=-1))  # [size, R, H, D + 1]
        parts = [PartialAttention(out=one[..., :-1], lse=one[..., -1:]) for one in gathered]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merged(part)
        return merged.out.to(q.dtype).flatten(1)


class RingStep:
    """Where the requests stand on this rank between two decode steps; see `profiler.layers.decode_inputs.DecodeState`.

    Request i's new tokens are kept by rank i mod size. dump_row: of the slab, read by no one.
    """

    def __init__(
        self,
        *,
        starts: Sequence[int],
        prompt_tokens: Sequence[int],
        local_tokens: Sequence[int],
        dump_row: int,
        group: RowGroup,
        device: torch.device,
    ) -> None:
        self.group, self.dump_row = group, dump_row
        self.starts = torch.tensor(starts, device=device)
        self.local_tokens = torch.tensor(local_tokens, device=device)
        self.is_mine = torch.tensor([index % group.size == group.rank for index in range(len(starts))], device=device)
        self.prompt_tokens = torch.tensor(prompt_tokens, device=device)
        self.positions = self.prompt_tokens.clone()

    def restart(self) -> None:
        """The next step is the first after the prompts."""
        self.positions.copy_(self.prompt_tokens)

    def advance(self) -> None:
        """The step has run: every request is a token longer."""
        self.positions.add_(1)

    def inputs(self, rotary: Rotary, dtype: torch.dtype) -> RingStepInputs:
        """Of the step at the positions as they are when the device comes to it."""
        added = self.positions - self.prompt_tokens
        return RingStepInputs(
            rotary=rotary(self.positions, dtype),
            slab_rows=torch.where(self.is_mine, self.starts + self.local_tokens + added, self.dump_row),
            starts=self.starts,
            lengths=self.local_tokens + torch.where(self.is_mine, added + 1, 0),
            group=self.group,
        )
