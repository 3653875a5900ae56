"""The memory each rank of a plan needs, counted before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from db.errors import UserError
from profiler.comm.links.buffers import BOUNDARY_BUFFERS, SEND_BUFFER_BYTES
from profiler.model import PRECISIONS, LayerSpec, ModelShape, Precision
from profiler.model.precision import FLOAT32
from tuner.plan.kv_rows import assign_rows
from tuner.plan.plan import Plan, Request, Round

USABLE_SHARE = 0.92  # the rest is the allocator's and the driver's
MOST_RECORDED = 1024  # rounds that a rank on a card keeps recorded
RECORDED_LAYER_BYTES = 64 << 10  # what a layer of a recorded round holds on a card
RUNTIME_BYTES = {"cuda": 2 << 30, "cpu": 300 << 20}  # libraries, context and communicators of one rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes that one rank of a stage holds."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    unsent_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it at the worst moment."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.unsent_bytes + self.runtime_bytes


def rank_memory(
    shape: ModelShape,
    *,
    dtype: str,
    tp_size: int,
    layer_partition: Sequence[int],
    slab_tokens: int,
    max_round_tokens: int,
    all_tokens: int,
    num_rounds: int,
    device_type: str,
) -> tuple[RankMemory, ...]:
    """Memory of a rank of each stage.

    slab_tokens: KV rows at once, new tokens included; max_round_tokens: of the largest round; all_tokens: of all.
    """
    precision = PRECISIONS[dtype]
    hidden_bytes = precision.activations.num_bytes(shape.hidden_size)
    last = len(layer_partition) - 1
    # The buffer may be overrun by the round that fills it.
    unsent = min(all_tokens * hidden_bytes, SEND_BUFFER_BYTES + max_round_tokens * hidden_bytes)
    unsent = unsent if device_type == "cpu" else 0
    num_recorded = min(num_rounds, MOST_RECORDED) if device_type == "cuda" else 0
    # Rounds beyond those that are recorded take their scratch memory from elsewhere.
    scratches = 2 if num_recorded and num_rounds > MOST_RECORDED else 1
    stages, first = list[RankMemory](), 0
    for stage, num_layers in enumerate(layer_partition):
        layers = shape.layers[first : first + num_layers]
        first += num_layers
        weights = sum(layer.num_elements(tp_size) for layer in layers)
        weights += shape.embedding.num_elements(tp_size) if stage == 0 else 0
        weights += shape.final_norm.num_elements() + shape.head.num_elements(tp_size) if stage == last else 0
        kv_elements = sum(layer.attention.kv_elements(tp_size) for layer in layers)
        row_bytes = max(_block_row_bytes(layer, precision, tp_size) for layer in set(layers))
        row_bytes += (4 + BOUNDARY_BUFFERS[device_type]) * hidden_bytes
        stages.append(
            RankMemory(
                weights_bytes=precision.weights.num_bytes(weights),
                kv_bytes=precision.kv.num_bytes(slab_tokens * kv_elements),
                activation_bytes=scratches * max_round_tokens * row_bytes,
                unsent_bytes=unsent if stage < last else 0,
                runtime_bytes=RUNTIME_BYTES[device_type] + num_recorded * num_layers * RECORDED_LAYER_BYTES,
            )
        )
    return tuple(stages)


def _block_row_bytes(layer: LayerSpec, precision: Precision, tp_size: int) -> int:
    """Bytes a token within the larger block, beside the residual before and after it, its output and its norm.

    q, k, v before and after rotation with both partial attentions in float32, or gate, up and their product.
    """
    products, number_bytes = layer.products(tp_size), precision.activations.num_bytes
    (qkv, _), (_, attended) = products["qkv"], products["o"]
    (gate_up, _), (_, product) = products["gate_up"], products["down"]
    attention = number_bytes(2 * qkv + attended) + FLOAT32.num_bytes(3 * attended)
    return max(attention, number_bytes(gate_up + product))


def rounds_memory(
    shape: ModelShape,
    requests: Sequence[Request],
    rounds: Sequence[Round],
    *,
    dtype: str,
    tp_size: int,
    layer_partition: Sequence[int],
    max_new_tokens: int,
    device_type: str,
) -> tuple[RankMemory, ...]:
    """Memory of a rank of each stage that runs these rounds, then decodes `max_new_tokens` for each request."""
    round_tokens = [sum(chunk.tokens for chunk in chunks) for chunks in rounds]
    return rank_memory(
        shape,
        dtype=dtype,
        tp_size=tp_size,
        layer_partition=layer_partition,
        slab_tokens=assign_rows(requests, rounds, max_new_tokens=max_new_tokens).total,
        max_round_tokens=max(round_tokens),
        all_tokens=sum(round_tokens),
        num_rounds=len(rounds),
        device_type=device_type,
    )


def plan_memory(shape: ModelShape, plan: Plan, *, max_new_tokens: int, device_type: str) -> tuple[RankMemory, ...]:
    """Memory of a rank of each stage of a plan that decodes `max_new_tokens` for each request."""
    return rounds_memory(
        shape,
        plan.requests,
        plan.rounds,
        dtype=plan.precision,
        tp_size=plan.parallel.tp_size,
        layer_partition=plan.parallel.layer_partition,
        max_new_tokens=max_new_tokens,
        device_type=device_type,
    )


def memory_refusal(stages: Sequence[RankMemory], *, tp_size: int, device_type: str, memory_bytes: int) -> str | None:
    """Why ranks that need `stages` do not fit, or None when they do.

    memory_bytes: of one GPU, which one rank has to itself, or of the host, which all ranks share.
    """
    usable = int(memory_bytes * USABLE_SHARE)
    if device_type == "cuda":
        worst = max(range(len(stages)), key=lambda stage: stages[stage].total_bytes)
        needed, who = stages[worst].total_bytes, f"a rank of stage {worst}"
    else:
        needed, who = tp_size * sum(stage.total_bytes for stage in stages), "all ranks of this host"
    if needed <= usable:
        return None
    share = max(stage.kv_bytes / stage.total_bytes for stage in stages)
    return (
        f"needs {_gib(needed)} for {who}, up to {share:.0%} of it for the KV cache; at most {_gib(usable)} can be used"
    )


def check_memory(shape: ModelShape, plan: Plan, *, max_new_tokens: int, device_type: str, memory_bytes: int) -> None:
    """Raise `UserError` unless the plan fits into the memory of the device."""
    stages = plan_memory(shape, plan, max_new_tokens=max_new_tokens, device_type=device_type)
    refusal = memory_refusal(stages, tp_size=plan.parallel.tp_size, device_type=device_type, memory_bytes=memory_bytes)
    if refusal:
        raise UserError("memory", "", f"the plan {refusal}")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
