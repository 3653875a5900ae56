"""Every policy with answers decoded beside prefill: TTFT, TPOT and goodput: `python -m benchmarks.planner_decode`.

Requests of two classes of lengths arrive at four stages of H100 (Llama-3-8B on a profile kept here) as Poisson's, with
answers of 16 to 256 tokens and limits of TTFT and TPOT. Each policy is shown under the parameter that is best by the
deadlines met; the rate is a share of what the pipeline could prefill if it decoded nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from benchmarks.planner_arrivals import MODELS, Stream
from service.cli.output import print_table
from tuner.plan.plan import Request
from tuner.replays.comparison import compare_replays
from tuner.replays.replay import Replay
from tuner.workload.objective import Objective

RATES = (0.3, 0.5, 0.7)
SLA_TTFT_S, SLA_TPOT_S = 1.0, 0.05
NUM_REQUESTS = 40


def requests_of(stream: Stream, num_requests: int) -> list[Request]:
    """The stream's requests with answers and limits."""
    rng = np.random.default_rng(1)
    answers = rng.integers(16, 257, num_requests).tolist()
    return [
        replace(request, output_tokens=tokens, sla_ttft_s=SLA_TTFT_S, sla_tpot_s=SLA_TPOT_S)
        for request, tokens in zip(stream.requests(num_requests), answers, strict=True)
    ]


def row(replay: Replay) -> list[object]:
    """A policy's figures."""
    evaluation, tpot_s = replay.evaluation, np.array(replay.evaluation.tpot_s)
    return [
        replay.policy, replay.planned.policy, evaluation.mean_ttft_s, replay.ttft_s(99), 1e3 * float(tpot_s.mean()),
        1e3 * float(np.percentile(tpot_s, 99)), 100 * evaluation.sla_weight, replay.goodput,
    ]  # fmt: skip


def main() -> None:
    """Print a table a rate, the most deadlines met first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="h100x2-nvlink")
    parser.add_argument("--num-requests", type=int, default=NUM_REQUESTS)
    options = parser.parse_args()
    for rate in RATES:
        stream = Stream(model=options.model, pp_size=4, lengths="two classes", rate=rate, arrivals="poisson")
        started = time.perf_counter()
        wanted = requests_of(stream, options.num_requests)
        replays = compare_replays(stream.cost, wanted, chunk_multiple=256, objective=Objective.SLA)
        replays.sort(key=lambda one: one.evaluation.score(Objective.SLA))
        print_table(
            ["policy", "taken", "TTFT s", "p99 s", "TPOT ms", "p99 ms", "met %", "goodput/s"],
            [row(replay) for replay in replays],
            title=f"{rate:g} of what prefill alone could take: TTFT within {SLA_TTFT_S:g} s and TPOT within "
            f"{1e3 * SLA_TPOT_S:g} ms ({time.perf_counter() - started:.0f} s)",
        )


if __name__ == "__main__":
    main()
