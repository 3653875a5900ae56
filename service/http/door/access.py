"""Who may do what: tokens with scopes, kept as hashes, and the sessions that a browser gets for one."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Lock
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
COOKIE = "isochunk_session"
SESSION_S = 12 * 3600.0
KNOWN_S = 2.0
"""How long what the database said of a token is believed: a token that was revoked opens nothing after that."""
_MOST_SESSIONS = 1000
_ATTRIBUTE = "isochunk_access"


class Scope(StrEnum):
    """What a token allows; each beside those before it."""

    READ = "read"
    PLAN = "plan"
    RUN = "run"


ALL_SCOPES = frozenset(Scope)


def open_to(scope: Scope) -> Callable[[F], F]:
    """Say which scope a route's callers need. A route that says nothing is open to nobody."""
    return _marked(scope)


def open_to_all(function: F) -> F:
    """Say that a route needs no token: nothing of what is kept may be shown there."""
    return _marked(None)(function)


def access_of(function: object) -> tuple[bool, Scope | None]:
    """Whether a route says who may call it, and the scope that is needed; None for none."""
    marks: tuple[bool, Scope | None] = getattr(function, _ATTRIBUTE, (False, None))
    return marks


def _marked(scope: Scope | None) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        setattr(function, _ATTRIBUTE, (True, scope))
        return function

    return decorate


@dataclass(slots=True, kw_only=True)
class Access:
    """The tokens that are known, by their hashes, and the sessions that were opened with them."""

    tokens: dict[str, frozenset[Scope]] = field(default_factory=dict)
    kept: Callable[[str], str | None] = lambda _hash: None
    """The scopes, with commas between, of a token that is kept under a hash and was not revoked."""
    _looked_up: dict[str, tuple[float, frozenset[Scope] | None]] = field(default_factory=dict)
    _sessions: dict[str, tuple[float, str]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def make_token(self, scopes: frozenset[Scope] = ALL_SCOPES) -> str:
        """A token that nobody can guess; only its hash is kept."""
        token = random_token()
        self.tokens[hash_of(token)] = scopes
        return token

    def remembered(self, hashed: str) -> tuple[bool, frozenset[Scope] | None]:
        """Whether it is known without a look into the database what the token of a hash allows, and what that is."""
        if hashed in self.tokens:
            return True, self.tokens[hashed]
        until, scopes = self._looked_up.get(hashed, (0.0, None))
        return until >= time.monotonic(), scopes

    def looked_up(self, hashed: str) -> frozenset[Scope] | None:
        """What the token of a hash allows, as the database says; None for one that is not known."""
        kept = self.kept(hashed)
        scopes = None if kept is None else frozenset(Scope(word) for word in kept.split(","))
        if len(self._looked_up) >= _MOST_SESSIONS:
            self._looked_up.clear()
        self._looked_up[hashed] = (time.monotonic() + KNOWN_S, scopes)
        return scopes

    def open_session(self, token: str) -> str:
        """A session that allows what the token does, for some hours; the oldest gives way where there are too many."""
        session = random_token()
        with self._lock:
            now = time.monotonic()
            self._sessions = {key: kept for key, kept in self._sessions.items() if kept[0] > now}
            while len(self._sessions) >= _MOST_SESSIONS:
                del self._sessions[min(self._sessions, key=lambda key: self._sessions[key][0])]
            self._sessions[hash_of(session)] = (now + SESSION_S, hash_of(token))
        return session

    def token_of_session(self, session: str) -> str | None:
        """The hash of the token that a session was opened with; None for one that is unknown or over."""
        until, hashed = self._sessions.get(hash_of(session), (0.0, ""))
        return hashed if until > time.monotonic() else None

    def end_session(self, session: str) -> None:
        """Forget a session."""
        with self._lock:
            self._sessions.pop(hash_of(session), None)


def random_token() -> str:
    """A secret of 256 random bits."""
    return secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """What is kept of a secret: it has 256 random bits, so that a plain hash cannot be turned back."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
