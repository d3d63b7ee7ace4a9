"""The least privileges on durable's tables for each kind of process, and the SQL that grants them.

Migrations are run by the owner of the tables. These privileges are complete: clients generate the ids, and the one
sequence is that of an identity column, which needs none; there are no functions; and NOTIFY and LISTEN need no
privileges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..errors import InvalidConfiguration
from ..models import SCHEMA
from .sql import quoted

PRODUCER: Final = {
    "queues": "SELECT",
    "tasks": "SELECT, INSERT, UPDATE, DELETE",  # DELETE takes back a batch in which one spawn is refused
    "runs": "INSERT",
    "checkpoints": "SELECT, INSERT",  # SELECT finds a message that was received before its sender had an answer
    "waits": "SELECT, DELETE",
    "events": "SELECT, INSERT",
    "messages": "SELECT, INSERT",
    "task_values": "SELECT",
    "streams": "SELECT",
    "stream_items": "SELECT",
    "limit_arrivals": "INSERT",
}
"""Privileges of an application that spawns, emits, sends, cancels and reads results."""

WORKER: Final = {
    "queues": "SELECT, UPDATE",  # UPDATE has a queue claimed by limit keys, when the first task has one
    "tasks": "SELECT, INSERT, UPDATE, DELETE",
    "runs": "SELECT, INSERT, DELETE",
    "checkpoints": "SELECT, INSERT, DELETE",
    "waits": "SELECT, INSERT, UPDATE, DELETE",  # UPDATE is needed to skip locked rows
    "events": "SELECT, INSERT, UPDATE, DELETE",
    "messages": "SELECT, INSERT, UPDATE, DELETE",
    "task_values": "SELECT, INSERT, UPDATE, DELETE",
    "streams": "SELECT, INSERT, UPDATE, DELETE",
    "stream_items": "SELECT, INSERT, DELETE",
    "task_minutes": "SELECT, INSERT, UPDATE, DELETE",
    "schedules": "SELECT, UPDATE",
    "workers": "SELECT, INSERT, UPDATE, DELETE",
    "ended_workers": "SELECT, INSERT, DELETE",
    "limits": "SELECT",
    "limit_keys": "SELECT, INSERT, UPDATE, DELETE",
    "limit_totals": "SELECT, UPDATE",
    "limit_arrivals": "SELECT, INSERT, UPDATE, DELETE",  # UPDATE is needed to skip locked rows
}
"""Privileges of workers, which also spawn subtasks, fire schedules and delete what is past its retention."""

OPERATOR: Final = {
    **WORKER,
    "queues": "SELECT, INSERT, UPDATE, DELETE",
    "schedules": "SELECT, INSERT, UPDATE, DELETE",
    "waits": "SELECT, INSERT, DELETE",
    "workers": "SELECT, UPDATE",  # UPDATE is needed to wait for claims in flight, when a queue gets limits
    "limits": "SELECT, INSERT, UPDATE, DELETE",
    "limit_totals": "SELECT, INSERT, UPDATE, DELETE",
    "ended_workers": "SELECT",
}
"""Privileges of the command line, and of applications that define queues and schedules."""

ROLES: Final[Mapping[str, Mapping[str, str]]] = {"producer": PRODUCER, "worker": WORKER, "operator": OPERATOR}


def grants(names: Mapping[str, str], schema: str = SCHEMA) -> list[str]:
    """Return the statements that give database roles exactly the privileges they need on durable's tables.

    `names` maps a kind, `producer`, `worker` or `operator`, to a database role; one role may have several kinds. The
    owner of the tables executes the statements in one transaction, and repeats them after an upgrade of durable_sa that
    adds tables.

    Raises:
        InvalidConfiguration: no role is given, or a kind does not exist.
    """
    if not names:
        raise InvalidConfiguration("roles", "none is named", "Name a producer, a worker or an operator.")
    if unknown := names.keys() - ROLES.keys():
        raise InvalidConfiguration("roles", f"there is no kind {min(unknown)!r}", f"There are {', '.join(ROLES)}.")
    statements: list[str] = []
    for role in dict.fromkeys(names.values()):
        statements.append(f"REVOKE ALL ON ALL TABLES IN SCHEMA {quoted(schema)} FROM {quoted(role)}")
        statements.append(f"GRANT USAGE ON SCHEMA {quoted(schema)} TO {quoted(role)}")
    for kind, role in names.items():
        for table, privileges in ROLES[kind].items():
            statements.append(f"GRANT {privileges} ON {quoted(schema)}.{table} TO {quoted(role)}")
    return statements
