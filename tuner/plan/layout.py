"""Which parallel layouts a world of ranks allows, and why the others are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from db.errors import UserError
from profiler.model import Backend, ModelShape, Precision
from profiler.model.experts import Dispatch
from profiler.sequence.kind import SPKind
from tuner.plan.plan import Degrees, Parallel, Weights
from tuner.plan.stage_order import StageOrder

MAX_WORLD_SIZE = 100_000
MOST_REFUSALS = 64
VIRTUAL_STAGES = (1, 2, 4)
"""Groups of layers a stage that are tried: each doubling halves the bubble that is left, and adds hand-offs."""
OWN_RANKS = (SPKind.GATHER, SPKind.ULYSSES, SPKind.RING)
"""Kinds that take ranks beside the tensor-parallel group."""
PASSES_KV = (SPKind.GATHER, SPKind.RING)
"""Kinds whose ranks hand keys and values to one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Degrees):
    """A plan's degrees without the layers of its groups; `refusal` says why it cannot run, None when it can."""

    refusal: str | None = None

    @property
    def family(self) -> str:
        """The parallel schemes of the layout, without their sizes."""
        schemes = []
        if self.tp_size > 1:
            schemes.append("TP+SP" if self.sp_kind is SPKind.MEGATRON else "TP")
        if self.sp_size > 1:
            schemes.append(f"SP {self.sp_kind}")
        if self.ep_size > 1:
            schemes.append("EP" if self.dispatch is Dispatch.NONE else f"EP {self.dispatch}")
        if self.pp_size > 1:
            schemes.append("PP" if self.virtual_stages == 1 else "PP interleaved")
        return " x ".join(schemes) or "one rank"

    def __str__(self) -> str:
        words = [f"TP{self.tp_size}", *([f"EP{self.ep_size}"] if self.ep_size > 1 else [])]
        words += [str(self.dispatch)] if self.dispatch is not Dispatch.NONE else []
        if self.sp_kind is not SPKind.NONE:
            words.append(f"SP{self.sp_size} {self.sp_kind}" if self.sp_size > 1 else str(self.sp_kind))
        words.append(f"PP{self.pp_size}")
        if self.virtual_stages > 1:
            words.append(f"x{self.virtual_stages} {self.stage_order}")
        if self.weights is Weights.GATHERED:
            words.append("gathered weights")
        return " ".join(words)


def check_precision_fits(precision: Precision, sp_kind: SPKind, weights: Weights) -> None:
    """Raise `UserError` where ranks would hand one another numbers that `precision` keeps in 8 bits."""
    if weights is Weights.GATHERED and precision.linears is not None:
        allowed = f"whole in {precision.name}; only plain numbers are gathered"
        raise UserError("parallel.weights", weights, allowed)
    if sp_kind in PASSES_KV and precision.has_kv_scales:
        allowed = f"one of none, ulysses, megatron: {precision.name} keeps keys and values in 8 bits"
        raise UserError("parallel.sp_kind", sp_kind, allowed)


def check_sequence_fits(shape: ModelShape, sp_kind: SPKind) -> None:
    """Raise `UserError` where this kind's attention does not know the masks of the model's layers."""
    heads = {(layer.attention.heads, layer.attention.kv_heads) for layer in shape.layer_kinds}
    if sp_kind is SPKind.ULYSSES and len(heads) > 1:
        raise UserError("sp_kind", sp_kind, f"none, gather, ring or megatron: heads of {shape.name}'s layers differ")
    for layer in shape.layer_kinds:
        if layer.attention.latent and sp_kind in OWN_RANKS:
            raise UserError("sp_kind", sp_kind, f"one of none, megatron: it runs no {layer.kind}")
        masked = layer.attention.masking
        if masked and (sp_kind is SPKind.RING or (sp_kind is SPKind.ULYSSES and "sinks" in masked)):
            others = "none, gather, megatron" if "sinks" in masked else "none, gather, ulysses, megatron"
            raise UserError("sp_kind", sp_kind, f"one of {others}: it runs no {layer.kind}")


def check_experts_fit(shape: ModelShape, precision: Precision, weights: Weights) -> None:
    """Raise `UserError` where experts or latents would have to be what kernels here do not run."""
    if not shape.has_experts and not shape.has_latents:
        return
    shape.check_precision(precision, field="precision")
    if weights is Weights.GATHERED:
        what = shape.experts_or_latents
        raise UserError("parallel.weights", weights, f"whole: {what} of {shape.name} are not gathered")


def layout_of(parallel: Parallel) -> Layout:
    """The layout of a plan, without the layers of its groups."""
    return Layout(**{field.name: getattr(parallel, field.name) for field in fields(Degrees)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """The parts of a layout that a user fixes; None leaves a part to the search."""

    tp_size: int | None = None
    ep_size: int | None = None
    pp_size: int | None = None
    sp_size: int | None = None
    sp_kind: SPKind | None = None
    virtual_stages: int | None = None
    stage_order: StageOrder | None = None

    def __post_init__(self) -> None:
        own_ranks = self.sp_kind in OWN_RANKS
        if own_ranks and self.sp_size == 1:
            raise UserError("sp_size", 1, f"2 or more with sp_kind {self.sp_kind}")
        if self.sp_kind is not None and not own_ranks and (self.sp_size or 1) > 1:
            raise UserError("sp_size", self.sp_size, f"1 with sp_kind {self.sp_kind}")
        if self.sp_kind is SPKind.MEGATRON and self.tp_size == 1:
            raise UserError("sp_kind", self.sp_kind, "cuts over the tensor-parallel group: tp_size must be 2 or more")
        if self.tp_size and self.tp_size % (self.ep_size or 1) and self.ep_size != self.sp_size and not own_ranks:
            allowed = f"must divide tp_size = {self.tp_size}, whose ranks hold experts, or be sp_size"
            raise UserError("ep_size", self.ep_size, allowed)
        if self.pp_size == 1 and (self.virtual_stages or 1) > 1:
            raise UserError("virtual_stages", self.virtual_stages, "1 with pp_size 1: there is no pipeline to fill")

    def __str__(self) -> str:
        names = ("tp_size", *(("ep_size",) if self.ep_size else ()), "pp_size", "sp_size", "sp_kind", "virtual_stages")
        return ", ".join(f"{name} {getattr(self, name) or 'any'}" for name in names)

    def check_experts(self, shape: ModelShape) -> None:
        """Raise `UserError` where experts of the model cannot be spread as wanted."""
        if self.ep_size is None or self.ep_size == 1:
            return
        if not shape.has_experts:
            raise UserError("ep_size", self.ep_size, f"1: kernels here run no experts of {shape.name}")
        if self.sp_size not in (None, 1) or self.sp_kind in OWN_RANKS:
            shape.spread(1, beside=self.ep_size, dispatch=Dispatch.ALL_TO_ALL).check_tp_size(self.tp_size or 1)
        else:
            shape.spread(self.ep_size).check_tp_size(self.tp_size or self.ep_size)

    @property
    def num_ranks(self) -> int:
        """Ranks that the sizes need at least."""
        own_ranks, ep_size = self.sp_kind in OWN_RANKS, self.ep_size or 1
        sp_size = self.sp_size or (max(2, ep_size) if own_ranks else 1)
        least_tp = 1 if own_ranks or ep_size == sp_size else ep_size
        tp_size = self.tp_size or max(least_tp, 2 if self.sp_kind is SPKind.MEGATRON else 1)
        return tp_size * sp_size * (self.pp_size or (2 if (self.virtual_stages or 1) > 1 else 1))

    def allow(self, layout: Layout) -> bool:
        """Whether the layout has what is kept fixed; the order counts only where a stage holds several groups."""
        names = ("tp_size", "ep_size", "pp_size", "sp_size", "sp_kind", "virtual_stages")
        kept = all(getattr(self, name) in (None, getattr(layout, name)) for name in names)
        return kept and (layout.virtual_stages == 1 or self.stage_order in (None, layout.stage_order))


ANY = Pins()


def enumerate_layouts(shape: ModelShape, world_size: int, pins: Pins = ANY) -> list[Layout]:
    """Every layout that uses `world_size` ranks or a divisor of them, as far as the pins leave a choice.

    Weights are whole on each rank of a sequence-parallel group; where they do not fit, the search gathers them.
    Those that cannot run are left out where there are more than `MOST_REFUSALS` of them.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise UserError("world_size", world_size, f"must be 1 or more, at most {MAX_WORLD_SIZE}")
    pins.check_experts(shape)
    layouts = [layout for layout in _layouts(shape, world_size, pins) if pins.allow(layout)]
    if not layouts:
        raise UserError("world_size", world_size, f"must be a multiple of tp_size x sp_size x pp_size ({pins})")
    if sum(layout.refusal is not None for layout in layouts) > MOST_REFUSALS:
        layouts = [layout for layout in layouts if not layout.refusal] or layouts[:1]
    return sorted(layouts, key=lambda layout: (-layout.world_size, layout.tp_size, layout.sp_size))


def _layouts(shape: ModelShape, world_size: int, pins: Pins) -> Iterator[Layout]:
    divisors = [divisor for divisor in range(1, world_size + 1) if world_size % divisor == 0]
    wanted_tp, wanted_sp = ([size] if size else divisors for size in (pins.tp_size, pins.sp_size))
    for tp_size in wanted_tp:
        refusal = _tp_refusal(shape, tp_size)
        ep_sizes = () if refusal else shape.spread_sizes(tp_size)
        for sp_size in wanted_sp:
            for pp_size in [pins.pp_size] if pins.pp_size else divisors:
                plain = Layout(tp_size=tp_size, sp_size=sp_size, pp_size=pp_size)
                if plain.world_size > world_size or world_size % plain.world_size:
                    continue
                if pp_size > shape.num_layers:
                    refusal = refusal or f"pp_size {pp_size} is more than the {shape.num_layers} layers of {shape.name}"
                for layout in _of_kinds(shape, plain, pins):
                    reason = refusal or layout.refusal
                    if reason:  # once, whatever the kind and the order
                        if sp_size == 1 or pins.sp_size or pins.sp_kind:
                            yield replace(layout, refusal=reason)
                        break
                    for spread in _spreads(shape, layout, ep_sizes):
                        yield from _interleaved(shape, spread, pins)
                refusal = _tp_refusal(shape, tp_size)


def _spreads(shape: ModelShape, layout: Layout, ep_sizes: Sequence[int]) -> Iterator[Layout]:
    """The layout with experts over as many groups of tensor-parallel ranks as there can be, and over the ranks that
    share the rows, where those are sent to them."""
    for ep_size in ep_sizes:
        yield replace(layout, ep_size=ep_size)
    size = layout.sequence_size
    if size == 1:
        return
    mixtures = [layer.experts for layer in shape.layer_kinds if layer.experts]
    if mixtures and all(mlp.experts.count >= size for mlp in mixtures):
        yield replace(layout, ep_size=size, dispatch=Dispatch.ALL_TO_ALL)


def _tp_refusal(shape: ModelShape, tp_size: int) -> str | None:
    try:
        shape.check_tp_size(tp_size)
    except UserError as error:
        return str(error)
    return None


def _of_kinds(shape: ModelShape, plain: Layout, pins: Pins) -> Iterator[Layout]:
    """The layout in every kind of sequence parallelism that its sizes allow; a pinned one with its refusal."""
    if shape.backend is not Backend.OWN:
        refusal = f"the layers of {shape.name} are run as wholes: no ranks share their rows"
        yield replace(plain, refusal=str(UserError("sp_size", plain.sp_size, refusal))) if plain.sp_size > 1 else plain
        return
    if plain.sp_size == 1:
        for kind in (SPKind.NONE, SPKind.MEGATRON) if plain.tp_size > 1 else (SPKind.NONE,):
            yield replace(plain, sp_kind=kind)
        return
    for kind in OWN_RANKS if pins.sp_kind not in OWN_RANKS else (pins.sp_kind,):
        try:
            check_sequence_fits(shape, kind)
        except UserError as error:
            if pins.sp_kind is kind:
                yield replace(plain, sp_kind=kind, refusal=str(error))
            continue
        heads = min(layer.attention.heads.count for layer in shape.layer_kinds) // plain.tp_size
        if kind is SPKind.ULYSSES and plain.sp_size > heads:
            if pins.sp_kind is kind:
                allowed = f"at most {heads} with sp_kind ulysses, the query heads a rank has at tp_size {plain.tp_size}"
                yield replace(plain, sp_kind=kind, refusal=str(UserError("sp_size", plain.sp_size, allowed)))
            continue
        yield replace(plain, sp_kind=kind)


def _interleaved(shape: ModelShape, layout: Layout, pins: Pins) -> Iterator[Layout]:
    """The layout with one group of layers a stage and with several, in both orders."""
    most = shape.num_layers // layout.pp_size if shape.backend is Backend.OWN else 1
    for virtual in VIRTUAL_STAGES if pins.virtual_stages is None else (pins.virtual_stages,):
        if virtual > most:
            if pins.virtual_stages is not None:
                allowed = f"at most {most}: {shape.name} has {shape.num_layers} layers for {layout.pp_size} stages"
                reason = str(UserError("virtual_stages", virtual, allowed))
                yield replace(layout, virtual_stages=virtual, refusal=reason)
        elif virtual == 1:
            yield layout
        elif layout.pp_size > 1:
            for order in StageOrder:
                yield replace(layout, virtual_stages=virtual, stage_order=order)
