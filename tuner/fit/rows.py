"""Selects the measured rows that describe a model's work on one rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, cast

from db.errors import UserError
from db.rows.hardware import Hardware
from db.rows.measurements import Measurement
from profiler.hardware.datasheet import published_multiprocessors
from profiler.model import PRECISIONS, Backend, LayerSpec, ModelShape
from profiler.model.experts import Dispatch, ExpertsMLP
from profiler.points.point import KEPT, MASKS
from profiler.sequence.heads import most_heads
from profiler.sequence.kind import SPKind
from tuner.plan.plan import Weights

PEER_LINKS = ("nvlink", "p2p")  # by which the runtime finds its peers, `profiler.comm.links.group.find_hosts`
LEAST_SHARE, LEAST_POINTS = 0.3, 3  # of the points of the load measured most densely; the coarsest profile has three


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """The work of one rank: the local sizes that the profiler's rows name."""

    shape: ModelShape
    dtype: str
    tp_size: int
    num_multiprocessors: int | None = None
    """Of the rank's device, where it is a card that is known."""
    sp_size: int = 1
    sp_kind: SPKind = SPKind.NONE
    weights: Weights = Weights.WHOLE
    kind: LayerSpec | None = None
    """The layer that is meant, where those of the model differ."""
    longest_prompt: int | None = None
    """Tokens of the longest prompt that is planned for; None: as long as was measured."""
    has_peer_memory: bool = False
    """Whether cards write to each other's memory, so that copy engines gather keys and values."""

    @classmethod
    def on(
        cls,
        hardware: Hardware,
        *,
        shape: ModelShape,
        dtype: str,
        tp_size: int,
        sp_size: int = 1,
        sp_kind: SPKind = SPKind.NONE,
        weights: Weights = Weights.WHOLE,
        longest_prompt: int | None = None,
    ) -> Self:
        """The work on a device of `hardware`."""
        return cls(
            shape=shape,
            dtype=dtype,
            tp_size=tp_size,
            num_multiprocessors=published_multiprocessors(hardware.device),
            sp_size=sp_size,
            sp_kind=sp_kind,
            weights=weights,
            longest_prompt=longest_prompt,
            has_peer_memory=hardware.link in PEER_LINKS,
        )

    @property
    def layer(self) -> LayerSpec:
        """What the rank runs: the layer meant, or the first kind of the model."""
        return self.kind or self.shape.layer_kinds[0]

    @property
    def kinds(self) -> list[Self]:
        """The same for each kind of layer."""
        return [replace(self, kind=layer) for layer in self.shape.layer_kinds]

    @property
    def stage_size(self) -> int:
        """Ranks that hold a stage together, and wait for one another in every layer."""
        return self.sp_size * self.tp_size

    @property
    def sequence_size(self) -> int:
        """Ranks of a stage that share the rows of a round."""
        return self.tp_size if self.sp_kind is SPKind.MEGATRON else self.sp_size

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return PRECISIONS[self.dtype].activations.num_bytes(self.shape.hidden_size)

    @property
    def reduced_bytes(self) -> tuple[int, ...]:
        """Bytes a token of each all-reduce in a layer."""
        return self.layer.reduced_bytes(PRECISIONS[self.dtype])

    @property
    def squares_bytes(self) -> tuple[int, ...]:
        """Of these the sums of squares, where a norm spans the heads of all ranks."""
        return self.reduced_bytes[:1] if self.layer.attention.norms_all_heads else ()

    @property
    def attending_size(self) -> int:
        """Ranks of a stage that attend with different heads."""
        return self.stage_size if self.sp_kind is SPKind.ULYSSES else self.tp_size

    @property
    def attention_sizes(self) -> dict[str, int]:
        """Sizes that an `attention` row names beside chunk and context: the most heads that a rank attends with."""
        attention = self.layer.attention
        sizes = dict.fromkeys(MASKS, 0) | attention.sizes(self.tp_size) | attention.masking
        if self.sp_kind is not SPKind.ULYSSES:
            return sizes
        heads, kv_heads = most_heads(sizes["heads"], sizes["kv_heads"], self.sp_size)
        return sizes | {"heads": heads, "kv_heads": kv_heads}

    @property
    def exchanged(self) -> ExpertsMLP | None:
        """The layer's experts, if rows are sent to them; layers known as wholes send none."""
        if self.kind is None and self.shape.backend is not Backend.OWN:
            return None
        experts = self.layer.experts
        return experts if experts is not None and experts.dispatch is Dispatch.ALL_TO_ALL else None

    @property
    def without_sequence(self) -> Self:
        """The same with tensor parallelism alone."""
        return replace(self, sp_size=1, sp_kind=SPKind.NONE, weights=Weights.WHOLE)

    def __str__(self) -> str:
        words = f"{self.shape.name} at tp_size {self.tp_size}"
        if self.sp_kind is not SPKind.NONE:
            words += f", sp_size {self.sp_size} {self.sp_kind}" if self.sp_size > 1 else f", sp_kind {self.sp_kind}"
        words += f", experts over {self.exchanged.num_groups} ranks that share rows" if self.exchanged else ""
        return f"{words} in {self.dtype}"

    @property
    def layer_sizes(self) -> dict[str, int]:
        """Sizes that `elementwise` rows name beside their tokens."""
        return self.layer.sizes(self.tp_size)

    @property
    def whole_layer_sizes(self) -> dict[str, int]:
        """Sizes that `layer` rows name beside chunk and context."""
        return dict.fromkeys(MASKS, 0) | self.layer_sizes | self.layer.traits(self.tp_size)

    @property
    def expert_sizes(self) -> dict[str, int]:
        """Sizes that `experts` rows name beside their tokens."""
        assert self.layer.experts is not None
        return {"hidden": self.layer.hidden_size} | self.layer.experts.sizes(self.tp_size)

    @property
    def layer_variant(self) -> str:
        """The variant of `elementwise` and `layer` rows."""
        return self.layer.variant

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(out, in) features of a layer's matmuls: q|k|v, o, gate|up, down; with experts those of all tokens."""
        return list(self.layer.products(self.tp_size).values())

    @property
    def projection_rows(self) -> list[tuple[dict[str, int], str]]:
        """Sizes and variant of the rows of each: those that a model keeps plain have rows of their own."""
        kept = [linear.kept for linear in self.layer.linears]
        return [({"n": n, "k": k}, KEPT if plain else "") for (n, k), plain in zip(self.projections, kept, strict=True)]

    @property
    def vocab_slice(self) -> int:
        """Rows of the head that a rank holds at most."""
        return self.shape.head.sizes(self.tp_size)[0]


@dataclass(frozen=True, slots=True)
class Rows:
    """The measurements of one hardware and dtype, asked by operation and sizes."""

    measurements: Sequence[Measurement]
    _by_op: Mapping[str, list[Measurement]] = field(init=False, repr=False, compare=False)
    _found: dict[tuple[object, ...], dict[int, list[Measurement]]] = field(init=False, repr=False, compare=False)
    """Cache of selections, by load: fits of many layouts select the same rows."""

    def __post_init__(self) -> None:
        by_op: dict[str, list[Measurement]] = defaultdict(list)
        for row in self.measurements:
            by_op[row.op].append(row)
        object.__setattr__(self, "_by_op", by_op)
        object.__setattr__(self, "_found", {})

    @classmethod
    def of(cls, rows: Sequence[Measurement] | Self) -> Self:
        """Rows as they are, or made of measurements."""
        return rows if isinstance(rows, cls) else cls(cast(Sequence[Measurement], rows))

    def replaced(self, made: Sequence[Measurement]) -> Self:
        """The same with rows that stand for all those of their operation, group and variant."""
        instead = {(row.op, row.group_size, row.variant) for row in made}
        kept = [row for row in self.measurements if (row.op, row.group_size, row.variant) not in instead]
        rows, changed = type(self)([*kept, *made]), {row.op for row in made}
        rows._found.update({asked: found for asked, found in self._found.items() if asked[0] not in changed})
        return rows

    def select(
        self,
        op: str,
        sizes: Mapping[str, int],
        *,
        busy_ranks: int,
        group_size: int | None = None,
        variant: str | None = "",
    ) -> list[Measurement]:
        """Rows of `op` whose shape has `sizes`, of one variant (None: of all).

        Of several loads, the rows taken with as many ranks at work as come nearest to `busy_ranks`; a load with far
        fewer points than another is passed over, for its gaps would cost more than the load does.
        """
        asked = (op, *sorted(sizes.items()), group_size, variant)
        if asked not in self._found:
            self._found[asked] = self._by_load(op, sizes, group_size, variant)
        by_load = self._found[asked]
        nearest = min(by_load, key=lambda load: (abs(load - busy_ranks), -load), default=None)
        return [] if nearest is None else by_load[nearest]

    def _by_load(
        self, op: str, sizes: Mapping[str, int], group_size: int | None, variant: str | None
    ) -> dict[int, list[Measurement]]:
        """The rows by the number of ranks at work, without loads of too few points."""
        found: dict[int, list[Measurement]] = {}
        for row in self._by_op.get(op, ()):
            if (
                group_size in (None, row.group_size)
                and variant in (None, row.variant)
                and all(row.shape.get(name, 0) == value for name, value in sizes.items())
            ):
                found.setdefault(row.busy_ranks, []).append(row)
        most = max(map(len, found.values()), default=0)
        enough = max(most * LEAST_SHARE, min(LEAST_POINTS, most))
        return {load: rows for load, rows in found.items() if len(rows) >= enough}

    def require(
        self,
        op: str,
        sizes: Mapping[str, int],
        *,
        busy_ranks: int,
        group_size: int | None = None,
        variant: str | None = "",
        why: str,
    ) -> list[Measurement]:
        """As `select`, but raises `UserError` that says what to measure when there is nothing."""
        found = self.select(op, sizes, busy_ranks=busy_ranks, group_size=group_size, variant=variant)
        if not found:
            raise UserError("measurements", f"no {op} rows for {why}", "measure them first: isochunk profile")
        return found


def expected_s(row: Measurement, *, ranks: int = 1) -> float:
    """What the row's work costs on average when `ranks` ranks do it and wait for the slowest, in seconds.

    Makespans add times up, so means count and not medians, and a kernel's times lean to the slow side. For one rank
    Swanson's rule, 0.3 p10 + 0.4 p50 + 0.3 p90, stands for the mean (Hurst, Brown and Swanson, 2000). The largest of n
    samples lies about at the quantile n / (n + 1), taken between the row's percentiles.
    """
    if ranks == 1:
        return (0.3 * row.p10_us + 0.4 * row.median_us + 0.3 * row.p90_us) * 1e-6
    quantile = min(ranks / (ranks + 1), 0.9)
    share = (quantile - 0.5) / 0.4
    return (row.median_us + share * (row.p90_us - row.median_us)) * 1e-6
