"""Prepares the work of each point: the runtime's own kernels over random operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from profiler.comm.links.group import RankGroup, Reduction
from profiler.experts.experts import Experts, ExpertWeights
from profiler.experts.products import EachProduct, GroupedLinear, GroupedProduct
from profiler.experts.routing import route
from profiler.kernels.attention import attend
from profiler.kernels.attention_kernel import AttentionKernel, Masking
from profiler.kernels.elementwise import silu_product
from profiler.kernels.entry import Entries, Operand, Product
from profiler.kernels.linear import Linear
from profiler.kernels.quantized.kv import KV, read_rows
from profiler.kernels.rotary import Rotary
from profiler.layers.decoder_layer import DecoderLayer, Norms, ResidualStream, projections
from profiler.layers.head import Head, embed
from profiler.layers.latent import Latent
from profiler.layers.layer_inputs import LayerInputs
from profiler.layers.prefill_inputs import ChooseKernel, RoundInputs, prepare_round
from profiler.measure.operations.library_layers import LibraryLayers
from profiler.measure.operations.workspace import Slabs, Workspace
from profiler.measure.timing import Prepared, Run
from profiler.model import Backend, LayerSpec, ModelShape
from profiler.model.experts import Dispatch, ExpertsMLP
from profiler.model.spec import ROUTER, LatentSpec
from profiler.model.tensors import Cut, LinearSpec
from profiler.points.point import BEFORE_LAYERS, KEPT, MASKS, SKEWED, WARM, Op, Point

_SOFTCAP = 50.0
_MANY_ROWS = 384  # a card's FLOPs for each byte it reads, with two bytes a weight


class Operators:
    """The operators of one model on one rank; `prepare` turns a point into a function of the call's number."""

    def __init__(
        self, shape: ModelShape, context_length: int, workspace: Workspace, choose_kernel: ChooseKernel
    ) -> None:
        self.shape, self.context_length = shape, context_length
        self.workspace, self.choose_kernel = workspace, choose_kernel
        self.library = LibraryLayers(shape, context_length, workspace)

    @cached_property
    def rotary(self) -> Rotary:
        """The rotation of the model's positions."""
        return Rotary(self.shape, self.workspace.device)

    def prepare(self, point: Point) -> Prepared:
        """The work of a point that needs no other rank. A call of `layer` runs one layer, the next call the next."""
        own_load = has_own_load(point, self.workspace.device.type)
        run, recordable = self._run(point), not self._is_of_library(point) or self.library.is_recordable(point)
        return Prepared(run=run, recordable=recordable, follows_clock=_follows_clock(point), own_load=own_load)

    def _run(self, point: Point) -> Run:
        match point.op:
            case Op.MATMUL:
                return self._matmul(point)
            case Op.MATMUL_CEILING:
                return self._matmul_ceiling(point)
            case Op.EXPERTS:
                return self._experts(point)
            case Op.ATTENTION:
                return self._attention(point)
            case Op.ELEMENTWISE:
                return self._elementwise(point)
            case Op.LAYER:
                return self.library.run(point) if self._is_of_library(point) else self._layer(point)
            case Op.EMBEDDING:
                return self._embedding(point)
            case Op.HEAD:
                return self._head(point)
            case _:
                raise ValueError(f"{point.op} needs other ranks")

    def _is_of_library(self, point: Point) -> bool:
        return point.op is Op.LAYER and self.shape.backend is not Backend.OWN

    def round_inputs(self, chunks: Sequence[tuple[int, int, int]]) -> RoundInputs:
        """chunks: (slab_start, context, num_tokens) as `prepare_round` takes them."""
        return prepare_round(
            chunks,
            rotary=self.rotary,
            choose_kernel=self.choose_kernel,
            device=self.workspace.device,
            dtype=self.workspace.dtype,
        )

    def _matmul(self, point: Point) -> Run:
        m, n, k = (point.shape[name] for name in ("m", "n", "k"))
        linears = self.workspace.cold_linears(n, k, kept=point.variant == KEPT)
        if point.variant == WARM:
            linears = linears[:1]
        x = linears[0].entry.take(self.workspace.random(m, k))
        return lambda call: linears[call % len(linears)](x)

    def _matmul_ceiling(self, point: Point) -> Run:
        m, n, k = (point.shape[name] for name in ("m", "n", "k"))
        linear = self.workspace.linear(n, k)
        x = linear.entry.take(self.workspace.random(m, k))
        return lambda _call: linear(x)

    def _experts(self, point: Point) -> Run:
        """Routed experts of the rank that gets most tokens: all but the router's product, whose logits are there."""
        spec = self._expert_spec(point)
        tokens, held, features = (point.shape[name] for name in ("tokens", "held", "features"))
        hidden, precision = point.shape["hidden"], self.workspace.precision
        each = ((2 * features, hidden), (hidden, features))
        size = held * sum(precision.matrix_bytes(n, k, kept=spec.kept) for n, k in each)
        copies = self.workspace.num_copies(size)
        weights = self.workspace.keep(
            ("experts", held, features), size * copies,
            lambda: [self._expert_weights(spec, held, features) for _ in range(copies)],
        )  # fmt: skip
        count = spec.experts.count
        logits = self.workspace.random(tokens, count)
        if point.variant == SKEWED:
            logits = logits + self.workspace.random(count)
        bias = None if spec.router.bias is None else self.workspace.random(count, scale=0.0)
        x = self.workspace.random(tokens, point.shape["hidden"])
        got = torch.bincount(route(spec.router, logits, bias)[0].flatten(), minlength=count)
        groups = -(-count // held)
        firsts = [min(spec.experts.of_rank(rank, groups).start, count - held) for rank in range(groups)]
        first = max(firsts, key=lambda first: int(got[first : first + held].sum()))
        router = Linear(x.new_zeros(1, point.shape["hidden"]))
        layers = [
            Experts(replace(spec, shared=None), one, first=first, router=router, choice_bias=bias) for one in weights
        ]
        return lambda call: layers[call % copies].routed(x, *route(spec.router, logits, bias))

    def _expert_spec(self, point: Point) -> ExpertsMLP:
        names = ("experts", "per_token")
        for layer in self.shape.layer_kinds:
            if layer.experts and all(layer.experts.sizes(1)[name] == point.shape[name] for name in names):
                return layer.experts
        raise ValueError(f"{self.shape.name} has no experts of {point.shape}")

    def _expert_weights(self, spec: ExpertsMLP, held: int, features: int) -> ExpertWeights:
        hidden, workspace = spec.hidden.size, self.workspace

        def product(n: int, k: int) -> GroupedProduct:
            if workspace.precision.linears is not None and not spec.kept:
                return EachProduct([workspace.linear(n, k) for _ in range(held)])
            weight = workspace.random(held, n, k, scale=k**-0.5)
            return GroupedLinear(weight, workspace.random(held, n) if spec.tensors_of.has_bias else None)

        return ExpertWeights(gate_up=product(2 * features, hidden), down=product(hidden, features))

    def _attention(self, point: Point) -> Run:
        chunk, context = point.shape["chunk"], point.shape["context"]
        kernel, slabs, masking = AttentionKernel(point.variant), self._slabs(point), self._masking(point)
        # As the layer gives it: [c, H, D] seen as [H, c, D].
        q = self.workspace.random(chunk, point.shape["heads"], point.shape["head_dim"]).transpose(0, 1)
        seen = slice(masking.first_seen(context + chunk, chunk), context + chunk)

        def run(call: int) -> torch.Tensor:
            copy = call % slabs.num_copies
            return attend(kernel, q, read_rows(slabs.keys[copy], seen), read_rows(slabs.values[copy], seen), masking)

        return run

    def _elementwise(self, point: Point) -> Run:
        tokens, sizes = point.shape["tokens"], point.shape
        spec, tp_size = self._layer_of(point)
        made = {linear.name: linear.sizes(tp_size) for linear in spec.linears}
        qkv = self.workspace.random(tokens, made["qkv"][0])
        hidden, gate_up = (self.workspace.random(tokens, size) for size in (sizes["hidden"], 2 * sizes["intermediate"]))
        projected = self.workspace.random(tokens, sizes["hidden"])
        # Quantizing is element-wise work, and so are they measured; products take what is quantized already.
        products = {
            linear.name: self.workspace.linear(1, made[linear.name][1], kept=linear.kept) for linear in spec.linears
        }
        take = products["o"].entry.take

        def attended(x: Operand) -> torch.Tensor:
            assert isinstance(x, torch.Tensor)
            take(x)
            return projected

        layer = ElementwiseLayer(
            spec,
            tp_size,
            norms=self._norms(spec, tp_size),
            qkv=lambda _x: qkv,
            o=attended,
            gate_up=None if spec.experts else lambda _x: gate_up,
            down=None if spec.experts else lambda _x: projected,
            experts=(lambda _x, _tokens: _with_shared(gate_up, projected)) if spec.experts else None,
            latent=self._given_latent(spec, tp_size, tokens),
            entries=Entries.of(products, has_latent=spec.attention.latent is not None),
            reduce_o=self._reduce(spec.attention.o),
            reduce_down=self._reduce(None if spec.experts else spec.dense.down),
            sum_ranks=lambda partial: partial,
        )
        layer.mixed = self.workspace.random(tokens, made["o"][1])
        slabs = self._slabs(point)
        inputs = self.round_inputs([(0, 0, tokens)])

        def run(call: int) -> torch.Tensor:
            copy = call % slabs.num_copies
            return layer(ResidualStream(hidden, projected), inputs, slabs.keys[copy], slabs.values[copy]).hidden

        return run

    def _layer(self, point: Point) -> Run:
        """Whole layers one after another: each finds its weights and its KV as cold as in a stage."""
        chunk, context = point.shape["chunk"], point.shape["context"]
        layers, slabs = self._cold_layers(point), self._slabs(point)
        inputs = self.round_inputs([(0, context, chunk)])
        first = ResidualStream(*(self.workspace.random(chunk, point.shape["hidden"]) for _ in range(2)))
        stream = first

        def run(call: int) -> torch.Tensor:
            nonlocal stream
            index, copy = call % len(layers), call % slabs.num_copies
            before = first if index == 0 else stream
            stream = layers[index](before, inputs, slabs.keys[copy], slabs.values[copy])
            return stream.hidden

        return run

    def _embedding(self, point: Point) -> Run:
        vocab, hidden = point.shape["vocab"], point.shape["hidden"]
        size = self.workspace.precision.weights.num_bytes(vocab * hidden)
        weight = self.workspace.keep(("embedding", vocab), size, lambda: self.workspace.random(vocab, hidden))
        ids = torch.randint(vocab, (8, point.shape["tokens"]), device=self.workspace.device)
        return lambda call: embed(weight, ids[call % 8])

    def _head(self, point: Point) -> Run:
        rows, hidden, vocab = (point.shape[name] for name in ("rows", "hidden", "vocab"))
        logits = self.workspace.cold_linears(vocab, hidden, kept=True)
        norm, x = self.workspace.random(hidden), self.workspace.random(rows, hidden)
        heads = [Head(norm, self.shape.norm_eps, linear, first_id=0, gather=None) for linear in logits]
        return lambda call: heads[call % len(heads)](x)

    def _masking(self, point: Point) -> Masking:
        """The mask of an `attention` point: of a softcap any finite one takes as long."""
        sinks = self.workspace.random(point.shape["heads"]) if point.shape.get("sinks") else None
        softcap = _SOFTCAP if point.shape.get("softcap") else None
        return Masking(
            window=point.shape.get("window"), softcap=softcap, sinks=sinks, latents=self._latent_of(point)
        )  # fmt: skip

    def _latent_of(self, point: Point) -> Latent | None:
        """What expands the latents of an `attention` point, if it has any; its queries are given."""
        for layer in self.shape.layer_kinds:
            attention = layer.attention
            tp_size = attention.heads.count // point.shape["heads"]
            if attention.latent and attention.sizes(tp_size).items() <= point.shape.items():
                return self._latent(attention.latent, tp_size, self.workspace.linear(1, 1))
        return None

    def _latent(self, spec: LatentSpec, tp_size: int, q: Callable[[Operand], torch.Tensor]) -> Latent:
        return Latent(spec, q, self.workspace.random(*spec.expand.sizes(tp_size), scale=spec.rank**-0.5))

    def _given_latent(self, spec: LayerSpec, tp_size: int, tokens: int) -> Latent | None:
        """Latents whose queries are made without a product."""
        latent = spec.attention.latent
        if latent is None:
            return None
        q = self.workspace.random(tokens, latent.q.sizes(tp_size)[0])
        return self._latent(latent, tp_size, lambda _x: q)

    def _slabs(self, point: Point) -> Slabs:
        width = point.shape["head_dim"]
        widths = (point.shape["latent"] + point.shape["turned"], 0) if "latent" in point.shape else (width, width)
        return self.workspace.slabs(point.shape["kv_heads"], self.context_length, widths)

    def _cold_layers(self, point: Point) -> list[DecoderLayer]:
        spec, tp_size = self._layer_of(point)
        size = spec.weights_bytes(self.workspace.precision, tp_size)
        # Two layers at least, so that no layer follows itself.
        copies = max(2, self.workspace.num_copies(size))
        return self.workspace.keep(
            ("layers", spec, tp_size),
            size * copies,
            lambda: [self._decoder_layer(spec, tp_size) for _ in range(copies)],
        )

    def _layer_of(self, point: Point) -> tuple[LayerSpec, int]:
        """Which layer of the model an `elementwise` or `layer` point is, and the tp_size that gives it such sizes."""
        for spec in self.shape.layer_kinds:
            tp_size = spec.attention.heads.count // point.shape["heads"]
            for made in self._spreads(spec, point, tp_size) if spec.variant == point.variant else ():
                if not made.sizes(tp_size).items() <= point.shape.items():
                    continue
                named = made.sizes(tp_size) | made.traits(tp_size)
                alike = (point.shape.get(name, 0) == named.get(name, 0) for name in {*MASKS, *named})
                if point.op is Op.ELEMENTWISE or all(alike):
                    return made, tp_size
        raise ValueError(f"{self.shape.name} has no layer of {point.shape} {point.variant}")

    def _spreads(self, spec: LayerSpec, point: Point, tp_size: int) -> Iterator[LayerSpec]:
        """The layer with its experts wherever they may lie in the point."""
        yield from map(spec.spread, self.shape.spread_sizes(tp_size))
        if spec.experts is not None:
            yield spec.spread(tp_size, dispatch=Dispatch.ALL_TO_ALL)
            if held := point.shape.get("held"):
                yield spec.spread(1, beside=-(-spec.experts.experts.count // held), dispatch=Dispatch.ALL_TO_ALL)

    def _decoder_layer(self, spec: LayerSpec, tp_size: int) -> DecoderLayer:
        linears = {
            linear.name: self.workspace.linear(
                *linear.sizes(tp_size), bias=linear.has_bias and linear.cut is not Cut.ROW, kept=linear.kept
            )
            for linear in spec.linears
        }
        return DecoderLayer(
            spec,
            tp_size,
            norms=self._norms(spec, tp_size),
            **projections(linears, has_latent=spec.attention.latent is not None),
            experts=None if spec.experts is None else self._whole_experts(spec.experts, tp_size, linears),
            latent=self._whole_latent(spec, tp_size, linears),
            reduce_o=self._reduce(spec.attention.o),
            reduce_down=self._reduce(None if spec.experts else spec.dense.down),
            sum_ranks=lambda partial: partial,
        )

    def _whole_experts(self, mlp: ExpertsMLP, tp_size: int, linears: Mapping[str, Product]) -> Experts:
        held, features = mlp.held(0, tp_size)
        return Experts(
            mlp,
            self._expert_weights(mlp, held.stop - held.start, features.stop - features.start),
            first=held.start,
            router=linears[ROUTER],
            choice_bias=None if mlp.router.bias is None else self.workspace.random(mlp.experts.count, scale=0.0),
            shared=None if mlp.shared is None else (linears["shared_gate_up"], linears["shared_down"]),
            shared_gate=linears.get("shared_gate"),
        )

    def _whole_latent(self, spec: LayerSpec, tp_size: int, linears: Mapping[str, Product]) -> Latent | None:
        latent = spec.attention.latent
        return None if latent is None else self._latent(latent, tp_size, linears["q"])

    def _norms(self, spec: LayerSpec, tp_size: int) -> Norms:
        return Norms.of(
            spec, lambda norm: self.workspace.random(norm.num_elements(tp_size)), eps=self.shape.norm_eps
        )  # fmt: skip

    def _reduce(self, linear: LinearSpec | None) -> Reduction:
        """A reduction over one rank: only adds the row-parallel bias."""
        return RankGroup().reduce(self.workspace.random(linear.sizes()[0]) if linear and linear.has_bias else None)


class ElementwiseLayer(DecoderLayer):
    """A layer's element-wise work alone: results of attention and projections are given."""

    mixed: torch.Tensor  # [T, H D]

    def attend(self, q: torch.Tensor, inputs: LayerInputs, keys: KV, values: KV) -> torch.Tensor:
        """The attention made beforehand."""
        return self.mixed


def _with_shared(gate_up: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """What a shared expert [T, 2F] adds between its products, and the sum with the routed ones [T, hidden]."""
    if not gate_up.shape[1]:
        return routed
    return routed + silu_product(gate_up)[:, :1]


def has_own_load(point: Point, device_type: str) -> bool:
    """Whether the point is the mix of work that a run consists of: a card is timed while it does nothing else.

    What comes before layers is too little to bring a card to a power of its own.
    """
    return device_type == "cuda" and point.op is Op.LAYER and point.variant != BEFORE_LAYERS


def _follows_clock(point: Point) -> bool:
    """Whether arithmetic and not memory bounds the work: with so many rows to each weight or key that is read."""
    rows = point.shape.get("m") or point.shape.get("chunk") or 0
    return point.op in (Op.MATMUL, Op.ATTENTION) and rows >= _MANY_ROWS
