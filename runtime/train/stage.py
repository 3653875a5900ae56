"""One stage of a model in training, on one rank: rounds through its layers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from profiler.comm.links.group import Groups
from profiler.kernels.rotary import Rotary
from profiler.model import ModelShape
from profiler.model.precision import LinearFormat
from profiler.model.rope import WHOLE_HEADS
from runtime.job.place import Place
from runtime.train.attention import CacheView, LayerCache, Span, attend, kernel_for, make_spans
from runtime.train.blocks import Block, Halves, Rotation, weights_of
from runtime.train.exchange import Way
from runtime.train.head import TrainingHead
from runtime.train.parameters import Parameter, Reader
from runtime.weights.checkpoint import Checkpoint, RandomWeights
from tuner.plan.plan import Round
from tuner.training.order import Recompute

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRound:
    """A round made ready for all layers."""

    spans: tuple[Span, ...]
    rotation: Rotation
    num_rows: int


@dataclass(slots=True)
class _Layer:
    """A layer's parameters and what runs them."""

    block: Block
    weights: dict[str, torch.Tensor]


@dataclass(slots=True)
class KeptRound:
    """What a round leaves for its backward."""

    inputs: TrainingRound
    entered: torch.Tensor  # the stage's input, a leaf
    caches: Sequence[LayerCache]
    output: torch.Tensor | None  # None where the round is recomputed
    outer: torch.Tensor | None = field(default=None)  # the output's gradient, where the stage has the loss


class TrainingStage:
    """Layers of one rank, and the ends of the model that it holds.

    A model whose weights stay as they are (a teacher) is a stage whose parameters keep no gradients.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Path | None,
        place: Place,
        groups: Groups,
        *,
        device: torch.device,
        dtype: torch.dtype,
        rounded: LinearFormat | None = None,
        recompute: Recompute = Recompute.NONE,
        compiles: bool = False,
        is_trained: bool = True,
    ) -> None:
        self.shape, self.place, self.device, self.dtype = shape, place, device, dtype
        self.recompute, self.halves = recompute, Halves.compiled() if compiles else Halves()
        self.rotary = Rotary(shape, device)
        self.group = groups.tensor.group
        tp_size = place.parallel.tp_size
        source = (
            RandomWeights(shape, device=device, dtype=torch.float32)
            if weights is None
            else Checkpoint(weights, device=device)
        )
        reader = Reader(source, place, dtype, keeps_master=is_trained)
        self.layers: list[_Layer] = []
        self.parameters: list[Parameter] = []
        self.embedding = self.final_norm = self.head_matrix = None
        if place.is_first:
            self.embedding = self._own(reader.matrix(shape.embedding))
        blocks = {  # one for all layers alike: what is compiled for one serves the others
            spec: Block.of(spec, tp_size, eps=shape.norm_eps, rounded=rounded, group=self.group)
            for spec in shape.layer_kinds
        }
        for index in place.layers:
            found = reader.layer(shape, index)
            self.layers.append(_Layer(blocks[shape.layers[index]], weights_of(found)))
            self.parameters += found.values()
        if place.is_last:
            self.final_norm = self._own(reader.norm(shape.final_norm))
            self.head_matrix = reader.matrix(shape.head)
            if not self.is_tied:
                self.parameters.append(self.head_matrix)
            elif self.embedding is not None:  # what one rank holds of both is kept once
                self.head_matrix.weight = self.embedding.weight.detach()[self._head_rows]
        if isinstance(source, Checkpoint):
            source.close()

    def _own(self, parameter: Parameter) -> Parameter:
        self.parameters.append(parameter)
        return parameter

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return self.shape.head.parts[0].tensor == self.shape.embedding.parts[0].tensor

    @property
    def head(self) -> TrainingHead:
        """The rank's part of the output matrix, on the last stage."""
        assert self.head_matrix is not None
        return TrainingHead(weight=self.head_matrix.weight, first_id=self._head_rows.start, group=self.group)

    @property
    def _head_rows(self) -> slice:
        (mine,) = self.shape.head.slices(self.place.tp_rank, self.place.parallel.tp_size)
        return mine.rows

    def keep_grads(self) -> None:
        """Train: gradients are summed from here on."""
        for parameter in self.parameters:
            parameter.keep_grads(by_hand=parameter is self.head_matrix)
        if self.head_matrix is not None and self.is_tied:
            if self.embedding is not None and self.group is None:
                self.head_matrix.grads = self.embedding.grads
            else:
                self.head_matrix.keep_grads(by_hand=True)

    def begin_step(self) -> None:
        """Before a step's first backward."""
        for parameter in (*self.parameters, self.head_matrix):
            if parameter is not None and parameter.grads is not None:
                parameter.grads.zero_()

    def join_tied(self, ends: Way | None) -> None:
        """Add the output matrix's gradient to that of the embedding, which it is; ends: the way from last to first."""
        if not self.is_tied:
            return
        if self.head_matrix is not None and (ends is not None or self.group is not None):
            assert self.head_matrix.grads is not None
            whole = self.head_matrix.grads
            if self.group is not None:
                whole = whole.new_zeros(self.shape.vocab_size, self.shape.hidden_size)
                whole[self._head_rows] = self.head_matrix.grads
                dist.all_reduce(whole, group=self.group)
            if ends is not None:
                ends.send(whole)
                ends.flush()
            elif self.embedding is not None and self.embedding.grads is not None:
                self.embedding.grads += whole
        elif ends is not None and self.embedding is not None and self.embedding.grads is not None:
            grads = self.embedding.grads
            grads += ends.receive(tuple(grads.shape), grads.dtype, self.device)

    @torch.no_grad()
    def share_tied(self, ends: Way | None) -> None:
        """After an update, or when weights were restored: the output matrix from the embedding on another rank."""
        if not self.is_tied or ends is None:
            return
        if self.embedding is not None:
            ends.send(self.embedding.weight)
            ends.flush()
        elif self.head_matrix is not None:
            size = self.shape.vocab_size, self.shape.hidden_size
            self.head_matrix.weight.copy_(ends.receive(size, self.dtype, self.device)[self._head_rows])

    def make_caches(self, num_rows: int) -> list[LayerCache]:
        """Room for the keys and values of so many tokens, a cache a layer."""
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        return [LayerCache.empty(num_rows, layer.block.kv_heads, layer.block.head_dim, like) for layer in self.layers]

    def round_inputs(self, chunks: Round, starts: Sequence[int]) -> TrainingRound:
        """A round of a plan; starts: each request's first row in the caches."""
        spans = make_spans([(starts[chunk.request], chunk.start, chunk.tokens) for chunk in chunks])
        positions = torch.cat([torch.arange(chunk.start, chunk.end, device=self.device) for chunk in chunks])
        rotation = self.rotary(positions, self.dtype)[WHOLE_HEADS]
        return TrainingRound(
            spans=spans,
            rotation=rotation,
            num_rows=sum(chunk.tokens for chunk in chunks),
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """On the first stage: token_ids [T] -> [T, hidden]."""
        assert self.embedding is not None
        return F.embedding(token_ids, self.embedding.weight)

    def forward(self, entered: torch.Tensor, inputs: TrainingRound, caches: Sequence[LayerCache]) -> KeptRound:
        """Run a round: the stage's input [T, hidden] -> what its backward needs, with the output."""
        if self.recompute is Recompute.ROUND:
            with torch.no_grad():
                output = self.run(entered, inputs, caches)
        else:
            output = self.run(entered, inputs, caches)
        return KeptRound(inputs, entered, caches, output)

    def run(self, hidden: torch.Tensor, inputs: TrainingRound, caches: Sequence[LayerCache]) -> torch.Tensor:
        """Through all layers, and the last norm on the last stage: [T, hidden] -> [T, hidden]."""
        keeps = self.recompute in (Recompute.NONE, Recompute.ROUND) or not torch.is_grad_enabled()
        for layer, cache in zip(self.layers, caches, strict=True):
            block = layer.block
            kernel = kernel_for(self.device, self.dtype, block.heads, block.kv_heads, block.head_dim)
            view = CacheView(cache, inputs.spans, kernel)
            if keeps:
                hidden = self._run_layer(hidden, layer, inputs, view)
            elif self.recompute is Recompute.LAYER:
                hidden = _again(self._run_layer, hidden, layer, inputs, view)
            else:
                q, k, v = _again(self.halves.before, block, hidden, inputs.rotation, layer.weights)
                hidden = _again(self.halves.after, block, hidden, attend(q, k, v, view), layer.weights)
        if self.final_norm is not None:
            weight = self.final_norm.weight
            hidden = F.rms_norm(hidden, weight.shape, weight, self.shape.norm_eps)
        return hidden

    def _run_layer(self, hidden: torch.Tensor, layer: _Layer, inputs: TrainingRound, view: CacheView) -> torch.Tensor:
        q, k, v = self.halves.before(layer.block, hidden, inputs.rotation, layer.weights)
        return self.halves.after(layer.block, hidden, attend(q, k, v, view), layer.weights)

    def backward(self, kept: KeptRound, outer: torch.Tensor) -> torch.Tensor | None:
        """outer: the gradient of the round's output [T, hidden] -> that of its input, where a stage is before."""
        output = kept.output
        if self.recompute is Recompute.ROUND:
            output = self.run(kept.entered, kept.inputs, kept.caches)
        assert output is not None
        torch.autograd.backward(output, outer)
        return None if self.place.is_first else kept.entered.grad

    def sum_shared(self) -> None:
        """Complete the gradients of which each tensor-parallel rank has a part."""
        for parameter in self.parameters:
            if parameter.sums_ranks and parameter.grads is not None:
                dist.all_reduce(parameter.grads, group=self.group)


def _again(function: Callable[..., T], *arguments: object) -> T:
    """Run a function now, and once more in its backward."""
    result: T = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
