"""The planning problem that every policy is given: costs, requests, window, grid and limits, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypedDict, Unpack

from db.errors import UserError
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round, check_window
from tuner.rounds.schedule import Evaluation, evaluate
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective, check_makespan_increase

MOST_UNITS = 2**20
"""Steps of `chunk_multiple` tokens in a batch: 67 million tokens in steps of 64."""
MOST_UNIT_STAGES = 2**26
"""Steps times stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What memory allows."""

    max_round_tokens: int | None = None
    """Most tokens in one round (activations)."""
    max_kv_tokens: int | None = None
    """Most KV tokens held at once. A request holds room for its whole prompt from its first round to its last: with
    less, two half-done prompts could each wait for the other's room for ever."""


NO_LIMITS = Limits()


class RoundOptions(TypedDict, total=False):
    """How rounds are made, beside the policy: fields of `Problem`, whose defaults hold for what is missing."""

    window: int | None
    chunk_multiple: int
    limits: Limits
    objective: Objective
    max_makespan_increase: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A batch to plan. Raises UserError for input under which no plan exists."""

    cost: CostModel
    requests: tuple[Request, ...]
    window: int | None = None
    chunk_multiple: int = 64
    """Chunks are this many tokens or a multiple of it; only a prompt's last chunk may be shorter."""
    limits: Limits = NO_LIMITS
    objective: Objective = Objective.MAKESPAN
    max_makespan_increase: float = MAX_MAKESPAN_INCREASE
    """For another objective: how much longer than the least one found a plan's makespan may be, as a share; infinity:
    any. Requests that arrive over time have no limit."""
    is_timed: bool = field(init=False, repr=False)
    """Whether some requests arrive later than the start."""

    @classmethod
    def of(cls, cost: CostModel, requests: Sequence[Request], **options: Unpack[RoundOptions]) -> Self:
        """The problem with these options, an objective's name parsed."""
        options["objective"] = Objective.parse(options.get("objective", Objective.MAKESPAN))
        return cls(cost=cost, requests=tuple(requests), **options)

    def __post_init__(self) -> None:
        if not self.requests:
            raise UserError("requests", "[]", "at least one request is needed")
        check_window(self.window)
        check_chunk_multiple(self.chunk_multiple)
        check_makespan_increase(self.max_makespan_increase)
        self._check_work()
        object.__setattr__(self, "is_timed", arrive_over_time(self.requests))
        most = self.limits.max_round_tokens
        needed = min(self.chunk_multiple, max(request.new_tokens for request in self.requests))
        if most is not None and most < needed:
            raise UserError("max_round_tokens", most, f"at least {needed} (chunk_multiple); no plan exists below it")
        most, needed = self.limits.max_kv_tokens, max(request.prompt_tokens for request in self.requests)
        if most is not None and most < needed:
            raise UserError("max_kv_tokens", most, f"at least {needed}, the longest prompt; no plan exists below it")

    def _check_work(self) -> None:
        """Time and memory of planning go with the batch's chunks of `chunk_multiple` tokens and with the stages."""
        tokens = sum(request.new_tokens for request in self.requests)
        most = min(MOST_UNITS, MOST_UNIT_STAGES // len(self.cost.stages)) * self.chunk_multiple
        if tokens > most:
            allowed = f"at most {most} with chunk_multiple {self.chunk_multiple} on {self.cost.pp_size} stages"
            raise UserError("prompt_tokens of all requests", tokens, allowed)

    def makespan_limit_s(self, least_s: float) -> float:
        """The longest makespan that a plan for another objective may have beside one of `least_s`."""
        return (1.0 + self.max_makespan_increase) * least_s

    def evaluate(self, rounds: Sequence[Round]) -> Evaluation:
        """What the cost model says of rounds."""
        return evaluate(self.cost, self.requests, rounds, self.window)


def check_chunk_multiple(chunk_multiple: int) -> None:
    """Raise `UserError` for chunks of no tokens."""
    if chunk_multiple < 1:
        raise UserError("chunk_multiple", chunk_multiple, "at least 1")


def arrive_over_time(requests: Sequence[Request]) -> bool:
    """Whether some requests arrive later than the start, or decode on beside others: a trace, and no batch."""
    return any(request.arrival_s > 0.0 or request.output_tokens > 1 for request in requests)
