"""The least weighted sum of a batch's ends where each request ends with its round: few rounds save overhead, many end
the first requests sooner.

Why it is a bound. Take any plan and a line below all stages' costs, with overhead o a round (`rounds.relaxation`). Let
k(i) requests have ended with round i or before. The first i rounds cost at least i o + W(k(i)), W being the least
seconds of so many requests beside overhead, and the longest of them at least their mean. By the path that goes down
with that one, round i ends no sooner than

    C(i, k) = (i o + W(k)) (1 + (pp_size - 1) / i) + hops

and the requests of round i with it. The ends in their order are thus at least those of some division of the requests,
those of least work first, into the rounds in which they end, and their weighted sum is least with the largest weights
first. The least over all divisions is found round by round: batching on one machine, where a batch ends as a whole, is
solved in the same way (Coffman, Yannakakis, Magazine and Santos, Batch sizing and job sequencing on a single machine,
1990). Beyond the last round that is looked at each request is charged (i o + W(k)) alone.
"""

from __future__ import annotations

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats
from tuner.rounds.relaxation import Envelope, Work, envelopes, requests_s

MOST_ROUNDS, MOST_STEPS = 128, 20_000_000
"""Rounds that are looked at, and fewer with many requests."""
LEAST_ROUNDS = 8
"""Where no more could be, nothing is proven."""
ROUNDING = 1e-9


def least_sum_of_round_ends_s(cost: CostModel, work: Work, weights: Floats) -> float:
    """Seconds that no plan's weighted sum of ends is below, for requests that are all there at the start and one group
    of layers a stage; 0 with too many requests."""
    num_rounds = min(MOST_ROUNDS, MOST_STEPS // len(weights) ** 2)
    if num_rounds < LEAST_ROUNDS:
        return 0.0
    lines = envelopes(cost.kinds, work)
    return max(_under(line, cost, work, np.sort(weights)[::-1], num_rounds) for line in lines) * (1.0 - ROUNDING)


def _under(line: Envelope, cost: CostModel, work: Work, weights: Floats, num_rounds: int) -> float:
    """The same where every stage's costs are this line."""
    num_more, hops_s = cost.pp_size - 1, (cost.pp_size - 1) * (cost.hop_latency_s + cost.hop_token_s)
    done_s = np.append(0.0, np.cumsum(np.sort(requests_s(line, work, max(work.new_tokens, 1.0)))))  # W
    weight = np.append(0.0, np.cumsum(weights))
    more = weight[None, :] - weight[:, None]  # of the requests that end with a round, [before it, after it]
    is_later = np.triu(np.ones(more.shape, dtype=bool), 1)
    least = np.full(len(weight), np.inf)  # by how many have ended
    least[0] = 0.0
    for number in range(1, num_rounds + 1):
        end_s = (number * line.round_s + done_s) * (1.0 + num_more / number)
        least = np.minimum(least, np.where(is_later, least[:, None] + more * end_s, np.inf).min(axis=0))
    alone_s = np.diff(weight) * ((num_rounds + 1) * line.round_s + done_s[1:])
    left_s = np.append(np.cumsum(alone_s[::-1])[::-1], 0.0)
    return float((least + left_s).min()) + hops_s * float(weights.sum())
