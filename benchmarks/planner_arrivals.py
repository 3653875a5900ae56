"""Every policy on streams of requests, from light load to overload: is `joint` ever behind?

    python -m benchmarks.planner_arrivals [--small] [--part I/N] [--results FILE] [--seed N] [--minutes N]

Streams: lengths (equal, mixed, two classes) x rates (shares of capacity) x arrivals (regular, Poisson, bursty) x stages
x cost models. Capacity is the rate at which the best fixed chunk up to the longest prompt, or whole prompts, just keep
up. A row a stream is kept in the results file as it comes; rows that are there are not made again. Then the table is
printed: how far `joint`, and the online planner under each of its settings, are above the best of all other policies
with swept chunks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_passes import costs_of
from service.cli.output import print_table
from tests.tuner.atom import atom
from tuner.fit.layer_costs import LayerCosts
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.policies.named import fixed_sweep
from tuner.replays.comparison import replay_variants
from tuner.replays.ranking import ranked
from tuner.replays.replay import Replay, Runs
from tuner.rounds.problem import Problem, RoundOptions
from tuner.search.partition import even_partition
from tuner.workload.objective import Objective

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
SMALL = 12
"""Streams of the sample."""


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
def _layer_costs(name: str) -> LayerCosts:
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


def streams(*, small: bool, seed: int = 0) -> list[Stream]:
    """All of them in an order in which any beginning is a fair sample, or a sample."""
    axes = list(product(MODELS, STAGES, LENGTHS, RATES, ARRIVALS))
    order = np.random.default_rng(7).permutation(len(axes))[: SMALL if small else None]
    found = []
    for model, pp_size, lengths, rate, arrivals in (axes[i] for i in order):
        found.append(Stream(model=model, pp_size=pp_size, lengths=lengths, rate=rate, arrivals=arrivals, seed=seed))
    return found


def measure(stream: Stream, num_requests: int) -> dict[str, Any]:
    """A row: mean and p99 TTFT of every policy under every parameter, and of `joint`."""
    requests, started = stream.requests(num_requests), time.perf_counter()
    problem = Problem.of(stream.cost, requests, **stream.options)
    variants = replay_variants(Runs(problem))
    joint = ranked(variants, problem.objective)[-1]
    return {
        "key": stream.key,
        "policies": {each.planned.policy: _figures(each) for replays in variants.values() for each in replays},
        "joint": joint.planned.policy,
        "took_s": round(time.perf_counter() - started, 2),
    }


def _figures(replay: Replay) -> list[float]:
    return [round(seconds, 6) for seconds in (replay.evaluation.mean_ttft_s, replay.ttft_s(99))]


def kept_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a results file, by stream."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut short
    return {row["key"]: row for row in rows}


@dataclass(frozen=True, slots=True)
class Excess:
    """How far a policy's mean and p99 are above the best of all other policies', as factors."""

    mean: float
    p99: float

    @classmethod
    def of(cls, row: Mapping[str, Any], policy: str) -> Excess:
        """Of a policy in a row."""
        others = [figures for name, figures in row["policies"].items() if not name.startswith("joint")]
        mean_s, p99_s = row["policies"][policy]
        return cls(mean_s / min(mean for mean, _ in others), p99_s / min(p99 for _, p99 in others))

    @property
    def is_behind(self) -> bool:
        """Whether it is further above than allowed."""
        return self.mean > ALLOWED_MEAN or self.p99 > ALLOWED_P99


def summary(name: str, found: Iterable[Excess]) -> list[object]:
    """A row of the table: how many streams, how many behind, and by how much below and above in the mean."""
    found = list(found)
    means, p99s = [each.mean for each in found], [each.p99 for each in found]

    def geometric(values: list[float]) -> str:
        return f"{math.exp(sum(map(math.log, values)) / len(values)) - 1.0:+.1%}"

    below = sum(mean < 0.98 for mean in means)
    behind = sum(each.is_behind for each in found)
    return [name, len(found), behind, below, geometric(means), f"{max(means) - 1.0:+.1%}",
            geometric(p99s), f"{max(p99s) - 1.0:+.1%}"]  # fmt: skip


def print_summary(rows: Mapping[Stream, Mapping[str, Any]]) -> None:
    """`joint` by each axis, and the online planner under each of its settings over all streams."""
    columns = ["streams", "number", "behind", "below by 2 %", "mean", "worst", "p99", "worst"]
    table = [summary("all", (Excess.of(row, row["joint"]) for row in rows.values()))]
    for axis in ("model", "pp_size", "lengths", "rate", "arrivals"):
        for value in dict.fromkeys(getattr(stream, axis) for stream in rows):
            of_value = [row for stream, row in rows.items() if getattr(stream, axis) == value]
            table.append(summary(f"{axis} {value}", (Excess.of(row, row["joint"]) for row in of_value)))
    print_table(columns, table, title="`joint`, tuned on the trace, above the best of all other policies")
    settings = dict.fromkeys(name for row in rows.values() for name in row["policies"] if name.startswith("joint"))
    alone = {name: [Excess.of(row, name) for row in rows.values() if name in row["policies"]] for name in settings}
    title = "The online planner, the same settings for all streams where they were tried"
    print_table(
        columns, [summary(name, found) for name, found in alone.items() if len(found) > len(rows) / 2], title=title
    )
    for stream, row in rows.items():
        excess = Excess.of(row, row["joint"])
        if excess.is_behind:
            print(f"behind: {stream.key}: {row['joint']}, mean {excess.mean:.3f}, p99 {excess.p99:.3f}")


def _part(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text}: I/N with I from 1 to N is needed")
    return int(part), int(of)


def main() -> None:
    """Make the rows that are missing, then print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a sample of the streams")
    parser.add_argument("--results", type=Path, default=RESULTS / "arrivals.jsonl", help="where rows are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="every Nth stream, from the Ith on")
    parser.add_argument("--num-requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop making rows after so long")
    options = parser.parse_args()
    first, step = options.part
    wanted = list(streams(small=options.small, seed=options.seed))
    kept, started = kept_rows(options.results), time.perf_counter()
    with options.results.open("a") as file:
        for stream in wanted[first - 1 :: step]:
            if time.perf_counter() - started > 60.0 * options.minutes:
                break
            if stream.key not in kept:
                kept[stream.key] = row = measure(stream, options.num_requests)
                file.write(json.dumps(row) + "\n")
                file.flush()
                excess = Excess.of(row, row["joint"])
                print(f"{stream.key}: mean {excess.mean:.3f}, p99 {excess.p99:.3f} ({row['joint']})", flush=True)
    print_summary({stream: kept[stream.key] for stream in wanted if stream.key in kept})


if __name__ == "__main__":
    main()
