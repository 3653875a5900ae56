"""Why a layout won, or cannot run, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from service.reasons.sought import NAMES
from tuner.workload.objective import Objective

if TYPE_CHECKING:  # planning from a cost model file needs neither the database nor the fit
    from tuner.search.explanation import Explanation, Parts, Winner
    from tuner.search.layouts import Candidate

MOST_RIVALS = 3
SMALLEST_SHARE = 0.005
"""Parts below this share of the whole are not named."""
KINDS = (
    ("compute_s", "compute"),
    ("attention_s", "attention"),
    ("messages_s", "communication"),
    ("bubble_s", "bubble"),
)


def explanation_in_words(why: Explanation) -> str:
    """One paragraph: where the seconds sought of the best layout and of its rivals go; nothing where they add up to
    nothing that is sought."""
    if not why.families or why.parts_of is not why.objective:
        return ""
    best, parts = why.families[0], why.parts[0]
    is_makespan = why.objective is Objective.MAKESPAN
    of = "" if is_makespan else f"{NAMES[why.objective]} of "
    sentences = [f"Why {best.layout}: of its {of}{parts.total_s:.4g} s, {_shares(parts)}."]
    for rival, theirs in list(zip(why.families, why.parts, strict=True))[1 : 1 + MOST_RIVALS]:
        longer = theirs.total_s / parts.total_s - 1.0
        what = (
            f"{rival.layout} takes {longer:.1%} longer"
            if is_makespan
            else f"That of {rival.layout} is {longer:.1%} longer"
        )
        sentences.append(f"{what}: {_difference(theirs, parts)}.")
    return " ".join(sentences)


def elsewhere(why: Explanation) -> list[str]:
    """At which links, prompt lengths and batches another layout would win, by plans of equal chunks."""
    return [
        *_changes(why.by_link, lambda one: one.link_factor, _links),
        *_changes(why.by_length, lambda one: one.prompt_tokens, lambda one: f"{one.prompt_tokens} tokens a prompt"),
        *_changes(why.by_batch, lambda one: one.num_requests, lambda one: f"{one.num_requests} prompts"),
    ]


def _shares(parts: Parts) -> str:
    shares = [(getattr(parts, field) / parts.total_s, name) for field, name in KINDS]
    named = [f"{share:.0%} {name}" for share, name in shares if share >= SMALLEST_SHARE]
    return ", ".join(named)


def _difference(theirs: Parts, ours: Parts) -> str:
    """The parts in which the other layout takes longer, or less, the largest first."""
    more = [((getattr(theirs, field) - getattr(ours, field)), name) for field, name in KINDS]
    named = [
        f"{1e3 * abs(seconds):.3g} ms {'more' if seconds > 0 else 'less'} {name}"
        for seconds, name in sorted(more, key=lambda each: -abs(each[0]))
        if abs(seconds) >= SMALLEST_SHARE * ours.total_s
    ]
    return ", ".join(named) or "a little more of everything"


def _changes(winners: Sequence[Winner], place: Callable[[Winner], float], words: Callable[[Winner], str]) -> list[str]:
    """Where along an axis the winner changes; nothing where one wins everywhere."""
    fitting = sorted((winner for winner in winners if winner.layout is not None), key=place)
    stretches = [list(group) for _, group in groupby(fitting, key=lambda winner: winner.layout)]
    if len(stretches) < 2:
        return []
    (*_, last), *others = stretches
    return [f"up to {words(last)} {last.layout}", *(f"from {words(first)} on {first.layout}" for first, *_ in others)]


def _links(winner: Winner) -> str:
    factor = winner.link_factor
    if factor == 1.0:
        return "these links"
    return f"links {factor:g} times as fast" if factor > 1.0 else f"1/{round(1 / factor)} of the links' speed"


def refusals_in_words(candidates: Iterable[Candidate]) -> list[str]:
    """Each reason once, beginning with a layout that it refuses and how many more there are."""
    refused: dict[str, list[str]] = {}
    for one in candidates:
        if one.refusal:
            refused.setdefault(one.refusal, []).append(str(one.layout))
    return [
        f"{layouts[0]}{f' and {len(layouts) - 1} more' if len(layouts) > 1 else ''}: {reason}"
        for reason, layouts in refused.items()
    ]
