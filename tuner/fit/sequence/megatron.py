"""The tensor-parallel group cuts norms and the residual stream by rows: Megatron-LM's sequence parallelism.

An all-gather before q|k|v and gate|up and a reduce-scatter after o and down stand for two all-reduces. Attention and
products are those of tensor parallelism.
"""

from __future__ import annotations

import numpy as np

from profiler.points.point import Op
from tuner.fit.curve import Floats
from tuner.fit.sequence.cut_costs import UncutCosts


class Megatron(UncutCosts):
    """Products of all rows with a share of their features; norms and residual of a share of the rows.

    Rows that are sent to experts are not gathered for them: one gather and one scatter are left.
    """

    cuts_rows = True

    def compute_s(self, tokens: Floats) -> Floats:
        """Less what the norms of the other ranks' rows take, as far as a kernel's shortest time lets it shrink."""
        parts = self.parts
        whole_s, least_s = parts.elementwise_s(tokens), parts.elementwise_s(parts.rows(tokens))
        cut_s = np.maximum(whole_s * (1.0 - parts.norms_share * (1.0 - 1.0 / parts.size)), least_s)
        seconds = super().compute_s(tokens) - whole_s + cut_s
        if parts.exchange is not None:
            seconds += parts.exchange.own_rows_s(parts.rows(tokens)) - parts.exchange.own_rows_s(tokens)
        return seconds

    def sent_s(self, tokens: Floats) -> Floats:
        """Two gathers and two scatters of hidden states, each rank's rows padded to the largest share."""
        parts = self.parts
        message = parts.size * parts.rows(tokens) * parts.row_bytes.hidden
        pair_s = parts.message_s(Op.ALL_GATHER, message) + parts.message_s(Op.REDUCE_SCATTER, message)
        return (2 if parts.exchange is None else 1) * pair_s + parts.squares_s(tokens)
