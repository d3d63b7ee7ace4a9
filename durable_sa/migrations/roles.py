"""Least privilege: what each kind of process does to durable's tables, and the SQL that grants it.

Migrations are run by the owner of the tables. Nobody else needs more than what is here: there are no sequences, as ids
are made by the client, and no functions; NOTIFY and LISTEN know no privileges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..errors import InvalidConfiguration
from ..models import SCHEMA
from .sql import quoted

PRODUCER: Final = {
    "queues": "SELECT",
    "tasks": "SELECT, INSERT, UPDATE, DELETE",  # the last to take back a batch in which one spawn is refused
    "runs": "INSERT",
    "checkpoints": "INSERT",
    "waits": "SELECT, DELETE",
    "events": "SELECT, INSERT",
}
"""Of an application that spawns, emits, cancels and asks for results."""

WORKER: Final = {
    "queues": "SELECT",
    "tasks": "SELECT, INSERT, UPDATE, DELETE",
    "runs": "SELECT, INSERT, DELETE",
    "checkpoints": "SELECT, INSERT, DELETE",
    "waits": "SELECT, INSERT, UPDATE, DELETE",  # the third to pass over what somebody has locked
    "events": "SELECT, INSERT, UPDATE, DELETE",
    "schedules": "SELECT, UPDATE",
    "workers": "SELECT, INSERT, UPDATE, DELETE",
}
"""Of workers, which also spawn subtasks, fire schedules and delete what is past its retention."""

OPERATOR: Final = {
    **WORKER,
    "queues": "SELECT, INSERT, UPDATE, DELETE",
    "schedules": "SELECT, INSERT, UPDATE, DELETE",
    "waits": "SELECT, INSERT, DELETE",
    "workers": "SELECT",
}
"""Of the command line, and of applications that define queues and schedules themselves."""

ROLES: Final[Mapping[str, Mapping[str, str]]] = {"producer": PRODUCER, "worker": WORKER, "operator": OPERATOR}


def grants(names: Mapping[str, str], schema: str = SCHEMA) -> list[str]:
    """The statements after which database roles may do what they need to durable's tables, and nothing else.

    `names` has the database's role for each kind, `producer`, `worker` or `operator`; one role may be of several kinds.
    They are to be executed by the owner of the tables, in one transaction, and once more after an upgrade of durable_sa
    that brings new tables.

    Raises:
        InvalidConfiguration: no role is named, or one of a kind that there is not.
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
