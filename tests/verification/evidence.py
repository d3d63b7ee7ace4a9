"""What there is to judge a round by: the history of every row, the tables at the end, what processes noted and said."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from .ledger import entries

Row = dict[str, Any]


class Change(NamedTuple):
    """One row, before and after: an insert has no `was`, a delete no `became`."""

    seq: int
    at: datetime
    committed_at: datetime | None
    xid: int
    application: str
    relation: str
    was: Row | None
    became: Row | None

    @property
    def row(self) -> Row:
        """Whichever there is, the later one first."""
        row = self.became or self.was
        assert row is not None
        return row


@dataclass
class Evidence:
    """All of it."""

    changes: list[Change] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    ledger: list[Row] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    settled: bool = True
    """Whether the round came to its end by itself, so that nothing may be left unfinished."""
    clock_moved: bool = False
    """Whether the server's clock was changed, so that times of one process say nothing about those of another."""
    slack: float = 0.5
    """Seconds that a commit may take from its timestamp until it is seen."""
    steady_since: datetime | None = None
    """From when on nothing that was done to them kept workers from claiming what was due."""
    told: dict[str, datetime] = field(default_factory=dict)
    """Workers that were told to stop, and since when they claim nothing more."""
    slots: int = 10
    """What each worker has."""

    def __post_init__(self) -> None:
        self.by_relation: dict[str, list[Change]] = defaultdict(list)
        self.by_task: dict[str, list[Change]] = defaultdict(list)
        """Changes of a task's row and of its checkpoints, in their order."""
        for change in self.changes:
            self.by_relation[change.relation].append(change)
            if change.relation in ("tasks", "checkpoints"):
                self.by_task[change.row["task_id"]].append(change)
        self.tasks: dict[str, Row] = {}
        """Every task there ever was, as it was last seen."""
        for change in self.by_relation["tasks"]:
            self.tasks[change.row["task_id"]] = change.row
        self.deleted = {
            change.row["task_id"] for change in self.by_relation["tasks"] if change.became is None and change.was
        }
        self.knows: dict[str, set[str]] = {entry["name"]: set(entry["tasks"]) for entry in self.noted("knows")}
        """The tasks that each worker has registered, by its name."""
        self.workers = {row["worker_id"]: row for row in self.inserted("workers")}

    def inserted(self, relation: str) -> Iterable[Row]:
        """Rows of a table as they came into it."""
        return (change.became for change in self.by_relation[relation] if change.was is None and change.became)

    def noted(self, *what: str) -> Iterable[Row]:
        """Lines of the ledger."""
        return (entry for entry in self.ledger if entry["what"] in what)

    def claims(self, task_id: str) -> dict[int, int]:
        """When each attempt of a task was first claimed, as a position in the history."""
        found: dict[int, int] = {}
        for change in self.by_task[task_id]:
            if change.relation == "tasks" and change.became and change.became["state"] == "running":
                found.setdefault(change.became["attempt"], change.seq)
        return found

    def executions(self) -> dict[str, dict[int, list[Row]]]:
        """The durable calls that each execution of a task has made, in their order; executions by their fences."""
        found: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for entry in self.noted("called"):
            found[entry["task"]][entry["fence"]].append(entry)
        return {task_id: dict(sorted(executions.items())) for task_id, executions in found.items()}

    def write(self, path: Path) -> None:
        """The history as lines of JSON, for whoever looks into a violation."""
        with path.open("w") as file:
            for change in self.changes:
                file.write(json.dumps(change._asdict(), default=str) + "\n")


_HISTORY = """
SELECT seq, at, pg_xact_commit_timestamp(xid::text::bigint::text::xid) AS committed_at, xid::text::bigint AS xid,
    application, relation, was, became
FROM audit.log ORDER BY seq
"""
_TABLES = {
    "effects": "SELECT * FROM effects",
    "accounts": "SELECT * FROM accounts",
    "transfers": "SELECT * FROM transfers",
    "orders": "SELECT * FROM orders",
    "tasks": "SELECT * FROM durable.tasks",
    "runs": "SELECT * FROM durable.runs",
    "checkpoints": "SELECT * FROM durable.checkpoints",
    "waits": "SELECT * FROM durable.waits",
    "events": "SELECT * FROM durable.events",
    "workers": "SELECT * FROM durable.workers",
}


async def collect(connection: asyncpg.Connection[Any], directory: Path, **options: Any) -> Evidence:
    """Read everything, from the database and from the files of the round."""
    changes = [
        Change(
            *(row["seq"], row["at"], row["committed_at"], row["xid"], row["application"], row["relation"]),
            None if row["was"] is None else json.loads(row["was"]),
            None if row["became"] is None else json.loads(row["became"]),
        )
        for row in await connection.fetch(_HISTORY)
    ]
    tables: dict[str, list[Row]] = {}
    for name, query in _TABLES.items():
        rows = await connection.fetch(f"SELECT row_to_json(found)::text FROM ({query}) found")
        tables[name] = [json.loads(row[0]) for row in rows]
    return Evidence(changes, tables, list(entries(directory)), _logs(directory), **options)


def _logs(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in sorted(directory.glob("*.log"))}
