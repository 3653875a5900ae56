"""The formats of published traces, and what their times count: what options name."""

from __future__ import annotations

from enum import StrEnum


class TraceFormat(StrEnum):
    """The formats of published traces."""

    MOONCAKE = "mooncake"
    BAILIAN = "bailian"
    AZURE = "azure"
    BURSTGPT = "burstgpt"

    @property
    def block_tokens(self) -> int:
        """Tokens of the blocks that hash_ids name."""
        return 16 if self is TraceFormat.BAILIAN else 512


class TimeUnit(StrEnum):
    """What a trace's times count."""

    SECONDS = "s"
    MILLISECONDS = "ms"

    @property
    def seconds(self) -> float:
        """Seconds of one."""
        return 1.0 if self is TimeUnit.SECONDS else 1e-3

    @property
    def word(self) -> str:
        """In words."""
        return "seconds" if self is TimeUnit.SECONDS else "milliseconds"


UNITS = {
    TraceFormat.MOONCAKE: TimeUnit.MILLISECONDS,
    TraceFormat.BAILIAN: TimeUnit.SECONDS,
    TraceFormat.AZURE: TimeUnit.SECONDS,
    TraceFormat.BURSTGPT: TimeUnit.SECONDS,
}


AUTO = "auto"
"""Of options: what the file itself tells."""


def parse_format(name: str) -> TraceFormat | None:
    """The format of this name, None for AUTO."""
    return None if name == AUTO else TraceFormat(name)


def parse_unit(name: str) -> TimeUnit | None:
    """The unit of this name, None for AUTO."""
    return None if name == AUTO else TimeUnit(name)
