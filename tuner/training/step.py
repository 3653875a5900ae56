"""How long a training step takes by a cost model, and how far it is above what any order of its rounds takes."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.plan.cost_model import CostModel
from tuner.training.order import Recompute, TrainingTask, stage_tasks
from tuner.training.work import StepWork

# Products of a backward for each of a forward: two for the gradients of both operands; attention has two products
# forward and five backward, its scores once more among them (Dao, FlashAttention-2, 2023).
PRODUCTS_BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedStep:
    """A step by the cost model."""

    seconds: float
    lower_bound_s: float  # of any order of these rounds with this recomputation
    bubble_share: float

    @property
    def gap(self) -> float:
        """How far above the bound."""
        return self.seconds / self.lower_bound_s - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What a step does beside its layers; nothing where it is not known."""

    token_s: float = 0.0  # of a token on the last stage: output matrix and loss, forward and backward
    round_s: float = 0.0  # of a round's backward: its gradients of all weights are added to the sums
    update_s: float = 0.0  # of the optimizer, after the last backward


NO_ENDS = Ends()


@dataclass(frozen=True, slots=True)
class _Seconds:
    """Of each round in each stage, [round][stage]."""

    forward: list[list[float]]
    backward: list[list[float]]
    hop: list[float]


def predict_step(work: StepWork, cost: CostModel, *, ends: Ends = NO_ENDS) -> PredictedStep:
    """Run the step's tasks by the cost model of its forward rounds."""
    if cost.pp_size != work.parallel.pp_size:
        cost = cost.for_pp_size(work.parallel.pp_size)
    seconds = _seconds(work, cost, ends)
    makespan, busy = _simulate(work, seconds)
    return PredictedStep(
        seconds=makespan + ends.update_s,
        lower_bound_s=_bound(work, seconds) + ends.update_s,
        bubble_share=1.0 - sum(busy) / (makespan * len(busy)),
    )


def _seconds(work: StepWork, cost: CostModel, ends: Ends = NO_ENDS) -> _Seconds:
    plain = cost.without_attention()
    forward, backward, hop = [], [], []
    for chunks in work.rounds:
        pieces = [(chunk.tokens, chunk.start, False) for chunk in chunks]  # `ends` has the head of all tokens
        tokens = sum(chunk.tokens for chunk in chunks)
        whole = [cost.stage_seconds(stage, pieces) for stage in range(cost.pp_size)]
        products = [plain.stage_seconds(stage, pieces) for stage in range(cost.pp_size)]
        again = {
            Recompute.NONE: [0.0] * len(whole), Recompute.LINEAR: products, Recompute.LAYER: whole,
            Recompute.ROUND: whole,
        }[work.recompute]  # fmt: skip
        forward.append([*whole[:-1], whole[-1] + ends.token_s * tokens])  # the head's backward runs in its forward
        backward.append([
            PRODUCTS_BACKWARD * product + ATTENTION_BACKWARD * (all_of - product) + more + ends.round_s
            for all_of, product, more in zip(whole, products, again, strict=True)
        ])  # fmt: skip
        hop.append(float(cost.hop_seconds(tokens)))
    return _Seconds(forward, backward, hop)


def _simulate(work: StepWork, seconds: _Seconds) -> tuple[float, list[float]]:
    """The end of the last task, and the busy seconds of each stage.

    start(forward i, k)  = max(end of the task before on k, end(forward i, k-1) + hop)
    start(backward i, k) = max(end of the task before on k, end(backward i, k+1) + hop)
    """
    units, count = work.units, work.parallel.pp_size
    queues = [
        list(stage_tasks(units, stage=stage, pp_size=count, order=work.order)) for stage in range(count)
    ]  # fmt: skip
    ends: dict[tuple[int, bool, int], float] = {}
    places, free, busy = [0] * count, [0.0] * count, [0.0] * count
    left = sum(map(len, queues))
    while left:
        moved = False
        for stage in range(count):
            while places[stage] < len(queues[stage]):
                task = queues[stage][places[stage]]
                ready = _ready(task, stage, count, ends, seconds)
                if ready is None:
                    break
                took = (seconds.backward if task.is_backward else seconds.forward)[task.unit.round_index][stage]
                free[stage] = max(free[stage], ready) + took
                busy[stage] += took
                ends[task.unit.index, task.is_backward, stage] = free[stage]
                places[stage] += 1
                left -= 1
                moved = True
        assert moved, "stages wait for one another"
    return max(free), busy


def _ready(
    task: TrainingTask, stage: int, count: int, ends: dict[tuple[int, bool, int], float], seconds: _Seconds
) -> float | None:
    """When what a task takes in has arrived; None where it has not been made."""
    before = stage + 1 if task.is_backward else stage - 1
    if not 0 <= before < count:
        return 0.0
    made = ends.get((task.unit.index, task.is_backward, before))
    return None if made is None else made + seconds.hop[task.unit.round_index]


def _bound(work: StepWork, seconds: _Seconds) -> float:
    """No order is shorter: a stage has all its tasks to run after its first round came through the stages before it,
    and its last backward still has to go through them."""
    count, rounds = work.parallel.pp_size, range(len(work.rounds))
    bounds = []
    for stage in range(count):
        own = work.accumulate * sum(seconds.forward[index][stage] + seconds.backward[index][stage] for index in rounds)
        there = min(sum(seconds.forward[index][:stage]) + stage * seconds.hop[index] for index in rounds)
        back = min(sum(seconds.backward[index][:stage]) + stage * seconds.hop[index] for index in rounds)
        bounds.append(own + there + back)
    return max(bounds)
