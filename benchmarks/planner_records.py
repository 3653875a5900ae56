"""The planner against the field's records, on ATOM's published coefficients: `python -m benchmarks.planner_records`."""

from __future__ import annotations

from tests.tuner.atom import ATOM, atom
from tuner.plan.plan import Request
from tuner.rounds.ends.mean_ttft import mean_ttft_bound_s
from tuner.rounds.problem import Problem
from tuner.search.planner import compare_policies, plan_rounds
from tuner.workload.objective import Objective

CASES = [
    ("1 x 131072, K = 4", [131072], 4, None, 9.28),
    ("mix of 16, K = 4, W = 5", ATOM["request_mix"], 4, 5, 22.6),
    ("mix of 16, K = 8, W = 9", ATOM["request_mix"], 8, 9, 25.15),
    ("8 x 131072, K = 4, W = 5", [131072] * 8, 4, 5, 58.5),
]


def prompts(lengths: list[int]) -> list[Request]:
    """Requests of these many tokens."""
    return [Request(id=f"r{i}", prompt_tokens=length) for i, length in enumerate(lengths)]


def main() -> None:
    """Print every policy's makespan, TTFTs, bubbles and gap for each case, and ours beside the record."""
    for name, lengths, pp_size, window, record_s in CASES:
        requests = prompts(lengths)
        print(f"\n{name}: record {record_s} s")
        print(
            f"{'policy':>14} {'makespan_s':>10} {'mean_ttft':>9} {'p90_ttft':>8} {'bubble':>7} {'rounds':>6} "
            f"{'gap':>7} {'plan_ms':>8}"
        )
        for plan in compare_policies(atom(pp_size), requests, window=window):
            what = plan.evaluation
            print(
                f"{plan.policy:>14} {plan.makespan_s:10.3f} {what.mean_ttft_s:9.3f} {what.p90_ttft_s:8.3f} "
                f"{what.bubble_share:7.1%} {len(plan.rounds):6d} {plan.gap:7.2%} {plan.planning_s * 1e3:8.1f}"
            )
        ours = plan_rounds(atom(pp_size), requests, window=window)
        ttft = plan_rounds(atom(pp_size), requests, window=window, objective=Objective.MEAN_TTFT)
        print(
            f"joint: {ours.makespan_s:.3f} s ({ours.makespan_s / record_s - 1:+.2%} of the record), "
            f"gap {ours.gap:.2%}, bound {ours.lower_bound_s:.3f} s"
        )
        least_s = mean_ttft_bound_s(Problem.of(atom(pp_size), requests, window=window))
        print(
            f"joint by mean TTFT: {ttft.evaluation.mean_ttft_s:.3f} s, "
            f"gap {ttft.evaluation.mean_ttft_s / least_s - 1:.1%}, with makespan {ttft.makespan_s:.3f} s "
            f"({ttft.makespan_s / ours.makespan_s - 1:+.2%}), gap {ttft.gap:.2%}"
        )


if __name__ == "__main__":
    main()
