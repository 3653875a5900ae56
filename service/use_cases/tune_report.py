"""What `isochunk tune` found, and the same as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from service.reasons.precision import PrecisionStep
from service.reasons.recommendation import Recommendation
from tuner.plan.plan import Plan
from tuner.replays.replay import Replay
from tuner.rounds.deadlines import Impossible
from tuner.rounds.round_plan import RoundPlan
from tuner.rounds.schedule import Evaluation
from tuner.workload.objective import Objective

if TYPE_CHECKING:  # planning from a cost model file needs neither the database nor the fit
    from db.rows.hardware import Hardware
    from tuner.fit.holdout import HeldOutError
    from tuner.fit.whole.costs import Costs
    from tuner.search.autotune import Trial
    from tuner.search.explanation import Explanation
    from tuner.search.layouts import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """Everything that tune found, for the table and for JSON."""

    plan: Plan
    recommendation: Recommendation
    options: Mapping[str, Any]
    """What the caller chose."""
    policies: list[RoundPlan] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    impossible: tuple[Impossible, ...] = ()
    """Deadlines that no plan meets."""
    mean_ttft_bound_s: float | None = None
    """No plan has a smaller mean TTFT; of requests that arrive over time, and of batches planned for it."""
    candidates: list[Candidate] = field(default_factory=list)
    held_out: list[HeldOutError] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    interrupted: bool = False
    """Before all the runs that were asked for."""
    hardware: Hardware | None = None
    explanation: Explanation | None = None
    precisions: tuple[PrecisionStep, ...] = ()
    """Those that were compared, the model's own first."""
    output: str | None = None
    plot: str | None = None
    notes: tuple[str, ...] = ()
    """How the input was read, what was changed in it, and what the plan supposes of the model, a sentence each."""

    @property
    def num_planned(self) -> int:
        """Layouts that were planned, those that then did not fit into memory included."""
        return sum(candidate.rounds is not None for candidate in self.candidates)

    @property
    def num_proven_worse(self) -> int:
        """Layouts proven no better than the best one without being planned."""
        return sum(candidate.is_proven_worse for candidate in self.candidates)

    @property
    def num_estimated_worse(self) -> int:
        """Layouts left out without a proof, because their estimates are clearly above the best plan."""
        return sum(candidate.is_estimated_worse for candidate in self.candidates)

    @property
    def costs(self) -> Costs | None:
        """Fitted costs behind the plan; None where it was made from a cost model file."""
        return self.candidates[0].costs if self.candidates else None

    def to_json(self) -> dict[str, Any]:
        """For programs: the plan, the ranking, the policies, the held-out errors and the trials."""
        objective = Objective(self.options.get("objective", Objective.MAKESPAN))
        return {
            "plan": self.plan.to_json(),
            "recommendation": self.recommendation.to_json(),
            "options": dict(self.options),
            "layouts": [_candidate_json(candidate, objective) for candidate in self.candidates],
            "num_planned": self.num_planned,
            "num_proven_worse": self.num_proven_worse,
            "num_estimated_worse": self.num_estimated_worse,
            "why": self.explanation.to_json() if self.explanation else None,
            "precisions": [step.to_json(objective) for step in self.precisions],
            "policies": [_policy_json(planned) for planned in self.policies],
            "impossible": [str(one) for one in self.impossible],
            "replays": [replay_json(replay) for replay in self.replays],
            "classes": classes_json(self),
            "mean_ttft_bound_s": self.mean_ttft_bound_s,
            "held_out": [error.to_json() for error in self.held_out],
            "correction": self.costs.correction.to_json() if self.costs else None,
            "rank_factors": list(self.costs.rank_skew.factors) if self.costs else [],
            "trials": [
                {"layout": t.choice.layout, "policy": t.choice.policy, "predicted_s": t.choice.predicted_s,
                 "measured_s": t.measured_s, "error": t.error}
                for t in self.trials
            ],
            "notes": list(self.notes),
            "interrupted": self.interrupted,
            "output": self.output,
        }  # fmt: skip


def replay_json(replay: Replay) -> dict[str, Any]:
    """A policy's replay of requests that arrive over time."""
    return {
        "policy": replay.policy,
        "taken": replay.planned.policy,
        "num_rounds": replay.num_rounds,
        "makespan_s": replay.evaluation.makespan_s,
        "mean_ttft_s": replay.evaluation.mean_ttft_s,
        "p50_ttft_s": replay.ttft_s(50),
        "p90_ttft_s": replay.ttft_s(90),
        "p99_ttft_s": replay.ttft_s(99),
        "tokens_per_s": replay.tokens_per_s,
        **_deadlines_json(replay.evaluation),
        **_decode_json(replay),
    }


def _decode_json(replay: Replay) -> dict[str, Any]:
    """TPOT of the requests with more than one token; nothing where none is decoded beside."""
    tpot_s = [seconds for seconds in replay.evaluation.tpot_s if seconds > 0.0]
    if not tpot_s:
        return {}
    return {
        "mean_tpot_s": float(np.mean(tpot_s)),
        "p99_tpot_s": float(np.percentile(tpot_s, 99)),
        "goodput_per_s": replay.goodput,
    }


def classes_json(report: TuneReport) -> list[dict[str, Any]]:
    """What each class of requests got of the policy that is the plan; nothing where requests have none."""
    requests = report.plan.requests
    names = sorted({request.priority for request in requests if request.priority is not None})
    chosen = next((one for one in report.replays if one.planned.policy == report.plan.policy), None)
    if not names or chosen is None:
        return []
    rows = []
    for name in names:
        own = [i for i, request in enumerate(requests) if request.priority == name]
        ttft_s = [chosen.evaluation.ttft_s[i] for i in own]
        rows.append(
            {
                "priority": name,
                "requests": len(own),
                "weight": requests[own[0]].weight,
                "mean_ttft_s": float(np.mean(ttft_s)),
                "p99_ttft_s": float(np.percentile(ttft_s, 99)),
            }
        )
    return rows


def _candidate_json(candidate: Candidate, objective: Objective) -> dict[str, Any]:
    layout = candidate.layout
    names = (
        "tp_size",
        "pp_size",
        "sp_size",
        "sp_kind",
        "virtual_stages",
        "stage_order",
        "weights",
        "ep_size",
        "dispatch",
        "family",
    )
    found: dict[str, Any] = {name: getattr(layout, name) for name in names} | {
        "layer_partition": list(candidate.layer_partition),
        "refusal": candidate.refusal,
        "extrapolates": candidate.extrapolates,
        "assumed": [str(group) for group in candidate.assumed],
        "alike": list(candidate.alike),
        "memory_bytes": candidate.peak_memory_bytes,
        "bound_by_memory": candidate.is_bound_by_memory,
        "memory_limits": _limits_json(candidate),
        "proven_worse": candidate.is_proven_worse,
        "estimated_worse": candidate.is_estimated_worse,
        "estimate_s": _seconds(candidate.likely, objective),
        "floor_s": _seconds(candidate.floor, objective),
    }
    return found | ({} if candidate.rounds is None else _expected_json(candidate.rounds))


def _seconds(score: tuple[float, ...] | None, objective: Objective) -> float | None:
    """What a bound or an estimate of a score says of its objective; of deadlines met, of the mean TTFT."""
    seconds = math.inf if score is None else score[1 if objective is Objective.SLA else 0]
    return seconds if math.isfinite(seconds) else None


def _limits_json(candidate: Candidate) -> dict[str, int | None] | None:
    limits = candidate.limits
    if limits is None:
        return None
    return {"max_round_tokens": limits.max_round_tokens, "max_kv_tokens": limits.max_kv_tokens}


def _policy_json(planned: RoundPlan) -> dict[str, Any]:
    return _expected_json(planned) | {"lower_bound_s": planned.lower_bound_s, "gap": planned.gap}


def _expected_json(planned: RoundPlan) -> dict[str, Any]:
    evaluation = planned.evaluation
    return {
        "policy": planned.policy,
        "num_rounds": len(planned.rounds),
        "makespan_s": planned.makespan_s,
        "mean_ttft_s": evaluation.mean_ttft_s,
        "p90_ttft_s": evaluation.p90_ttft_s,
        "p99_ttft_s": evaluation.p99_ttft_s,
        "bubble_share": evaluation.bubble_share,
        "planning_s": planned.planning_s,
        **_deadlines_json(evaluation),
    }


def _deadlines_json(evaluation: Evaluation) -> dict[str, Any]:
    """How many deadlines are met and how late the latest is; nothing where there are none."""
    late_s = evaluation.lateness_s
    if not math.isfinite(late_s) and not evaluation.has_limits:
        return {}
    return {"sla_met": evaluation.sla_weight, "lateness_s": late_s if math.isfinite(late_s) else None}
