"""Contexts for unit tests of tasks as the plain functions they are: no database, no worker, no waiting."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import random
import uuid
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, cast, overload

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from typing_extensions import Unpack

from ..client import Durable
from ..context import TaskContext
from ..context.races import Member
from ..context.streams import TaskStream
from ..context.sync import SyncTaskContext
from ..current import running
from ..errors import InvalidState
from ..execution.calls import Call
from ..execution.run import Run
from ..execution.session_transactions import InThread
from ..execution.streaming import ended
from ..execution.transactions import refuse_awaitable
from ..ids import new_id
from ..options import SpawnOptions, encode_headers
from ..results import Race, TaskHandle
from ..serialization.annotations import is_coroutine_function
from ..serialization.codec import UNTYPED, codec_for
from ..statements.claiming import ClaimedRun
from ..steps import result_codec
from ..tasks import Task
from ..validation import Duration, timestamp
from .memory import MemoryRun, Recorded, SentMessage, Slept, SpawnedChild

__all__ = [
    "ContextOptions",
    "MemoryContext",
    "MemorySyncContext",
    "Recorded",
    "SentMessage",
    "Slept",
    "SpawnedChild",
    "task_context",
]

T = TypeVar("T")


class ContextOptions(TypedDict, total=False):
    """Keywords of `task_context`."""

    state: Any
    """The value of `ctx.state`; None if absent."""
    headers: Mapping[str, Any]
    task_name: str
    queue_name: str
    attempt: int
    """1 if absent."""
    task_id: uuid.UUID
    run_id: uuid.UUID
    events: Mapping[str, Any]
    """Payloads by the names of events. Those that the task emits are added."""
    messages: Mapping[str, Sequence[Any]]
    """Payloads by topic, in the order of receiving. Those that the task sends to itself are added."""
    results: Mapping[str, Any]
    """The results of children, by the name passed to `ctx.spawn`, or else by the name of their task. An exception is
    the error with which the child has failed. A `ChildCancelled` stands for a child that was cancelled, a `TaskTimeout`
    for one that takes longer than the timeout of the join."""
    session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
    """The session for `ctx.transaction`, each call of which is a savepoint. Nothing is committed."""
    now: datetime
    """The time at which the task starts. It stands still except for sleeps and timeouts."""
    seed: int
    """The seed of `ctx.rand()` and `ctx.uuid7()`, which differ each time if it is absent."""


class _Enterable:
    """A context that is the current one inside a `with` block."""

    def __enter__(self) -> Self:
        self._running = running(self)
        self._running.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running.__exit__(kind, error, traceback)


class MemoryContext(TaskContext[Any], _Enterable):
    """The context of an `async def` task in a unit test. Made by `task_context()`."""

    def __init__(self, options: ContextOptions, events: dict[str, str] | None = None) -> None:
        durable: Durable[Any] = Durable(telemetry=False)
        now = timestamp(options["now"], "now") if "now" in options else datetime.now(UTC)
        claimed = ClaimedRun(
            task_id=options.get("task_id") or new_id(),
            run_id=options.get("run_id") or new_id(),
            queue_name=options.get("queue_name", durable.queue_name),
            priority=0,
            available_at=now,
            task_name=options.get("task_name", "task"),
            params=None,
            headers=encode_headers(options.get("headers")),
            attempt=options.get("attempt", 1),
            fence=1,
            cancel_at=None,
            now=now,
        )
        if events is None:
            given = options.get("events", {}).items()
            events = {name: UNTYPED.encode(payload, f"the payload of event {name!r}") for name, payload in given}
        messages = {
            topic: [UNTYPED.encode(payload, f"the message of topic {topic!r}") for payload in payloads]
            for topic, payloads in options.get("messages", {}).items()
        }
        self._memory = MemoryRun(
            claimed, durable.max_payload_bytes, events, messages, options.get("results", {}), self._execute_child
        )
        super().__init__(cast(Run, self._memory), durable, options.get("state"))
        session = options.get("session")
        # The scope is that of the test, whichever thread executes the transaction.
        self.session = session() if isinstance(session, scoped_session | async_scoped_session) else session
        """The session of transactions."""
        self._options = options
        self._random = random.Random(options.get("seed"))  # noqa: S311

    @property
    def recorded(self) -> Recorded:
        """The durable calls that the task has made so far."""
        return self._memory.recorded

    async def _pause(self, call: Call, tries: int, delay: float) -> None:
        self._memory.pass_until(self._memory.now() + timedelta(seconds=delay))

    async def _spawn(
        self, call: Call, task: Task[Any, Any] | str, params: Any, options: SpawnOptions, *, unchecked: bool
    ) -> TaskHandle[Any]:
        name = task if isinstance(task, str) else task.name
        if isinstance(task, Task):
            self._app.tasks.setdefault(name, task)
        handle = await super()._spawn(call, task, params, options, unchecked=unchecked)
        self.recorded.spawned.append(SpawnedChild(call.name, name, params, options, handle))
        return handle

    async def _execute_child(self, child: SpawnedChild, task: Task[Any, Any]) -> Any:
        options = self._options | ContextOptions(
            task_id=child.handle.task_id,
            run_id=new_id(),
            task_name=task.name,
            queue_name=child.options.get("queue_name") or self.queue_name,
            headers=child.options.get("headers") or {},
            attempt=1,
            messages={},
            now=self._memory.now(),
        )
        context = MemoryContext(options, self._memory.events)
        arguments = (task.decode_params(task.encode_params(child.params)),) if task.takes_params else ()
        if task.is_async:
            with context:
                return await task.function(context, *arguments)
        with MemorySyncContext(context) as sync_context:
            return task.function(sync_context, *arguments)

    async def _transaction(
        self,
        call: Call,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_thread: InThread | None = None,
    ) -> Any:
        session = self.session
        if session is None:
            raise InvalidState(
                f"transaction {call.name!r}", "without a session", "Pass one: task_context(session=...)."
            )
        if isinstance(session, Session):
            if is_coroutine_function(fn):
                raise InvalidState(f"transaction {call.name!r}", "asynchronous", "Pass an AsyncSession.")
            result = self._transact(session, call, fn, args, kwargs)
        elif not is_coroutine_function(fn):
            result = await session.run_sync(self._transact, call, fn, args, kwargs)
        else:
            with self._memory.branches.scope(str(call.key)):
                async with session.begin_nested() as savepoint:
                    with _guarded(session.sync_session, savepoint.sync_transaction, call.name):
                        result = await fn(session, *args, **kwargs)
        return await self._end_step(call, result_codec(fn), result)

    def _transact(
        self, session: Session, call: Call, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with (
            self._memory.branches.scope(str(call.key)),
            session.begin_nested() as savepoint,
            _guarded(session, savepoint, call.name),
        ):
            result = fn(session, *args, **kwargs)
            refuse_awaitable(result, f"the result of transaction {call.name!r}")
        return result

    async def _decide(self, call: Call, members: Mapping[str, Member]) -> Race[Any]:
        waits = {keyword: member.coroutine for keyword, member in members.items()}
        return await self._memory.decide(call.name, call.key, waits)

    def stream(self, name: str, type: Any = None, *, keep_open: bool = False) -> TaskStream[Any]:  # noqa: A002
        """Return a block whose items are found in `recorded.streams`."""
        return MemoryStream(self._memory, super().stream(name, type, keep_open=keep_open))

    async def rand(self) -> float:
        """Return a random number in [0, 1), by the seed."""
        return await self._draw("$rand", codec_for(float), self._random.random)

    def uuid7(self) -> Coroutine[object, None, uuid.UUID]:
        """Return a UUIDv7, by the seed and the time."""
        return self._draw("$uuid7", codec_for(uuid.UUID), self._new_uuid)

    def _new_uuid(self) -> uuid.UUID:
        milliseconds = int(self._memory.now().timestamp() * 1000)
        bits = milliseconds << 80 | 0x7 << 76 | self._random.getrandbits(12) << 64
        return uuid.UUID(int=bits | 0b10 << 62 | self._random.getrandbits(62))


class MemoryStream(TaskStream[Any]):
    """A block of a stream in a unit test."""

    def __init__(self, memory: MemoryRun, stream: TaskStream[Any]) -> None:
        vars(self).update(vars(stream))
        self._memory = memory

    async def __aenter__(self) -> Self:
        if self.name in self._memory.ended_streams:
            raise ended(self.name)
        self._open_in(self._memory.open_streams)
        self._entered = True
        self._memory.recorded.streams.setdefault(self.name, [])
        return self

    async def write(self, item: Any) -> None:
        """Record an item."""
        self._check_open()
        what = f"an item of stream {self.name!r}"
        self._memory.recorded.streams[self.name].append(UNTYPED.decode(self.codec.encode(item, what), what))

    async def __aexit__(self, *_: object) -> None:
        self._left = True
        del self._memory.open_streams[self.name]
        if not self.keep_open:
            self._memory.ended_streams.add(self.name)


class MemorySyncContext(SyncTaskContext[Any], _Enterable):
    """The context of a `def` task in a unit test. Made by `task_context(sync=True)`."""

    def __init__(self, context: MemoryContext) -> None:
        super().__init__(context)
        self._memory = context
        self._bodies: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Bodies of steps, for the thread of the test."""

    @property
    def recorded(self) -> Recorded:
        """The durable calls that the task has made so far."""
        return self._memory.recorded

    def _perform(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        # In another thread, since the test may have an event loop running in this one, which executes its steps.
        bodies: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        outer, self._bodies = self._bodies, bodies
        context = contextvars.copy_context()
        try:
            with ThreadPoolExecutor(1) as thread:
                result = thread.submit(context.run, lambda: asyncio.run(make()))
                result.add_done_callback(lambda _: bodies.put(None))
                while (body := bodies.get()) is not None:
                    body()
            return result.result()
        finally:
            self._bodies = outer

    async def _execute(self, body: Callable[[], Any]) -> Any:
        outcome: Future[Any] = Future()
        context = contextvars.copy_context()

        def run() -> None:
            try:
                outcome.set_result(context.run(body))
            except BaseException as error:  # noqa: BLE001 - raised in the step
                outcome.set_exception(error)

        self._bodies.put(run)
        return await asyncio.wrap_future(outcome)

    def heartbeat(self, duration: Duration | None = None) -> None:
        """Check that the task goes on, as :meth:`durable_sa.TaskContext.heartbeat`."""
        self._call(lambda: self.context.heartbeat(duration))

    def transaction(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a transaction as :meth:`durable_sa.SyncTaskContext.transaction`, in this thread, where the session is."""
        if isinstance(self._memory.session, AsyncSession):
            raise InvalidState(f"transaction {name!r}", "synchronous", "Pass a Session.")
        coroutine = self._memory.transaction(name, fn, *args, **kwargs)
        try:
            coroutine.send(None)
        except StopIteration as returned:
            return returned.value
        raise AssertionError("unreachable")


@contextmanager
def _guarded(session: Session, savepoint: SessionTransaction | None, name: str) -> Generator[None]:
    """Refuse to let the code inside end the whole transaction, as the engine does."""

    def refuse(_: Session, ended: SessionTransaction | None = None) -> None:
        if savepoint in (ended, session.get_nested_transaction()):
            raise InvalidState(
                f"The session of transaction {name!r}",
                "committed, or rolled back if its function raises, by the engine",
                "Remove the commit() or rollback(); use begin_nested() for a part that may be rolled back alone.",
            )

    event.listen(session, "before_commit", refuse)
    event.listen(session, "after_soft_rollback", refuse)
    try:
        yield
    finally:
        event.remove(session, "before_commit", refuse)
        event.remove(session, "after_soft_rollback", refuse)


@overload
def task_context(*, sync: Literal[False] = False, **options: Unpack[ContextOptions]) -> MemoryContext: ...
@overload
def task_context(*, sync: Literal[True], **options: Unpack[ContextOptions]) -> MemorySyncContext: ...
def task_context(*, sync: bool = False, **options: Unpack[ContextOptions]) -> MemoryContext | MemorySyncContext:
    """Return a context to call a task with, as the plain function that it is; for `def` tasks with `sync=True`.

    It does in memory what the engine does with a database, and refuses what the engine would refuse. Steps are run,
    with the retries and timeouts of their decorators; arguments and results pass through JSON. Sleeps, pauses between
    tries and timeouts are over at once, and `ctx.now()` is later by as long. Events come from `events`, messages from
    `messages`, and a wait for any other runs into its timeout. A join returns the child's entry in `results`, or else
    the result of the child's function, called with such a context. `ctx.recorded` has the durable calls that the task
    has made:

    ```python
    from datetime import UTC, datetime, timedelta

    import pytest

    from durable_sa import TaskContext, TaskTimeout, UserError, step, task
    from durable_sa.testing import task_context


    @step(max_attempts=3)
    async def charge(cents: int) -> str:
        return f"receipt for {cents} cents"


    @task
    async def order(ctx: TaskContext, cents: int) -> str:
        try:
            await ctx.await_event("confirmed", timeout=timedelta(days=1))
        except TaskTimeout:
            raise UserError("not confirmed") from None
        receipt = await ctx.step("charge", charge, cents)
        await ctx.emit_event("charged", receipt)
        await ctx.sleep_for("cooling-off period", timedelta(days=14))
        return receipt


    async def test_order():
        ctx = task_context(events={"confirmed": None}, now=datetime(2030, 1, 1, tzinfo=UTC))
        assert await order(ctx, 500) == "receipt for 500 cents"
        assert ctx.recorded.steps == ["charge"]
        assert ctx.recorded.emitted == {"charged": "receipt for 500 cents"}
        assert ctx.recorded.sleeps[0].until == datetime(2030, 1, 15, tzinfo=UTC)


    async def test_order_that_is_not_confirmed():
        ctx = task_context()
        with pytest.raises(UserError):
            await order(ctx, 500)
        assert ctx.recorded.steps == []
    ```

    Inside a `with` block it is also the result of `current_context()`, and the context of steps that are called
    directly, as `await charge(500)`; outside of one such a call is the plain function:

    ```python
    from durable_sa import SyncTaskContext, current_context, step, task
    from durable_sa.testing import task_context


    @step(max_attempts=2)
    def fetch() -> str:
        tries.append(current_context().task_name)
        if len(tries) == 1:
            raise ConnectionError
        return "data"


    @task
    def load(ctx: SyncTaskContext) -> str:
        return fetch()


    tries = []


    def test_second_try():
        with task_context(sync=True, task_name="load") as ctx:
            assert load(ctx) == "data"
        assert tries == ["load", "load"]
    ```
    """
    if unknown := options.keys() - ContextOptions.__annotations__.keys():
        raise TypeError(f"task_context() got an unexpected keyword argument {min(unknown)!r}")
    context = MemoryContext(options)
    return MemorySyncContext(context) if sync else context
