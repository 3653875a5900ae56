"""A scheduler class for vLLM (`--scheduler-cls`) whose steps are the rounds of the plan that ISOCHUNK_PLAN names.

Written for vLLM 0.33.0. It runs `AsyncScheduler.schedule` as it is, with KV blocks, preemption, connectors and decode
steps, and sets two things: the order in which requests are looked at, and the last limit that it puts on the tokens of
each of them, `_reserve_prefill_lookahead`. A limit of 0 leaves a request for a later step.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from service.engines.plan_steps import PlanSteps
from tuner.plan.plan import load_plan

VARIABLE = "ISOCHUNK_PLAN"


class PlannedScheduler(AsyncScheduler):
    """vLLM's own scheduler with a plan's rounds as its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = PlanSteps(load_plan(os.environ[VARIABLE]))
        if self.max_num_scheduled_tokens < self.steps.most_tokens:
            raise ValueError(
                f"--max-num-batched-tokens is {self.max_num_scheduled_tokens} and must be at least "
                f"{self.steps.most_tokens}, the largest round of {os.environ[VARIABLE]}"
            )
        self._positions: dict[str, int] = {}
        """Of requests that wait, how much of them was found to be in the KV cache."""

    def add_request(self, request: Any) -> None:
        """A request comes."""
        super().add_request(request)
        self.steps.come(request.request_id, request.num_prompt_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: a round of the plan, and a token of each request that decodes."""
        positions = {
            known: request.num_computed_tokens or self._positions.get(known, 0)
            for known, request in self.requests.items()
        }
        self.steps.begin(positions)
        self._positions = {known: at for known, at in self._positions.items() if known in positions}
        self.running.sort(key=lambda request: (request.is_prefill_chunk, *self.steps.order(request.request_id)))
        return super().schedule(*args, **kwargs)

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        tokens = int(super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens))
        if num_computed_tokens >= request.num_prompt_tokens:
            return tokens
        if request.num_computed_tokens == 0:
            self._positions[request.request_id] = num_computed_tokens
        return min(tokens, self.steps.allowed(request.request_id, num_computed_tokens, request.num_prompt_tokens))
