"""Rounds that grow while the pipeline fills and shrink while it drains, for stages of several groups.

Such a stage has other passes to run while it waits for a longer round, so that rounds may about double as the pipeline
fills: the first round reaches the last stage, and the last one leaves it, after a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.plan.plan import Chunk, Request, Round

MOST_HALVINGS = 4
"""How often the first and the last round are halved, at most."""


def ramps(requests: Sequence[Request], rounds: Sequence[Round], multiple: int, width: int = 1) -> Iterator[list[Round]]:
    """The rounds with the first `width` and the last `width` cut into so many halves of one, quarters, ..., each end to
    every depth."""
    if len(rounds) < 2 * width:
        return
    start, end = [c for r in rounds[:width] for c in r], [c for r in rounds[-width:] for c in r]
    for head in range(MOST_HALVINGS + 1):
        for tail in range(MOST_HALVINGS + 1):
            if head or tail:
                first = _cut(requests, start, _halves(head, width)[::-1], multiple) if head else rounds[:width]
                last = _cut(requests, end, _halves(tail, width), multiple) if tail else rounds[-width:]
                yield [*first, *rounds[width:-width], *last]


def _halves(depth: int, width: int) -> list[float]:
    """`width` times 1/2, 1/4, ..., the smallest twice as often, of the whole of `width` rounds."""
    shares = [0.5**place for place in range(1, depth + 1)] + [0.5**depth]
    return [share / width for share in shares for _ in range(width)]


def _cut(requests: Sequence[Request], chunks: Sequence[Chunk], shares: Sequence[float], multiple: int) -> list[Round]:
    """Tokens in order, in rounds of these shares of them; chunks are cut on their requests' grids."""
    total = sum(chunk.tokens for chunk in chunks)
    pieces: list[list[Chunk]] = [[]]
    ends = [sum(shares[: place + 1]) * total for place in range(len(shares))]
    done = 0
    for chunk in chunks:
        start = chunk.start
        while start < chunk.end:
            while len(pieces) < len(shares) and ends[len(pieces) - 1] - done < multiple / 2:
                pieces.append([])
            wanted = ends[len(pieces) - 1] - done if len(pieces) < len(shares) else chunk.end - start
            origin = requests[chunk.request].cached_tokens
            end = origin + round((start + wanted - origin) / multiple) * multiple
            end = chunk.end if wanted >= chunk.end - start else min(max(end, start + 1), chunk.end)
            if end < chunk.end and (end - origin) % multiple:
                end = min(start + multiple, chunk.end)
            pieces[-1].append(Chunk(chunk.request, start, end - start))
            done += end - start
            start = end
    return [_joined(piece) for piece in pieces if piece]


def _joined(piece: Sequence[Chunk]) -> Round:
    """A round of these chunks, those of one request as one."""
    joined: dict[int, Chunk] = {}
    for chunk in piece:
        before = joined.get(chunk.request)
        start, tokens = (before.start, before.tokens) if before else (chunk.start, 0)
        joined[chunk.request] = Chunk(chunk.request, start, tokens + chunk.tokens)
    return tuple(joined.values())
