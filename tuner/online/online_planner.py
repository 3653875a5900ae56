"""The online planner: requests come and go, an engine asks for the next round, and gets it in well under a
millisecond.

    planner = OnlinePlanner(cost, window=5)
    planner.add(Request(id="a", prompt_tokens=131072), now_s=0.0)
    chunks = planner.next_round(now_s=0.0)        # None while the window is full or nothing waits
    ...
    planner.finish_round(now_s=0.7)               # the oldest round in flight has left the last stage

How long may the next round be? `rounds.round_budgets` says, from the work that waits, which caps make the mean TTFT or
the makespan least when nothing else arrives; the first request's counts. While all that ever came was there at the
start, the mean TTFT's caps keep the makespan within the limit that the batch planner keeps. Where requests keep
arriving faster than the queue drains, those ahead of a long prompt are soon replaced by newcomers: then all that wait
share one cap, that of the mean over them. Rounds no longer than those the pipeline is already busy with cost no
latency: on equal stages a round waits behind the slowest one before it (`recurrence.timeline`), so the cap never falls
below what is in flight. Then the remaining work is shared out evenly over whole rounds.

With few requests, where rounds and requests end matters: the rounds of all of them are planned under several scales of
these caps, and held until the queue changes (`tuner.online.lookahead`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from db.errors import UserError
from tuner.online.even_rounds import EvenRounds
from tuner.online.in_flight import InFlight
from tuner.online.lookahead import Lookahead
from tuner.online.patience import running_order
from tuner.online.settings import AS_IT_COMES, OnlineSettings
from tuner.online.to_come.outlook import NONE_TO_COME, Outlook
from tuner.online.to_come.steady_pace import SteadyPace
from tuner.online.to_come.traffic import IN_TURN, MEMORY, Levels, Traffic
from tuner.online.waiting import Waiting, WaitingOrder
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round, check_window
from tuner.rounds.packing.packer import OpenRound, Packer
from tuner.rounds.problem import NO_LIMITS, Limits
from tuner.rounds.round_budgets import QueueBudgets, RoundExcess, context_token_s, round_overhead_s
from tuner.serving.answers import NOTHING_BESIDE, Beside
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective, check_makespan_increase

FIRST_TABLE_TOKENS = 131_072
"""Prompt length that the cost tables hold from the start; a longer prompt doubles them."""
FEW_WAITING, FEW_IN_PASSING = 32, 16
"""With no more requests than these, the rounds of all of them are planned whenever the queue has changed: where all
were there at the start, and once they arrive over time."""
ENDS_WITHIN = 1.08
"""How much longer a round may be so that a prompt ends in it: what is left of one would take a chunk of its own."""
IN_TIME, LATE_SHARE = 0.9, 0.5
"""Shares of the time until a decoded token is due that rounds may take before it is back, and of its TPOT limit that
they may take at least: prompts go on however late the tokens beside them are."""
STRETCH_SHARE = 0.125
"""Share of the latest round in the mean of what rounds take over their work."""


class OnlinePlanner:
    """Decides one round at a time.

    `objective` makespan and mean-ttft differ in how far ahead the cap looks; sla and lateness run the earliest deadline
    first. `more_to_come`: requests will arrive over time, though none has shown it yet; until then the first ones are
    taken for all there are, and their makespan is limited.
    Raises UserError for a window of 0, a repeated id or a request that the limits can never hold.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        window: int | None = None,
        chunk_multiple: int = 64,
        limits: Limits = NO_LIMITS,
        objective: Objective = Objective.MEAN_TTFT,
        max_makespan_increase: float = MAX_MAKESPAN_INCREASE,
        settings: OnlineSettings = AS_IT_COMES,
        more_to_come: bool = False,
    ) -> None:
        check_window(window)
        if chunk_multiple < 1:
            raise UserError("chunk_multiple", chunk_multiple, "at least 1")
        if limits.max_round_tokens is not None and limits.max_round_tokens < chunk_multiple:
            allowed = f"at least {chunk_multiple} (chunk_multiple); no plan exists below it"
            raise UserError("max_round_tokens", limits.max_round_tokens, allowed)
        cost = cost.merged()  # a stage's groups as one: how a queue drains, not in which order tasks run
        self.cost = cost
        self.window = window
        self.chunk_multiple = chunk_multiple
        self.limits = limits
        self.objective = settings.objective_of(Objective.parse(objective))
        check_makespan_increase(max_makespan_increase)
        self.max_makespan_increase = max_makespan_increase
        self.settings = settings
        self.more_to_come = more_to_come
        self.requests: list[Request] = []
        """Every request ever added; a chunk's `request` is an index into it."""
        self._index_of: dict[str, int] = {}
        self._queue = WaitingOrder()
        self._order: list[int] = []  # of the next round, by index
        self._stretch = 1.0  # seconds of rounds over those of the work in them; running mean
        self._waiting: dict[int, Waiting] = {}
        self._started: set[int] = set()
        self._ending: list[Waiting] = []
        self._held_tokens = 0
        self._in_flight = InFlight(cost, window)
        self._total_work_s = 0.0
        self._left_tokens = 0
        self._traffic = Traffic()
        self._tokens, self._squares, self._contexts = (
            0.0,
            0.0,
            0.0,
        )  # of a request: new ones, squared, times their context
        self._levels: Levels | None = None  # of those to come
        self._steady = SteadyPace()
        self._makespan_weight: float | None = None  # kept while no request comes
        self._planned: deque[Round] = deque()  # for the queue as it is; a request that comes or goes voids them
        self._stages_after = cost.pp_size - 1
        self._hop_share = 0.0  # of a round's seconds that handing it on takes; running mean
        self._overhead_s = round_overhead_s(cost)
        self._context_token_s = context_token_s(cost)
        self._packer = self._make_packer(FIRST_TABLE_TOKENS)

    @property
    def num_waiting(self) -> int:
        """Requests with tokens to run."""
        return len(self._waiting)

    def add(self, request: Request, now_s: float = 0.0) -> int:
        """A request has arrived; returns its index."""
        if request.id in self._index_of and self._index_of[request.id] in self._waiting:
            raise UserError("id", request.id, "each waiting request needs its own id")
        most = self.limits.max_kv_tokens
        if most is not None and request.prompt_tokens > most:
            raise UserError("prompt_tokens", request.prompt_tokens, f"at most {most} (max_kv_tokens)")
        if request.new_tokens > self._table_tokens:
            self._packer = self._make_packer(2 * request.new_tokens)
        index = len(self.requests)
        self._note_arrival(request, now_s)
        self._planned.clear()
        self._makespan_weight = None
        self.requests.append(request)
        self._index_of[request.id] = index
        self._enqueue(Waiting(index, request, request.cached_tokens))
        return index

    def abort(self, request_id: str) -> bool:
        """Forget a request's remaining tokens; False if none were waiting. Chunks already given out are not
        recalled."""
        index = self._index_of.get(request_id)
        if index is None or index not in self._waiting:
            return False
        self._planned.clear()
        self._release(self._dequeue(index))
        return True

    def finish_round(self, now_s: float | None = None) -> None:
        """The oldest round in flight has left the last stage; its time, if given, corrects the planner's clock."""
        self._in_flight.finish(now_s)

    def next_round(self, now_s: float = 0.0, beside: Beside = NOTHING_BESIDE) -> Round | None:
        """The round to run next on stage 0; None while the window is full or there is nothing to run.

        beside: decoded tokens that ride in it; a round may have nothing else. Their TPOT limits shorten it: a token is
        back after about pp_size rounds, so each may take that share of the time in which the first of them is due.
        """
        if self._in_flight.is_full or not (self._waiting or beside.tokens):
            return None
        start_s = self._in_flight.start_s(now_s)
        chunks = self._next_chunks(start_s, beside) if self._waiting else ()
        self._in_flight.run(chunks, self.requests, start_s, beside)
        return chunks

    @property
    def expected_s(self) -> float:
        """When the oldest round in flight should leave the last stage; infinity without one."""
        return self._in_flight.expected_s

    def _next_chunks(self, start_s: float, beside: Beside) -> Round:
        most_s = self._most_s(start_s, beside)
        if self._planned and self._seconds_beside(self._planned[0], beside) > most_s:
            self._planned.clear()
        if not self._planned:
            self._order = self._running_order(start_s)
        if not self._planned and not math.isfinite(most_s) and self._may_plan_ahead():
            self._planned.extend(self._plan_ahead(start_s))
        work_s = self._total_work_s
        chunks = self._planned_round() if self._planned else self._greedy_round(start_s, beside, most_s)
        if self.settings.patience:
            done_s = max(work_s - self._total_work_s, 1e-12)
            self._stretch += STRETCH_SHARE * (self._packer.seconds(chunks, self.requests) / done_s - self._stretch)
        while self._ending:  # their KV room is free for the round after this one
            self._release(self._ending.pop())
        return chunks

    def _most_s(self, start_s: float, beside: Beside) -> float:
        """Most seconds that the next round may take for the TPOT of those that decode beside it."""
        if not math.isfinite(beside.limit_s):
            return math.inf
        hops_s = self._stages_after * self.cost.hop_latency_s + self.cost.return_s
        rounds = self.cost.pp_size + (hops_s > 0.0)  # handed on and reported back it misses the next round
        return max(IN_TIME * (beside.due_s - start_s - hops_s), LATE_SHARE * beside.limit_s) / rounds

    def _seconds_beside(self, chunks: Round, beside: Beside) -> float:
        """Seconds of a round on the slowest stage with what is decoded beside."""
        return self._packer.seconds(chunks, self.requests, self._open_round(beside)) if beside.tokens else 0.0

    def _open_round(self, beside: Beside) -> OpenRound:
        """A round that holds decoded tokens."""
        into = self._packer.open_round()
        into.num_tokens = beside.tokens
        into.added_s = [beside.seconds(table.stage) for table in self._packer.tables]
        return into

    def _running_order(self, start_s: float) -> list[int]:
        """All that wait, those that run first at the start."""
        patience_s = self.settings.patience
        if not patience_s or self.objective.needs_deadlines:
            return self._queue.indices.copy()
        waiting = [self._waiting[index] for index in sorted(self._waiting)]  # as they came
        work_s = [self._stretch * each.work_s for each in waiting]
        pass_s = max(self._in_flight.pass_s, self._overhead_s * self._stages_after)
        due_s = [each.request.arrival_s + patience_s - start_s - pass_s for each in waiting]
        rank = [each.work_s / max(each.request.weight, 1e-12) for each in waiting]
        return [waiting[place].index for place in running_order(rank, work_s, due_s)]

    def _planned_round(self) -> Round:
        chunks = self._planned.popleft()
        for chunk in chunks:
            self._run(self._waiting[chunk.request], chunk.tokens)
        return chunks

    def _greedy_round(self, start_s: float, beside: Beside, most_s: float) -> Round:
        """The cap's fill of the queue in running order."""
        into = self._open_round(beside)
        cap_s = max(self._cap_s(start_s), self._in_flight.lag_s(start_s, self._hop_share)) + max(into.added_s)
        cap_s, is_limited = min(cap_s, most_s), self._is_limited
        for index in self._order:
            if not self._put(into, self._waiting[index], cap_s, is_limited):
                break
        if not into.chunks:  # under the cap not even one grid unit fits
            for index in self._order:
                if self._admissible(self._waiting[index]):
                    self._force(into, self._waiting[index])
                    break
        return tuple(into.chunks)

    def _put(self, into: OpenRound, waiting: Waiting, cap_s: float, is_limited: bool) -> bool:
        """Run as much of a request as fits; False once the round is full."""
        left = waiting.left
        if not self._admissible(waiting):
            return False
        tokens = self._packer.longest(into, waiting.done, left, cap_s)
        if tokens < left:
            ends_s = cap_s if is_limited or into.num_tokens else ENDS_WITHIN * cap_s
            if self._packer.fits(into, left, waiting.done, True, ends_s):
                tokens = min(left, self._packer.max_round_tokens - into.num_tokens)
        if not tokens:
            return False
        if tokens < left and not is_limited:
            thrifty = self._excess.thrifty_tokens(into.num_tokens + tokens, waiting.done) - into.num_tokens
            tokens = min(tokens, max(thrifty // self.chunk_multiple * self.chunk_multiple, self.chunk_multiple))
        self._take(into, waiting, tokens, tokens == left)
        return tokens == left

    def _force(self, into: OpenRound, waiting: Waiting) -> None:
        left = waiting.left
        tokens = min(left, self.chunk_multiple)
        self._take(into, waiting, tokens, tokens == left)

    def _take(self, into: OpenRound, waiting: Waiting, tokens: int, final: bool) -> None:
        self._packer.add(into, waiting.index, waiting.done, tokens, final)
        self._run(waiting, tokens)

    def _run(self, waiting: Waiting, tokens: int) -> None:
        self._dequeue(waiting.index)
        if waiting.index not in self._started:
            self._started.add(waiting.index)
            self._held_tokens += waiting.request.prompt_tokens
        waiting.done += tokens
        if not waiting.left:
            self._ending.append(waiting)
        else:
            self._enqueue(waiting)

    def _admissible(self, waiting: Waiting) -> bool:
        most = self.limits.max_kv_tokens
        if most is None or waiting.index in self._started:
            return True
        return self._held_tokens + waiting.request.prompt_tokens <= most

    def _queue_budgets(self) -> QueueBudgets:
        """What waits, in running order; read before the round at hand changes it."""
        work_s: Sequence[float] = self._queue.work_s
        context_work: Sequence[float] = self._queue.context_work
        weights: Sequence[float] = self._queue.weights
        if self._order != self._queue.indices:
            waiting = list(map(self._waiting.__getitem__, self._order))
            work_s = [each.work_s for each in waiting]
            context_work = [each.context_work for each in waiting]
            weights = [each.request.weight for each in waiting]
        return QueueBudgets(
            work_s=work_s,
            context_work=context_work,
            weights=weights,
            overhead_s=self._overhead_s,
            context_token_s=self._context_token_s,
            stages_after=self._stages_after,
        )

    def _even_rounds(self, budgets: QueueBudgets, start_s: float) -> EvenRounds:
        return EvenRounds(
            budgets=budgets,
            num_tokens=self._left_tokens,
            excess=self._excess,
            outlook=self._outlook(start_s),
            lag_s=self._in_flight.lag_s(start_s, self._hop_share),
            hop_share=self._hop_share,
        )

    def _cap_s(self, start_s: float) -> float:
        """Most seconds that the next round may take on the slowest stage."""
        if self.settings.pace:
            return self.settings.pace
        budgets = self._queue_budgets()
        if self.objective is Objective.MAKESPAN:
            allowed = budgets.for_makespan()
        elif not self._is_limited:
            return self._even_rounds(budgets, start_s).cap_s
        else:
            if self._is_limited and self._makespan_weight is None:
                self._makespan_weight = budgets.makespan_weight(self.max_makespan_increase)
            allowed = budgets.for_mean_ttft(self._makespan_weight or 0.0)
        return budgets.evened(allowed[0])

    def _outlook(self, now_s: float) -> Outlook:
        if self._levels is None:
            return NONE_TO_COME
        later = self.settings.aging * now_s
        return Outlook.of(
            self._traffic,
            self._levels,
            self._steady,
            now_s,
            before_s=self._queue.work_before([most_s + later for most_s in self._levels.most_s.tolist()]),
            waiting_s=self._total_work_s,
            behind=self._behind,
            weight=self.settings.foresight,
            passing=self.settings.passing,
        )

    @property
    def _behind(self) -> float:
        """Times a round's seconds to pass the stages behind the first."""
        return self._stages_after * (1.0 + self._hop_share)

    def _note_arrival(self, request: Request, now_s: float) -> None:
        work_s = max(
            table.round_s(request.new_tokens)
            - table.tokens[0]
            + table.chunk_s(request.new_tokens, request.cached_tokens)
            for table in self._packer.tables
        )
        self._traffic.note(now_s, work_s)
        new, share = request.new_tokens, 1.0 / min(self._traffic.count, MEMORY)
        self._tokens += share * (new - self._tokens)
        self._squares += share * (new * new - self._squares)
        self._contexts += share * (new * (request.cached_tokens + new / 2.0) - self._contexts)
        self._hop_share = self.cost.hop_token_s * self._tokens / max(self._traffic.work_s, 1e-12)
        if self._traffic.is_known:
            sizes = self._excess.sizes
            round_s = self._excess.sizes_s(self._squares / self._tokens, self._contexts / self._tokens)
            self._levels = self._traffic.levels(IN_TURN if self.objective.needs_deadlines else self.settings.aging)
            self._steady = SteadyPace.of(
                self._levels,
                sizes,
                round_s=round_s,
                stretches=round_s * self._tokens / (sizes * max(self._traffic.work_s, 1e-12)),
                behind=self._behind,
                horizon_s=self._traffic.horizon_s(now_s),
            )

    @property
    def _is_limited(self) -> bool:
        """Whether all that ever came was there at the start: then the last end is the makespan, and is limited."""
        return not (self.more_to_come or self._traffic.is_known)

    def _may_plan_ahead(self) -> bool:
        """Few requests wait, all fit into the KV cache, and how long rounds are is left open."""
        if self.settings.pace or len(self._queue) > (FEW_WAITING if self._is_limited else FEW_IN_PASSING):
            return False
        most = self.limits.max_kv_tokens
        to_come = sum(self.requests[i].prompt_tokens for i in self._waiting if i not in self._started)
        return most is None or self._held_tokens + to_come <= most

    def _plan_ahead(self, start_s: float) -> list[Round]:
        """Rounds of all that waits."""
        budgets, least_s = self._queue_budgets(), self._in_flight.lag_s(start_s, self._hop_share)
        ahead = Lookahead(
            packer=self._packer,
            requests=self.requests,
            spans=[(i, self._waiting[i].done, self.requests[i].prompt_tokens) for i in self._order],
            free_s=self._in_flight.clock.finish_s,
            start_s=start_s,
            window=self.window,
            objective=self.objective,
            max_makespan_increase=self.max_makespan_increase,
            outlook=self._outlook(start_s),
            patience_s=self.settings.patience,
            clock=self._in_flight.clock,
        )

        if self.objective is Objective.MAKESPAN:
            return ahead.rounds(budgets.for_makespan(), least_s)
        if not self._is_limited:
            even_s, sizes = self._even_rounds(budgets, start_s).likely()
            steady = self._excess.thrifty_tokens(self._steady.tokens, 0.0)
            sizes = list(dict.fromkeys([*sizes, steady])) if steady else sizes
            return ahead.rounds_in_passing(budgets.for_mean_ttft(), even_s, sizes, least_s)
        choices = [*budgets.choices(self.max_makespan_increase), budgets.for_makespan()]
        return ahead.limited_rounds(budgets.for_makespan(), choices, least_s)

    def _enqueue(self, waiting: Waiting) -> None:
        request = waiting.request
        left = waiting.left
        self._left_tokens += left
        waiting.work_s = self._work_s(left, waiting.done)
        waiting.context_work = waiting.work_s * (waiting.done + left / 2.0)
        if self.objective.needs_deadlines:
            waiting.rank = request.arrival_s + (math.inf if request.sla_ttft_s is None else request.sla_ttft_s)
        else:
            waiting.rank = waiting.work_s / max(request.weight, 1e-12) + self.settings.aging * request.arrival_s
        self._total_work_s += waiting.work_s
        self._waiting[waiting.index] = waiting
        self._queue.insert(waiting)

    def _work_s(self, tokens: int, context: int) -> float:
        """Seconds that these tokens take in one round on the slowest stage, its overhead left out."""
        tables = self._packer.tables
        return max(table.round_s(tokens) - table.tokens[0] + table.chunk_s(tokens, context) for table in tables)

    def _dequeue(self, index: int) -> Waiting:
        waiting = self._waiting.pop(index)
        self._queue.remove(waiting)
        self._total_work_s -= waiting.work_s
        self._left_tokens -= waiting.left
        if not self._waiting:
            self._total_work_s = 0.0
        return waiting

    def _release(self, waiting: Waiting) -> None:
        if waiting.index in self._started:
            self._started.discard(waiting.index)
            self._held_tokens -= waiting.request.prompt_tokens

    def _make_packer(self, longest_tokens: int) -> Packer:
        self._table_tokens = longest_tokens
        self._excess = RoundExcess(self.cost, self.chunk_multiple, longest_tokens)
        return Packer(
            self.cost,
            self.chunk_multiple,
            longest_tokens=longest_tokens,
            total_tokens=4 * longest_tokens,
            limits=self.limits,
        )
