"""Prompt lengths as the command line gives them: `8192,4096*16,32768@2048`."""

from __future__ import annotations

from db.errors import UserError
from db.files.numbers import whole_number
from tuner.plan.plan import MAX_REQUESTS, Request
from tuner.plan.stage_cost import MAX_TOKENS

FIELD = "--prompt-lens"


def parse_prompt_lens(text: str) -> tuple[Request, ...]:
    """Requests that are all there at the start, from lengths between commas.

    `N` is a prompt of N tokens, `N@C` one whose first C tokens are cached, and `N*R` or `N@C*R` R of them.
    """
    requests: list[Request] = []
    for part in text.split(","):
        length, star, repeated = part.partition("*")
        length, at, cached = length.partition("@")
        tokens = whole_number(FIELD, length, most=MAX_TOKENS)
        cached_tokens = whole_number(f"{FIELD} {part.strip()}", cached, least=0, most=tokens - 1) if at else 0
        times = whole_number(f"{FIELD} {part.strip()}", repeated, most=MAX_REQUESTS) if star else 1
        if len(requests) + times > MAX_REQUESTS:
            raise UserError(FIELD, part.strip(), f"at most {MAX_REQUESTS} prompts in all")
        first = len(requests)
        requests += [
            Request(id=f"r{first + i}", prompt_tokens=tokens, cached_tokens=cached_tokens) for i in range(times)
        ]
    return tuple(requests)
