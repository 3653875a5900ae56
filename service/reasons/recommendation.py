"""The recommendation of `tune`: what to run, its speed, gain, cost and uncertainty, and the next command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from profiler.sequence.kind import SPKind
from service.reasons.sought import NAMES, factor_over, figure_in_words, one_card_in_words, simple_in_words
from service.reasons.words import elsewhere
from tuner.fit.uncertainty import A_GUESS, SPARSE, Coverage, share_missing
from tuner.plan.layout import Layout, layout_of
from tuner.plan.plan import Plan, Weights
from tuner.rounds.round_plan import Alternative
from tuner.rounds.schedule import Evaluation
from tuner.workload.objective import Objective

if TYPE_CHECKING:  # planning from a cost model file needs neither the database nor the fit
    from db.rows.hardware import Hardware
    from tuner.search.explanation import Explanation

LARGE_GAP = 0.05
MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The plan, the plans it is compared with, and the coverage of the measurements it depends on."""

    plan: Plan
    evaluation: Evaluation
    """What the cost model says of the plan's rounds."""
    objective: Objective = Objective.MAKESPAN
    hardware: Hardware | None = None
    mfu: float | None = None
    mfu_of: str = ""
    """What the utilisation is a share of."""
    price_per_gpu_hour: float | None = None
    one_card: Alternative | None = None
    simple: Alternative | None = None
    coverage: tuple[Coverage, ...] = ()
    close: tuple[str, ...] = ()
    """Layouts within the prediction's uncertainty of the plan's."""
    explanation: Explanation | None = None
    profile_command: str | None = None
    """Measures what is missing."""
    next_command: str | None = None
    measured: float | None = None
    """The figure sought of the best run, where plans were run."""

    @property
    def num_points(self) -> int:
        """Points that the plan depends on."""
        return sum(one.num_points for one in self.coverage)

    @property
    def num_missing(self) -> int:
        """Points among them that were not measured."""
        return sum(one.num_missing for one in self.coverage)

    @property
    def share_missing(self) -> float:
        """Share of them that was not measured."""
        return share_missing(self.coverage)

    @property
    def tokens_per_s(self) -> float:
        """New prompt tokens over the makespan."""
        return self._num_tokens / self.makespan_s

    @property
    def makespan_s(self) -> float:
        """Measured where it was, else predicted."""
        assert self.plan.predicted is not None
        measured_s = self.measured if self.objective is Objective.MAKESPAN else None
        return measured_s or self.plan.predicted.makespan_s

    @property
    def sought(self) -> float:
        """The figure that the plan was made for, measured where it was, else predicted."""
        return self.evaluation.sought(self.objective) if self.measured is None else self.measured

    @property
    def cost_per_million_tokens(self) -> float | None:
        """In the price's currency, of all ranks over the makespan."""
        if self.price_per_gpu_hour is None:
            return None
        hours = self.makespan_s * self.plan.parallel.world_size / 3600.0
        return 1e6 * hours * self.price_per_gpu_hour / self._num_tokens

    @property
    def gain_over_one_card(self) -> float | None:
        """How many times as fast, by what is sought; None of deadlines."""
        return self._gain(self.one_card)

    @property
    def gain_over_simple(self) -> float | None:
        """Likewise."""
        return self._gain(self.simple)

    @property
    def _num_tokens(self) -> int:
        return sum(request.new_tokens for request in self.plan.requests)

    def _gain(self, other: Alternative | None) -> float | None:
        if other is None or other.rounds is None:
            return None
        return factor_over(self.objective, self.sought, other.rounds.evaluation.sought(self.objective))

    def warning(self) -> str | None:
        """Said before anything else where too little was measured."""
        if self.share_missing <= SPARSE:
            return None
        ops = ", ".join(f"{one.op} {one.num_missing} of {one.num_points}" for one in self.coverage if one.num_missing)
        kind = "A GUESS" if self.share_missing > A_GUESS else "CAREFUL"
        said = (
            f"{kind}: {self.num_missing} of the {self.num_points} points that this plan leans on were not measured "
            f"({ops}); the figures below may be far off."
        )
        return f"{said} Measure them: {self.profile_command}" if self.profile_command else said

    def pairs(self) -> list[tuple[str, str]]:
        """A word and a sentence for each question."""
        pairs = [
            ("run", self._run()),
            ("that is", layout_in_words(layout_of(self.plan.parallel))),
            ("takes", self._takes()),
        ]
        cost = self.cost_per_million_tokens
        if cost is not None:
            pairs.append(("costs", f"{cost:.4g} a million prompt tokens at {self.price_per_gpu_hour:g} a GPU hour"))
        pairs.append(("gains", self._gains()))
        pairs.append(("sure", self._sure()))
        changes = elsewhere(self.explanation) if self.explanation else []
        if changes:
            by = "" if self.objective is Objective.MAKESPAN else f" and {NAMES[self.objective]}"
            pairs.append(("changes", f"By plans of equal chunks{by}: {'; '.join(changes)}."))
        if self.next_command:
            pairs.append(("next", self.next_command))
        return [(word, text) for word, text in pairs if text]

    def _run(self) -> str:
        plan = self.plan
        name, ranks = str(plan.model.get("name") or "the cost model's engine"), plan.parallel.world_size
        device = f"x {self.hardware.device}" if self.hardware else "ranks" if ranks > 1 else "rank"
        window = "" if plan.window is None else f", at most {plan.window} in flight"
        rounds = f"{len(plan.rounds)} round{'s' if len(plan.rounds) > 1 else ''}"
        return f"{name} on {ranks} {device} as {layout_of(plan.parallel)}: {rounds} by {plan.policy}{window}"

    def _takes(self) -> str:
        predicted = self.plan.predicted
        assert predicted is not None
        if self.measured is not None:
            figure = figure_in_words(self.objective, self.measured)
            of = "" if self.objective is Objective.MAKESPAN else f" {NAMES[self.objective]},"
            first = f"{figure}{of} measured on this machine"
        elif len(self.plan.requests) == 1:
            first = f"{predicted.makespan_s:.4g} s to the first token"
        else:
            mean_s = self.evaluation.mean_ttft_s
            first = f"{predicted.makespan_s:.4g} s for all, {mean_s:.4g} s to a first token in the mean"
            if self.objective is Objective.P99_TTFT:
                first += f", {self.sought:.4g} s at the 99th percentile"
        if self.objective.needs_deadlines and self.measured is None:
            first += f", {figure_in_words(self.objective, self.sought)}"
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%} of {self.mfu_of}"
        return f"{first}, {self.tokens_per_s:,.0f} prompt tokens/s{mfu}"

    def _gains(self) -> str:
        parts = []
        alone, simple = self.one_card, self.simple
        if alone is not None and self.plan.parallel.world_size > 1:
            if alone.rounds is not None:
                parts.append(one_card_in_words(self.objective, self.sought, alone.rounds.evaluation))
            elif alone.refusal:
                parts.append(f"one card cannot: {alone.refusal}")
        if simple is not None and simple.rounds is not None:
            name, theirs = f"{simple.layout} by {simple.rounds.policy}", simple.rounds.evaluation
            parts.append(simple_in_words(self.objective, self.evaluation, self.measured, theirs, name))
        return "; ".join(parts)

    def _sure(self) -> str:
        predicted = self.plan.predicted
        assert predicted is not None
        parts = []
        if self.measured is not None:
            parts.append(f"predicted {figure_in_words(self.objective, self.evaluation.sought(self.objective))}")
        elif self.share_missing > A_GUESS:
            parts.append("not at all")
        elif predicted.uncertainty is not None:
            least, most = ((1.0 + sign * predicted.uncertainty) * predicted.makespan_s for sign in (-1, 1))
            of = "" if self.objective is Objective.MAKESPAN else " of the makespan"
            parts.append(f"give or take {predicted.uncertainty:.1%}{of}: {max(0.0, least):.4g} to {most:.4g} s")
        elif self.hardware is None:
            parts.append("as sure as the cost model's file")
        if self.num_points:
            parts.append(f"{self.num_points - self.num_missing} of {self.num_points} points that it leans on measured")
        if self.close and self.measured is None:
            more = f" and {len(self.close) - MOST_NAMED} more" if len(self.close) > MOST_NAMED else ""
            parts.append(f"too close to tell: {', '.join(self.close[:MOST_NAMED])}{more}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "objective": self.objective,
            "sought": self.sought,
            "makespan_s": self.makespan_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "mfu_of": self.mfu_of or None,
            "cost_per_million_tokens": self.cost_per_million_tokens,
            "gain_over_one_card": self.gain_over_one_card,
            "gain_over_simple": self.gain_over_simple,
            "one_card": self.one_card and self.one_card.to_json(self.objective),
            "simple": self.simple and self.simple.to_json(self.objective),
            "coverage": [one.to_json() for one in self.coverage],
            "warning": self.warning(),
            "close": list(self.close),
            "words": dict(self.pairs()),
            "next": self.next_command,
        }


def gap_in_words(plan: Plan) -> str | None:
    """What a large distance from the bound means; None where it is small."""
    predicted = plan.predicted
    if predicted is None or predicted.gap is None or predicted.gap <= LARGE_GAP:
        return None
    return (
        f"Why {predicted.gap:.1%}: the bound gives every round the cheapest way of being run and lets chunks end "
        "anywhere, which no plan can do at once; the plan may be the best all the same."
    )


def layout_in_words(layout: Layout) -> str:
    """What the short name of a layout means."""
    parts = []
    if layout.pp_size > 1:
        groups = f", each with {layout.virtual_stages} groups of layers" if layout.virtual_stages > 1 else ""
        parts.append(f"{layout.pp_size} pipeline stages{groups}")
    if layout.sp_size > 1:
        parts.append(f"{layout.sp_size} ranks share the tokens of each round ({layout.sp_kind})")
    if layout.tp_size > 1:
        beside = ", norms cut by tokens too" if layout.sp_kind is SPKind.MEGATRON else ""
        parts.append(f"{layout.tp_size} ranks share every matrix (tensor parallel{beside})")
    if layout.weights is Weights.GATHERED:
        parts.append("each keeps a share of the weights and gathers the rest")
    return "; ".join(parts) or "one rank runs the whole model"
