"""What a task can do: steps, transactions, children, sleeps, events, each remembered from the first time on."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar as DefaultTypeVar
from typing_extensions import Unpack

from .annotations import is_coroutine_function
from .arguments import encode_arguments
from .codec import Codec, check_size, codec_for
from .errors import ChildCancelled, ChildFailed, IdempotencyConflict, InvalidState, TaskNotFound, TaskTimeout
from .failures import is_retryable
from .hooks import Hooks, around_step
from .ids import child_id, digest, is_part, new_id, step_key
from .journal import Entry
from .names import validate_name
from .policies import Duration, RetryStrategy, seconds, timestamp
from .results import TaskHandle
from .run import Claimed, Parked
from .signals import ControlFlow, LeaseLost, TaskCancelled
from .spawns import over, prepare
from .steps import Step, StepOptions, result_codec
from .transactions import run_transaction
from .writer import Kind, Stored

if TYPE_CHECKING:
    from .client import Durable
    from .options import SpawnOptions
    from .run import Run
    from .tasks import Task

P = ParamSpec("P")
T = TypeVar("T")
ParamsT = TypeVar("ParamsT")
StateT = DefaultTypeVar("StateT", default=Any)

_PLAIN: Codec[Any] = codec_for(Any)
_NULL = "null"
_NO_KEY = uuid.UUID(int=0)


class Call(NamedTuple):
    """One durable call of a task, named by a key that is the same in every replay."""

    kind: str
    name: str
    key: uuid.UUID


class Begun(NamedTuple):
    """A step before it is executed: what is recorded of it, or how often it was tried in vain."""

    call: Call
    recorded: bool
    value: Any
    tries: int


class TaskContext(Generic[StateT]):
    """The running task, as its function gets it.

    Every method that waits may raise :class:`durable_sa.signals.ControlFlow`, which is no ``Exception``: the run is
    then suspended, cancelled or lost, and ``finally`` blocks run as usual.
    """

    __slots__ = ("_durable", "_headers", "_parts", "_run", "_state")

    def __init__(self, run: Run, durable: Durable[Any], state: StateT) -> None:
        self._run = run
        self._durable = durable
        self._state = state
        self._headers: Mapping[str, Any] | None = None
        self._parts: dict[uuid.UUID, Entry] = {}

    @property
    def task_id(self) -> uuid.UUID:
        """The task's id, the same in all attempts."""
        return self._run.claimed.task_id

    @property
    def run_id(self) -> uuid.UUID:
        """The id of this attempt; it outlives suspensions."""
        return self._run.claimed.run_id

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1. Suspensions do not raise it; failures and lost workers do."""
        return self._run.claimed.attempt

    @property
    def task_name(self) -> str:
        """The name under which the task was spawned."""
        return self._run.claimed.task_name

    @property
    def queue_name(self) -> str:
        """The queue the task was spawned into."""
        return self._run.claimed.queue_name

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers given at spawn; plain JSON."""
        headers: Mapping[str, Any] | None = self._headers
        if headers is None:
            text = self._run.claimed.headers
            headers = {} if text is None else cast("Mapping[str, Any]", _PLAIN.decode(text, "the task's headers"))
            self._headers = headers
        return headers

    @property
    def state(self) -> StateT:
        """What the worker's `lifespan` yielded, else the client's `state`."""
        return self._state

    @property
    def signal(self) -> ControlFlow | None:
        """Why the run is coming to its end; None while it goes on."""
        return self._run.signal

    @property
    def claimed(self) -> Claimed:
        """What the claim of the run said."""
        return self._run.claimed

    @property
    def step_hooks(self) -> tuple[Hooks, ...]:
        """The client's hooks that go around steps."""
        return self._run.host.hooks.around_step

    @overload
    async def step(
        self, name: str, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    def step(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(*args, **kwargs)` once; in replays, its stored result is given back instead.

        A step whose result is stored never runs again. One that was cut off by a crash before that does, so its effects
        happen at least once. The result is stored by `fn`'s return annotation, and what comes back is what was stored,
        the first time too. A coroutine function is awaited, another function runs in a thread.

        The same name with the same arguments, called again, is the next occurrence, counted for each branch.

        Raises:
            InvalidName: the name is empty, longer than 200 bytes, starts with `$` or holds control characters.
            SerializationError: an argument or the result has no faithful JSON form.
            PayloadTooLarge: the result is larger than the client's `max_payload_bytes`.
            TaskTimeout: the step ran longer than its `timeout`.
        """
        function, options = (fn.function, fn.options) if isinstance(fn, Step) else (fn, StepOptions())
        call = self._call("step", name, encode_arguments(args, kwargs, f"step {name!r}"))
        return self._step(call, function, options, args, kwargs)

    async def _step(
        self,
        call: Call,
        function: Callable[..., Any],
        options: StepOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        run = self._run
        begun = await self._begin(call, function, options)
        if begun.recorded:
            return begun.value
        tries = begun.tries
        while True:
            await run.enter()
            try:
                with (
                    run.branches.busy(),
                    run.branches.scope(str(call.key)),
                    around_step(self.step_hooks, self, call.name),
                ):
                    result = await self._execute(call, function, options, args, kwargs)
            except Exception as error:
                tries += 1
                if not await self.try_again(call, tries, options, error):
                    raise
            else:
                return await self.end_step(call, result_codec(function), result)

    def begin_step(
        self,
        name: str,
        function: Callable[..., Any],
        options: StepOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Coroutine[Any, Any, Begun]:
        """The first part of a step that another thread executes."""
        call = self._call("step", name, encode_arguments(args, kwargs, f"step {name!r}"))
        return self._begin(call, function, options)

    async def _begin(self, call: Call, function: Callable[..., Any], options: StepOptions) -> Begun:
        run = self._run
        codec = result_codec(function)
        if (entry := await self._recall(call)) is not None:
            value = codec.decode(entry.value or _NULL, f"the result of step {call.name!r}")
            return Begun(call, True, value, 0)
        tries = await self._failed_tries(call) if options.max_attempts > 1 else 0
        await run.enter()
        if failures := tries % options.max_attempts:
            # What has woken the run may have been something else.
            await self._pause(call, tries, self._strategy(options).delay(failures))
        return Begun(call, False, None, tries)

    async def _execute(
        self,
        call: Call,
        function: Callable[..., Any],
        options: StepOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if options.timeout is None:
            return await _invoke(self._run.host.executor, function, args, kwargs)
        deadline = asyncio.timeout(options.timeout)
        try:
            async with deadline:
                return await _invoke(self._run.host.executor, function, args, kwargs)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise TaskTimeout(f"step {call.name!r}", options.timeout) from None

    async def _failed_tries(self, call: Call) -> int:
        """How often the step has failed before, in earlier runs."""
        tries = 0
        while await self._recall(self._try(call, tries)) is not None:
            tries += 1
        return tries

    def _try(self, call: Call, number: int) -> Call:
        return Call("value", "$try", step_key("try", str(call.key), "", (), number, part=True))

    async def try_again(self, call: Call, tries: int, options: StepOptions, error: Exception) -> bool:
        """Whether a step is to be tried again: remembers that it failed and waits; a long wait suspends the run.

        The last try that it has is remembered, too: the next attempt of the task then begins with a full number of
        them, whereas after a crash it goes on counting.
        """
        strategy = self._strategy(options)
        if options.max_attempts == 1 or strategy.kind == "none" or not is_retryable(error):
            return False
        tried = self._try(call, tries - 1)
        with self._run.branches.busy():
            await self._run.write(Kind.CHECKPOINT, tried.key, (tried.kind, tried.name, "completed", _NULL, None))
        failures = tries % options.max_attempts
        if failures == 0:
            return False
        await self._pause(call, tries, strategy.delay(failures))
        return True

    def _strategy(self, options: StepOptions) -> RetryStrategy:
        return options.retry_strategy or self._durable.default_retry_strategy

    async def _pause(self, call: Call, tries: int, delay: float) -> None:
        """Between two tries of a step."""
        if delay < 1.0 or is_part(call.key):
            with self._run.branches.busy():
                await asyncio.sleep(delay)
        else:
            key = step_key("pause", str(call.key), "", (), tries, part=True)
            await self._sleep(Call("sleep", "$retry", key), delay=delay, due_at=None)

    async def end_step(self, call: Call, codec: Codec[T], result: T) -> T:
        """Store a result, and give back what is stored."""
        what = f"the result of {call.kind} {call.name!r}"
        text, value = codec.round_trip(result, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        with self._run.branches.busy():
            stored = await self._run.write(
                Kind.CHECKPOINT, call.key, (call.kind, call.name, "completed", text, None), size=len(text)
            )
        if call.kind == "step" and not is_part(call.key) and self._run.journal.holds_other("step", call.name):
            # Only now: branches that start later than this one have asked for theirs in the meantime.
            self._run.warn("step %r is recorded with other arguments than now, and was run anew", call.name)
        if is_part(call.key):
            # The step around it may be tried again, and asks for it then.
            text = text if stored is None else stored.value or _NULL
            self._parts[call.key] = Entry(call.kind, call.name, "completed", text)
        return value if stored is None else codec.decode(stored.value or _NULL, what)

    @overload
    async def transaction(
        self,
        name: str,
        fn: Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T: ...
    @overload
    async def transaction(
        self, name: str, fn: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    def transaction(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn(session, *args, **kwargs)` in one database transaction with its checkpoint.

        What it writes happens exactly once, or not at all. The session comes from the client's sessionmaker or engine;
        `spawn_with` and `emit_event_with` on it commit with it. `fn` is awaited with an `AsyncSession`, or, if it is a
        plain function, called with a `Session` on the event loop, so it should do nothing slow besides its statements.
        It may be called again, from the beginning: up to 5 times after serialization failures and deadlocks, up to 20
        times after lost connections. Savepoints are its own.

        Raises:
            InvalidState: `fn` commits or rolls back the whole transaction by itself.
            SerializationError, PayloadTooLarge: the result cannot be stored; nothing is committed then.
        """
        call = self._call("transaction", name, encode_arguments(args, kwargs, f"transaction {name!r}"))
        return self._transaction(call, fn, args, kwargs)

    async def _transaction(
        self, call: Call, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        codec = result_codec(fn)
        if (entry := await self._recall(call)) is not None:
            return codec.decode(entry.value or _NULL, f"the result of transaction {call.name!r}")
        with (
            self._run.branches.busy(),
            self._run.branches.scope(str(call.key)),
            around_step(self.step_hooks, self, call.name),
        ):
            return await run_transaction(self._run, self._durable, call.key, call.name, codec, fn, args, kwargs)

    @overload
    async def spawn(
        self, name: str, task: Task[None, T], params: None = None, /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...
    @overload
    async def spawn(
        self, name: str, task: Task[ParamsT, T], params: ParamsT, /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...

    def spawn(self, name: str, task: Task[Any, Any], params: Any = None, /, **options: Unpack[SpawnOptions]) -> Any:
        """Spawn a subtask, once: the child and the memory of it commit together.

        It goes to this task's queue unless `queue_name` is given. If this task fails or is cancelled, so is the child;
        if it completes, the child goes on. Called with other params in a replay, the first child is given back.

        Raises:
            InvalidTaskParams: the params do not fit the task.
            InvalidConfiguration, InvalidName: an option is out of range.
            IdempotencyConflict: the idempotency key belongs to a task that is not this child.
        """
        return self._spawn(self._call("spawn", name), task, params, options, unchecked=False)

    def spawn_by_name(
        self, name: str, task_name: str, params: Any = None, /, **options: Unpack[SpawnOptions]
    ) -> Coroutine[Any, Any, TaskHandle[Any]]:
        """Spawn a subtask by the name of its task, which need not be registered in this process.

        As :meth:`spawn`; params are checked where the task is registered, and sent as plain JSON where it is not.
        """
        return self._spawn(self._call("spawn", name), task_name, params, options, unchecked=True)

    async def _spawn(
        self, call: Call, task: Task[Any, Any] | str, params: Any, options: SpawnOptions, *, unchecked: bool
    ) -> TaskHandle[Any]:
        run = self._run
        options.setdefault("queue_name", self.queue_name)
        child = child_id(self.task_id, call.key)
        entry = await self._recall(call)
        prepared = prepare(
            self._durable,
            task,
            params,
            options,
            task_id=child,
            parent_task_id=self.task_id,
            unchecked=unchecked,
            hooked=entry is None,
        )
        fingerprint = f'"{digest(prepared.params)}"'
        if entry is None:
            values = ("spawn", call.name, "completed", fingerprint, child)
            try:
                with run.branches.busy():
                    stored = await run.write(
                        Kind.CHILD, call.key, (values, prepared.values), size=len(prepared.params or "")
                    )
                if stored is not None and stored.status == "refused":
                    await self._explain_refusal(options, child)
            except BaseException as error:
                over([prepared], (), error)
                raise
            over([prepared], {child} if stored is None else ())
        elif entry.value is not None and entry.value != fingerprint:
            run.warn("subtask %r was spawned with other params than it is now; the first one counts", call.name)
        run.children[child] = self._durable.tasks.get(prepared.task_name)
        return TaskHandle(child)

    async def _explain_refusal(self, options: SpawnOptions, child: uuid.UUID) -> None:
        queue_name = options.get("queue_name") or self.queue_name
        await self._durable.require_queue(queue_name)
        raise IdempotencyConflict(str(options.get("idempotency_key")), queue_name, child)

    def join(self, handle: TaskHandle[T], *, timeout: Duration | None = None) -> Coroutine[Any, Any, T]:
        """The result of a child; suspends until it has ended.

        Raises:
            ChildFailed, ChildCancelled: the child ended that way.
            TaskTimeout: it had not ended after `timeout` seconds; remembered, so a replay takes the same way.
            TaskNotFound: the handle is not of a child of this task.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        call = self._call("join", "$join", str(handle.task_id))
        return self._join(call, handle, limit)

    async def _join(self, call: Call, handle: TaskHandle[T], timeout: float | None) -> T:
        run = self._run
        child = handle.task_id
        known: Task[Any, T] | None = run.children.get(child)
        stored = await self._recorded(call)
        if stored is None:
            await run.enter()
            with self._observed("join", child=child):
                with run.branches.busy():
                    ended = await run.host.reader.task(child)
                if ended is None or ended.parent_task_id != self.task_id:
                    raise TaskNotFound(child, "it is not a child of the task that joins it")
                known = known or self._durable.tasks.get(ended.task_name)
                if ended.outcome is not None:
                    value = ended.output if ended.outcome == "completed" else ended.error
                    stored = await self._settle(call, Stored(ended.outcome, value, child))
                else:
                    stored = await self._park(call, child_task_id=child, timeout=timeout)
        elif known is None:
            with run.branches.busy():
                ended = await run.host.reader.task(child)
            known = self._durable.tasks.get(ended.task_name) if ended is not None else None
        if stored.status == "completed":
            codec = known.output_codec if known is not None else _PLAIN
            return cast(T, codec.decode(stored.value or _NULL, f"the output of task {child}"))
        if stored.status == "timeout":
            raise TaskTimeout(f"joining task {child}", timeout or 0.0)
        if stored.status == "cancelled":
            raise ChildCancelled(child)
        error = _PLAIN.decode(stored.value or "{}", "a child's error")
        raise ChildFailed(child, str(error.get("name")), str(error.get("message")), raw=error.get("raw"))

    def sleep_for(self, name: str, duration: Duration) -> Coroutine[Any, Any, None]:
        """Suspend for a duration: seconds or a `timedelta`, up to 100 years. Holds no slot and no connection.

        When it ends is fixed the first time, by the database's clock; replays and retries do not move it.

        Raises:
            InvalidConfiguration: the duration is negative or too long.
            InvalidName: a name that breaks the rules for steps.
        """
        call = self._call("sleep", name)
        return self._sleep(call, delay=seconds(duration, "duration"), due_at=None)

    def sleep_until(self, name: str, when: datetime) -> Coroutine[Any, Any, None]:
        """Suspend until a time, timezone-aware; not at all if it has passed. As :meth:`sleep_for`."""
        call = self._call("sleep", name)
        return self._sleep(call, delay=None, due_at=timestamp(when, "when"))

    async def _sleep(self, call: Call, *, delay: float | None, due_at: datetime | None) -> None:
        run = self._run
        entry = await self._recall(call)
        if entry is not None:
            due_at, delay = _PLAIN_TIME.decode(entry.value or _NULL, "a wake time"), None
        await run.enter()
        if delay == 0 or (due_at is not None and due_at <= run.now()):
            return
        self._refuse_inside_step(call)
        future: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        with self._observed("sleep", call.name):
            await run.park(Parked(future, call.key, "sleep", call.name, due_at=due_at, delay=delay))

    @overload
    async def await_event(self, name: str, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    @overload
    async def await_event(self, name: str, *, timeout: Duration | None = None, type: None = None) -> Any: ...

    def await_event(self, name: str, *, timeout: Duration | None = None, type: Any = None) -> Any:  # noqa: A002
        """The payload of the queue's event of this name; suspends until it is emitted.

        `type` is what the payload is decoded as; without it, plain JSON. The event may have been emitted before.

        Raises:
            InvalidName: a name that breaks the rules for events.
            SerializationError: the payload is not of that type.
            TaskTimeout: it was not emitted within `timeout` seconds; remembered, so a replay takes the same way.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        validate_name("event", name)
        call = self._call("event", name)
        return self._await_event(call, limit, _PLAIN if type is None else codec_for(type))

    async def _await_event(self, call: Call, timeout: float | None, codec: Codec[T]) -> T:
        run = self._run
        stored = await self._recorded(call)
        if stored is None:
            await run.enter()
            with self._observed("await", event=call.name):
                with run.branches.busy():
                    payload = await run.host.reader.event((self.queue_name, call.name))
                if payload is not None:
                    stored = await self._settle(call, Stored("completed", payload))
                else:
                    stored = await self._park(call, event_name=call.name, timeout=timeout)
        if stored.status == "timeout":
            raise TaskTimeout(f"event {call.name!r}", timeout or 0.0)
        return codec.decode(stored.value or _NULL, f"the payload of event {call.name!r}")

    def emit_event(self, name: str, payload: Any = None) -> Coroutine[Any, Any, bool]:
        """Emit an event in this task's queue, once. False if the name had been emitted before; then nothing changes.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or payload that cannot be stored.
        """
        validate_name("event", name)
        call = self._call("emit", name)
        what = f"the payload of event {name!r}"
        text = _PLAIN.encode(payload, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        return self._emit(call, text)

    async def _emit(self, call: Call, text: str) -> bool:
        if (entry := await self._recall(call)) is not None:
            return entry.value == "true"
        await self._run.enter()
        telemetry = self._run.host.telemetry
        with self._observed("emit", event=call.name), self._run.branches.busy():
            metadata = None if telemetry is None else telemetry.metadata()
            values = ("emit", call.name, "completed", None, None, call.name, text, metadata)
            stored = await self._run.write(Kind.EVENT, call.key, values, size=len(text))
        first = stored is not None and stored.value == "true"
        if first and telemetry is not None:
            telemetry.emitted(self.queue_name)
        return first

    async def rand(self) -> float:
        """A random number in [0, 1), drawn once."""
        return await self._draw("$rand", codec_for(float), random.random)

    def now(self) -> Coroutine[Any, Any, datetime]:
        """The time by the database's clock, in UTC, drawn once."""
        return self._draw("$now", _PLAIN_TIME, self._run.now)

    def uuid7(self) -> Coroutine[Any, Any, uuid.UUID]:
        """A UUIDv7, drawn once."""
        return self._draw("$uuid7", codec_for(uuid.UUID), new_id)

    def _draw(self, name: str, codec: Codec[T], source: Callable[[], T]) -> Coroutine[Any, Any, T]:
        call = self._call("value", name)
        return self._drawn(call, codec, source)

    async def _drawn(self, call: Call, codec: Codec[T], source: Callable[[], T]) -> T:
        if (entry := await self._recall(call)) is not None:
            return codec.decode(entry.value or _NULL, call.name)
        await self._run.enter()
        return await self.end_step(call, codec, source())

    async def heartbeat(self, duration: Duration | None = None) -> None:
        """Ask whether the run still goes on: raises where the task was cancelled or taken over.

        Never needed to keep a lease, which is the worker's; `duration` is checked and otherwise has no meaning.
        """
        if duration is not None:
            seconds(duration, "duration")
        run = self._run
        await run.enter()
        with self._observed("heartbeat"), run.branches.busy():
            state = await run.host.reader.gone((self.task_id, run.claimed.fence))
        if state is not None:
            signal: ControlFlow = TaskCancelled() if state == "cancelled" else LeaseLost()
            run.take_away(signal)
            raise signal

    def _observed(self, kind: str, name: str | None = None, **more: Any) -> AbstractContextManager[object]:
        """In a span of the call, if anybody wants to see it."""
        telemetry = self._run.host.telemetry
        return _UNOBSERVED if telemetry is None else telemetry.call(kind, name, self._run.claimed, **more)

    def _call(self, kind: str, name: str, arguments: str = "") -> Call:
        """Draw the key of a call, when it is made: by name, arguments, branch and occurrence in that branch."""
        if not name.startswith("$") or kind in ("step", "transaction", "spawn", "sleep"):
            validate_name("step", name)
        if self._run.signal is not None:
            # It has no place in the run any more, and is refused as soon as it is awaited.
            return Call(kind, name, _NO_KEY)
        branch = self._run.branch()
        occurrence = branch.occurrence((kind, name, arguments))
        part = _is_inside_step(branch.path)
        return Call(kind, name, step_key(kind, name, arguments, branch.path, occurrence, part=part))

    async def _recall(self, call: Call) -> Entry | None:
        run = self._run
        if run.signal is not None:
            await run.enter()
        entry = run.journal.take(call.key) or self._parts.get(call.key)
        if entry is not None and entry.left_behind:
            return await run.fetch(entry, call.key)
        return entry

    async def _recorded(self, call: Call) -> Stored | None:
        """What a wait came to, or, where it is still open, what it comes to now."""
        if (entry := await self._recall(call)) is not None:
            return Stored(entry.status, entry.value, entry.child_task_id)
        return None

    async def _settle(self, call: Call, stored: Stored) -> Stored:
        """Remember what a wait that need not wait came to."""
        with self._run.branches.busy():
            earlier = await self._run.write(
                Kind.CHECKPOINT,
                call.key,
                (call.kind, call.name, stored.status, stored.value, stored.child_task_id),
                size=len(stored.value or ""),
            )
        return stored if earlier is None else earlier

    async def _park(
        self,
        call: Call,
        *,
        event_name: str | None = None,
        child_task_id: uuid.UUID | None = None,
        timeout: float | None = None,
    ) -> Stored:
        self._refuse_inside_step(call)
        waiting, due_at = self._run.journal.wait(call.key)
        future: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        parked = Parked(
            future, call.key, call.kind, call.name, event_name, child_task_id, due_at, None if waiting else timeout
        )
        return await self._run.park(parked)

    def _refuse_inside_step(self, call: Call) -> None:
        if _is_inside_step(self._run.branch().path):
            raise InvalidState(
                f"{call.kind} {call.name!r}",
                "called inside a step or transaction, which cannot be suspended",
                "Call it from the task's own code.",
            )


_PLAIN_TIME: Codec[datetime] = codec_for(datetime)
_UNOBSERVED = nullcontext()


def _is_inside_step(path: tuple[int | str, ...]) -> bool:
    return any(isinstance(part, str) and not part.startswith("callback-") for part in path)


async def _invoke(
    executor: ThreadPoolExecutor, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Await a coroutine function; run any other in a thread, with the caller's context variables."""
    if is_coroutine_function(function):
        return await function(*args, **kwargs)
    context = contextvars.copy_context()

    def call() -> Any:
        try:
            return context.run(function, *args, **kwargs)
        except StopIteration as error:
            # No future can hold one. Where a coroutine raises it, Python does the same.
            raise RuntimeError("the step raised StopIteration") from error

    result = await asyncio.get_running_loop().run_in_executor(executor, call)
    return await result if inspect.isawaitable(result) else result
