"""The share of a round's rows that go to the rank whose experts are chosen most, where rows are sent to them."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from profiler.model.experts import ExpertsMLP, Router, Scoring
from tuner.fit.curve import Floats

_ROWS, _DRAWS, _SEED = 1024, 8, 7


def busiest_share(mlp: ExpertsMLP) -> float:
    """The mean over the spreads that a profile measures experts under: even, and skewed as it draws routers.

    The rank with most rows sends, receives and multiplies most of them, and the others wait for it.
    """
    return (mlp.sent_share + skewed_share(mlp.router, tuple(mlp.owners))) / 2


@cache
def skewed_share(router: Router, owners: tuple[int, ...]) -> float:
    """Of routers whose logits are normal of standard deviation 1, each expert adding a number of its own of the same
    deviation: the share of rows with some expert of the busiest group, the mean over such routers, drawn."""
    random = np.random.default_rng(_SEED)
    group_of, shares = np.array(owners), []
    for _ in range(_DRAWS):
        logits = random.standard_normal((_ROWS, len(owners))) + random.standard_normal(len(owners))
        found = group_of[_chosen(router, logits)]
        shares.append(max(float((found == group).any(axis=1).mean()) for group in set(owners)))
    return float(np.mean(shares))


def _chosen(router: Router, logits: Floats) -> npt.NDArray[np.int64]:
    """The experts of each row [T, k], as `profiler.experts.routing` chooses them, without a bias."""
    if router.groups > 1:
        scores = 1.0 / (1.0 + np.exp(-logits)) if router.scoring is Scoring.SIGMOID else np.exp(logits)
        grouped = scores.reshape(len(scores), router.groups, -1)
        of_group = np.sort(grouped, axis=2)[:, :, -router.best_of_group :].sum(axis=2)
        closed = np.argsort(of_group, axis=1)[:, : router.groups - router.groups_per_token]
        grouped[np.arange(len(scores))[:, None], closed] = -1.0
        logits = grouped.reshape(len(scores), -1)
    return np.argpartition(logits, -router.per_token, axis=1)[:, -router.per_token :]
