"""A run in memory, in place of the run, the worker and the database that a context uses."""

from __future__ import annotations

import contextvars
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

from ..concurrency.branches import Branch
from ..errors import ChildCancelled, InvalidState, TaskTimeout
from ..execution.calls import Call
from ..execution.hooks import HookChain
from ..execution.journal import EMPTY_JOURNAL
from ..execution.lines import Lines
from ..execution.reader import EmittedEvent, JoinTarget
from ..execution.waits import PendingWait, Stored
from ..execution.writes import CheckpointValues, EventValues, Kind, MessageValues, ReceiptValues, Values
from ..options import SpawnOptions
from ..results import Race, TaskHandle
from ..serialization.codec import UNTYPED, Codec
from ..serialization.failures import encode_error
from ..statements.claiming import ClaimedRun
from ..tasks import Task


@dataclass(frozen=True)
class Slept:
    """A sleep of a task."""

    name: str
    duration: timedelta
    until: datetime


@dataclass(frozen=True)
class SpawnedChild:
    """A child that a task has spawned."""

    name: str
    """The name given to `ctx.spawn`."""
    task_name: str
    params: Any = field(repr=False)
    options: SpawnOptions = field(repr=False)
    handle: TaskHandle[Any]


@dataclass(frozen=True)
class SentMessage:
    """A message that a task has sent."""

    task_id: uuid.UUID
    """The receiver."""
    topic: str
    payload: Any = field(repr=False)
    """Plain JSON."""
    idempotency_key: str | None


@dataclass(frozen=True)
class Recorded:
    """The durable calls that a task has made, each kind in its order."""

    steps: list[str] = field(default_factory=list[str])
    """Names of the steps and transactions that have been completed."""
    sleeps: list[Slept] = field(default_factory=list[Slept])
    spawned: list[SpawnedChild] = field(default_factory=list[SpawnedChild])
    emitted: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """Payloads of the events that the task was the first to emit, as plain JSON."""
    sent: list[SentMessage] = field(default_factory=list[SentMessage])
    published: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """The values of the task by name, as plain JSON."""
    streams: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]], repr=False)
    """The items of each stream, as plain JSON."""


class _WouldWait(BaseException):
    """Ends a wait of a race that is not over."""

    def __init__(self, wait: PendingWait) -> None:
        super().__init__()
        self.wait = wait


class _Branches:
    """The branches of a run that has no asyncio tasks of its own: the task's code, and the bodies of its steps."""

    def __init__(self) -> None:
        self._root = Branch(cast(Any, self), (), bound=True)
        self._inside: contextvars.ContextVar[Branch] = contextvars.ContextVar("durable_sa_step", default=self._root)

    def current(self) -> Branch:
        return self._inside.get()

    def busy(self) -> nullcontext[None]:
        return nullcontext()

    @contextmanager
    def scope(self, label: str) -> Generator[None]:
        token = self._inside.set(self.current().within_step(label))
        try:
            yield
        finally:
            self._inside.reset(token)


class MemoryRun:
    """Takes the place of a `Run`, of its worker and of the worker's reader."""

    signal = None
    mismatch = None
    replay = None
    journal = EMPTY_JOURNAL
    threads = None
    """None is the executor of the event loop."""
    hooks = HookChain()
    telemetry = None
    conversation = None

    def __init__(
        self,
        claimed: ClaimedRun,
        max_payload_bytes: int,
        events: dict[str, str],
        messages: dict[str, list[str]],
        results: Mapping[str, Any],
        execute: Callable[[SpawnedChild, Task[Any, Any]], Awaitable[Any]],
    ) -> None:
        self.claimed = claimed
        self.max_payload_bytes = max_payload_bytes
        self.events = events
        self.messages = messages
        """By topic those that were not received yet."""
        self.recorded = Recorded()
        self.children: dict[uuid.UUID, Task[Any, Any] | None] = {}
        self.unawaited: dict[uuid.UUID, object] = {}
        self.lines = Lines()
        self.steps: dict[uuid.UUID, tuple[Call, float]] = {}
        self.branches = _Branches()
        self.branch = self.branches.current
        self.host = self.reader = self
        self.open_streams: dict[str, Any] = {}
        self.ended_streams: set[str] = set()
        self.stream_positions: dict[uuid.UUID, dict[str, int]] = {}
        self._racing = False
        """True while the waits of a race are tried one after the other."""
        self._results = results
        self._execute = execute
        self._now = claimed.now

    def now(self) -> datetime:
        """Return the time of the start, plus all sleeps and timeouts."""
        return self._now

    def pass_until(self, moment: datetime) -> None:
        """Let time pass until `moment`."""
        self._now = max(self._now, moment)

    def in_another_loop(self) -> bool:
        """Return False, because the run belongs to no event loop."""
        return False

    async def enter(self) -> None:
        """Let every call begin, because no other worker can take the run over."""

    def timed_out(self, key: uuid.UUID, error: TaskTimeout) -> TaskTimeout:
        """Return the error of a wait, whose record no other attempt will read."""
        return error

    async def ownership(self, _: object) -> None:
        """Return None, because the task is never cancelled or taken over."""

    async def write(self, kind: Kind, key: uuid.UUID, values: Values, *, size: int = 0) -> Stored | None:
        """Record steps and events. No checkpoint is stored before."""
        match values:
            case CheckpointValues(kind="step" | "transaction"):
                self.recorded.steps.append(values.name)
            case EventValues(event_name=name):
                first = name not in self.events
                if first:
                    self.events[name] = values.payload
                    self.recorded.emitted[name] = UNTYPED.decode(values.payload, f"the payload of event {name!r}")
                return Stored("completed", "true" if first else "false")
            case MessageValues(receiver_id=receiver_id, topic=topic, payload=text, idempotency_key=sent_key):
                message = UNTYPED.decode(text, f"the message of topic {topic!r}")
                if receiver_id == self.claimed.task_id:
                    self.messages.setdefault(topic, []).append(text)
                self.recorded.sent.append(SentMessage(receiver_id, topic, message, sent_key))
            case ReceiptValues(topic=topic):
                waiting = self.messages.get(topic)
                return Stored("completed", waiting.pop(0)) if waiting else Stored("none", None)
            case _:
                pass
        return None

    def converse(self) -> None:
        """Begin no conversation, because nothing comes while the run stays."""

    def publish(self, name: str, text: str) -> None:
        """Note a value of the task."""
        self.recorded.published[name] = UNTYPED.decode(text, f"value {name!r}")

    def keep_timeouts(self, keys: Collection[uuid.UUID]) -> None:
        """Keep all records, as there are none."""

    async def decide(self, name: str, key: uuid.UUID, waits: Mapping[str, Coroutine[Any, Any, Any]]) -> Race[Any]:
        """Return the first wait of a race that is over; if none is, let something happen that ends one."""
        pending: dict[str, PendingWait] = {}
        for keyword, coroutine in waits.items():
            self._racing = True
            try:
                result = await coroutine
            except _WouldWait as waiting:
                pending[keyword] = waiting.wait
                continue
            except Exception:
                await self.decided(name, key, keyword)
                raise
            finally:
                self._racing = False
            await self.decided(name, key, keyword)
            return Race(keyword, result)
        return await self.undecided(name, pending)

    async def decided(self, name: str, key: uuid.UUID, winner: str) -> None:
        """Record nothing, because no replay follows."""

    async def undecided(self, name: str, pending: Mapping[str, PendingWait]) -> Race[Any]:
        """Let the time of the wait pass that ends first."""
        due = {keyword: wait.due_at for keyword, wait in pending.items() if wait.due_at is not None}
        if not due:
            raise InvalidState(
                f"race {name!r}", "awaited, and would never end", "Pass task_context() what one of its waits is for."
            )
        winner = min(due, key=due.__getitem__)
        wait = pending[winner]
        stored = await self.park(wait)
        if stored.status == "timeout":
            raise TaskTimeout(f"{wait.kind} {wait.name!r}", wait.delay or 0.0)
        return Race(winner, None)

    def due(self, wait: PendingWait) -> datetime | None:
        """Return the time at which a wait ends in any case, which is fixed when this is first asked."""
        if wait.due_at is None and wait.delay is not None:
            wait.due_at = self._now + timedelta(seconds=wait.delay)
        return wait.due_at

    async def park(self, wait: PendingWait) -> Stored:
        """End a wait at once, by letting its time pass."""
        due_at = self.due(wait)
        if self._racing:
            raise _WouldWait(wait)
        if due_at is None:
            given = {"event": "events", "message": "messages"}.get(wait.kind, "results")
            raise InvalidState(
                f"{wait.kind} {wait.name!r}",
                "awaited, and would never come",
                f"Pass task_context({given}={{...}}) with it, or give the call a timeout.",
            )
        if wait.kind == "sleep":
            self.recorded.sleeps.append(Slept(wait.name, due_at - self._now, due_at))
        self.pass_until(due_at)
        return Stored("completed" if wait.kind == "sleep" else "timeout", None)

    async def event(self, queue_and_name: tuple[str, str]) -> EmittedEvent | None:
        """Return an event; None if it has not been emitted."""
        payload = self.events.get(queue_and_name[1])
        return None if payload is None else EmittedEvent(payload, None)

    async def task(self, task_id: uuid.UUID) -> JoinTarget | None:
        """Return a child, which has ended, unless its result is a `TaskTimeout`."""
        for child in self.recorded.spawned:
            if child.handle.task_id == task_id:
                outcome, output, error = await self._outcome(child, self.children.get(task_id))
                return JoinTarget(self.claimed.task_id, child.task_name, outcome, output, error)
        return None

    async def _outcome(
        self, child: SpawnedChild, task: Task[Any, Any] | None
    ) -> tuple[str | None, str | None, str | None]:
        name = child.name if child.name in self._results else child.task_name
        if name in self._results:
            value = self._results[name]
            if isinstance(value, TaskTimeout):
                return None, None, None
            if isinstance(value, ChildCancelled):
                return "cancelled", None, None
            if isinstance(value, BaseException):
                return "failed", None, encode_error(value)
        elif task is None:
            raise InvalidState(
                f"The result of child {child.name!r}",
                "not known",
                f"Pass task_context(results={{{child.name!r}: ...}}), as its task is known by name only.",
            )
        else:
            try:
                value = await self._execute(child, task)
            except Exception as error:  # noqa: BLE001 - it reaches the parent as ChildFailed
                return "failed", None, encode_error(error)
        codec: Codec[Any] = UNTYPED if task is None else task.output_codec
        return "completed", codec.encode(value, f"the result of child {child.name!r}"), None
