"""The base of a context: calls with the same key in every replay, and their records.

Methods draw their key when they are called and do the rest when they are awaited, so they are functions that return
coroutines. They are declared as `Coroutine[object, None, T]`, or overloaded as `async def`: if an `asyncio.gather` has
both `Coroutine[Any, Any, T]` and coroutines of `async def`, mypy takes all of its results for `Any`.
"""

from __future__ import annotations

import uuid
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

from ..app import App
from ..errors import InvalidState
from ..execution.hooks import around_step
from ..execution.journal import Entry
from ..execution.run import Run
from ..execution.waits import PendingWait, Stored
from ..execution.writes import CheckpointValues, Kind
from ..ids import is_part, step_key
from ..names import validate_name
from ..serialization.codec import Codec, check_size

T = TypeVar("T")

NULL = "null"
_NO_KEY = uuid.UUID(int=0)
_UNOBSERVED = nullcontext()


class Call(NamedTuple):
    """One durable call of a task, identified by a key that is the same in every replay."""

    kind: str
    name: str
    key: uuid.UUID


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
        if kind in ("step", "transaction", "spawn", "sleep") or not name.startswith("$"):
            validate_name("step", name)
        if self._run.signal is not None:
            # The run has ended, so the call is refused when it is awaited and needs no key.
            return Call(kind, name, _NO_KEY)
        branch = self._run.branch()
        occurrence = branch.occurrence((kind, name, arguments))
        part = _is_inside_step(branch.path)
        return Call(kind, name, step_key(kind, name, arguments, branch.path, occurrence, part=part))

    async def _recall(self, call: Call) -> Entry | None:
        """Return the record of a call, None if it has none."""
        run = self._run
        if run.signal is not None:
            await run.enter()
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
    ) -> Stored:
        """Block on an event or a child until it is there or `timeout` seconds have passed."""
        self._refuse_inside_step(call)
        waiting, due_at = self._run.journal.wait(call.key)
        delay = None if waiting else timeout
        wait = PendingWait(call.key, call.kind, call.name, event_name, child_task_id, due_at, delay)
        return await self._run.park(wait)

    async def _end_step(self, call: Call, codec: Codec[T], result: T) -> T:
        """Record a result, and return the result that is stored."""
        what = f"the result of {call.kind} {call.name!r}"
        text, value = codec.round_trip(result, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        with self._run.branches.busy():
            values = CheckpointValues(call.kind, call.name, "completed", text)
            stored = await self._run.write(Kind.CHECKPOINT, call.key, values, size=len(text))
        if call.kind == "step" and not is_part(call.key) and self._run.journal.holds_other("step", call.name):
            # Asked after the write, because branches that start after this one need time to take their own records.
            self._run.warn("step %r is recorded with other arguments than now, and was run anew", call.name)
        if is_part(call.key):
            self._keep_part(call, text if stored is None else stored.value or NULL)
        return value if stored is None else codec.decode(stored.value or NULL, what)

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

    def _observed(self, kind: str, name: str | None = None, **more: Any) -> AbstractContextManager[object]:
        """Return the span of a call, or a context manager without effect if there is no telemetry."""
        telemetry = self._run.host.telemetry
        return _UNOBSERVED if telemetry is None else telemetry.call(kind, name, self._run.claimed, **more)


def check_function(function: object, call: Call) -> None:
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
    raise TypeError(f"{call.kind} {call.name!r} takes a function and then its arguments, not {given}")


def _is_inside_step(path: tuple[int | str, ...]) -> bool:
    return any(isinstance(part, str) and not part.startswith("callback-") for part in path)
