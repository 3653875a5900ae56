"""Why a run took longer or shorter than its plan predicts, in words, from the times of its rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from db.rows.runs import RoundTime, StoredRun
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan

DRIFT = 0.02
"""Shares up to this are what a machine drifts from run to run."""
HELD_UP = 0.5
"""Of the whole difference: a single round that has more of it was held up."""
EXPLAINED = 0.5
"""The machine's own speed explains a difference when less than this share of it remains without it."""
ALIKE = 0.35
"""Rounds are slower alike when early and late ones differ by less than this share of the difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of a stage on the average: at work, and all in all."""

    work_s: float
    makespan_s: float

    @property
    def waiting_s(self) -> float:
        """Filling, draining, hand-offs, and waiting for longer rounds."""
        return self.makespan_s - self.work_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetails:
    """A run with its plan, its rounds, and the makespans of other runs of the same plan on the same hardware."""

    run: StoredRun
    plan: Plan
    rounds: Sequence[RoundTime]
    others_s: Sequence[float] = ()

    @property
    def name(self) -> str:
        """Layout and policy."""
        return f"{layout_of(self.plan.parallel)} {self.plan.policy or ''}".strip()

    @property
    def error(self) -> float | None:
        """How much longer it took than predicted, as a share."""
        measured_s, predicted_s = self.run.makespan_s, self.run.predicted_makespan_s
        return measured_s / predicted_s - 1.0 if measured_s and predicted_s else None

    @property
    def measured(self) -> Times | None:
        """As it ran; None without times of rounds."""
        return self._times(self.run.makespan_s, {each: each.finish_s - each.start_s for each in self.rounds})

    @property
    def predicted(self) -> Times | None:
        """As it was predicted; None where rounds were not."""
        seconds = {each: each.predicted_s for each in self.rounds if each.predicted_s is not None}
        return self._times(self.run.predicted_makespan_s, seconds) if len(seconds) == len(self.rounds) else None

    def _times(self, makespan_s: float | None, seconds: Mapping[RoundTime, float]) -> Times | None:
        if makespan_s is None or not seconds:
            return None
        return Times(work_s=sum(seconds.values()) / self.plan.parallel.pp_size, makespan_s=makespan_s)


def run_in_words(details: RunDetails, profile_command: str, run_command: str) -> list[tuple[str, str]]:
    """A word and a sentence for each question; commands: what measures the hardware anew, and what runs the plan."""
    run = details.run
    pairs = [("run", f"{run.id}, {details.name}, {run.status}, {run.started_at:%Y-%m-%d %H:%M} UTC")]
    if run.makespan_s is None:
        return [*pairs, ("failed", run.error or "it has not ended")]
    if details.error is None or run.predicted_makespan_s is None:
        return [*pairs, ("took", f"{run.makespan_s:.4g} s; its plan predicts nothing")]
    pairs.append(
        ("took", f"{run.makespan_s:.4g} s, predicted {run.predicted_makespan_s:.4g} s: {_longer(details.error)}")
    )
    measured, predicted = details.measured, details.predicted
    if details.others_s:
        usual_s = median(details.others_s)
        pairs.append(
            (
                "others",
                f"{len(details.others_s)} more of this plan here: {usual_s:.4g} s in the median, this one "
                f"{_longer(run.makespan_s / usual_s - 1.0)}",
            )
        )
    if run.slowdown is not None:
        pairs.append(("machine", in_profile_words(run.slowdown, _at_profiled_speed(run))))
    if measured is None or predicted is None:
        return pairs
    work_s, waiting_s = measured.work_s - predicted.work_s, measured.waiting_s - predicted.waiting_s
    pairs.append(("work", f"{_more(work_s)} of rounds a stage ({_by_stage(details.rounds)})"))
    pairs.append(("waiting", f"{_more(waiting_s)} a stage: filling, draining, hand-offs, longer rounds elsewhere"))
    worst = max(details.rounds, key=_excess_s)
    ratio = (worst.finish_s - worst.start_s) / worst.predicted_s if worst.predicted_s else 0.0
    pairs.append(("worst", f"round {worst.round} on stage {worst.stage}: {ratio:.2f} times its prediction"))
    so, command = _conclusion(details, work_s, waiting_s, worst, profile_command, run_command)
    return [*pairs, ("so", so), *([("next", command)] if command else [])]


def _conclusion(
    details: RunDetails, work_s: float, waiting_s: float, worst: RoundTime, profile_command: str, run_command: str
) -> tuple[str, str | None]:
    assert details.error is not None and details.run.makespan_s is not None
    if abs(details.error) <= DRIFT:
        return f"within {DRIFT:.0%}, which a machine drifts from run to run: nothing to explain.", None
    usual_s = median(details.others_s) if details.others_s else None
    without = _at_profiled_speed(details.run)
    if without is not None and abs(without) < EXPLAINED * abs(details.error):
        words = "slower" if details.error > 0.0 else "faster"
        return f"the machine itself was {words} than in its profile, a product beside the run too.", profile_command
    difference_s = work_s + waiting_s
    if difference_s > 0.0 and _excess_s(worst) > HELD_UP * difference_s:
        return "one round was held up, not the plan: run it again.", run_command
    if usual_s is not None and abs(details.run.makespan_s / usual_s - 1.0) > DRIFT:
        return "the machine was not as it was on the other runs: run it again when it is quiet.", run_command
    if abs(waiting_s) > abs(work_s):
        return "stages waited, their rounds took what was predicted: links, or the host, were slower.", profile_command
    early, late = _early_and_late(details.rounds)
    if abs(late - early) > ALIKE * abs(details.error):
        where = "late rounds, over long contexts: attention" if abs(late) > abs(early) else "early rounds, from rest"
        return f"most of it lies in {where}.", profile_command
    words = "slower" if details.error > 0.0 else "faster"
    return f"all rounds were {words} alike: the machine is not as it was when it was profiled.", profile_command


def in_profile_words(slowdown: float, error: float | None) -> str:
    """How fast the machine was beside a run, and how far the prediction is off without that."""
    share = slowdown - 1.0
    words = "as fast as in its profile" if abs(share) < 0.005 else f"{_longer(share)} than in its profile"
    off = "" if error is None else f"; without that the prediction is off by {error:+.1%}"
    return f"The machine, by one product beside the run: {words}{off}"


def _at_profiled_speed(run: StoredRun) -> float | None:
    """Relative error of the prediction, had the machine been as fast as in its profile."""
    if run.slowdown is None or not run.makespan_s or not run.predicted_makespan_s:
        return None
    return run.predicted_makespan_s * run.slowdown / run.makespan_s - 1.0


def _early_and_late(rounds: Sequence[RoundTime]) -> tuple[float, float]:
    """How much longer the first and the last third of the rounds took than predicted, as shares."""
    count = 1 + max(each.round for each in rounds)

    def share(first: int, end: int) -> float:
        chosen = [each for each in rounds if first <= each.round < end]
        predicted_s = sum(each.predicted_s or 0.0 for each in chosen)
        return sum(map(_excess_s, chosen)) / predicted_s if predicted_s else 0.0

    third = max(1, count // 3)
    return share(0, third), share(count - third, count)


def _by_stage(rounds: Sequence[RoundTime]) -> str:
    by_stage: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in rounds:
        by_stage[each.stage][0] += each.finish_s - each.start_s
        by_stage[each.stage][1] += each.predicted_s or 0.0
    shares = {stage: took / expected - 1.0 for stage, (took, expected) in sorted(by_stage.items()) if expected}
    if len(shares) > 4:
        return f"stages by {min(shares.values()):+.1%} to {max(shares.values()):+.1%}"
    return ", ".join(f"stage {stage} {share:+.1%}" for stage, share in shares.items())


def _excess_s(each: RoundTime) -> float:
    return each.finish_s - each.start_s - (each.predicted_s or 0.0)


def _longer(share: float) -> str:
    return f"{abs(share):.1%} {'slower' if share > 0.0 else 'faster'}"


def _more(seconds: float) -> str:
    amount = f"{abs(seconds):.3g} s" if abs(seconds) >= 0.9995 else f"{1e3 * abs(seconds):.3g} ms"
    return f"{amount} {'more' if seconds > 0.0 else 'less'}"
