"""A proven lower bound on the makespan of any plan."""

from __future__ import annotations

from tuner.problem import Problem


def makespan_bound_s(problem: Problem) -> float:
    """Work of the busiest stage: each request in one chunk, all in one round."""
    chunks = [(r.new_tokens, r.cached_tokens, True) for r in problem.requests]
    return max(kind.seconds(chunks) for kind in problem.cost.kinds)
