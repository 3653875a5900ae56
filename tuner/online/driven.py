"""Runs the online planner in simulated time, with a problem's arrivals, and returns its rounds."""

from __future__ import annotations

from tuner.online.online_planner import OnlinePlanner
from tuner.online.queue import drive
from tuner.online.settings import AS_IT_COMES, OnlineSettings
from tuner.plan.plan import Chunk, Round
from tuner.rounds.problem import Problem
from tuner.serving.answers import Beside


class Driven:
    """The online planner as a scheduler: rounds are back when its own clock says so."""

    def __init__(self, problem: Problem, settings: OnlineSettings) -> None:
        self._problem = problem
        self._planner = OnlinePlanner(
            problem.cost,
            window=problem.window,
            chunk_multiple=problem.chunk_multiple,
            limits=problem.limits,
            objective=problem.objective,
            max_makespan_increase=problem.max_makespan_increase,
            settings=settings,
            more_to_come=problem.is_timed,
        )
        self._index: list[int] = []  # of the problem's requests, by the planner's

    @property
    def has_work(self) -> bool:
        """Whether any request that came has tokens to run."""
        return self._planner.num_waiting > 0

    def add(self, index: int, now_s: float) -> None:
        """A request has arrived."""
        self._planner.add(self._problem.requests[index], now_s)
        self._index.append(index)

    def next_round(self, now_s: float, beside: Beside) -> Round:
        """The next round, with what is decoded beside it."""
        while self._planner.expected_s + self._problem.cost.return_s <= now_s:
            self._planner.finish_round()
        chunks = self._planner.next_round(now_s, beside)
        assert chunks is not None
        return tuple(Chunk(self._index[chunk.request], chunk.start, chunk.tokens) for chunk in chunks)


def online_rounds(problem: Problem, settings: OnlineSettings = AS_IT_COMES) -> list[Round]:
    """The online planner's rounds: it sees a request when it arrives and is asked whenever stage 0 can take a round."""
    return drive(problem, Driven(problem, settings), is_timed=True)
