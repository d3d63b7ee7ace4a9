"""Races: the first of several durable waits, decided once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple, cast

from ..errors import InvalidConfiguration, InvalidState
from ..execution.calls import Call
from ..execution.writes import CheckpointValues, Kind, RaceValues
from ..results import Race
from ..serialization.codec import UNTYPED
from .base import NULL, ContextBase
from .messages import Available

_WAITS = frozenset({"event", "message", "join", "sleep"})
_SETTLING = 0.001
"""Seconds between looks at the calls of a race that neither wait nor are over."""


class Member(NamedTuple):
    """A wait that takes part in a race."""

    call: Call
    coroutine: Coroutine[Any, Any, Any]


class Races(ContextBase):
    """The part of a context that decides races."""

    __slots__ = ()

    def race(
        self, name: str, /, **waits: Coroutine[Any, Any, Any] | Callable[[], Coroutine[Any, Any, Any]]
    ) -> Coroutine[object, None, Race[Any]]:
        """Return the first of several durable waits that is over: its keyword, and its value.

        The waits are those of `receive`, `await_event`, `join`, `sleep_for` and `sleep_until`, as coroutines or as
        functions without parameters that return them. The winner is recorded, and the others are withdrawn: a message
        that lost stays to be received, a child goes on. If several are over at once, the first keyword wins. The error
        of a winner, such as a timeout, is raised, also in replays.

        ```python
        race = await ctx.race("payment", paid=ctx.receive("paid"), late=ctx.sleep_for("grace", 3600))
        if race.winner == "late":
            ...
        ```

        Raises:
            InvalidName: a name that breaks the rules for steps.
            InvalidConfiguration: no waits are given.
            InvalidState: the call is made inside a step or transaction.
            TypeError: something else than a wait of this task takes part.
        """
        made: dict[str, Any] = {}
        try:
            for key, wait in waits.items():
                made[key] = self._made(wait)
            members = {key: self._member(key, coroutine) for key, coroutine in made.items()}
            if not members:
                raise InvalidConfiguration("race", f"{name!r} has no waits", "Pass them as keywords.")
            call = self._call("race", name)
        except BaseException:
            # Also the coroutines that were passed and not reached, behind a function that has raised.
            for coroutine in (waits | made).values():
                self._withdraw(coroutine)
            raise
        return self._begun(call, self._race(call, members))

    def _made(self, wait: Any) -> Any:
        return wait() if callable(wait) else wait

    def _member(self, key: str, coroutine: Any) -> Member:
        run = self._run
        if run.signal is not None and isinstance(coroutine, Coroutine):
            return Member(Call("wait", key, run.claimed.task_id), cast("Coroutine[Any, Any, Any]", coroutine))
        for entry in run.unawaited.values():
            call, known = cast("tuple[Call, object]", entry)
            if known is coroutine and call.kind in _WAITS:
                return Member(call, cast("Coroutine[Any, Any, Any]", coroutine))
        raise TypeError(
            f"{key}= of a race is not a wait of this task that was not awaited yet: "
            "ctx.receive, ctx.await_event, ctx.join, ctx.sleep_for or ctx.sleep_until"
        )

    def _withdraw(self, coroutine: Any) -> None:
        """Close the coroutine of a call, which then counts as awaited."""
        unawaited = self._run.unawaited
        for key in [key for key, entry in unawaited.items() if cast("tuple[Any, object]", entry)[1] is coroutine]:
            del unawaited[key]
        if isinstance(coroutine, Coroutine):
            made = cast("Coroutine[Any, Any, Any]", coroutine)
            if inspect.getcoroutinestate(made) == inspect.CORO_CREATED:
                made.close()

    async def _race(self, call: Call, members: Mapping[str, Member]) -> Race[Any]:
        run = self._run
        try:
            entry = await self._recall(call)
            if entry is None:
                await run.enter()
                self._refuse_inside_step(call)
                with self._observed("race", call.name):
                    return await self._decide(call, members)
            winner = cast(str, UNTYPED.decode(entry.value or NULL, f"the winner of race {call.name!r}"))
            if winner not in members:
                raise InvalidState(
                    f"Race {call.name!r}",
                    f"recorded with the winner {winner!r}, which does not take part any more",
                    "Keep the keywords of a race while tasks are under way.",
                )
            for key, member in members.items():
                if key != winner:
                    run.journal.take(member.call.key)
                    self._withdraw(member.coroutine)
            try:
                return Race(winner, await members[winner].coroutine)
            finally:
                run.keep_timeouts([members[winner].call.key])
        finally:
            for member in members.values():
                self._withdraw(member.coroutine)

    async def _decide(self, call: Call, members: Mapping[str, Member]) -> Race[Any]:
        """Run the waits as asyncio tasks until one is over and recorded as the winner."""
        run = self._run
        with run.branches.race(str(call.key)):
            tasks = {key: asyncio.ensure_future(member.coroutine) for key, member in members.items()}
        try:
            while True:
                await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
                with run.branches.busy():
                    await self._settle_members(members, tasks)
                    for key in members:
                        if not tasks[key].done():
                            continue
                        result = _result(tasks[key])
                        stored = await self._record_winner(call, key, members, result)
                        if stored is None:
                            # A call in another branch has received the message.
                            assert isinstance(result, Available)  # noqa: S101 - nothing else is refused
                            with run.branches.race(str(call.key)):
                                tasks[key] = asyncio.ensure_future(result.again())
                            continue
                        run.keep_timeouts([member.call.key for member in members.values()])
                        if isinstance(result, BaseException):
                            raise result
                        if isinstance(result, Available):
                            what = f"the message of topic {result.call.name!r}"
                            return Race(key, result.codec.decode(stored, what))
                        return Race(key, result)
        finally:
            for task in tasks.values():
                task.cancel()
            if run.signal is None:
                with run.branches.busy():
                    await asyncio.wait(tasks.values())
                for task in tasks.values():
                    if not task.cancelled():
                        task.exception()

    async def _settle_members(self, members: Mapping[str, Member], tasks: Mapping[str, asyncio.Future[Any]]) -> None:
        """Wait until each call is over or waits, as the first of those that are over wins."""
        while unsettled := [
            tasks[key]
            for key, member in members.items()
            if not tasks[key].done() and not self._run.is_parked(member.call.key)
        ]:
            await asyncio.wait(unsettled, timeout=_SETTLING)

    async def _record_winner(self, call: Call, winner: str, members: Mapping[str, Member], result: Any) -> str | None:
        """Record the winner, and return the message it receives, or "null"; None if there is no message any more."""
        checkpoint = CheckpointValues("race", call.name, "completed", UNTYPED.encode(winner, "the winner of a race"))
        losers = [member.call.key for key, member in members.items() if key != winner]
        topic = result.call.name if isinstance(result, Available) else None
        values = RaceValues(checkpoint, members[winner].call.key, topic, losers)
        keys = [member.call.key for member in members.values()]
        self._run.hold_back(keys, stored=True)
        stored = await self._run.write(Kind.RACE, call.key, values)
        if stored is None or stored.status == "none":
            self._run.hold_back(keys, stored=False)
            return None
        if stored.status == "won" or topic is None:
            return stored.value or NULL
        # The statement was executed before, and its reply was lost.
        return await self._run.host.reader.checkpoint(self._run.claimed.task_id, members[winner].call.key)


def _result(task: asyncio.Future[Any]) -> Any:
    """Return the result or the error of a call that is over."""
    if task.cancelled():
        raise asyncio.CancelledError
    error = task.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return task.result() if error is None else error
