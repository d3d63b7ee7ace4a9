"""The notification that wakes workers."""

from __future__ import annotations

from sqlalchemy import Text, bindparam, func, literal_column, select

NOTIFY = select(
    func.pg_notify(bindparam("channel", type_=Text()), bindparam("payload", type_=Text())),
    func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), literal_column("true")),
)
"""Send a hint to all listening workers. Nothing is stored, so the commit need not wait for a disk or a standby."""
