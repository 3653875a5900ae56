"""A rank's part of a profile: measures each point together with the other ranks, when the first rank names it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from db.rows.hardware import Hardware
from db.rows.measurements import Measurement
from profiler.comm.links.group import HostGroup, find_hosts
from profiler.comm.ranks.mark import Doing, Phase
from profiler.comm.ranks.rank import RankContext
from profiler.hardware.device import cache_bytes, free_bytes
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.measure.background_load import BackgroundLoad
from profiler.measure.cpu_interference import CpuInterference
from profiler.measure.expected_time import POINT_S, ROUGH_FLOPS, expected_seconds
from profiler.measure.operations.collectives import (
    PeerMessages,
    collective_groups,
    prepare_collective,
    prepare_message,
    prepare_round_overhead,
)
from profiler.measure.operations.operators import Operators
from profiler.measure.operations.side_by_side import beside_collectives, beside_products, num_calls
from profiler.measure.operations.workspace import Workspace
from profiler.measure.point_rows import rows_of
from profiler.measure.timing import (
    Prepared,
    Samples,
    Timing,
    call_seconds,
    plan_own_load,
    plan_sampling,
    summarize,
    take_samples,
)
from profiler.model import Backend, WholeLayer
from profiler.points.grid import BESIDE_BYTES, Grid, rank_groups, round_up
from profiler.points.point import BESIDE, COLLECTIVES, Op, Point
from profiler.points.rank_groups import RankGroups
from profiler.points.whole_layers import whole_sizes, whole_variant
from profiler.points.worklist import Worklist

ATTEMPTS = 2  # at once; a point that stays noisy is tried once more at the end
STOP = -1
_TRIAL_CALLS = 2  # one alone may have met another process
STALL_FACTOR = 20.0  # a point may take so many times what is expected before it counts as stalled
_LONG_CALL_S = 2.5  # too long for a second try
_LOAD_CHUNK, _LOAD_CONTEXT = 2048, 8192
_ROUGH_BYTES = 2e11  # a second, of a message between cards
_PAIR = RankGroups(2)
_CACHES = 2  # weights lie so many caches apart, or a stage of the model if that is less


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileJob:
    """A profile's input for its ranks.

    points: those of the grid that fit into memory, in order. rows: what the database had of them.
    budget_s: seconds from the first point on after which none is begun.
    """

    grid: Grid
    points: tuple[Point, ...]
    rows: tuple[Measurement, ...]
    hardware: Hardware
    database_url: str
    budget_s: float


class RankSession:
    """A rank's side: measures the points that the first rank names."""

    def __init__(self, context: RankContext, job: ProfileJob) -> None:
        self.context, self.job = context, job
        self.device, self.precision = context.device, job.grid.precision
        self.worklist = Worklist(job.points, job.rows, usual_kernel=job.grid.kernels[0])
        shape = job.grid.shape
        stage_bytes = sum(layer.weights_bytes(self.precision) for layer in shape.every_layer) // context.world_size
        ranks_on_device = context.world_size if self.device.type == "cpu" else 1
        workspace = Workspace(
            self.device,
            self.precision,
            cold_bytes=min(_CACHES * cache_bytes(self.device), stage_bytes),
            limit_bytes=int(0.4 * free_bytes(self.device) / ranks_on_device),
        )
        self.operators = Operators(shape, job.grid.context_length, workspace, self.choose_kernel)
        is_own = shape.backend is Backend.OWN
        self.heads = shape.layers[0].attention.sizes(1) if is_own else {}
        self.is_slow = CpuInterference() if self.device.type == "cpu" else None
        self.load = self.make_load() if self.device.type == "cuda" else None
        # Every rank makes every group, in the same order. What ranks agree on travels over gloo, beside NCCL.
        self.control = {
            busy: dist.new_group(list(range(busy)), backend="gloo")
            for busy in sorted({point.busy_ranks for point in job.points} | {context.world_size})
        }
        forms = rank_groups(job.grid.tp_sizes, job.grid.sp_sizes, context.world_size)
        self.neighbours = collective_groups(forms, context.world_size)
        self.messages = self.make_messages()
        self.num_begun = 0
        context.progress.enter(Phase.RUN)

    def make_load(self) -> BackgroundLoad:
        """The model's usual work: whole layers over a round of middling size and context."""
        grid = self.job.grid
        chunk = min(_LOAD_CHUNK, grid.context_length)
        layer = grid.shape.every_layer[0]
        at = {"chunk": chunk, "context": min(_LOAD_CONTEXT, grid.context_length - chunk)}
        if isinstance(layer, WholeLayer):
            sizes, variant = whole_sizes(layer), whole_variant(layer)
        else:
            sizes, variant = layer.sizes(1) | layer.traits(1), layer.variant
        point = Point(op=Op.LAYER, dtype=grid.dtype, shape=at | sizes, variant=variant)
        prepared = self.operators.prepare(point)
        run = prepared.run
        call_seconds(run, self.device)
        return BackgroundLoad(run, call_seconds(run, self.device), self.device, recordable=prepared.recordable)

    def make_messages(self) -> PeerMessages | None:
        """The shared memory for a pair's messages where cards reach each other's memory, as in a pipeline."""
        sizes = [point.shape["bytes"] for point in self.job.points if point.op is Op.SEND_RECV]
        everyone = self.control[self.context.world_size]
        shared = find_hosts(everyone, self.device).groups()
        if not sizes or len(shared) != 1 or len(shared[0]) != self.context.world_size:
            return None
        pair = self.neighbours.get(_PAIR)  # none on a rank that is left over, which takes part all the same
        sent = self.precision.activations
        return PeerMessages.of(
            HostGroup(ranks=shared[0], group=everyone),
            pair.partner if pair else self.context.rank,
            count=sent.num_elements(max(sizes)),
            device=self.device,
            dtype=sent.torch_dtype,
        )

    def choose_kernel(self, chunk: int, context: int) -> AttentionKernel:
        """The kernel that measured best for the layer being prepared."""
        return self.worklist.kernel_choice(self.heads, self.context.world_size)(chunk, context)

    def follow(self) -> int:
        """Measure until the first rank says stop."""
        measured = 0
        while (index := self.agree_on_index(STOP)) != STOP:
            measured += bool(self.measure(self.job.points[index]))
            self.context.progress.wait(Doing.MEET)
        return measured

    def agree_on_index(self, index: int) -> int:
        """The first rank's index, on all ranks. Waiting for it uses no processor time."""
        message = torch.tensor([index])
        dist.broadcast(message, 0, group=self.control[self.context.world_size])
        return int(message.item())

    def measure(self, point: Point) -> list[Measurement]:
        """Time a point together with the other ranks that are busy -> the rows of `rows_of`.

        None on idle ranks, and on all when the memory of one does not hold the point.
        """
        self.num_begun += 1
        expected_s = expected_seconds(point, self.device.type, self.job.hardware.num_threads)
        self.context.progress.mark(0, self.num_begun, until_s=time.monotonic() + STALL_FACTOR * expected_s)
        if self.context.rank >= point.busy_ranks:
            return []
        ready = self.prepare_together(point)
        if ready is None:
            return []
        prepared, first_s = ready
        call_s = self.call_seconds(prepared, point, first_s)
        samples, timing = self.sample(prepared, point, call_s)
        for _ in range(ATTEMPTS - 1):
            if timing.noisy and not prepared.waits:  # messages always vary
                samples, timing = self.sample(prepared, point, call_s, samples)
        rows = rows_of(point, samples, timing, own_load=prepared.own_load)
        for row in rows:
            self.worklist.add(row)
        return [self.worklist.rows[row.key] for row in rows]

    def prepare_together(self, point: Point) -> tuple[Prepared, float] | None:
        """The point's work, made ready on all busy ranks, and seconds of its first call on the slowest of them.

        The first call may import code and build plans. None on all ranks when the memory of one did not suffice.
        """
        prepared, first_s = None, math.inf
        try:
            prepared = self.prepare(point)
            # What waits for other ranks allocates nothing when it runs, and one rank alone must not run it.
            first_s = 0.0 if prepared.waits else call_seconds(prepared.run, self.device)
        except (torch.OutOfMemoryError, MemoryError):
            self.operators.workspace.clear()
        first_s = self.slowest(first_s, point)
        if prepared is not None and math.isfinite(first_s):
            return prepared, first_s
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def prepare(self, point: Point) -> Prepared:
        """The point's work, made ready on this rank."""
        if point.op is Op.SEND_RECV:
            return prepare_message(
                point, self.neighbours[_PAIR], self.messages, self.device, self.precision.activations
            )
        if point.variant == BESIDE:
            return self.prepare_beside(point)
        if point.op in COLLECTIVES:
            return self.prepare_collective(point)
        if point.op is Op.ROUND_OVERHEAD:
            return prepare_round_overhead(point, self.operators, self.neighbours.get(_PAIR))
        if "heads" in point.shape:
            self.heads = {name: point.shape.get(name, 0) for name in self.heads}
        return self.operators.prepare(point)

    def prepare_collective(self, point: Point) -> Prepared:
        """The collective of a point, with this rank's group."""
        return prepare_collective(point, self.neighbours[point.ranks], self.device, self.precision.reductions)

    def prepare_beside(self, point: Point) -> Prepared:
        """A gather while products run, or a product while gathers run: so many that they outlast it on every rank."""
        gather, product = self.pair_of(point)
        gather_s, product_s = self.alone_s(gather), self.alone_s(product)
        product_run = self.operators.prepare(product).run
        if point.op is Op.MATMUL:
            calls = num_calls(product_s, gather_s)
            return beside_collectives(product_run, self.prepare_collective(gather), calls=calls, device=self.device)
        calls = num_calls(gather_s, product_s)
        return beside_products(self.prepare_collective(gather), product_run, calls=calls, device=self.device)

    def pair_of(self, point: Point) -> tuple[Point, Point]:
        """The gather and the product of a point that has them side by side, each as it is alone."""
        grid = self.job.grid
        alone = replace(point, variant="")
        if point.op is Op.MATMUL:
            size_bytes = round_up(BESIDE_BYTES, point.group_size * grid.precision.reductions.num_bytes(1))
            gather = replace(alone, op=Op.ALL_GATHER, shape={"bytes": size_bytes})
            return gather, replace(alone, group_size=1)
        n, k = grid.shape.layers[0].products(1)["qkv"]
        m = min(_LOAD_CHUNK, grid.context_length)
        return alone, replace(alone, op=Op.MATMUL, shape={"m": m, "n": n, "k": k}, group_size=1, flops=2.0 * m * n * k)

    def alone_s(self, point: Point) -> float:
        """Seconds of a point alone, alike on all ranks: as measured, in proportion to the nearest size, or roughly."""
        at = "m" if point.op is Op.MATMUL else "bytes"
        rest = {name: size for name, size in point.shape.items() if name != at}
        size = point.shape[at]
        alike = [
            row
            for row in self.worklist.rows.values()
            if (row.op, row.group_size, row.variant) == (point.op, point.group_size, "")
            and rest.items() <= row.shape.items()
        ]
        if not alike:
            return size / _ROUGH_BYTES if at == "bytes" else point.flops / ROUGH_FLOPS[self.device.type]
        nearest = min(alike, key=lambda row: (abs(math.log(row.shape[at] / size)), row.busy_ranks))
        return nearest.median_us * 1e-6 * size / nearest.shape[at]

    def call_seconds(self, prepared: Prepared, point: Point, first: float) -> float:
        """Seconds of a call on the slowest rank; the first call, of `first` seconds, counts only if it took long."""
        self.barrier(point)
        if prepared.waits:
            first = self.slowest(call_seconds(prepared.run, self.device), point)
        if first > _LONG_CALL_S and self.device.type == "cpu":  # on a card the first call may load its kernel
            return first
        trials = 1 if first > POINT_S[self.device.type] else _TRIAL_CALLS
        return self.slowest(min(call_seconds(prepared.run, self.device) for _ in range(trials)), point)

    def sample(
        self, prepared: Prepared, point: Point, call_s: float, before: tuple[Samples, ...] = ()
    ) -> tuple[tuple[Samples, ...], Timing]:
        """Sample on all busy ranks at once -> each rank's samples, those of `before` included, and the point's timing.

        The rank with the largest median counts: a pipeline runs at the pace of its slowest stage, and the mean over
        ranks would promise too much. Of ranks in step it is the slowest group that counts.
        """
        device_type = self.device.type
        if prepared.own_load:
            sampling = plan_own_load(call_s)
        else:
            sampling = plan_sampling(
                call_s, device_type=device_type, budget_s=POINT_S[device_type], waits=prepared.waits,
                in_step=prepared.in_step,
            )  # fmt: skip
        self.barrier(point)
        mine = take_samples(prepared, sampling, self.device, is_slow=self.is_slow, load=self.load)
        table = torch.tensor([mine.us, mine.disturbed], dtype=torch.float64)
        gathered = torch.stack([torch.empty_like(table) for _ in range(point.busy_ranks)])  # [ranks, 2, samples]
        dist.all_gather(list(gathered.unbind()), table, group=self.control[point.busy_ranks])
        if prepared.in_step:
            gathered[:, 0] = of_the_last(gathered[:, 0], point.ranks.of(point.busy_ranks))
        if prepared.waits:  # for ranks that were disturbed
            gathered[:, 1] = gathered[:, 1].amax(dim=0)
        samples = tuple(Samples(us.tolist(), disturbed.bool().tolist()) for us, disturbed in gathered)
        if before:
            samples = tuple(one + other for one, other in zip(before, samples, strict=True))
        return samples, max(map(summarize, samples), key=lambda timing: timing.median_us)

    def barrier(self, point: Point) -> None:
        """Wait until all busy ranks, and their devices, are here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(group=self.control[point.busy_ranks])

    def slowest(self, seconds: float, point: Point) -> float:
        """The largest of the busy ranks' figures."""
        figure = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(figure, dist.ReduceOp.MAX, group=self.control[point.busy_ranks])
        return float(figure.item())


def of_the_last(us: torch.Tensor, groups: Iterable[Sequence[int]]) -> torch.Tensor:
    """Samples [ranks, n] of work that groups of ranks leave in step: of each group the least, which waited for none."""
    least = us.clone()
    for ranks in groups:
        least[list(ranks)] = us[list(ranks)].amin(dim=0)
    return least
