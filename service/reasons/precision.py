"""Compares precisions: which are allowed by their loss, and how fast each would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from db.errors import UserError
from db.files.documents import located, parse, read_json
from profiler.model import PRECISIONS, ModelShape
from tuner.plan.plan import Plan
from tuner.rounds.schedule import Evaluation
from tuner.waterfall.steps import Kind
from tuner.workload.objective import Objective

AUTO = "auto"
_FLAG = "--quantize-reports"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionStep:
    """A precision's best plan, or why it is not taken."""

    precision: str
    loss: float | None
    """Relative rise of perplexity; None where unknown."""
    evaluation: Evaluation | None = None
    """What the cost model says of the plan's rounds."""
    attention_share: float | None = None
    """Of the seconds of the rounds: what no format of the linears makes less."""
    refusal: str | None = None

    def to_json(self, objective: Objective) -> dict[str, object]:
        """For programs."""
        made = self.evaluation
        return {
            "precision": self.precision,
            "loss": self.loss,
            "makespan_s": made and made.makespan_s,
            "sought": made and made.sought(objective),
            "attention_share": self.attention_share,
            "refusal": self.refusal,
        }


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is read of a report of `isochunk quantize --json`."""

    precision: str
    perplexity_loss: float | None = None


def read_losses(paths: Sequence[str]) -> dict[str, float]:
    """By what share perplexity rose in each precision, from reports of `isochunk quantize --json`."""
    found: dict[str, float] = {}
    for path in paths:
        content = read_json(Path(path), field=_FLAG)
        if not isinstance(content, Mapping):
            raise UserError(_FLAG, path, "must be a report of isochunk quantize --json")
        known = {name: content[name] for name in ("precision", "perplexity_loss") if name in content}
        with located(Path(path)):
            judged = parse(_Judged, known)
        if judged.perplexity_loss is None or not isfinite(judged.perplexity_loss):
            raise UserError(_FLAG, path, "tells no perplexity: quantize with --held-out")
        found[judged.precision] = judged.perplexity_loss
    return found


def compare_precisions(
    shape: ModelShape,
    own: str,
    measured: Sequence[str],
    losses: Mapping[str, float],
    most_loss: float,
    plan: Callable[[str], tuple[Plan, Evaluation]],
) -> Iterator[PrecisionStep]:
    """The model's `own` precision and every other that was measured with the same activations: planned, or refused.

    Raises nothing for one that cannot be planned: the step says why.
    """
    around = PRECISIONS[own].activations
    others = (name for name in measured if name != own and PRECISIONS[name].activations == around)
    for name in (own, *others):
        loss = 0.0 if name == own else losses.get(name.replace(f"+{around.name}", ""))
        refusal = _refusal(shape, name, loss, most_loss)
        if refusal is not None:
            yield PrecisionStep(precision=name, loss=loss, refusal=refusal)
            continue
        try:
            planned, evaluation = plan(name)
        except UserError as error:
            yield PrecisionStep(precision=name, loss=loss, refusal=str(error))
            continue
        assert planned.predicted is not None
        kinds = {kind: sum(seconds) for kind, seconds in (planned.predicted.round_kinds or {}).items()}
        all_s = sum(kinds.values())
        share = kinds.get(Kind.ATTENTION.value, 0.0) / all_s if all_s else None
        yield PrecisionStep(precision=name, loss=loss, evaluation=evaluation, attention_share=share)


def best_precision(steps: Sequence[PrecisionStep], objective: Objective) -> str:
    """The best that may be taken, of equals the first. Raises `UserError` where there is none."""
    scores = {step.precision: step.evaluation.score(objective) for step in steps if step.evaluation is not None}
    if not scores:
        raise UserError("--precision", AUTO, "none can run: " + "; ".join(f"{s.precision}: {s.refusal}" for s in steps))
    return min(scores, key=lambda name: scores[name])


def _refusal(shape: ModelShape, name: str, loss: float | None, most_loss: float) -> str | None:
    if shape.quantization is not None:
        refused = shape.quantization.refusal(PRECISIONS[name].linears)
        if refused is not None:
            return refused
    if loss is None:
        return f"its loss is not known: isochunk quantize --held-out TEXT --json, and {_FLAG}"
    return None if loss <= most_loss else f"loses {loss:.2%} of perplexity, more than {most_loss:.2%}"
