"""Every policy on streams of requests, from light load to overload: is `joint` ever behind?

    python -m benchmarks.planner_arrivals [--small] [--results FILE] [--part I/N] [--only TEXT]

Streams: lengths (equal, mixed, two classes) x rates (shares of capacity) x arrivals (regular, Poisson, bursty) x stages
x cost models. Capacity is the rate at which the best fixed chunk up to the longest prompt, or whole prompts, just keep
up. A row a stream is kept in the results file as it comes; rows that are there are not made again. Then the table is
printed: how far `joint`, and the online planner as it comes, are above the best of all other policies with swept chunks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_passes import costs_of
from service.cli.output import print_table
from tests.tuner.atom import atom
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.policies.named import fixed_sweep
from tuner.rounds.problem import RoundOptions
from tuner.rounds.schedule import Objective
from tuner.search.partition import even_partition
from tuner.search.replay import Replay, compare_replays, every_replay

RESULTS = Path(__file__).parent / "results"
MODELS = ("atom", "h100x2-nvlink", "h100x2-ethernet-like")
STAGES = (2, 4, 8)
LENGTHS = ("2048", "8192", "16384", "32768", "mixed", "two classes")
RATES = (0.3, 0.6, 0.8, 0.9, 0.95, 1.1)
ARRIVALS = ("regular", "poisson", "bursty")
NUM_REQUESTS = 120
BURSTINESS = 2.0
"""Standard deviation of the time between bursty arrivals, as a share of its mean (gamma distributed)."""
ALLOWED_MEAN, ALLOWED_P99 = 1.02, 1.05
NUM_LAYERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Requests that arrive, and the pipeline that they arrive at."""

    model: str
    pp_size: int
    lengths: str
    rate: float
    arrivals: str
    seed: int = 0

    @property
    def key(self) -> str:
        """What its row is found by."""
        return f"{self.model}, K = {self.pp_size}, {self.lengths}, {self.rate}, {self.arrivals}, seed {self.seed}"

    @property
    def cost(self) -> CostModel:
        """The pipeline's costs."""
        return cost_model(self.model, self.pp_size)

    @property
    def options(self) -> RoundOptions:
        """How rounds are made."""
        return {"chunk_multiple": 64 if self.model == "atom" else 256, "objective": Objective.MEAN_TTFT}

    def requests(self, num_requests: int) -> list[Request]:
        """The first so many."""
        rng = np.random.default_rng([self.seed, LENGTHS.index(self.lengths), ARRIVALS.index(self.arrivals)])
        if self.lengths == "mixed":
            lengths = (1024 * 2 ** (5 * rng.random(num_requests))).astype(int)
        elif self.lengths == "two classes":
            lengths = np.where(rng.random(num_requests) < 0.1, 32768, 2048)
        else:
            lengths = np.full(num_requests, int(self.lengths))
        shape = BURSTINESS**-2
        gaps = {
            "regular": np.ones(num_requests),
            "poisson": rng.exponential(1.0, num_requests),
            "bursty": rng.gamma(shape, 1.0 / shape, num_requests),
        }[self.arrivals]
        gap_s = least_work_s(self.cost, lengths.tolist()) / num_requests / self.rate
        arrival_s = gap_s * (np.cumsum(gaps) - gaps[0])
        rows = enumerate(zip(lengths.tolist(), arrival_s.tolist(), strict=True))
        return [Request(id=f"r{i}", prompt_tokens=length, arrival_s=at_s) for i, (length, at_s) in rows]


@cache
def cost_model(name: str, pp_size: int) -> CostModel:
    """ATOM's coefficients, or Llama-3-8B on a profile kept here."""
    if name == "atom":
        return atom(pp_size)
    return _layer_costs(name).cost_model(even_partition(NUM_LAYERS, pp_size))


@cache
def _layer_costs(name: str) -> Any:
    return costs_of(RESULTS / f"{name}.profile.json.gz")


def least_work_s(cost: CostModel, lengths: list[int]) -> float:
    """Seconds that the prompts keep the slowest stage busy: whole, or under the best fixed chunk in full rounds."""
    whole_s = max(sum(kind.seconds([(length, 0, True)]) for length in lengths) for kind in cost.kinds)
    requests = [Request(id=str(i), prompt_tokens=length) for i, length in enumerate(lengths)]
    chunks = [int(name.removeprefix("fixed:")) for name in fixed_sweep(requests, 1024)]
    return min(whole_s, *(_fixed_s(cost, lengths, chunk) for chunk in chunks))


def _fixed_s(cost: CostModel, lengths: list[int], chunk: int) -> float:
    num_rounds = sum(lengths) / chunk
    seconds = []
    for kind in cost.kinds:
        busy_s = num_rounds * (kind.round_overhead_s + float(kind.tokens_s(chunk)))
        for length in lengths:
            starts = range(0, length, chunk)
            busy_s += sum(
                float(kind.chunk_seconds(min(chunk, length - start), start, start + chunk >= length))
                for start in starts
            )
        seconds.append(busy_s)
    return max(seconds)


def streams(*, small: bool) -> Iterator[Stream]:
    """All of them, or a sample."""
    axes = product(MODELS, STAGES, LENGTHS, RATES, ARRIVALS)
    for index, (model, pp_size, lengths, rate, arrivals) in enumerate(axes):
        if not small or index % 53 == 0:
            yield Stream(model=model, pp_size=pp_size, lengths=lengths, rate=rate, arrivals=arrivals)


def measure(stream: Stream, num_requests: int) -> dict[str, Any]:
    """A row: mean and p99 TTFT of every policy under every parameter, of the online planner and of `joint`."""
    requests, started = stream.requests(num_requests), time.perf_counter()
    own = {replay.planned.policy: replay for replay in every_replay(stream.cost, requests, **stream.options)}
    joint = compare_replays(stream.cost, requests, known=own, **stream.options)[-1]
    return {
        "key": stream.key,
        "policies": {name: _figures(replay) for name, replay in own.items()},
        "joint": {"policy": joint.planned.policy, "figures": _figures(joint)},
        "took_s": round(time.perf_counter() - started, 2),
    }


def _figures(replay: Replay) -> list[float]:
    return [round(seconds, 6) for seconds in (replay.evaluation.mean_ttft_s, replay.ttft_s(99))]
