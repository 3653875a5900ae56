"""What a training step does beside its layers, from the fitted costs: the head over all tokens, sums, the update."""

from __future__ import annotations

from profiler.model import PRECISIONS
from tuner.fit.layer_costs import LayerCosts
from tuner.training.step import Ends
from tuner.training.work import StepWork, rank_parameters

# Bytes that are read and written, counted in runtime.train: of a logit for the loss and its gradient in float32; of a
# parameter for a round's gradient added to its sum; of a parameter for AdamW's update, the norm and clipping.
LOGIT_BYTES, SUM_BYTES, UPDATE_BYTES = 48, 12, 44
HEAD_PRODUCTS = 3.0  # logits, and the gradients of both operands


def step_ends(costs: LayerCosts, work: StepWork) -> Ends:
    """At the rate of the widest product and of the element-wise work that were measured, with the step's round."""
    rows = max(sum(chunk.tokens for chunk in chunks) for chunks in work.rounds)
    sizes = costs.work.layer_sizes
    (n, k), product = max(zip(costs.work.projections, costs.projections, strict=True), key=lambda one: one[0])
    multiplied_s = float(product(rows)) / rows / (n * k)  # of a number of a matrix and a token
    width = 4 * sizes["hidden"] + 3 * sizes["intermediate"] + 3 * sizes["heads"] * sizes["head_dim"]
    moved = PRECISIONS[costs.work.dtype].activations.num_bytes(width)
    byte_s = float(costs.elementwise(rows)) / rows / moved
    vocab, parameters = costs.work.vocab_slice, max(rank_parameters(work))
    return Ends(
        token_s=vocab * (HEAD_PRODUCTS * work.shape.hidden_size * multiplied_s + LOGIT_BYTES * byte_s),
        round_s=SUM_BYTES * parameters * byte_s,
        update_s=UPDATE_BYTES * parameters * byte_s,
    )
