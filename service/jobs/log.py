"""A line for each event of a service or a worker, on standard error: words for people, or JSON for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Where events go."""

    as_json: bool = False

    def say(self, event: str, text: str | None, **fields: object) -> None:
        """Write an event. text: what people read; without one it is for programs alone."""
        if self.as_json:
            line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields})
        elif text is not None:
            line = text
        else:
            return
        print(line, file=sys.stderr, flush=True)
