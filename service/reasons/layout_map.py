"""The picture of why a layout won: where the seconds go, and which layout wins at which prompt length and link."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from service.pictures.svg import COLOURS, WIDTH, Panel, box, document, text
from service.reasons.sought import NAMES
from tuner.search.explanation import Explanation, Winner
from tuner.workload.objective import Objective

PARTS = (("compute_s", "compute", "#0072B2"), ("attention_s", "attention", "#56B4E9"),
         ("messages_s", "communication", "#D55E00"), ("bubble_s", "bubble", "#BBBBBB"))  # fmt: skip
LEFT, ROW, CELL_HEIGHT, MOST_BARS = 210, 24, 36, 8


def drawing(why: Explanation) -> str:
    """The picture as SVG."""
    bars, bars_end = _bars(why)
    cells, end = _map(why, bars_end + 40)
    return document([Panel(end, (*bars, *cells))])


def _bars(why: Explanation) -> tuple[list[str], int]:
    """A bar for the best layout of each family, and where they end."""
    of = "" if why.objective is Objective.MAKESPAN else f" of the {NAMES[why.parts_of]}"
    out = [text(12, 24, f"Where the seconds{of} go: the best layout of each family", bold=True)]
    x = LEFT
    for _, name, colour in PARTS:
        out += [box(x, 36, 12, 12, colour), text(x + 17, 47, name, kind="soft")]
        x += 40 + 8 * len(name)
    found = list(zip(why.families, why.parts, strict=True))[:MOST_BARS]
    longest = max((parts.total_s for _, parts in found), default=1.0)
    scale = (WIDTH - LEFT - 90) / longest
    y = 60
    for candidate, parts in found:
        out.append(text(LEFT - 8, y + 15, str(candidate.layout), anchor="end"))
        x = LEFT
        for field, name, colour in PARTS:
            seconds = getattr(parts, field)
            out.append(box(x, y, scale * seconds, ROW - 6, colour, f"{name}: {seconds:.4g} s"))
            x += scale * seconds
        out.append(text(x + 6, y + 15, f"{parts.total_s:.4g} s"))
        y += ROW
    return out, y


def _map(why: Explanation, top: int) -> tuple[list[str], int]:
    """The map, prompt length to the right and links upwards, with its legend; and where it ends."""
    if not why.map:
        return [], top
    lengths = sorted({winner.prompt_tokens for winner in why.map})
    factors = sorted({winner.link_factor for winner in why.map}, reverse=True)
    names = list(dict.fromkeys(winner.layout.family for winner in why.map if winner.layout))
    colour_of = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    width = (WIDTH - LEFT - 20) / len(lengths)
    out = [text(12, top, "Which layout wins: one prompt, by its length and the speed of all links", bold=True)]
    top += 16
    for row, factor in enumerate(factors):
        y = top + row * CELL_HEIGHT
        out.append(text(LEFT - 8, y + CELL_HEIGHT / 2 + 4, _speed(why, factor), anchor="end"))
        for column, length in enumerate(lengths):
            winner = next(one for one in why.map if (one.prompt_tokens, one.link_factor) == (length, factor))
            x = LEFT + column * width
            if winner.layout is None:
                out.append(box(x, y, width - 2, CELL_HEIGHT - 2, "#8884", "does not fit"))
                continue
            out.append(box(x, y, width - 2, CELL_HEIGHT - 2, colour_of[winner.layout.family], _title(winner)))
            lines = _short(winner)
            for place, words in enumerate(lines):
                at = y + CELL_HEIGHT / 2 + 4 + 12 * (place - (len(lines) - 1) / 2)
                out.append(
                    f'<text x="{x + width / 2 - 1:.1f}" y="{at:.1f}" text-anchor="middle" class="light" '
                    f'font-size="11">{escape(words)}</text>'
                )
    y = top + len(factors) * CELL_HEIGHT
    for column, length in enumerate(lengths):
        out.append(text(LEFT + (column + 0.5) * width, y + 16, _tokens(length), anchor="middle"))
    out.append(text(LEFT + len(lengths) * width / 2, y + 34, "tokens of the prompt", anchor="middle", kind="soft"))
    legend, end = list(_legend(colour_of, y + 52)), y + 52 + ROW * -(-len(colour_of) // 3)
    note = "Plans of equal chunks on even layers; all that is sent scales with the links; memory is not asked."
    return [*out, *legend, text(12, end + 12, note, kind="soft")], end + 24


def _legend(colour_of: dict[str, str], top: int) -> Iterator[str]:
    for index, (name, colour) in enumerate(colour_of.items()):
        x, y = 12 + index % 3 * 280, top + index // 3 * ROW
        yield box(x, y, 14, 14, colour)
        yield text(x + 20, y + 12, name)


def _speed(why: Explanation, factor: float) -> str:
    times = f"x {factor:g}" if factor >= 1.0 else f"x 1/{round(1 / factor)}"
    gb_s = (why.link_gb_s or 0.0) * factor
    known = f" ({gb_s:.0f} GB/s)" if gb_s >= 10 else f" ({gb_s:.2g} GB/s)" if gb_s else ""
    return ("measured links" if factor == 1.0 else f"links {times}") + known


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _short(winner: Winner) -> list[str]:
    """The layout in a cell: its sizes, and what its family does not tell."""
    layout = winner.layout
    assert layout is not None
    sizes = {"TP": layout.tp_size, "SP": layout.sp_size, "PP": layout.pp_size}
    words = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"
    passes = f"x{layout.virtual_stages} {layout.stage_order}" if layout.virtual_stages > 1 else ""
    return [words, passes] if passes else [words]


def _title(winner: Winner) -> str:
    title = f"{winner.layout}: {winner.sought:.4g} s"
    return title if winner.lead is None else f"{title}; {winner.runner_up} takes {winner.lead:.1%} longer"
