"""Reads a checkpoint's generation settings: the token ids that end a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.files.documents import located, parse, read_json


@dataclass(frozen=True, slots=True)
class _EndIds:
    eos_token_id: tuple[int, ...]


def end_ids(weights: Path | None) -> frozenset[int]:
    """Token ids that end a text, as `generate` reads them: generation_config.json first, else config.json.

    Raises `UserError` for a file that is not such a configuration.
    """
    for name in ("generation_config.json", "config.json"):
        path = weights / name if weights else None
        if path is not None and path.is_file():
            content = read_json(path, field="weights")
            with located(path):
                found = parse(dict[str, Any], content).get("eos_token_id")
                ids = [] if found is None else found if isinstance(found, list) else [found]
                return frozenset(parse(_EndIds, {"eos_token_id": ids}).eos_token_id)
    return frozenset()
