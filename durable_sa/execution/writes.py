"""The writes of runs: what each kind holds, and the statement that sends many writes of one kind."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, NamedTuple, TypeAlias

from sqlalchemy import Executable, Row
from typing_extensions import TypeVar

from ..serialization.codec import in_ascii
from ..signals import LeaseLost
from ..statements import checkpoints, log_lines, messages, outcomes, streams, suspending, values
from ..statements.expressions import arrays
from ..statements.spawning import LIMITED_SPAWN_COLUMNS
from .waits import Stored, WaitSpec


class Kind(Enum):
    """The kinds of writes. Each has a statement, and a batch sends them in this order."""

    CHECKPOINT = "checkpoint"
    CHILD = "child"
    EVENT = "event"
    MESSAGE = "message"
    RECEIPT = "receipt"
    PUBLICATION = "publication"
    OPENING = "opening"
    SUPERSESSION = "supersession"
    ITEMS = "items"
    CLOSING = "closing"
    LINES = "lines"
    WAITS = "waits"
    RACE = "race"
    SUSPENSION = "suspension"
    FAILURE = "failure"
    RELEASE = "release"
    COMPLETION = "completion"


CONTENDED = frozenset({Kind.CHILD, Kind.EVENT, Kind.MESSAGE})
"""Kinds that may meet an insert of the same key in a transaction that is still open."""

KEYED = frozenset(
    {
        Kind.CHECKPOINT,
        Kind.CHILD,
        Kind.EVENT,
        Kind.MESSAGE,
        Kind.RECEIPT,
        Kind.RACE,
        Kind.OPENING,
        Kind.SUPERSESSION,
        Kind.ITEMS,
        Kind.CLOSING,
    }
)
"""Kinds that are stored under a key, once."""

REFUSABLE = frozenset({Kind.CHILD, Kind.MESSAGE})
"""Kinds that the database may refuse: the queue of a child does not exist, the receiver of a message has ended."""

ENDING = frozenset({Kind.SUSPENSION, Kind.FAILURE, Kind.RELEASE, Kind.COMPLETION})
"""Kinds that end a run, and give back its slot."""

COUNTED = frozenset({Kind.CHECKPOINT, Kind.COMPLETION})
"""The commonest kinds. Their statements return one row: the number of writes, and the ids only if some are missing."""


class CheckpointValues(NamedTuple):
    """The columns of a checkpoint, after the task's id, the fence and the key."""

    kind: str
    name: str
    status: str
    value: str | None
    child_task_id: uuid.UUID | None = None
    duration: float | None = None
    """Seconds that the call took."""
    arguments: str | None = None
    """The beginning of a step's or transaction's arguments as JSON."""


class ChildValues(NamedTuple):
    """A child, and the checkpoint of its spawn."""

    checkpoint: CheckpointValues
    spawn: tuple[Any, ...]
    """In the order of `LIMITED_SPAWN_COLUMNS`."""


class EventValues(NamedTuple):
    """An event, and the checkpoint of its emit, whose value says if the event was the first of its name."""

    checkpoint: CheckpointValues
    event_name: str
    payload: str
    metadata: str | None


class MessageValues(NamedTuple):
    """A message, and the checkpoint of its sending."""

    checkpoint: CheckpointValues
    message_id: uuid.UUID
    receiver_id: uuid.UUID
    topic: str
    payload: str
    idempotency_key: str | None


class ReceiptValues(NamedTuple):
    topic: str
    """The topic of which the next message is received, if there is one."""


class RaceValues(NamedTuple):
    """The checkpoint of a race, which names the winner, and the keys of the calls that take part."""

    checkpoint: CheckpointValues
    winner_key: uuid.UUID
    topic: str | None
    """The topic of which the winner receives the next message; None for another wait."""
    loser_keys: Sequence[uuid.UUID]


class PublicationValues(NamedTuple):
    published: Mapping[str, str]
    """JSON texts by the names of values."""


class BlockValues(NamedTuple):
    """A block of a stream, whose id is the key of the write."""

    name: str
    step_key: uuid.UUID
    try_id: uuid.UUID


class ItemsValues(NamedTuple):
    """A row of items of a stream."""

    name: str
    block_id: uuid.UUID
    position: int
    """Of the last item."""
    step_key: uuid.UUID
    try_id: uuid.UUID
    items: str
    """A JSON array."""
    reservation: int | None
    """The position up to which further ones are reserved."""


class ClosingValues(NamedTuple):
    """A block of a stream that was left."""

    name: str
    block_id: uuid.UUID
    position: int
    """Of the last item."""
    ends: bool
    """True if readers come to the end of the stream."""
    checkpoint_key: uuid.UUID | None
    """The key of the checkpoint to write."""


class LinesValues(NamedTuple):
    """Lines that a task has logged."""

    lines: str
    """A JSON array."""
    number: int


class SuspensionValues(NamedTuple):
    waited: bool
    """True if waits of the task may be stored, which the statement deletes."""


class FailureValues(NamedTuple):
    error: str
    retryable: bool
    next_run_id: uuid.UUID
    waited: bool
    delay: float | None = None
    """Seconds until the retry; None leaves them to the task's strategy."""
    puts_off: bool = False
    """True if the task is attempted after the delay in any case, and no failure is counted."""
    timeouts: Sequence[uuid.UUID] = ()
    """Keys of recorded timeouts that are deleted, because they are the failure."""


class ReleaseValues(NamedTuple):
    error: str
    next_run_id: uuid.UUID


class CompletionValues(NamedTuple):
    output: str
    waited: bool


Values: TypeAlias = (
    CheckpointValues
    | ChildValues
    | EventValues
    | MessageValues
    | ReceiptValues
    | RaceValues
    | PublicationValues
    | BlockValues
    | ItemsValues
    | ClosingValues
    | LinesValues
    | SuspensionValues
    | FailureValues
    | ReleaseValues
    | CompletionValues
    | None
)
ValuesT_co = TypeVar("ValuesT_co", bound=Values, covariant=True, default=Any)

_PARAMS: Final = list(LIMITED_SPAWN_COLUMNS).index("params")

OnWritten: TypeAlias = Callable[[Any, BaseException | None], None]


@dataclass(slots=True, eq=False)
class Write(Generic[ValuesT_co]):
    """One write of one run. `on_written` is called once, with a value or an error, after the commit."""

    kind: Kind
    task_id: uuid.UUID
    fence: int
    on_written: OnWritten
    values: ValuesT_co
    key: uuid.UUID | None = None
    waits: Sequence[WaitSpec] = ()
    size: int = 0
    """Bytes that count towards the limit of a batch."""
    delays: int = 0
    """How often the write was put off because another transaction held a row that it needs."""
    refusals: int = 0
    """How often the write was passed over although no other transaction held its task."""
    over: bool = False
    limited: bool = False
    """True if the write ends a run of a task with a limit key."""

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """Report the outcome, unless one was reported before."""
        if not self.over:
            self.over = True
            self.on_written(value, error)


def escape(write: Write) -> bool:
    """Escape the characters beyond ASCII in the JSON of a write. Returns False if it has none that can be escaped.

    JSON with escapes means the same, and a database of any encoding takes it. A failure is no such write, because its
    texts are read by SQL, which fails at such an escape.
    """
    present: Any = write.values
    escaped: Any = present
    match present:
        case CheckpointValues(value=str(text)):
            escaped = present._replace(value=in_ascii(text))
        case EventValues(payload=text) | MessageValues(payload=text):
            escaped = present._replace(payload=in_ascii(text))
        case PublicationValues(published):
            escaped = PublicationValues({name: in_ascii(text) for name, text in published.items()})
        case ItemsValues(items=text):
            escaped = present._replace(items=in_ascii(text))
        case LinesValues(lines=text):
            escaped = present._replace(lines=in_ascii(text))
        case CompletionValues(output=text):
            escaped = present._replace(output=in_ascii(text))
        case ChildValues(spawn=spawn) if spawn[_PARAMS] is not None:
            escaped = present._replace(spawn=(*spawn[:_PARAMS], in_ascii(spawn[_PARAMS]), *spawn[_PARAMS + 1 :]))
        case _:
            pass
    if escaped == present:
        return False
    write.values = escaped
    return True


def without_earlier_fences(batch: list[Write]) -> list[Write]:
    """Return the batch without writes of runs whose task this worker has claimed anew since. Those are settled as lost.

    A statement knows one fence per task.
    """
    fences: dict[uuid.UUID, int] = {}
    for write in batch:
        fences[write.task_id] = max(write.fence, fences.get(write.task_id, write.fence))
    current = [write for write in batch if write.fence == fences[write.task_id]]
    if len(current) < len(batch):
        for write in batch:
            if write.fence != fences[write.task_id]:
                write.settle(None, LeaseLost())
    return current


def _checkpoints(writes: list[Write[CheckpointValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, write.key, *write.values) for write in writes]
    return checkpoints.RECORD, arrays(checkpoints.CHECKPOINT_COLUMNS, rows)


def _children(writes: list[Write[ChildValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, write.key, *write.values.checkpoint) for write in writes]
    parameters = arrays(checkpoints.CHECKPOINT_COLUMNS, rows)
    parameters |= arrays(LIMITED_SPAWN_COLUMNS, [write.values.spawn for write in writes])
    return checkpoints.RECORD_CHILDREN, parameters


def _events(writes: list[Write[EventValues]]) -> tuple[Executable, dict[str, Any]]:
    names = [*checkpoints.CHECKPOINT_COLUMNS, "event_names", "payloads", "metadata"]
    rows = [(write.task_id, write.fence, write.key, *write.values.checkpoint, *write.values[1:]) for write in writes]
    return checkpoints.RECORD_EVENTS, arrays(names, rows)


def _messages(writes: list[Write[MessageValues]]) -> tuple[Executable, dict[str, Any]]:
    names = [*checkpoints.CHECKPOINT_COLUMNS, *messages.MESSAGE_COLUMNS]
    rows = [(write.task_id, write.fence, write.key, *write.values.checkpoint, *write.values[1:]) for write in writes]
    return messages.RECORD_MESSAGES, arrays(names, rows)


def _receipts(writes: list[Write[ReceiptValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, write.key, write.values.topic) for write in writes]
    return messages.RECEIVE, arrays(messages.RECEIVE_COLUMNS, rows)


def _races(writes: list[Write[RaceValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [
        (write.task_id, write.fence, write.key, *write.values.checkpoint, write.values.winner_key, write.values.topic)
        for write in writes
    ]
    losers = [(write.task_id, write.key, key) for write in writes for key in write.values.loser_keys]
    return messages.RECORD_RACE, arrays(messages.RACE_COLUMNS, rows) | arrays(messages.LOSER_COLUMNS, losers)


def _publications(writes: list[Write[PublicationValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, *item) for write in writes for item in write.values.published.items()]
    fenced = arrays(("task_ids", "fences"), [(write.task_id, write.fence) for write in writes])
    return values.PUBLISH, fenced | arrays(values.VALUE_COLUMNS, rows)


def _streams(
    statement: Executable, columns: Iterable[str], writes: list[Write[BlockValues | ItemsValues | ClosingValues]]
) -> tuple[Executable, dict[str, Any]]:
    return statement, arrays(columns, [(write.task_id, write.fence, write.key, *write.values) for write in writes])


def _lines(writes: list[Write[LinesValues]]) -> tuple[Executable, dict[str, Any]]:
    rows: dict[uuid.UUID, tuple[Any, ...]] = {}
    for write in writes:
        row = (write.task_id, write.fence, write.key, write.values.number, write.values.lines)
        if (earlier := rows.get(write.task_id)) is not None:
            # The first row was delayed, because its task was locked by another transaction.
            *_, key, number, lines = earlier
            row = (*row[:2], key, number + write.values.number, f"{lines[:-1]},{write.values.lines[1:]}")
        rows[write.task_id] = row
    return log_lines.WRITE_LINES, arrays(log_lines.LINE_COLUMNS, rows.values())


def _waits(writes: list[Write[None]]) -> tuple[Executable, dict[str, Any]]:
    fenced = arrays(("task_ids", "fences"), [(write.task_id, write.fence) for write in writes])
    return suspending.REGISTER_WAITS, fenced | _wait_columns(writes)


def _suspensions(writes: list[Write[SuspensionValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [
        (
            write.task_id,
            write.fence,
            write.values.waited,
            min((wait.due_at for wait in write.waits if wait.due_at is not None), default=None),
            min((wait.delay for wait in write.waits if wait.delay is not None), default=None),
        )
        for write in writes
    ]
    names = ("task_ids", "fences", "waited", "earliest_times", "earliest_delays")
    statement = suspending.SUSPEND_LIMITED if _limited(writes) else suspending.SUSPEND
    return statement, arrays(names, rows) | _wait_columns(writes)


def _limited(writes: Sequence[Write]) -> bool:
    """Return whether these writes, which are alike in that, end runs of tasks with limit keys."""
    return bool(writes) and writes[0].limited


def _outcomes(
    statement: Executable, names: tuple[str, ...], writes: list[Write[ReleaseValues | CompletionValues]]
) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, *write.values) for write in writes]
    return statement, arrays(("task_ids", "fences", *names), rows)


def _failures(writes: list[Write[FailureValues]]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, *write.values[:6]) for write in writes]
    names = ("task_ids", "fences", "errors", "retryable", "next_run_ids", "waited", "delays", "puts_off")
    parameters = arrays(names, rows)
    timeouts = [(write.task_id, key) for write in writes for key in write.values.timeouts]
    return outcomes.fail(limited=_limited(writes)), parameters | arrays(("timed_out_ids", "timed_out_keys"), timeouts)


def _wait_columns(writes: Sequence[Write]) -> dict[str, list[Any]]:
    rows = [(write.task_id, *wait) for write in writes for wait in write.waits]
    return arrays(suspending.SUSPEND_COLUMNS, rows)


_STATEMENTS: dict[Kind, Callable[[list[Write]], tuple[Executable, dict[str, Any]]]] = {
    Kind.CHECKPOINT: _checkpoints,
    Kind.CHILD: _children,
    Kind.EVENT: _events,
    Kind.MESSAGE: _messages,
    Kind.RECEIPT: _receipts,
    Kind.RACE: _races,
    Kind.PUBLICATION: _publications,
    Kind.OPENING: lambda writes: _streams(streams.OPEN_STREAMS, streams.OPENING_COLUMNS, writes),
    Kind.SUPERSESSION: lambda writes: _streams(streams.SUPERSEDE, streams.SUPERSESSION_COLUMNS, writes),
    Kind.ITEMS: lambda writes: _streams(streams.WRITE_ITEMS, streams.ITEM_COLUMNS, writes),
    Kind.CLOSING: lambda writes: _streams(streams.CLOSE_STREAMS, streams.CLOSING_COLUMNS, writes),
    Kind.LINES: _lines,
    Kind.WAITS: _waits,
    Kind.SUSPENSION: _suspensions,
    Kind.FAILURE: _failures,
    Kind.RELEASE: lambda writes: _outcomes(
        outcomes.release(limited=_limited(writes)), ("errors", "next_run_ids"), writes
    ),
    Kind.COMPLETION: lambda writes: _outcomes(
        outcomes.COMPLETE_LIMITED if _limited(writes) else outcomes.COMPLETE, ("outputs", "waited"), writes
    ),
}


@functools.cache
def single_statements() -> Mapping[Kind, Executable]:
    """Return the statements for one write alone, which is what an idle worker has to send."""
    return {Kind.CHECKPOINT: checkpoints.RECORD_ONE, Kind.COMPLETION: outcomes.COMPLETE_ONE}


def statement_of(kind: Kind, writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    """Return one statement for all writes, and its parameters."""
    statement, parameters = statement_of_many(kind, writes)
    if len(writes) == 1 and not writes[0].limited and (single := single_statements().get(kind)) is not None:
        return single, {name: value for name, (value,) in parameters.items()}
    return statement, parameters


def statement_of_many(kind: Kind, writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    """Return the statement with array parameters, for any number of writes."""
    return _STATEMENTS[kind](writes)


def identify(write: Write) -> Hashable:
    """Return the key of a write in :func:`results`."""
    if write.kind is Kind.CHILD:
        child: Hashable = write.values.checkpoint.child_task_id
        return child
    return (write.task_id, write.key) if write.kind in KEYED else write.task_id


def results(kind: Kind, rows: Sequence[Row[Any]]) -> Mapping[Hashable, Any]:
    """Return the result of each write that a statement has written."""
    match kind:
        case Kind.CHECKPOINT:
            return dict.fromkeys(zip(rows[0].task_ids or (), rows[0].keys or (), strict=True))
        case Kind.COMPLETION:
            return dict.fromkeys(rows[0].task_ids or ())
        case Kind.CHILD:
            return dict.fromkeys(row.child_task_id for row in rows)
        case Kind.EVENT:
            return {(row.task_id, row.key): Stored("completed", row.value) for row in rows}
        case Kind.OPENING | Kind.ITEMS:
            return {(row.task_id, row.key): row for row in rows}
        case Kind.MESSAGE | Kind.SUPERSESSION | Kind.CLOSING:
            return {(row.task_id, row.key): None for row in rows}
        case Kind.RACE:
            return {(row.task_id, row.key): Stored("won" if row.found else "none", row.value) for row in rows}
        case Kind.RECEIPT:
            return {(row.task_id, row.key): Stored("completed" if row.found else "none", row.value) for row in rows}
        case Kind.WAITS:
            groups: dict[Hashable, list[Row[Any]]] = {}
            for row in rows:
                groups.setdefault(row.task_id, []).append(row)
            return groups
        case _:
            return {row.task_id: row for row in rows}
