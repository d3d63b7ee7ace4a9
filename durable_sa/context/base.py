"""The base of a context: calls with the same key in every replay, and their records.

Methods draw their key when they are called and do the rest when they are awaited, so they are functions that return
coroutines. They are declared as `Coroutine[object, None, T]`, or overloaded as `async def`: if an `asyncio.gather` has
both `Coroutine[Any, Any, T]` and coroutines of `async def`, mypy takes all of its results for `Any`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ..app import App
from ..concurrency.branches import CALLBACK, RACE, Branch
from ..errors import InvalidState, ReplayMismatch
from ..execution.calls import Call
from ..execution.hooks import around_step
from ..execution.journal import Entry
from ..execution.run import Run
from ..execution.waits import PendingWait, Stored
from ..execution.writes import CheckpointValues, Kind
from ..ids import is_part, step_key
from ..names import validate_name
from ..serialization.codec import UNTYPED, Codec, check_size
from ..signals import Suspended

if TYPE_CHECKING:
    from ..telemetry.spans import Scope

T = TypeVar("T")

NULL = "null"
STREAM_MARK = "$stream"
_NO_KEY = uuid.UUID(int=0)
_UNOBSERVED = nullcontext()


class ContextBase:
    """The run of a context, and the records of its calls."""

    __slots__ = ("_app", "_parts", "_run")

    def __init__(self, run: Run, app: App) -> None:
        self._run = run
        self._app = app
        self._parts: dict[uuid.UUID, Entry] = {}
        """The records of calls inside of steps, for the next try of the step."""

    def _call(self, kind: str, name: str, arguments: str = "") -> Call:
        """Return a call with its key, which its name, arguments, branch and occurrence in that branch determine."""
        if kind in ("step", "transaction", "spawn", "sleep", "race") or not name.startswith("$"):
            validate_name("step", name)
        if self._run.signal is not None:
            # The run has ended, so the call is refused when it is awaited and needs no key.
            return Call(kind, name, _NO_KEY)
        branch = self._run.branch()
        occurrence = branch.occurrence((kind, name, arguments))
        part = _is_inside_step(branch.path)
        key = step_key(kind, name, arguments, branch.path, occurrence, part=part)
        self._run.journal.ask(key)
        journal = self._run.journal
        if not (branch.live or (journal.empty and not self._run.lines.held)):
            self._run.lines.called(branch, recorded=journal.knows(key))
        return Call(kind, name, key, arguments)

    def log_line(self, record: logging.LogRecord, branch: Branch | None = None) -> None:
        """Log a record of the calling code, in `branch` if that is given, unless an earlier run has logged it."""
        run = self._run
        if isinstance(run.signal, Suspended):
            # The code unwinds, and will come to this line once more.
            return
        if branch is None:
            with contextlib.suppress(InvalidState):
                branch = run.branch()
        run.lines.log(record, branch if run.signal is None else None, replaying=not run.journal.used_up)

    def _begun(self, call: Call, coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Return the coroutine of a call, and remember it until it is awaited."""
        if call.key is not _NO_KEY:
            self._run.unawaited[call.key] = call, coroutine
        return coroutine

    async def _recall(self, call: Call) -> Entry | None:
        """Return the record of a call, None if it has none. Each call begins with this."""
        run = self._run
        run.unawaited.pop(call.key, None)
        if run.signal is not None:
            await run.enter()
        if run.mismatch is not None:
            raise ReplayMismatch(run.mismatch.step)
        entry = run.journal.take(call.key) or self._parts.get(call.key)
        if entry is not None and entry.left_behind:
            entry = await run.fetch(entry, call.key)
        if entry is not None and is_part(call.key):
            self._parts[call.key] = entry
        return entry

    async def _recorded(self, call: Call) -> Stored | None:
        """Return the recorded outcome of a wait, None if it has none."""
        if (entry := await self._recall(call)) is not None:
            return Stored(entry.status, entry.value, entry.child_task_id)
        return None

    async def _settle(self, call: Call, stored: Stored) -> Stored:
        """Record the outcome of a wait that is over before it has begun, and return the outcome that is stored."""
        with self._run.branches.busy():
            earlier = await self._run.write(
                Kind.CHECKPOINT,
                call.key,
                CheckpointValues(call.kind, call.name, stored.status, stored.value, stored.child_task_id),
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
        kind: str | None = None,
    ) -> Stored:
        """Block on an event, a child or a message until it is there or `timeout` seconds have passed."""
        self._refuse_inside_step(call)
        waiting, due_at = self._run.journal.wait(call.key)
        delay = None if waiting else timeout
        wait = PendingWait(call.key, kind or call.kind, call.name, event_name, child_task_id, due_at, delay)
        return await self._run.park(wait)

    async def _end_step(self, call: Call, codec: Codec[T], result: T, duration: float | None = None) -> T:
        """Record a result, with the seconds that it took, and return the result that is stored."""
        what = f"the result of {call.kind} {call.name!r}"
        text, value = codec.round_trip(result, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        with self._run.branches.busy():
            values = CheckpointValues(call.kind, call.name, "completed", text, None, duration, call.summary)
            stored = await self._run.write(Kind.CHECKPOINT, call.key, values, size=len(text))
        if is_part(call.key):
            self._keep_part(call, text if stored is None else stored.value or NULL)
        return value if stored is None else codec.decode(stored.value or NULL, what)

    @property
    def _strict(self) -> bool:
        """True if a recorded step must not be met with other arguments."""
        return (self._run.replay or self._app.replay) == "strict"

    def _check_replay(self, call: Call) -> bool:
        """Return True, after a warning, if a step or transaction without a record is recorded with other arguments.

        A call whose failure is recorded is no such case: it has no result, whatever is recorded after it.

        Raises:
            ReplayMismatch: it is recorded with other arguments, and the task is strict.
        """
        run = self._run
        if is_part(call.key) or not run.journal.passes_over(call.key):
            return False
        if run.journal.take(self._try(call, 0).key) is not None:
            return False
        if self._strict:
            run.mismatch = ReplayMismatch(call.name)
            raise run.mismatch
        run.warn("%s %r is recorded with other arguments than now, and runs anew", call.kind, call.name)
        return True

    def _check_moved(self, call: Call) -> None:
        """Warn of a step that has run although one of its name is recorded, and no branch has asked for that."""
        # Asked after the write, because branches that start after this one need time to take their own records.
        if not is_part(call.key) and self._run.journal.holds_other(call.kind, call.name):
            self._run.warn("%s %r is recorded with other arguments than now, and was run anew", call.kind, call.name)

    async def _note_failure(self, call: Call) -> None:
        """Record that a step has failed, so that a replay does not take the records behind it for those of this call.

        Only strict tasks need that. It is written before the task's code goes on, even if that is being cancelled.
        """
        if self._strict and not is_part(call.key) and self._run.signal is None:
            await self._record_try(self._try(call, 0))

    async def _record_try(self, tried: Call, text: str = NULL, duration: float | None = None) -> None:
        with self._run.branches.busy():
            values = CheckpointValues(tried.kind, tried.name, "completed", text, None, duration)
            await self._run.write(Kind.CHECKPOINT, tried.key, values)

    def _try(self, call: Call, number: int) -> Call:
        return Call("value", "$try", step_key("try", str(call.key), "", (), number, part=True))

    async def _note_streams(self, key: uuid.UUID, error: BaseException) -> None:
        """Record how far the streams were that a step, or a block in the body, has written before it has failed.

        The record tells a replay of code that has caught the error from the retry of a step that was interrupted. An
        error that fails the run deletes it, as it deletes the records of timeouts, whose status it has for that.
        """
        run = self._run
        names = run.stream_positions.get(key)
        if not names or run.signal is not None or not isinstance(error, Exception | asyncio.CancelledError):
            return
        ends = {name: max(of.get(name, 0) for of in run.stream_positions.values()) for name in names}
        mark, text = stream_mark(key), UNTYPED.encode(ends, "the positions of streams")
        run.timed_out(mark.key, error)
        with run.branches.busy():
            await run.write(Kind.CHECKPOINT, mark.key, CheckpointValues(mark.kind, mark.name, "timeout", text))
        self._keep_part(mark, text)

    def _keep_part(self, call: Call, text: str) -> None:
        self._parts[call.key] = Entry(call.kind, call.name, "completed", text)

    def _refuse_inside_step(self, call: Call) -> None:
        if _is_inside_step(self._run.branch().path):
            raise InvalidState(
                f"{call.kind} {call.name!r}",
                "called inside a step or transaction, which cannot be suspended",
                "Call it from the task's own code.",
            )

    def _around(self, call: Call) -> AbstractContextManager[object]:
        """Return a context manager for one try of a step or transaction: its span, and inside it the client's hooks."""
        host = self._run.host
        span = None if host.telemetry is None else host.telemetry.call("step", call.name, self._run.claimed)
        return around_step(host.hooks.around_step, self, call.name, span)

    def _observed(self, kind: str, name: str | None = None, **more: Any) -> AbstractContextManager[Scope | None]:
        """Return the span of a call, or a context manager without effect if there is no telemetry."""
        telemetry = self._run.host.telemetry
        return _UNOBSERVED if telemetry is None else telemetry.call(kind, name, self._run.claimed, **more)


def check_function(function: object, kind: str, name: str) -> None:
    """Refuse a step's function that is not callable, such as the coroutine in `ctx.step("charge", charge(5))`.

    Raises:
        TypeError: with the type of the object.
    """
    if callable(function):
        return
    given = type(function).__name__
    if isinstance(function, Coroutine):
        function.close()  # otherwise Python warns that it was never awaited
        given = f"the result of a call (a {given})"
    raise TypeError(f"{kind} {name!r} takes a function and then its arguments, not {given}")


def stream_mark(key: uuid.UUID) -> Call:
    """Return the call under which it is recorded that the step, or block, of a key has failed."""
    return Call("value", STREAM_MARK, step_key("streamed", str(key), "", (), 0, part=True))


def enclosing_step(path: tuple[int | str, ...]) -> uuid.UUID | None:
    """Return the key of the innermost step or transaction that code in a branch belongs to; None in the task's body."""
    for part in reversed(path):
        if isinstance(part, str) and not part.startswith((CALLBACK, RACE)):
            return uuid.UUID(part)
    return None


def _is_inside_step(path: tuple[int | str, ...]) -> bool:
    return any(isinstance(part, str) and not part.startswith((CALLBACK, RACE)) for part in path)
