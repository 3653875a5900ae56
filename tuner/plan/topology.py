"""Hosts, cards and links: an isochunk.topology/1 file, and which groups of a layout span hosts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from db.errors import UserError
from db.files.documents import located, of_schema, parse, read_json
from profiler.comm.links.mesh import Mesh
from tuner.plan.layout import MAX_WORLD_SIZE, Layout
from tuner.plan.stage_order import StageOrder

SCHEMA = "isochunk.topology/1"
MOST_GB_S, MOST_LATENCY_US = 1e6, 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """What one card sends over a link: gigabytes (1e9 bytes) a second in one direction, after a latency."""

    bandwidth_gb_s: float
    latency_us: float

    def __post_init__(self) -> None:
        if not 0.0 < self.bandwidth_gb_s <= MOST_GB_S:
            raise UserError("bandwidth_gb_s", self.bandwidth_gb_s, f"above 0, at most {MOST_GB_S:g}")
        if not 0.0 <= self.latency_us <= MOST_LATENCY_US:
            raise UserError("latency_us", self.latency_us, f"0 to {MOST_LATENCY_US:g}")

    @property
    def byte_s(self) -> float:
        """Seconds a byte."""
        return 1e-9 / self.bandwidth_gb_s

    @property
    def latency_s(self) -> float:
        """Seconds before the first byte."""
        return 1e-6 * self.latency_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """`hosts` of `cards_per_host` cards each; ranks stand on them one after another, host by host."""

    hosts: int
    cards_per_host: int
    inside_host: LinkSpeed
    between_hosts: LinkSpeed

    def __post_init__(self) -> None:
        for name in ("hosts", "cards_per_host"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "at least 1")
        if self.num_cards > MAX_WORLD_SIZE:
            raise UserError("hosts", self.hosts, f"at most {MAX_WORLD_SIZE} cards in all")

    @property
    def num_cards(self) -> int:
        """Cards of all hosts."""
        return self.hosts * self.cards_per_host

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless so many ranks have a card each."""
        if world_size > self.num_cards:
            allowed = f"at most {self.num_cards}, the cards of {self.hosts} hosts with {self.cards_per_host} each"
            raise UserError("world_size", world_size, allowed)

    def reach(self, layout: Layout) -> Reach:
        """How many hosts the groups of a layout span, and whether a hand-off between stages leaves a host."""
        loops = layout.virtual_stages > 1 and layout.stage_order is StageOrder.LOOP
        return _reach(self.cards_per_host, layout.pp_size, layout.sp_size, layout.tp_size, loops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The most hosts that a tensor-parallel group, a sequence-parallel group and a hand-off between stages span."""

    tensor: int
    sequence: int
    boundary: int


@lru_cache(maxsize=4096)
def _reach(cards_per_host: int, pp_size: int, sp_size: int, tp_size: int, loops: bool) -> Reach:
    mesh = Mesh(pp_size=pp_size, sp_size=sp_size, tp_size=tp_size)

    def most_hosts(groups: Iterable[tuple[int, ...]]) -> int:
        return max((len({rank // cards_per_host for rank in group}) for group in groups), default=1)

    pairs = list(mesh.boundaries()) + (list(mesh.returns()) if loops else [])
    return Reach(
        tensor=most_hosts(mesh.tensor_groups()), sequence=most_hosts(mesh.sequence_groups()), boundary=most_hosts(pairs)
    )


def load_topology(path: str | Path) -> Topology:
    """Read an isochunk.topology/1 file. Raises UserError naming the field, its value and what is allowed."""
    content = read_json(path, field="--topology")
    with located(path):
        return parse(Topology, of_schema(content, SCHEMA))
