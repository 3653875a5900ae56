"""The search over layouts: for each, the best partition and rounds or the reason why it is refused; then a ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from db.errors import UserError
from profiler.model import ModelShape
from tuner.cost_model import CostModel
from tuner.fit import LayerCosts
from tuner.layout import Layout
from tuner.memory import RankMemory, memory_refusal, rounds_memory
from tuner.partition import choose_partition
from tuner.plan import Parallel, Plan, Predicted, Request
from tuner.planner import Limits, Objective, RoundPlan, compare_policies, plan_rounds
from tuner.problem import NO_LIMITS, RoundOptions
from tuner.replay import Replay, compare_replays

FitLayout = Callable[[Layout], LayerCosts]  # raises UserError when nothing was measured for the layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is planned: the model in a precision, the requests, and the device they run on."""

    shape: ModelShape
    dtype: str
    requests: tuple[Request, ...]
    device_type: str
    memory_bytes: int
    max_new_tokens: int = 1
    threads_per_rank: int | None = None

    def __post_init__(self) -> None:
        for request in self.requests:
            most = self.shape.max_positions - self.max_new_tokens + 1
            if request.prompt_tokens > most:
                allowed = f"at most {most} with {self.max_new_tokens} new tokens, by the positions of {self.shape.name}"
                raise UserError(f"prompt_tokens of request {request.id}", request.prompt_tokens, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How rounds are made."""

    policy: str = "joint"
    window: int | None = None
    chunk_multiple: int = 64
    limits: Limits = NO_LIMITS
    objective: Objective = Objective.MAKESPAN

    def plan(self, cost: CostModel, requests: Sequence[Request]) -> RoundPlan:
        """Rounds by the policy."""
        return plan_rounds(cost, requests, policy=self.policy, **self._options())

    def compare(self, cost: CostModel, requests: Sequence[Request]) -> list[RoundPlan]:
        """Rounds by every policy, the best first."""
        return compare_policies(cost, requests, **self._options())

    def replay(self, cost: CostModel, requests: Sequence[Request]) -> list[Replay]:
        """Requests that arrive over time under every policy, each seeing a request when it arrives; in table order."""
        return compare_replays(cost, requests, **self._options())

    def choose_partition(
        self, costs: LayerCosts, pp_size: int, requests: Sequence[Request]
    ) -> tuple[tuple[int, ...], RoundPlan]:
        """Layers of each stage, chosen together with the rounds."""
        num_layers = costs.work.shape.num_layers
        return choose_partition(costs.cost_model, num_layers, pp_size, requests, policy=self.policy, **self._options())

    def _options(self) -> RoundOptions:
        return {
            "window": self.window,
            "chunk_multiple": self.chunk_multiple,
            "limits": self.limits,
            "objective": self.objective,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout with its best plan, or with the reason why there is none."""

    layout: Layout
    refusal: str | None = None
    costs: LayerCosts | None = None
    layer_partition: tuple[int, ...] = ()
    rounds: RoundPlan | None = None
    memory: tuple[RankMemory, ...] = ()

    @property
    def peak_memory_bytes(self) -> int:
        """Of the rank that needs most."""
        return max((stage.total_bytes for stage in self.memory), default=0)

    @property
    def extrapolates(self) -> bool:
        """Whether a chunk or a context of the plan is larger than any that was measured."""
        if self.costs is None or self.rounds is None:
            return False
        largest = max(sum(chunk.tokens for chunk in chunks) for chunks in self.rounds.rounds)
        longest = max(chunk.end for chunks in self.rounds.rounds for chunk in chunks)
        return largest > self.costs.max_chunk or longest > self.costs.max_context


def search_layouts(target: Target, layouts: Sequence[Layout], rules: Rules, fit_layout: FitLayout) -> list[Candidate]:
    """Plan every layout; the best by the objective first, refused ones last."""
    candidates = [_candidate(target, layout, rules, fit_layout) for layout in layouts]
    return sorted(candidates, key=lambda candidate: _order(candidate, rules.objective))


def to_plan(target: Target, candidate: Candidate, rules: Rules, *, uncertainty: float | None = None) -> Plan:
    """The plan file's content for a candidate that was not refused."""
    assert candidate.rounds is not None and candidate.costs is not None
    layout = candidate.layout
    return rounds_to_plan(
        candidate.rounds,
        requests=target.requests,
        model=dict(target.shape.config) | {"name": target.shape.name},
        precision=target.dtype,
        parallel=Parallel(tp_size=layout.tp_size, pp_size=layout.pp_size, layer_partition=candidate.layer_partition),
        window=rules.window,
        threads_per_rank=target.threads_per_rank,
        cost_model=candidate.costs.cost_model(candidate.layer_partition).to_json(),
        uncertainty=uncertainty,
    )


def rounds_to_plan(
    planned: RoundPlan,
    *,
    requests: tuple[Request, ...],
    model: dict[str, object],
    precision: str,
    parallel: Parallel,
    window: int | None,
    cost_model: dict[str, object],
    threads_per_rank: int | None = None,
    uncertainty: float | None = None,
) -> Plan:
    """Rounds with their prediction as a plan."""
    evaluation = planned.evaluation
    return Plan(
        model=model,
        precision=precision,
        parallel=parallel,
        window=window,
        threads_per_rank=threads_per_rank,
        requests=requests,
        rounds=planned.rounds,
        policy=planned.policy,
        cost_model=cost_model,
        predicted=Predicted(
            makespan_s=planned.makespan_s,
            lower_bound_s=planned.lower_bound_s,
            gap=planned.gap,
            ttft_s=tuple(float(seconds) for seconds in evaluation.ttft_s),
            planning_s=planned.planning_s,
            round_s=tuple(tuple(row) for row in evaluation.round_s.tolist()),
            uncertainty=uncertainty,
        ),
    )


def _candidate(target: Target, layout: Layout, rules: Rules, fit_layout: FitLayout) -> Candidate:
    if layout.refusal:
        return Candidate(layout=layout, refusal=layout.refusal)
    try:
        costs = fit_layout(layout)
    except UserError as error:
        return Candidate(layout=layout, refusal=str(error))
    partition, rounds = rules.choose_partition(costs, layout.pp_size, target.requests)
    candidate = Candidate(layout=layout, costs=costs, layer_partition=partition, rounds=rounds)
    memory = rounds_memory(
        target.shape,
        target.requests,
        rounds.rounds,
        dtype=target.dtype,
        tp_size=layout.tp_size,
        layer_partition=partition,
        max_new_tokens=target.max_new_tokens,
        device_type=target.device_type,
    )
    refusal = memory_refusal(
        memory, tp_size=layout.tp_size, device_type=target.device_type, memory_bytes=target.memory_bytes
    )
    return replace(candidate, memory=memory, refusal=refusal)


def _order(candidate: Candidate, objective: Objective) -> tuple[float, ...]:
    if candidate.refusal or candidate.rounds is None:
        return (1.0,)
    return (0.0, *candidate.rounds.evaluation.score(objective))
