"""What all parts of a context stand on: calls with the same key in every replay, and what is remembered of them.

Methods draw their key when they are called and do the rest when they are awaited, so they are functions that return
coroutines. They are declared as `Coroutine[object, None, T]`, or overloaded as `async def`: where `Coroutine[Any, Any,
T]` meets coroutines of `async def` in one `asyncio.gather`, mypy gives up and takes all of its results for `Any`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import InvalidState
from ..execution.hooks import around_step
from ..execution.journal import Entry
from ..execution.waits import PendingWait, Stored
from ..execution.writes import CheckpointValues, Kind
from ..ids import is_part, step_key
from ..names import validate_name
from ..serialization.codec import Codec, check_size

if TYPE_CHECKING:
    from ..client import Durable
    from ..execution.run import Run

T = TypeVar("T")

NULL = "null"
_NO_KEY = uuid.UUID(int=0)
_UNOBSERVED = nullcontext()


class Call(NamedTuple):
    """One durable call of a task, named by a key that is the same in every replay."""

    kind: str
    name: str
    key: uuid.UUID


class ContextBase:
    """A context before there is anything that it can do."""

    __slots__ = ("_durable", "_parts", "_run")

    def __init__(self, run: Run, durable: Durable[Any]) -> None:
        self._run = run
        self._durable = durable
        self._parts: dict[uuid.UUID, Entry] = {}
        """What is recorded inside of steps. One around it may be tried again, and asks for it then."""

    def _call(self, kind: str, name: str, arguments: str = "") -> Call:
        """Draw the key of a call, when it is made: by name, arguments, branch and occurrence in that branch."""
        if kind in ("step", "transaction", "spawn", "sleep") or not name.startswith("$"):
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
            entry = await run.fetch(entry, call.key)
        if entry is not None and is_part(call.key):
            self._parts[call.key] = entry
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
        self._refuse_inside_step(call)
        waiting, due_at = self._run.journal.wait(call.key)
        future: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        parked = PendingWait(
            future, call.key, call.kind, call.name, event_name, child_task_id, due_at, None if waiting else timeout
        )
        return await self._run.park(parked)

    async def end_step(self, call: Call, codec: Codec[T], result: T) -> T:
        """Store a result, and give back what is stored."""
        what = f"the result of {call.kind} {call.name!r}"
        text, value = codec.round_trip(result, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        with self._run.branches.busy():
            values = CheckpointValues(call.kind, call.name, "completed", text)
            stored = await self._run.write(Kind.CHECKPOINT, call.key, values, size=len(text))
        if call.kind == "step" and not is_part(call.key) and self._run.journal.holds_other("step", call.name):
            # Only now: branches that start later than this one have asked for theirs in the meantime.
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
        """In a span of the call, if anybody wants to see it."""
        telemetry = self._run.host.telemetry
        return _UNOBSERVED if telemetry is None else telemetry.call(kind, name, self._run.claimed, **more)


def check_function(function: object, call: Call) -> None:
    """Refuse what cannot be called, above all what comes of calling it: `ctx.step("charge", charge(5))`.

    Raises:
        TypeError: with what it is instead.
    """
    if callable(function):
        return
    given = type(function).__name__
    if isinstance(function, Coroutine):
        function.close()  # or Python warns that nobody has awaited it
        given = f"what it gives (a {given})"
    raise TypeError(f"{call.kind} {call.name!r} takes a function and then its arguments, not {given}")


def _is_inside_step(path: tuple[int | str, ...]) -> bool:
    return any(isinstance(part, str) and not part.startswith("callback-") for part in path)
