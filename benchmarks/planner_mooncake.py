"""Every policy on the Mooncake conversation trace at three loads: `python -m benchmarks.planner_mooncake
[num_requests]`.

The trace's 2000 requests (27.4 M tokens in 669 s) are replayed on ATOM's coefficients, slower or faster: light, near
saturation, over it. A policy sees a request when it arrives.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.tuner.atom import atom
from tuner.replays.comparison import compare_replays
from tuner.replays.replay import Replay
from tuner.workload.workload import load_workload

TRACE = Path(__file__).parent / "data" / "mooncake_conversation_2000.jsonl"
LOADS = {"light": 0.5, "near saturation": 1.1, "over it": 2.0}


def main(num_requests: int = 2000) -> None:
    """Print the table; a column of ours that the best swept fixed chunk beats is marked."""
    for pp_size in (4, 8):
        for load, rate in LOADS.items():
            requests = load_workload(TRACE, rate=rate, limit=num_requests).requests
            started = time.perf_counter()
            replays = compare_replays(atom(pp_size), requests, window=pp_size + 1, least_chunk=2048)
            took_s = time.perf_counter() - started
            print(f"\nK = {pp_size}, W = {pp_size + 1}, {load} (rate {rate}), {took_s:.0f} s to replay")
            print(f"{'policy':>14} {'mean_ttft':>9} {'p50':>8} {'p90':>8} {'p99':>8} {'tokens/s':>9} {'rounds':>7}")
            for replay in replays:
                print(
                    f"{replay.policy:>14} {replay.evaluation.mean_ttft_s:9.3f} {replay.ttft_s(50):8.3f} "
                    f"{replay.ttft_s(90):8.3f} {replay.ttft_s(99):8.3f} {replay.tokens_per_s:9.0f} "
                    f"{replay.num_rounds:7d}"
                )
            print(_verdict(replays))


def _verdict(replays: list[Replay]) -> str:
    """Where joint is not better than the best fixed chunk of each column."""
    joint = replays[-1]
    fixed = [replay for replay in replays if replay.policy.startswith("fixed")]
    worse = []
    if joint.evaluation.mean_ttft_s > min(replay.evaluation.mean_ttft_s for replay in fixed):
        worse.append("mean TTFT")
    if joint.ttft_s(99) > min(replay.ttft_s(99) for replay in fixed):
        worse.append("p99 TTFT")
    if joint.tokens_per_s < 0.999 * max(replay.tokens_per_s for replay in fixed):
        worse.append("throughput")
    return (
        f"joint is NOT better in {', '.join(worse)}"
        if worse
        else "joint is better than every fixed chunk in all columns"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
