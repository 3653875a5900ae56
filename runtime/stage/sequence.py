"""Inputs of a rank's rounds and decode steps, and the KV it keeps, for each kind of sequence parallelism."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

from profiler.comm.links.group import Groups, RankGroup
from profiler.kernels.elementwise import GatheredRun
from profiler.kernels.rotary import Rotary
from profiler.layers.decode_inputs import DecodeState
from profiler.layers.gather_inputs import GatherInputs, StagedRows
from profiler.layers.layer_inputs import LayerInputs
from profiler.layers.megatron_inputs import MegatronInputs
from profiler.layers.prefill_inputs import ChooseKernel, RoundInputs, make_spans, positions, prepare_round
from profiler.layers.ring_inputs import RingInputs, RingPiece, RingStep
from profiler.layers.ulysses_inputs import HeadColumns, UlyssesInputs, WholeUlyssesInputs
from profiler.model import PRECISIONS, LayerSpec
from profiler.sequence.cut import Piece, cut_round, share_tokens
from profiler.sequence.heads import most_heads, share_heads
from profiler.sequence.kind import SequenceCut, SPKind, usual_cut
from runtime.job.job import RunJob
from runtime.stage.share import RoundShare, sharing_size
from tuner.plan.kv_rows import KVRows, assign_rows
from tuner.plan.plan import Round


class StepState(Protocol):
    """Positions of the requests between two decode steps."""

    def restart(self) -> None:
        """The next step is the first after the prompts."""

    def advance(self) -> None:
        """The step has run."""


class Scheme:
    """No sequence parallelism: every rank of a stage runs all rows. Base class of the kinds."""

    def __init__(self, job: RunJob, groups: Groups, device: torch.device, choose_kernel: ChooseKernel) -> None:
        self.job, self.device, self.choose_kernel = job, device, choose_kernel
        self.dtype = PRECISIONS[job.dtype].activations.torch_dtype
        self.group = self.group_of(groups)
        self.kv_rows = self.assign_rows()
        self.step = self.make_step()

    @cached_property
    def rotary(self) -> Rotary:
        """The rotation of the model's positions."""
        return Rotary(self.job.shape, self.device)

    def group_of(self, groups: Groups) -> RankGroup:
        """The ranks that share the rows of a round."""
        return RankGroup()

    def use(self, sequence: RankGroup) -> None:
        """Use these links for exchanges."""

    def gathered_numbers(self, num_rows: int) -> int:
        """Numbers that this rank gathers at most of a layer, in a round of which it has so many rows."""
        return 0

    def share(self, chunks: Round, cut: SequenceCut) -> RoundShare:
        """This rank's share of a round."""
        size = sharing_size(self.job.parallel, cut)
        return RoundShare.of(chunks, cut, size=size, rank=self.group.rank if size > 1 else 0)

    def kv_heads(self, layer: LayerSpec) -> int:
        """KV heads that a rank keeps of a layer, the most that any does."""
        return layer.attention.kv_heads.per_rank(self.job.parallel.tp_size)

    def assign_rows(self) -> KVRows:
        """The rows of each request in this rank's KV slab."""
        return assign_rows(self.job.requests, self.job.rounds, max_new_tokens=self.job.max_new_tokens)

    def make_step(self) -> StepState:
        """Positions of the requests between two decode steps."""
        prompt_tokens = [request.prompt_tokens for request in self.job.requests]
        return DecodeState(starts=self.kv_rows.start, prompt_tokens=prompt_tokens, device=self.device)

    def step_inputs(self) -> LayerInputs:
        """Decode inputs; positions are read on the device at execution time."""
        assert isinstance(self.step, DecodeState)
        return self.step.inputs(self.rotary, self.dtype)

    def round_inputs(self, share: RoundShare) -> LayerInputs:
        """Inputs of this rank's share of a round."""
        return self.whole_round(share)

    def whole_round(self, share: RoundShare, *, padding: int = 0) -> RoundInputs:
        """Inputs of all rows of a round."""
        return prepare_round(
            [(self.kv_rows.start[chunk.request], chunk.start, chunk.tokens) for chunk in share.chunks],
            rotary=self.rotary,
            choose_kernel=self.choose_kernel,
            device=self.device,
            dtype=self.dtype,
            padding=padding,
        )


class GatherScheme(Scheme):
    """KV whole on each rank. See `profiler.layers.gather_inputs`."""

    def group_of(self, groups: Groups) -> RankGroup:
        """See `Scheme`."""
        return groups.sequence

    def use(self, sequence: RankGroup) -> None:
        """See `Scheme`."""
        self.group = sequence

    def gathered_numbers(self, num_rows: int) -> int:
        """See `Scheme`."""
        layers = self.job.shape.layer_kinds
        return max(2 * self.kv_heads(layer) * layer.attention.head_dim for layer in layers) * num_rows

    def round_inputs(self, share: RoundShare) -> LayerInputs:
        """See `Scheme`."""
        if share.cut is SequenceCut.WHOLE:
            return self.whole_round(share)
        start, rows = self.kv_rows.start, share.num_rows
        tokens = [(start[at.request], at.start, at.tokens) for at in share.token_ranges()]
        spans = make_spans(tokens, self.choose_kernel)
        rotary = self.rotary(positions(spans, self.device, padding=share.padding), self.dtype)
        runs = tuple(self._runs(share))
        gathered_rows = torch.full((self.group.size, rows), -1, device=self.device, dtype=torch.int64)
        for run in runs:
            gathered_rows[run.rank, run.rows] = torch.arange(run.places.start, run.places.stop, device=self.device)
        return GatherInputs(
            spans=spans,
            rotary=rotary,
            slab_rows=torch.arange(rows, device=self.device),
            padding=share.padding,
            group=self.group,
            staged=StagedRows(rotary=rotary, slab_rows=torch.arange(rows, device=self.device)),
            runs=runs,
            gathered_rows=gathered_rows.view(-1),
            overlaps=self.job.overlaps and self.device.type == "cuda",
        )

    def _runs(self, share: RoundShare) -> Iterator[GatheredRun]:
        for rank, pieces in enumerate(share.shares):
            for piece, end in zip(pieces, accumulate(piece.tokens for piece in pieces), strict=True):
                at = share.place(piece)
                first = self.kv_rows.start[at.request] + at.start
                places = slice(first, first + at.tokens)
                yield GatheredRun(rank=rank, rows=slice(end - piece.tokens, end), places=places)


class UlyssesScheme(Scheme):
    """KV by heads. See `profiler.layers.ulysses_inputs`."""

    def group_of(self, groups: Groups) -> RankGroup:
        """See `Scheme`."""
        return groups.sequence

    def kv_heads(self, layer: LayerSpec) -> int:
        """See `Scheme`."""
        sizes = layer.attention.sizes(self.job.parallel.tp_size)
        return most_heads(sizes["heads"], sizes["kv_heads"], self.job.parallel.sp_size)[1]

    def step_inputs(self) -> LayerInputs:
        """See `Scheme`."""
        return WholeUlyssesInputs(whole=super().step_inputs(), columns=self._columns(), group=self.group)

    def round_inputs(self, share: RoundShare) -> LayerInputs:
        """See `Scheme`."""
        whole = self.whole_round(share)
        if share.cut is SequenceCut.WHOLE:
            return WholeUlyssesInputs(whole=whole, columns=self._columns(), group=self.group)
        return UlyssesInputs(
            whole=whole,
            num_tokens=share.num_tokens,
            num_rows=share.num_rows,
            columns=self._columns(),
            group=self.group,
        )

    def _columns(self) -> HeadColumns:
        sizes = self.job.shape.layer_kinds[0].attention.sizes(self.job.parallel.tp_size)
        return HeadColumns(
            shares=share_heads(sizes["heads"], sizes["kv_heads"], self.group.size),
            num_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
        )


class MegatronScheme(Scheme):
    """Rows cut over the tensor-parallel group. See `profiler.layers.megatron_inputs`."""

    def group_of(self, groups: Groups) -> RankGroup:
        """See `Scheme`."""
        return groups.tensor

    def round_inputs(self, share: RoundShare) -> LayerInputs:
        """See `Scheme`."""
        if share.cut is SequenceCut.WHOLE:
            return self.whole_round(share)
        padding = share.num_rows * self.group.size - share.num_tokens
        return MegatronInputs(whole=self.whole_round(share, padding=padding), group=self.group)


class RingScheme(Scheme):
    """KV cut with the rows. See `profiler.layers.ring_inputs`."""

    _passed: tuple[torch.Tensor, torch.Tensor] | None = None

    def group_of(self, groups: Groups) -> RankGroup:
        """See `Scheme`."""
        return groups.sequence

    def assign_rows(self) -> KVRows:
        """See `Scheme`: as many rows for a request as the rank that keeps most of it needs, and one that none reads."""
        job, size = self.job, self.group.size
        kept: dict[int, list[int]] = defaultdict(lambda: [0] * size)  # tokens of a request on each rank
        self.kept_before: dict[tuple[int, int], tuple[int, ...]] = {}  # by request and start of a chunk
        cached = job.cached_rounds
        cuts = [*(usual_cut(SPKind.RING) for _ in cached), *job.round_cuts]
        for chunks, cut in zip([*cached, *job.rounds], cuts, strict=True):
            for rank, pieces in enumerate(cut_round([chunk.tokens for chunk in chunks], cut, size)):
                for piece in pieces:
                    chunk = chunks[piece.chunk]
                    place = chunk.request, chunk.start
                    self.kept_before.setdefault(place, tuple(kept[chunk.request]))
                    kept[chunk.request][rank] += piece.tokens
        self.kept = [tuple(kept[index]) for index in range(len(job.requests))]
        most = [max(tokens) for tokens in self.kept]
        rows = assign_rows(job.requests, job.rounds, max_new_tokens=job.max_new_tokens, kept_tokens=most)
        return KVRows(start=rows.start, total=rows.total + 1)

    def make_step(self) -> StepState:
        """See `Scheme`."""
        return RingStep(
            starts=self.kv_rows.start,
            prompt_tokens=[request.prompt_tokens for request in self.job.requests],
            local_tokens=[tokens[self.group.rank] for tokens in self.kept],
            dump_row=self.kv_rows.total - 1,
            group=self.group,
            device=self.device,
        )

    def step_inputs(self) -> LayerInputs:
        """See `Scheme`."""
        assert isinstance(self.step, RingStep)
        return self.step.inputs(self.rotary, self.dtype)

    def round_inputs(self, share: RoundShare) -> LayerInputs:
        """See `Scheme`."""
        me, ranks = self.group.rank, range(self.group.size)
        passed_rows = [self._passed_rows(share, rank) for rank in ranks]  # of each chunk, on each rank
        pieces, places = list[RingPiece](), list[tuple[slice, slice]]()
        ends = accumulate(piece.tokens for piece in share.pieces)
        for piece, end in zip(share.pieces, ends, strict=True):
            at = share.place(piece)
            kept = self._seen(share, piece, me)  # of the same request, before the piece
            rows = slice(end - piece.tokens, end)
            first = self.kv_rows.start[at.request] + kept
            places.append((rows, slice(first, first + piece.tokens)))
            visible = []
            for rank in ranks:
                start = sum(passed_rows[rank][: piece.chunk])
                own = piece.tokens if rank == me else 0  # they follow what lies before them
                visible.append(slice(start, start + self._seen(share, piece, rank) + own))
            pieces.append(RingPiece(rows=rows, visible=tuple(visible)))
        tokens = [(self.kv_rows.start[at.request], at.start, at.tokens) for at in share.token_ranges()]
        spans = make_spans(tokens, self.choose_kernel)
        slab_rows = [torch.arange(place.start, place.stop, device=self.device) for _, place in places]
        return RingInputs(
            pieces=tuple(pieces),
            rotary=self.rotary(positions(spans, self.device), self.dtype),
            slab_rows=torch.cat([torch.zeros(0, device=self.device, dtype=torch.int64), *slab_rows]),
            places=tuple(places),
            passed=tuple(
                slice(self.kv_rows.start[chunk.request], self.kv_rows.start[chunk.request] + passed_rows[me][index])
                for index, chunk in enumerate(share.chunks)
            ),
            most_passed=max(map(sum, passed_rows)),
            num_rows=share.num_rows,
            buffers=self._buffers(max(map(sum, passed_rows))),
            group=self.group,
        )

    def _buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for what goes around of a layer, the same for all rounds and layers; it grows before rounds are
        recorded, for every round is run once before."""
        layers = self.job.shape.layer_kinds
        numbers = rows * max(2 * self.kv_heads(layer) * layer.attention.head_dim for layer in layers)
        if self._passed is None or self._passed[0].numel() < numbers:
            first, second = (torch.empty(numbers, device=self.device, dtype=self.dtype) for _ in range(2))
            self._passed = first, second
        return self._passed

    def _kept_before(self, share: RoundShare, chunk: int, rank: int) -> int:
        """Tokens of a chunk's request that a rank keeps from earlier rounds."""
        at = share.chunks[chunk]
        return self.kept_before[at.request, at.start][rank]

    def _passed_rows(self, share: RoundShare, rank: int) -> list[int]:
        """Rows that a rank passes on for each chunk: those kept before and its new ones."""
        new = [0] * len(share.chunks)
        for piece in share.shares[rank]:
            new[piece.chunk] += piece.tokens
        return [self._kept_before(share, chunk, rank) + count for chunk, count in enumerate(new)]

    def _seen(self, share: RoundShare, piece: Piece, rank: int) -> int:
        """How many of a rank's rows of the piece's request lie before the piece."""
        earlier = tuple(
            other for other in share.shares[rank] if other.chunk == piece.chunk and other.end <= piece.start
        )
        return self._kept_before(share, piece.chunk, rank) + share_tokens(earlier)


SCHEMES: dict[SPKind, type[Scheme]] = {
    SPKind.NONE: Scheme,
    SPKind.GATHER: GatherScheme,
    SPKind.ULYSSES: UlyssesScheme,
    SPKind.RING: RingScheme,
    SPKind.MEGATRON: MegatronScheme,
}
