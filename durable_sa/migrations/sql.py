"""SQL written out, for what Alembic's operations cannot say. A schema's name may hold any character."""

from __future__ import annotations

from sqlalchemy import TextClause, text


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def verbatim(sql: str) -> TextClause:
    """A statement in which colons do not start parameters."""
    return text(sql.replace(":", r"\:"))
