"""SQL text, for what Alembic's operations cannot express. A schema's name may contain any character."""

from __future__ import annotations

from sqlalchemy import TextClause, text


def quoted(name: str) -> str:
    """Quote a name as an SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def verbatim(sql: str) -> TextClause:
    """Make a statement of text in which colons do not start parameters."""
    return text(sql.replace(":", r"\:"))
