"""Classes of requests, as traces name them by `priority`, and the weights that options give them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from db.errors import UserError
from tuner.plan.plan import MAX_WEIGHT, Request

FIELD = "--priority"


def parse_weights(text: str) -> dict[str, float]:
    """Weights by class, from `interactive=4,batch=1`. Raises UserError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not 0.0 <= weight <= MAX_WEIGHT or name in weights:
            allowed = f"NAME=WEIGHT,... is needed, each class once, weights from 0 to {MAX_WEIGHT:g}"
            raise UserError(FIELD, part.strip(), allowed)
        weights[name] = weight
    return weights


def weighted(requests: Sequence[Request], weights: Mapping[str, float]) -> tuple[Request, ...]:
    """Requests whose own weight is multiplied by their class's; classes without one keep theirs. Raises UserError."""
    found = {request.priority for request in requests if request.priority is not None}
    for name in weights:
        if name not in found:
            allowed = f"one of the workload's: {', '.join(sorted(found))}" if found else "the workload names none"
            raise UserError(FIELD, name, allowed)
    return tuple(
        replace(request, weight=request.weight * weights.get(request.priority or "", 1.0)) for request in requests
    )


def describe_classes(requests: Sequence[Request]) -> tuple[str, ...]:
    """A line on the classes that there are; none where requests have none."""
    counts = Counter(request.priority for request in requests)
    if set(counts) == {None}:
        return ()
    weights = {request.priority: request.weight for request in requests}
    parts = [
        f"{'without a class' if name is None else name}: {count} requests, weight {weights[name]:g}"
        for name, count in sorted(counts.items(), key=lambda each: (each[0] is None, each[0]))
    ]
    return (f"Classes: {'; '.join(parts)}.",)
