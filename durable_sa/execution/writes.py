"""What runs write, each under its fence, and the statement for many writes of a kind."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from sqlalchemy import Executable, Row

from ..signals import LeaseLost
from ..statements import checkpoints, outcomes, suspending
from ..statements.expressions import arrays
from ..statements.spawning import SPAWN_COLUMNS


class Kind(Enum):
    """What a write does; one statement each, sent in this order."""

    CHECKPOINT = "checkpoint"
    CHILD = "child"
    EVENT = "event"
    WAITS = "waits"
    SUSPENSION = "suspension"
    FAILURE = "failure"
    RELEASE = "release"
    COMPLETION = "completion"


CONTENDED = frozenset({Kind.CHILD, Kind.EVENT})
"""What may meet an insert of the same key in a transaction that is still open."""


KEYED = frozenset({Kind.CHECKPOINT, Kind.CHILD, Kind.EVENT})
"""What is stored under a key, once."""

TALLIED = frozenset({Kind.CHECKPOINT, Kind.COMPLETION})
"""The commonest, whose statements give one row: how many were written, and which only where some are missing."""


class Stored(NamedTuple):
    """What stands in the database under a key, which may be what an earlier run wrote."""

    status: str
    value: str | None
    child_task_id: uuid.UUID | None = None


class WaitSpec(NamedTuple):
    """A wait as it is stored: by an absolute time, or by seconds from now, or without end."""

    key: uuid.UUID
    kind: str
    name: str
    event_name: str | None
    child_task_id: uuid.UUID | None
    due_at: Any
    delay: float | None


@dataclass(slots=True, eq=False)
class Write:
    """One write of one run. `told` is called once with its outcome, a value or an error, after the commit."""

    kind: Kind
    task_id: uuid.UUID
    fence: int
    told: Callable[[Any, BaseException | None], None]
    key: uuid.UUID | None = None
    values: tuple[Any, ...] = ()
    waits: Sequence[WaitSpec] = ()
    size: int = 0
    tries: int = 0
    refusals: int = 0
    over: bool = False

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """Tell the outcome, if it has not been told."""
        if not self.over:
            self.over = True
            self.told(value, error)


def current(batch: list[Write]) -> list[Write]:
    """The batch without writes of runs whose task this worker has claimed anew: a statement knows one fence a task."""
    fences: dict[uuid.UUID, int] = {}
    for write in batch:
        fences[write.task_id] = max(write.fence, fences.get(write.task_id, write.fence))
    current = [write for write in batch if write.fence == fences[write.task_id]]
    if len(current) < len(batch):
        for write in batch:
            if write.fence != fences[write.task_id]:
                write.settle(None, LeaseLost())
    return current


def _checkpoints(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, write.key, *write.values) for write in writes]
    return checkpoints.RECORD, arrays(checkpoints.CHECKPOINT_COLUMNS, rows)


def _children(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    parameters = arrays(
        checkpoints.CHECKPOINT_COLUMNS, [(write.task_id, write.fence, write.key, *write.values[0]) for write in writes]
    )
    parameters |= arrays(SPAWN_COLUMNS, [write.values[1] for write in writes])
    return checkpoints.RECORD_CHILDREN, parameters


def _events(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    names = [*checkpoints.CHECKPOINT_COLUMNS, "event_names", "payloads", "metadata"]
    return checkpoints.RECORD_EVENTS, arrays(
        names, [(write.task_id, write.fence, write.key, *write.values) for write in writes]
    )


def _fenced(writes: list[Write], names: Iterable[str] = ()) -> dict[str, list[Any]]:
    return arrays(("task_ids", "fences", *names), [(write.task_id, write.fence, *write.values) for write in writes])


def _wait_columns(writes: list[Write]) -> dict[str, list[Any]]:
    rows = [(write.task_id, *wait) for write in writes for wait in write.waits]
    return arrays(suspending.SUSPEND_COLUMNS, rows)


def _suspensions(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    rows = [
        (
            write.task_id,
            write.fence,
            *write.values,
            min((wait.due_at for wait in write.waits if wait.due_at is not None), default=None),
            min((wait.delay for wait in write.waits if wait.delay is not None), default=None),
        )
        for write in writes
    ]
    names = ("task_ids", "fences", "waited", "earliest_times", "earliest_delays")
    return suspending.SUSPEND, arrays(names, rows) | _wait_columns(writes)


_STATEMENTS: dict[Kind, Callable[[list[Write]], tuple[Executable, dict[str, Any]]]] = {
    Kind.CHECKPOINT: _checkpoints,
    Kind.CHILD: _children,
    Kind.EVENT: _events,
    Kind.WAITS: lambda writes: (suspending.REGISTER_WAITS, _fenced(writes) | _wait_columns(writes)),
    Kind.SUSPENSION: _suspensions,
    Kind.FAILURE: lambda writes: (outcomes.FAIL, _fenced(writes, ("errors", "retryable", "next_run_ids", "waited"))),
    Kind.RELEASE: lambda writes: (outcomes.RELEASE, _fenced(writes, ("errors", "next_run_ids"))),
    Kind.COMPLETION: lambda writes: (outcomes.COMPLETE, _fenced(writes, ("outputs", "waited"))),
}

ALONE: dict[Kind, Executable] = {
    Kind.CHECKPOINT: checkpoints.RECORD_ONE,
    Kind.COMPLETION: outcomes.COMPLETE_ONE,
}
"""The statements for a write without company, which is what an idle worker has."""


def statement_of(kind: Kind, writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    """One statement for all of these, with what it binds."""
    statement, parameters = statement_of_many(kind, writes)
    if len(writes) == 1 and (alone := ALONE.get(kind)) is not None:
        return alone, {name: value for name, (value,) in parameters.items()}
    return statement, parameters


def statement_of_many(kind: Kind, writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    """As `statement_of`, also of none or one."""
    return _STATEMENTS[kind](writes)


def identify(write: Write) -> Hashable:
    """What a write goes by in :func:`answers`."""
    if write.kind in (Kind.CHECKPOINT, Kind.EVENT):
        return write.task_id, write.key
    return write.values[0][-1] if write.kind is Kind.CHILD else write.task_id


def answers(kind: Kind, rows: Sequence[Row[Any]]) -> Mapping[Hashable, Any]:
    """What a statement gave to each write that it has written."""
    match kind:
        case Kind.CHECKPOINT:
            return dict.fromkeys(zip(rows[0].task_ids or (), rows[0].keys or (), strict=True))
        case Kind.COMPLETION:
            return dict.fromkeys(rows[0].task_ids or ())
        case Kind.CHILD:
            return dict.fromkeys(row.child_task_id for row in rows)
        case Kind.EVENT:
            return {(row.task_id, row.key): Stored("completed", row.value) for row in rows}
        case Kind.WAITS:
            groups: dict[Hashable, list[Row[Any]]] = {}
            for row in rows:
                groups.setdefault(row.task_id, []).append(row)
            return groups
        case _:
            return {row.task_id: row for row in rows}
