"""Access tokens of the service: stored as hashes, with their scopes, until they are revoked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update

from db.errors import UserError
from db.store.engine import Database
from db.store.provenance import now
from db.store.tables import TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredToken:
    """A stored token: its hash only, since the token itself is shown once and not stored."""

    id: int
    name: str
    scopes: str
    created_at: datetime
    revoked_at: datetime | None


def save_token(database: Database, name: str, hashed: str, scopes: str) -> int:
    """Keep a token's hash and its scopes, with commas between; return its id."""
    with database.session() as session:
        row = TokenRow(name=name, hash=hashed, scopes=scopes, created_at=now())
        session.add(row)
        session.flush()
        return row.id


def token_scopes(database: Database, hashed: str) -> str | None:
    """The scopes of the token with a hash; None when there is none or it was revoked."""
    query = select(TokenRow.scopes).where(TokenRow.hash == hashed, TokenRow.revoked_at.is_(None))
    with database.reading() as session:
        return session.scalar(query)


def list_tokens(database: Database) -> list[StoredToken]:
    """All tokens, newest first."""
    with database.reading() as session:
        rows = session.scalars(select(TokenRow).order_by(TokenRow.id.desc())).all()
    return [StoredToken(**{name: getattr(row, name) for name in StoredToken.__dataclass_fields__}) for row in rows]


def revoke_token(database: Database, token_id: int) -> None:
    """Revoke a token. Raises UserError for an id that no valid token has."""
    with database.session() as session:
        found = session.execute(
            update(TokenRow)
            .where(TokenRow.id == token_id, TokenRow.revoked_at.is_(None))
            .values(revoked_at=now())
            .returning(TokenRow.id)
        )
        if found.first() is None:
            raise UserError("token", token_id, "must be the id of a token that is not revoked (`isochunk token list`)")
