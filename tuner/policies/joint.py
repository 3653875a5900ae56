"""`joint`: rounds of equal cost over the whole batch."""

from __future__ import annotations

from tuner.plan import Round
from tuner.policies.fixed import fixed_rounds
from tuner.problem import Problem


def joint_rounds(problem: Problem) -> list[Round]:
    """The best fixed budget on a fine sweep."""
    total = sum(r.new_tokens for r in problem.requests)
    sizes = {max(1, round(total / n / problem.chunk_multiple)) * problem.chunk_multiple for n in range(1, 80)}
    plans = [fixed_rounds(problem, size) for size in sizes]
    return min(plans, key=lambda rounds: problem.evaluate(rounds).score(problem.objective))
