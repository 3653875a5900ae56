"""The memory each rank of a plan needs, counted before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from db.errors import UserError
from profiler.comm.links.buffers import BOUNDARY_BUFFERS, SEND_BUFFER_BYTES
from profiler.model import PRECISIONS, ModelShape, Precision
from profiler.model.shape import Layer
from profiler.sequence.kind import SequenceCut
from tuner.plan.plan import Parallel, Plan, Request, Round, Weights
from tuner.plan.round_sizes import RoundSizes
from tuner.plan.scratch import gathered_bytes, kept_bytes, ring_bytes, scratch_bytes

USABLE_SHARE = 0.92  # the rest is the allocator's and the driver's
MOST_RECORDED = 1024  # rounds that a rank on a card keeps recorded
RECORDED_LAYER_BYTES = 128 << 10  # what a layer of a recorded round holds on a card
COMMUNICATOR_BYTES = 512 << 20  # what NCCL and peer memory take on a card beside others
RUNTIME_BYTES = {"cuda": 2200 << 20, "cpu": 300 << 20}  # libraries, context and communicators of one rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of memory that one rank of a stage needs."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    unsent_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.unsent_bytes + self.runtime_bytes


def rank_memory(
    shape: ModelShape, parallel: Parallel, sizes: RoundSizes, *, dtype: str, device_type: str
) -> tuple[RankMemory, ...]:
    """Memory of a rank of each stage."""
    precision, shape = PRECISIONS[dtype], shape.spread(**parallel.spread)
    hidden_bytes = precision.activations.num_bytes(shape.hidden_size)
    # The buffer may be overrun by the round that fills it.
    unsent = min(sizes.all_rows * hidden_bytes, SEND_BUFFER_BYTES + sizes.most_rows * hidden_bytes)
    unsent = unsent if device_type == "cpu" else 0
    num_recorded = min(sizes.num_rounds, MOST_RECORDED) if device_type == "cuda" else 0
    # Rounds beyond those that are recorded take their scratch memory from elsewhere.
    scratches = 2 if num_recorded and sizes.num_rounds > MOST_RECORDED else 1
    joined = COMMUNICATOR_BYTES if device_type == "cuda" and parallel.world_size > 1 else 0
    groups = list(_groups(shape, parallel))
    shares_rows = device_type == "cuda" and parallel.sp_size > 1
    gathered = gathered_bytes(shape.layer_kinds, parallel, sizes, precision) if shares_rows else 0
    passed = 0
    if shares_rows:  # each recording keeps what it passes on
        passed = max(ring_bytes(layer, parallel, sizes, precision) for layer in shape.layer_kinds) * num_recorded
    stages = list[RankMemory]()
    for stage in range(parallel.pp_size):
        held = [group for group in groups if group.stage == stage]
        layers = [layer for group in held for layer in group.layers]
        weights = shape.embedding.num_elements(parallel.tp_size) if groups[0] in held else 0
        if groups[-1] in held:
            weights += shape.final_norm.num_elements() + shape.head.num_elements(parallel.tp_size)
        kinds = {id(layer): layer for layer in layers}.values()  # most layers are one and the same object
        scratch = max(scratch_bytes(layer, parallel, sizes, precision) for layer in kinds)
        boundaries = _num_boundary_buffers(parallel, stage, device_type) * sizes.most_rows * hidden_bytes
        sends = parallel.pp_size > 1 and (parallel.virtual_stages > 1 or groups[-1] not in held)
        stages.append(
            RankMemory(
                weights_bytes=_layer_weights(layers, parallel, precision) + precision.weights.num_bytes(weights),
                kv_bytes=sum(kept_bytes(x, parallel, sizes, precision) for x in layers),
                activation_bytes=scratches * (scratch + boundaries) + gathered + passed,
                unsent_bytes=unsent if sends else 0,
                runtime_bytes=RUNTIME_BYTES[device_type] + joined + num_recorded * len(layers) * RECORDED_LAYER_BYTES,
            )
        )
    return tuple(stages)


def rounds_memory(
    shape: ModelShape,
    parallel: Parallel,
    requests: Sequence[Request],
    rounds: Sequence[Round],
    *,
    dtype: str,
    max_new_tokens: int,
    device_type: str,
    cuts: Sequence[SequenceCut] = (),
) -> tuple[RankMemory, ...]:
    """Memory of a rank of each stage that runs these rounds, then decodes `max_new_tokens` for each request."""
    sizes = RoundSizes.of(parallel, requests, rounds, cuts=cuts, max_new_tokens=max_new_tokens)
    return rank_memory(shape, parallel, sizes, dtype=dtype, device_type=device_type)


def plan_memory(shape: ModelShape, plan: Plan, *, max_new_tokens: int, device_type: str) -> tuple[RankMemory, ...]:
    """Memory of a rank of each stage of a plan that decodes `max_new_tokens` for each request."""
    return rounds_memory(
        shape,
        plan.parallel,
        plan.requests,
        plan.rounds,
        dtype=plan.precision,
        max_new_tokens=max_new_tokens,
        device_type=device_type,
        cuts=plan.cuts,
    )


def needed_bytes(stages: Sequence[RankMemory], stage_size: int, device_type: str) -> tuple[int, str]:
    """Bytes that one device must have for stages of `stage_size` ranks, and who takes them."""
    if device_type == "cuda":
        worst = max(range(len(stages)), key=lambda stage: stages[stage].total_bytes)
        return stages[worst].total_bytes, f"a rank of stage {worst}"
    return stage_size * sum(stage.total_bytes for stage in stages), "all ranks of this host"


def memory_refusal(stages: Sequence[RankMemory], *, stage_size: int, device_type: str, memory_bytes: int) -> str | None:
    """Why stages of `stage_size` ranks that need `stages` each do not fit, or None when they do.

    memory_bytes: of one GPU, which one rank has to itself, or of the host, which all ranks share.
    """
    usable = int(memory_bytes * USABLE_SHARE)
    needed, who = needed_bytes(stages, stage_size, device_type)
    if needed <= usable:
        return None
    share = max(stage.kv_bytes / stage.total_bytes for stage in stages)
    return (
        f"needs {_gib(needed)} for {who}, up to {share:.0%} of it for the KV cache; at most {_gib(usable)} can be used"
    )


def check_memory(shape: ModelShape, plan: Plan, *, max_new_tokens: int, device_type: str, memory_bytes: int) -> None:
    """Raise `UserError` unless the plan fits into the memory of the device."""
    stages = plan_memory(shape, plan, max_new_tokens=max_new_tokens, device_type=device_type)
    stage_size = plan.parallel.sp_size * plan.parallel.tp_size
    refusal = memory_refusal(stages, stage_size=stage_size, device_type=device_type, memory_bytes=memory_bytes)
    if refusal:
        raise UserError("memory", "", f"the plan {refusal}")


def _num_boundary_buffers(parallel: Parallel, stage: int, device_type: str) -> int:
    """Hidden states that a rank holds beside those it runs: of each link, and one where rounds stay from group to
    group."""
    passed = list(pairwise(parallel.stage_of_group))
    ways = {(source, target) for source, target in passed if source != target}
    num_links = max(sum(stage == way[side] for way in ways) for side in (0, 1))
    return max(num_links, 1) * BOUNDARY_BUFFERS[device_type] + ((stage, stage) in passed)


@dataclass(frozen=True, slots=True)
class _Group:
    stage: int
    layers: tuple[Layer, ...]


def _groups(shape: ModelShape, parallel: Parallel) -> Iterator[_Group]:
    """The groups of layers in the order in which rounds go through them, each with its stage."""
    first = 0
    for stage, num_layers in zip(parallel.stage_of_group, parallel.layer_partition, strict=True):
        yield _Group(stage, shape.every_layer[first : first + num_layers])
        first += num_layers


def _layer_weights(layers: Sequence[Layer], parallel: Parallel, precision: Precision) -> int:
    """Bytes that a rank holds of its layers' weights: all, or its share, the layer that runs and the next one."""
    kinds = {id(layer): layer for layer in layers}
    size_of = {key: layer.weights_bytes(precision, parallel.tp_size) for key, layer in kinds.items()}
    sizes = [size_of[id(layer)] for layer in layers]
    if parallel.weights is Weights.WHOLE:
        return sum(sizes)
    return sum(-(-size // parallel.sp_size) for size in sizes) + 2 * max(sizes)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
