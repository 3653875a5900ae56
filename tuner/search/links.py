"""Estimates unmeasured collectives and hand-offs by formulas over a topology's links.

A message of n bytes among g ranks, each of which sends over a link of latency a and of b seconds a byte:

    all-gather, reduce-scatter    (g - 1) a + (g - 1) / g n b         ring
    all-to-all                    (g - 1) a + (g - 1) / g n b         pair by pair
    all-reduce                    2 (g - 1) a + 2 (g - 1) / g n b     ring: reduce-scatter, then all-gather
                                  2 log2(g) a + 2 n b                 double tree, for short messages; the least counts
    send and receive              a + n b

The ring and pair-wise costs are those of Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication
Operations in MPICH" (2005), and their bandwidth factors those by which nccl-tests tells bus bandwidth (PERFORMANCE.md);
the trees are those of Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan"
(2009), which NCCL takes for short messages. A group that leaves a host is taken to run at the links between hosts on
all its steps: what a hierarchy of rings could save is not counted on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from db.rows.measurements import Measurement
from db.store.provenance import code_version, now
from profiler.points.point import Op, strided
from profiler.sequence.kind import SPKind
from tuner.fit.rows import Rows
from tuner.plan.layout import Layout
from tuner.plan.topology import LinkSpeed, Topology

MESSAGE_BYTES = tuple(1 << power for power in range(10, 37, 2))
"""Sizes at which the formulas stand in for rows."""
GROUP_OPS = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL)


@dataclass(frozen=True, slots=True)
class Assumed:
    """Messages of a group, or of a pair, that were not measured."""

    group_size: int
    stride: int
    """Ranks between neighbours of the group."""
    hosts: int
    """That the group spans."""

    def __str__(self) -> str:
        what = "hand-offs" if self.group_size == 2 and self.stride == 0 else f"groups of {self.group_size}"
        return f"{what} {'between hosts' if self.hosts > 1 else 'of one host'}"


def seconds(op: Op, num_bytes: float, group_size: int, link: LinkSpeed) -> float:
    """Seconds of a collective or a message, by the formulas of the module."""
    steps, share, sent_s = group_size - 1, (group_size - 1) / group_size, num_bytes * link.byte_s
    if op is Op.SEND_RECV:
        return link.latency_s + sent_s
    once = steps * link.latency_s + share * sent_s
    if op is not Op.ALL_REDUCE:
        return once
    return min(2.0 * once, 2.0 * math.log2(group_size) * link.latency_s + 2.0 * sent_s)


@dataclass(frozen=True, slots=True)
class Links:
    """Rows of a hardware, completed for layouts whose messages were not measured where the topology puts them."""

    rows: Rows
    topology: Topology | None
    num_cards: int | None = None
    """Of the hardware that was measured; None: its ranks are no cards."""
    _measured: frozenset[tuple[str, int]] = field(init=False, repr=False, compare=False)
    _most_busy: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = frozenset((row.op, row.group_size) for row in self.rows.measurements if row.group_size > 1)
        object.__setattr__(self, "_measured", found)
        object.__setattr__(self, "_most_busy", max((row.busy_ranks for row in self.rows.measurements), default=1))

    def assumed(self, layout: Layout) -> tuple[Assumed, ...]:
        """The messages of a layout that formulas stand for; none without a topology."""
        if self.topology is None:
            return ()
        reach = self.topology.reach(layout)
        shared = layout.tp_size if layout.sp_kind is SPKind.MEGATRON else layout.sp_size
        needed = [
            (Assumed(layout.tp_size, 1, reach.tensor), Op.ALL_REDUCE),
            (Assumed(layout.sp_size, layout.tp_size, reach.sequence), Op.ALL_GATHER),
        ]
        if layout.sp_kind is SPKind.MEGATRON:
            needed.append((Assumed(shared, 1, reach.tensor), Op.REDUCE_SCATTER))
        found = [
            group
            for group, op in needed
            if group.group_size > 1 and (group.hosts > 1 or (op, group.group_size) not in self._measured)
        ]
        passes_on = layout.pp_size > 1 or layout.sp_kind is SPKind.RING
        hosts = max(reach.boundary, reach.sequence if layout.sp_kind is SPKind.RING else 1)
        if passes_on and (hosts > 1 or (Op.SEND_RECV, 2) not in self._measured):
            found.append(Assumed(2, 0, hosts))
        return tuple(dict.fromkeys(found))

    def alike(self, layout: Layout) -> tuple[str, ...]:
        """In words, what no row tells and is taken to be as it was measured elsewhere."""
        found = []
        if layout.world_size > self._most_busy:
            found.append(f"{layout.world_size} ranks at work, as {self._most_busy}")
        if self._leaves_machine(layout):
            found.append(f"messages between hosts, as those of one with {self.num_cards} cards (--topology tells more)")
        return tuple(found)

    def _leaves_machine(self, layout: Layout) -> bool:
        return self.topology is None and self.num_cards is not None and layout.world_size > self.num_cards

    def leaves_host(self, layout: Layout) -> bool:
        """Whether ranks that share rows stand on several hosts, as far as a topology says."""
        return self.topology is not None and self.topology.reach(layout).sequence > 1

    def key(self, layout: Layout) -> tuple[int, tuple[Assumed, ...]]:
        """What layouts of the same work differ in: ranks at work, as far as rows tell loads apart, and assumptions."""
        return min(layout.world_size, self._most_busy), self.assumed(layout)

    def rows_for(self, layout: Layout) -> Rows:
        """The rows, those of messages that were not measured as the layout sends them made by the formulas."""
        assumed = self.assumed(layout)
        if not assumed:
            return self.rows
        return self.rows.replaced([row for group in assumed for row in self._made(group, layout)])

    def _made(self, group: Assumed, layout: Layout) -> Iterator[Measurement]:
        assert self.topology is not None
        link = self.topology.between_hosts if group.hosts > 1 else self.topology.inside_host
        dtype = self.rows.measurements[0].dtype
        variant, made_at, made_by = strided("", group.stride or 1), now(), code_version()
        for op in GROUP_OPS if group.stride else (Op.SEND_RECV,):
            for num_bytes in MESSAGE_BYTES:
                us = 1e6 * seconds(op, num_bytes, group.group_size, link)
                yield Measurement(
                    op=op, dtype=dtype, shape={"bytes": num_bytes}, group_size=group.group_size,
                    busy_ranks=layout.world_size, variant=variant, num_samples=1, median_us=us, p10_us=us, p90_us=us,
                    min_us=us, std_us=0.0, noisy=False, measured_at=made_at, code_version=made_by,
                )  # fmt: skip
