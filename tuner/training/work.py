"""A planned training step: its rounds and their order, and the memory of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from profiler.model import PRECISIONS, LayerSpec, ModelShape
from tuner.plan.plan import Parallel, Request, Round
from tuner.training.order import Order, Recompute, Unit, most_kept, step_units

LOGITS = 1 << 27
"""Numbers of logits that stand at once, in float32: three copies of them."""
MASTER_BYTES = 16  # a parameter's master copy, both moments and its summed gradient, in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """A training step: a plan's rounds over its requests, forward and backward, `accumulate` times."""

    shape: ModelShape
    parallel: Parallel
    requests: tuple[Request, ...]
    rounds: tuple[Round, ...]
    precision: str
    recompute: Recompute = Recompute.NONE
    order: Order = Order.ONE_EACH
    accumulate: int = 1
    compiled: bool = False

    @property
    def units(self) -> tuple[Unit, ...]:
        """The rounds of the step."""
        return step_units(self.rounds, self.accumulate)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes that a rank of one stage holds at most."""

    weights_bytes: int  # as they are multiplied, their master copies, moments and gradients
    kv_bytes: int  # of sequences in flight, with gradients
    kept_bytes: int  # of rounds that wait for their backward
    working_bytes: int  # of the round that runs

    @property
    def allocated_bytes(self) -> int:
        """All of it; what an allocator reserves beyond comes on top."""
        return self.weights_bytes + self.kv_bytes + self.kept_bytes + self.working_bytes


def rank_parameters(work: StepWork) -> tuple[int, ...]:
    """Numbers that a rank of each stage updates: its layers, and the ends of the model that it holds."""
    shape, parallel = work.shape, work.parallel
    found, first = [], 0
    for stage, count in enumerate(parallel.layer_partition):
        numbers = sum(layer.num_elements(parallel.tp_size) for layer in shape.layers[first : first + count])
        first += count
        numbers += shape.embedding.num_elements(parallel.tp_size) * (stage == 0)
        if stage == parallel.pp_size - 1:
            matrix = 0 if is_tied(shape) else shape.head.num_elements(parallel.tp_size)
            numbers += shape.final_norm.num_elements() + matrix
        found.append(numbers)
    return tuple(found)


def is_tied(shape: ModelShape) -> bool:
    """Whether the output matrix is the embedding."""
    return shape.head.parts[0].tensor == shape.embedding.parts[0].tensor


def step_memory(work: StepWork) -> tuple[StepMemory, ...]:
    """Of a rank of each stage."""
    shape, parallel = work.shape, work.parallel
    formats = PRECISIONS[work.precision]
    size = formats.activations.num_bytes(1)
    wide = max(size, 4)
    rows = [sum(chunk.tokens for chunk in chunks) for chunks in work.rounds]
    found, first = [], 0
    updated = rank_parameters(work)
    for stage, count in enumerate(parallel.layer_partition):
        layers = shape.layers[first : first + count]
        first += count
        is_first, is_last = stage == 0, stage == parallel.pp_size - 1
        weights = updated[stage] * (MASTER_BYTES + (size if size < 4 else 0))
        # The embedding's rows, and their gradients, where the last stage has a copy of its own.
        if is_tied(shape) and is_last and (not is_first or parallel.tp_size > 1):
            weights += shape.head.num_elements(parallel.tp_size) * (size + 4)
        kept = most_kept(work.units, stage=stage, pp_size=parallel.pp_size, order=work.order)
        a_token = sum(kept_numbers(layer, parallel.tp_size, work.recompute, compiled=work.compiled) for layer in layers)
        ends = shape.hidden_size * (2 + 2 * is_last)  # what comes in and goes out; the last norm's, and a gradient
        largest = sum(sorted(_in_flight(rows, work.accumulate), reverse=True)[:kept])
        one = max(kept_numbers(layer, parallel.tp_size, Recompute.NONE, compiled=False) for layer in layers)
        again = 0
        if work.recompute is Recompute.ROUND:
            again = sum(
                kept_numbers(layer, parallel.tp_size, Recompute.NONE, compiled=work.compiled) for layer in layers
            )
        logits = min(max(rows) * shape.head.sizes(parallel.tp_size)[0], LOGITS) * 4 * 3 * is_last
        # A layer's gradients stand beside what it kept; a weight's gradient is made before it is summed.
        working = max(logits, max(rows) * (one + again) * size + _largest(layers, shape, parallel, is_first) * size)
        kv = sum(layer.attention.kv_elements(parallel.tp_size) for layer in layers)
        found.append(
            StepMemory(
                weights_bytes=weights,
                kv_bytes=_tokens_in_flight(work, kept) * kv * (size + wide),
                kept_bytes=largest * (a_token + ends) * size,
                working_bytes=working,
            )
        )
    return tuple(found)


def kept_numbers(layer: LayerSpec, tp_size: int, recompute: Recompute, *, compiled: bool) -> int:
    """Numbers that a layer keeps of one token between its forward and its backward.

    Eager: both norms' inputs and outputs, q, attention's output, gate, up, silu and their product. Compiled: the inputs
    of all products, q, gate and up, and the layer's input; SiLU and the stream between are computed again.
    """
    hidden, heads = layer.hidden_size, layer.attention.heads.size // tp_size
    inner = layer.dense.intermediate.size // tp_size
    match recompute:
        case Recompute.NONE:
            return 3 * hidden + 2 * heads + 3 * inner if compiled else 4 * hidden + 2 * heads + 4 * inner
        case Recompute.LINEAR:
            return hidden + 2 * heads
        case Recompute.LAYER:
            return hidden
        case Recompute.ROUND:
            return 0


def _in_flight(rows: Sequence[int], accumulate: int) -> list[int]:
    return list(rows) * accumulate


def _tokens_in_flight(work: StepWork, kept: int) -> int:
    """Tokens of the sequences of as many consecutive rounds, at most: their caches stay until all are through."""
    units = work.units
    of_batch: dict[int, set[int]] = {}
    for unit in units:
        of_batch.setdefault(unit.batch, set()).update(chunk.request for chunk in work.rounds[unit.round_index])
    tokens = {batch: sum(work.requests[index].prompt_tokens for index in found) for batch, found in of_batch.items()}
    most = 0
    for start in range(len(units)):
        batches = {unit.batch for unit in units[start : start + kept]}
        most = max(most, sum(tokens[batch] for batch in batches))
    return most


def _largest(layers: Sequence[LayerSpec], shape: ModelShape, parallel: Parallel, is_first: bool) -> int:
    """Numbers of the largest gradient of a matrix."""
    sizes = [n * k for layer in layers for n, k in layer.products(parallel.tp_size).values()]
    return max([*sizes, shape.embedding.num_elements(parallel.tp_size) * is_first])
