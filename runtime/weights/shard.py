"""A rank's shard of a model: its stage's layers, sliced for tensor parallelism, with embedding and head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from profiler.comm.links.group import Groups, RankGroup
from profiler.experts.exchange import ExpertExchange
from profiler.experts.experts import Experts, ExpertWeights
from profiler.experts.products import EachProduct, GroupedLinear
from profiler.kernels.entry import Product
from profiler.kernels.linear import Linear
from profiler.kernels.quantized.linear import make_linear
from profiler.kernels.quantized.weight import QuantizedWeight, quantize_weight
from profiler.layers.decoder_layer import DecoderLayer, Norms, projections
from profiler.layers.head import Head
from profiler.layers.latent import Latent
from profiler.model import ModelShape, Precision
from profiler.model.experts import Dispatch, ExpertsMLP
from profiler.model.precision import LinearFormat
from profiler.model.shape import layer_prefix
from profiler.model.spec import ROUTER
from profiler.model.tensors import Cut, Folding, LinearSpec, NormSpec, Slice
from runtime.job.place import Place
from runtime.weights.checkpoint import WeightSource
from runtime.weights.gathered import GatheredWeights
from tuner.plan.plan import Weights as WeightsPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The weights of one rank; the embedding on the first stage only, the head on the last only."""

    layers: tuple[DecoderLayer, ...]
    gathered: GatheredWeights | None  # of the layers, where ranks that share rows cut them
    embedding: torch.Tensor | None  # [V, hidden], whole on each tensor-parallel rank: a look-up moves nothing
    head: Head | None  # a slice of the vocabulary


def load_shard(shape: ModelShape, place: Place, weights: WeightSource, groups: Groups, precision: Precision) -> Shard:
    """Read this rank's slices, no others."""
    reader = _Reader(weights, precision, place.tp_rank, place.parallel.tp_size, place.sp_rank)
    is_gathered = place.parallel.weights is WeightsPlace.GATHERED
    gathered = GatheredWeights(groups.sequence) if is_gathered else None
    return Shard(
        layers=tuple(_load_layer(shape, index, reader, groups, gathered) for index in place.layers),
        gathered=gathered,
        embedding=reader.matrix(shape.embedding) if place.is_first else None,
        head=_load_head(shape, reader, groups.tensor) if place.is_last else None,
    )


def folded(numbers: torch.Tensor, folding: Folding) -> torch.Tensor:
    """Numbers of a checkpoint, [rows, ...] in whole blocks, as kernels take them."""
    if folding.order is not None:
        order = torch.tensor(folding.order, device=numbers.device)
        numbers = numbers.view(-1, len(order), *numbers.shape[1:])[:, order].flatten(0, 1)
    if folding.offset:
        numbers = numbers + folding.offset
    return numbers if folding.scale == 1.0 else numbers * folding.scale


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads a rank's part of what specs describe; `prefix` stands before the names of a layer's tensors."""

    weights: WeightSource
    precision: Precision
    tp_rank: int
    tp_size: int
    sp_rank: int
    prefix: str = ""

    def matrix(self, spec: LinearSpec) -> torch.Tensor:
        """The rank's weight [n, k]."""
        return torch.cat([
            folded(self.weights.read(f"{self.prefix}{part.tensor}.weight", part.rows, part.columns), part.folding)
            for part in self.slices(spec)
        ])  # fmt: skip

    def bias(self, spec: LinearSpec) -> torch.Tensor | None:
        """The rank's bias [n], whole where the inputs are cut."""
        if not spec.has_bias:
            return None
        return torch.cat([
            folded(self.weights.read(f"{self.prefix}{part.tensor}.bias", part.rows), part.folding)
            for part in self.slices(spec)
        ])  # fmt: skip

    def linear(self, spec: LinearSpec) -> Product:
        """The product; where the inputs are cut, its bias is added to the sum of the ranks and not here."""
        return Linear(self.matrix(spec), self.own_bias(spec))

    def layer_linear(self, spec: LinearSpec) -> Product:
        """The product in the precision's format of a layer's linears, unless it is kept plain."""
        linears = self.precision.linears
        if linears is None or spec.kept:
            return self.linear(spec)
        weight = self.quantized(spec, linears)
        if not linears.is_calibrated:
            return make_linear(weight, linears, self.own_bias(spec))
        ranges = [self.weights.input_range(f"{self.prefix}{part.tensor}") for part in spec.parts]
        # All parts see the same input, and so one range must hold it.
        scale = torch.tensor([max(scale for scale, _ in ranges)], device=weight.scales.device)
        return make_linear(weight, linears, self.own_bias(spec), scale=scale, offset=ranges[0][1])

    def quantized(self, spec: LinearSpec, linears: LinearFormat) -> QuantizedWeight:
        """The rank's weight in 8 bits: as it is stored, or made from plain numbers.

        Scales of plain ones come from whole rows, so that they do not depend on how inputs are cut.
        """
        parts = []
        for part in self.slices(spec):
            name = f"{self.prefix}{part.tensor}"
            stored = self.weights.stored(name, part.rows, part.columns)
            if stored is None:
                whole = quantize_weight(self.weights.read(f"{name}.weight", part.rows), linears.weights.torch_dtype)
                stored = QuantizedWeight(whole.values[:, part.columns].contiguous(), whole.scales)
            values = folded(stored.values, replace(part.folding, scale=1.0))
            parts.append(QuantizedWeight(values, folded(stored.scales, part.folding)))
        return QuantizedWeight(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))

    def experts(self, mlp: ExpertsMLP) -> ExpertWeights:
        """Those of the rank's experts, and of each its features."""
        held, features = mlp.held(self.tp_rank, self.tp_size, self.sp_rank)
        if mlp.tensors_of.is_stacked:
            return self._stacked_experts(mlp, held, features)
        cut = self.tp_size // mlp.ep_size
        within = replace(self, tp_rank=self.tp_rank % cut, tp_size=cut)
        pairs = [mlp.matrices(expert) for expert in range(held.start, held.stop)]
        if self.precision.linears is not None and not mlp.kept:
            gate_up, down = ([within.layer_linear(each) for each in matrices] for matrices in zip(*pairs, strict=True))
            return ExpertWeights(gate_up=EachProduct(gate_up), down=EachProduct(down))
        plain = (torch.stack([within.matrix(each) for each in matrices]) for matrices in zip(*pairs, strict=True))
        return ExpertWeights(gate_up=GroupedLinear(next(plain)), down=GroupedLinear(next(plain)))

    def _stacked_experts(self, mlp: ExpertsMLP, held: slice, features: slice) -> ExpertWeights:
        """Of tensors that hold all experts."""
        names = [f"{self.prefix}{name}" for name in mlp.tensors_of.names]
        pairs = torch.arange(2 * features.start, 2 * features.stop).view(-1, 2).t().flatten()  # gates, then ups
        gate_up = self.weights.read(names[0], held)[:, :, pairs].transpose(1, 2).contiguous()
        down = self.weights.read(names[1], held, features).transpose(1, 2).contiguous()
        biases: list[torch.Tensor | None] = [None, None]
        if mlp.tensors_of.has_bias:
            biases[0] = self.weights.read(f"{names[0]}_bias", held)[:, pairs].contiguous()
            # Ranks that share an expert add its bias once.
            biases[1] = self.weights.read(f"{names[1]}_bias", held) if features.start == 0 else None
        return ExpertWeights(gate_up=GroupedLinear(gate_up, biases[0]), down=GroupedLinear(down, biases[1]))

    def own_bias(self, spec: LinearSpec) -> torch.Tensor | None:
        """The bias that the rank's product adds."""
        return None if spec.cut is Cut.ROW else self.bias(spec)

    def norm(self, spec: NormSpec) -> torch.Tensor:
        """The rank's part of a norm's weight."""
        rows = spec.rows(self.tp_rank, self.tp_size)
        return folded(self.weights.read(f"{self.prefix}{spec.name}", rows), spec.folding)

    def slices(self, spec: LinearSpec) -> Iterator[Slice]:
        """Where the rank's part lies in the checkpoint."""
        return spec.slices(self.tp_rank, self.tp_size)


def _load_layer(
    shape: ModelShape, index: int, model: _Reader, groups: Groups, gathered: GatheredWeights | None
) -> DecoderLayer:
    spec, reader, group = shape.layers[index], replace(model, prefix=layer_prefix(index)), groups.tensor
    linears: dict[str, Product] = {}
    if gathered is None:
        linears = {linear.name: reader.layer_linear(linear) for linear in spec.linears}
    else:
        views = gathered.add({linear.name: reader.matrix(linear) for linear in spec.linears})
        for linear in spec.linears:
            linears[linear.name] = Linear(views[linear.name], reader.own_bias(linear), reorder=False)
    latent, mlp = spec.attention.latent, spec.experts
    experts = None if mlp is None else _load_experts(mlp, linears, reader)
    exchange = None
    if experts is not None and mlp is not None and mlp.dispatch is Dispatch.ALL_TO_ALL:
        over_tensor = mlp.beside == 1
        exchange = ExpertExchange(
            experts, group if over_tensor else groups.sequence, None if over_tensor else group.reduce(None)
        )
    return DecoderLayer(
        spec,
        model.tp_size,
        norms=Norms.of(spec, reader.norm, eps=shape.norm_eps),
        **projections(linears, has_latent=latent is not None),
        experts=experts,
        exchange=exchange,
        latent=None if latent is None else Latent(latent, linears["q"], reader.matrix(latent.expand)),
        reduce_o=group.reduce(reader.bias(spec.attention.o)),
        reduce_down=group.reduce(None if spec.experts else reader.bias(spec.dense.down)),
        sum_ranks=group.reduce(None),
    )


def _load_experts(mlp: ExpertsMLP, linears: Mapping[str, Product], reader: _Reader) -> Experts:
    held, _ = mlp.held(reader.tp_rank, reader.tp_size, reader.sp_rank)
    return Experts(
        mlp,
        reader.experts(mlp),
        first=held.start,
        router=linears[ROUTER],
        choice_bias=None if mlp.router.bias is None else reader.norm(mlp.router.bias),
        shared=None if mlp.shared is None else (linears["shared_gate_up"], linears["shared_down"]),
        shared_gate=linears.get("shared_gate"),
    )


def _load_head(shape: ModelShape, reader: _Reader, group: RankGroup) -> Head:
    (mine,) = reader.slices(shape.head)
    return Head(
        reader.norm(shape.final_norm),
        shape.norm_eps,
        reader.linear(shape.head),
        first_id=mine.rows.start,
        gather=group.gather if reader.tp_size > 1 else None,
    )
