"""Which parallel layouts a world of ranks allows, and why the others are refused."""

from __future__ import annotations

from dataclasses import dataclass

from db.errors import UserError
from profiler.model import ModelShape
from profiler.sequence.kind import SPKind
from tuner.plan.plan import Parallel, Weights
from tuner.plan.stage_order import StageOrder

MAX_WORLD_SIZE = 100_000
MOST_REFUSALS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """pp_size x sp_size x tp_size ranks; `refusal` says why it cannot run, None when it can.

    The words are those of `tuner.plan.plan.Parallel`, which adds the layers of each group.
    """

    tp_size: int
    pp_size: int
    sp_size: int = 1
    sp_kind: SPKind = SPKind.NONE
    virtual_stages: int = 1
    stage_order: StageOrder = StageOrder.LOOP
    weights: Weights = Weights.WHOLE
    refusal: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks that take part."""
        return self.pp_size * self.sp_size * self.tp_size

    @property
    def num_groups(self) -> int:
        """Groups of consecutive layers that a round goes through."""
        return self.pp_size * self.virtual_stages

    def __str__(self) -> str:
        words = [f"TP{self.tp_size}"]
        if self.sp_kind is not SPKind.NONE:
            words.append(f"SP{self.sp_size} {self.sp_kind}" if self.sp_size > 1 else str(self.sp_kind))
        words.append(f"PP{self.pp_size}")
        if self.virtual_stages > 1:
            words.append(f"x{self.virtual_stages} {self.stage_order}")
        if self.weights is Weights.GATHERED:
            words.append("gathered weights")
        return " ".join(words)


def layout_of(parallel: Parallel) -> Layout:
    """The layout of a plan, without the layers of its groups."""
    names = ("tp_size", "pp_size", "sp_size", "sp_kind", "virtual_stages", "stage_order", "weights")
    return Layout(**{name: getattr(parallel, name) for name in names})


def enumerate_layouts(
    shape: ModelShape, world_size: int, *, tp_size: int | None = None, pp_size: int | None = None
) -> list[Layout]:
    """Every tp_size x pp_size that uses `world_size` ranks or a divisor of them; the sizes given are kept fixed.

    Those that cannot run are left out where there are more than `MOST_REFUSALS` in all.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise UserError("world_size", world_size, f"must be 1 or more, at most {MAX_WORLD_SIZE}")
    pairs = [
        (tp, used // tp)
        for used in _divisors(world_size)
        for tp in _divisors(used)
        if tp_size in (None, tp) and pp_size in (None, used // tp)
    ]
    if not pairs:
        asked = f"tp_size {tp_size or 'any'}, pp_size {pp_size or 'any'}"
        raise UserError("world_size", world_size, f"must be a multiple of tp_size x pp_size ({asked})")
    layouts = [_layout(shape, tp, pp) for tp, pp in pairs]
    if len(layouts) > MOST_REFUSALS:
        layouts = [layout for layout in layouts if not layout.refusal] or layouts[:1]
    return sorted(layouts, key=lambda layout: (-layout.world_size, layout.tp_size))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _layout(shape: ModelShape, tp_size: int, pp_size: int) -> Layout:
    refusal = None
    try:
        shape.check_tp_size(tp_size)
    except UserError as error:
        refusal = str(error)
    if pp_size > shape.num_layers:
        refusal = f"pp_size {pp_size} is more than the {shape.num_layers} layers of {shape.name}"
    return Layout(tp_size=tp_size, pp_size=pp_size, refusal=refusal)
