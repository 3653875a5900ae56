"""A point to be measured: an operation, its shape, and its level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from db.rows.measurements import MeasurementKey, measurement_key
from profiler.points.rank_groups import RankGroups


class Op(StrEnum):
    """The measured operations, as rows name them."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    LAYER = "layer"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUND_OVERHEAD = "round_overhead"
    EXPERTS = "experts"
    MATMUL_CEILING = "matmul_ceiling"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SEND_RECV = "send_recv"


COLLECTIVES = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.SEND_RECV)
_STRIDE = "stride-"
EVEN, SKEWED = "even", "skewed"  # how tokens spread over experts: logits of routers are normal of standard deviation 1,
# to which each expert adds nothing, or a number of its own of the same deviation
MASKS = ("window", "softcap", "sinks", "latent")  # sizes that attention has where it is not the plain causal one
KEPT = "kept"  # variant of a product that a model keeps plain among quantized ones
WARM = "warm"  # variant of a product whose weights are still in the cache
BESIDE = "beside"  # variant of a collective while products run, and of a product (its group_size tells of whose) while
# collectives run: what each loses to the other
BEFORE_LAYERS = "before layers/2"  # variant of a layer that stands for what a forward does once for all of them
RANK_LAYER = "rank_layer"  # rows that come with those of LAYER on cards: each rank's own times, its number in the shape


def strided(variant: str, stride: int) -> str:
    """The variant of a collective whose ranks stand `stride` apart: as the ranks of a layout do that share rows beside
    tensor parallelism."""
    return variant if stride == 1 else f"{variant}{_STRIDE}{stride}"


def stride_of(variant: str) -> int:
    """How far apart the ranks of a collective of this variant stand."""
    _, found, stride = variant.partition(_STRIDE)
    return int(stride) if found else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row to be measured.

    level: 0 is measured first; every operation has points of level 0.
    flops: a rough count, to order points and to tell the time that is left.
    size_bytes: what a rank must hold for it at least.
    """

    op: Op
    dtype: str
    shape: Mapping[str, int]
    group_size: int = 1
    busy_ranks: int = 1
    variant: str = ""
    level: int = 0
    flops: float = 0.0
    size_bytes: int = 0

    @property
    def ranks(self) -> RankGroups:
        """The groups of ranks that run it together."""
        return RankGroups(self.group_size, stride_of(self.variant))

    @property
    def key(self) -> MeasurementKey:
        """The key of the row that this point becomes."""
        return measurement_key(
            op=self.op,
            dtype=self.dtype,
            shape=self.shape,
            group_size=self.group_size,
            busy_ranks=self.busy_ranks,
            variant=self.variant,
        )

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.op} {sizes}" + (f" {self.variant}" if self.variant else "")
