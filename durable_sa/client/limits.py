"""Limits of queues and of their keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, get_args

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from ..app import App
from ..database.hint import Hint
from ..database.notifier import sender
from ..database.scripts import Script, drive_async, perform
from ..errors import InvalidConfiguration, InvalidState, QueueNotFound
from ..names import validate_name
from ..options import check_limit_key
from ..policies import Limit
from ..results import LimitKeyInfo, LimitKeyState
from ..statements import limit_diagnosis, limiting, queues
from ..validation import instance, integer, seconds, timestamp

RECOUNTED: Final = 1000
"""Keys that one repair counts anew at most."""
MAX_WEIGHT: Final = 1000
"""The largest weight of a key."""


class Limits(App):
    """The part of a client that deals with limits."""

    async def set_limit(
        self,
        queue_name: str,
        limit: Limit | None,
        *,
        key: str | None = None,
        per_key: bool = False,
        weight: int | None = None,
    ) -> None:
        """Set the limit of a queue, with `per_key` of each of its keys, or with `key` of that one. None removes it.

        It holds from the next claim on, on the whole fleet. A lowered limit stops new starts and cancels nothing. With
        `key`, a `weight` of 1 to 1000 is the share of turns that the key gets beside others, 1 unless set; with None
        as the limit, the key then has its weight, and the limit of each key.

        Raises:
            QueueNotFound: there is no such queue.
            InvalidConfiguration: arguments that do not go together.
            InvalidState: workers of a version that knows no limits are alive.
        """
        from ..worker import limit_setup

        queue = validate_name("queue", queue_name)
        if limit is not None:
            instance(limit, Limit, "limit")
        if key is not None and per_key:
            raise InvalidConfiguration("key and per_key", "both are given", "Give one of them.")
        if weight is not None:
            if key is None:
                raise InvalidConfiguration("weight", "it is given without key", "Queues have no weight, keys do.")
            weight = integer(weight, "weight", minimum=1, maximum=MAX_WEIGHT)
        scope = "key" if key is not None else "per_key" if per_key else "queue"
        name = "" if key is None else check_limit_key(key)
        if limit is None and weight is None and not await self._has_limits(queue):
            return
        await limit_setup.enable(self.database, queue)

        async def change(connection: AsyncConnection) -> None:
            script = put_limit(queue, scope, limit, name, weight)
            await drive_async(functools.partial(self.database.execute_on, connection), script)

        await limit_setup.under_lock(self.database, change)
        self.limited_queues.add(queue)
        self._wake(queue)

    async def close_limit_key(self, queue_name: str, key: str, until: datetime | None) -> None:
        """Let no task of a key start, or go on after a sleep, until a time with a time zone. None opens the key.

        Running tasks go on. In a queue without limits, too; its keys then take turns.

        Raises:
            QueueNotFound: there is no such queue.
            InvalidConfiguration: a time without a time zone.
            InvalidState: workers of a version that knows no limits are alive.
        """
        from ..worker import limit_setup

        queue, name = validate_name("queue", queue_name), check_limit_key(key)
        moment = None if until is None else timestamp(until, "until")
        await limit_setup.enable(self.database, queue)
        await perform(self.database, lambda _: _close_key(queue, name, moment))
        self.limited_queues.add(queue)
        self._wake(queue)

    async def list_limit_keys(
        self, queue_name: str, *, state: LimitKeyState | None = None, limit: int = 50, after: str | None = None
    ) -> list[LimitKeyInfo]:
        """Return the keys of a queue, by name: those in `state`, or all. At most `limit` of them.

        With `after`, only keys whose names come after that one, such as the last key of the page before. The tasks
        without a key come first, and an empty text leaves them out. Keys that nothing has used for a minute are left
        out as well, unless they have a limit or a weight of their own.

        Raises:
            QueueNotFound: there is no such queue.
            InvalidConfiguration: there is no such state.
            InvalidName: `after` cannot be a key.
        """
        queue = validate_name("queue", queue_name)
        if state is not None and state not in get_args(LimitKeyState):
            raise InvalidConfiguration("state", f"{state!r:.40} is none of {', '.join(get_args(LimitKeyState))}")
        most = integer(limit, "limit", minimum=1, maximum=100_000)
        position = check_limit_key(after) if after else after
        await self.require_queue(queue)
        parameters = {"queue_name": queue, "state": state, "first": position or "", "after": position, "most": most}
        rows = await self.database.execute(limiting.LIST_KEYS, parameters)
        return [LimitKeyInfo(row.limit_key or None, row.state, row.running, row.waiting, row.opens_at) for row in rows]

    async def count_limit_keys(self, queue_names: Collection[str]) -> dict[str, dict[LimitKeyState, int]]:
        """Return how many keys of each of these queues are in each state; a queue without keys is left out."""
        found: dict[str, dict[LimitKeyState, int]] = {}
        if queue_names:
            parameters = {"queue_names": list(queue_names)}
            for row in await self.database.execute(limiting.COUNT_KEYS, parameters):
                found.setdefault(row.queue_name, {})[row.state] = row.keys
        return found

    async def recount_limit_keys(self, grace: float = 60.0) -> int:
        """Count the slots of keys anew whose count is wrong, because rows were changed by hand; return their number.

        Keys that have room, and tasks that have been due for `grace` seconds, are looked at by the next claim.
        """
        from ..worker import limit_setup

        recounted = 0
        parameters = {"wanted": RECOUNTED, "grace": seconds(grace, "grace")}
        for statement in (limit_diagnosis.MISCOUNTED, limit_diagnosis.PARKED):
            for row in await self.database.execute(statement, parameters):
                key = {"queue_name": row.queue_name, "limit_key": row.limit_key}
                async with self.database.transaction() as connection:
                    await connection.execute(limit_diagnosis.LOCK_KEY, key)
                    await connection.execute(limit_diagnosis.RECOUNT_KEY, key)
                self._wake(row.queue_name)
                recounted += 1
        for row in await self.database.execute(limit_diagnosis.MISCOUNTED_TOTALS, parameters):

            async def recount(connection: AsyncConnection, queue_name: str = row.queue_name) -> None:
                await connection.execute(limiting.LOCK_KEYS)
                await connection.execute(limit_diagnosis.RECOUNT_TOTAL, {"queue_name": queue_name})

            await limit_setup.under_lock(self.database, recount)
            self._wake(row.queue_name)
            recounted += 1
        return recounted

    async def _has_limits(self, queue_name: str) -> bool:
        rows = await self.database.execute(limiting.LIMITED_STATE, {"queue_name": queue_name})
        if not rows:
            raise QueueNotFound(queue_name)
        return rows[0].limited_at is not None

    def _wake(self, queue_name: str) -> None:
        hint = Hint()
        hint.add(queue_name, 0, datetime(1970, 1, 1, tzinfo=UTC))
        sender(self.database).send(hint)


def creation(parameters: dict[str, Any], limits: Mapping[str, Limit | None]) -> Callable[[Hint], Script[bool]]:
    """Return the script that creates a queue, with limits by their scope. It returns False for one that exists.

    The script raises `InvalidState` if workers are alive that would not obey the limits.
    """
    name = {"queue_name": parameters["queue_name"]}
    given = {scope: limit for scope, limit in limits.items() if limit is not None}

    def script(_: Hint) -> Script[bool]:
        if given:
            from ..worker import limit_setup

            limit_setup.check_old_workers((yield limiting.OLD_WORKERS, {}))
        created = bool((yield queues.CREATE_QUEUE, parameters)[0].created)
        if created and given:
            for statement in limiting.DROP_LIMITS:
                yield statement, name
            yield limiting.MARK_LIMITED, {**name, "is_new": True}
            for scope, limit in given.items():
                yield limiting.PUT_LIMIT, {**name, "scope": scope, "limit_key": "", **_columns(limit), "weight": None}
                if scope == "queue":
                    yield limiting.COUNT_TOTAL, name
        return created

    return script


def require_limits(queue_name: str, limits: Mapping[str, Limit | None]) -> Script[None]:
    """Return the script that raises `InvalidState` unless a queue has these limits."""
    for scope, limit in limits.items():
        rows = yield limiting.READ_LIMIT, {"queue_name": queue_name, "scope": scope}
        found = {name: getattr(rows[0], name) for name in _columns(None)} if rows else None
        if found != (None if limit is None else _columns(limit)):
            raise InvalidState(
                f"Queue {queue_name!r}",
                "one that exists and has other limits",
                "Change them with set_limit(), which commits by itself.",
            )


def _close_key(queue_name: str, key: str, until: datetime | None) -> Script[None]:
    identity = {"queue_name": queue_name, "limit_key": key}
    yield limiting.FORGET_CLOSINGS, identity
    yield limiting.CLOSE_KEY, {**identity, "until": until}


def put_limit(
    queue_name: str, scope: str, limit: Limit | None, key: str = "", weight: int | None = None
) -> Script[None]:
    """Return the script that sets or removes a limit, and has claims look at the keys that it concerns."""
    identity = {"queue_name": queue_name, "scope": scope, "limit_key": key}
    if scope == "queue":
        yield limiting.LOCK_KEYS, {}
    rows = yield limiting.LOCK_LIMIT, identity
    if weight is None and rows:
        weight = rows[0].weight
    if limit is None and weight is None:
        yield limiting.DELETE_LIMIT, identity
    else:
        yield limiting.PUT_LIMIT, {**identity, **_columns(limit), "weight": weight}
    if scope == "queue":
        yield limiting.DELETE_TOTAL if limit is None else limiting.COUNT_TOTAL, {"queue_name": queue_name}
    # A key without a limit of its own has that of each key.
    shared = (yield limiting.READ_LIMIT, {"queue_name": queue_name, "scope": "per_key"}) if scope == "key" else ()
    before, after = _policy(rows) or _policy(shared), _columns(limit) if limit is not None else _policy(shared)
    if before is not None and before["hold"] == "task" and (after is None or after["hold"] == "run"):
        yield limiting.RELEASE_KEPT, {"queue_name": queue_name}
    keys = {"queue_name": queue_name, "limit_key": key if scope == "key" else None}
    if after is not None and (before is None or any(before[name] != after[name] for name in _RATE)):
        yield (
            (limiting.SHORTEN_WAIT_OF_ALL, {"queue_name": queue_name})
            if scope == "queue"
            else (limiting.SHORTEN_WAITS, keys)
        )
    yield limiting.WAKE_KEYS, keys


_RATE: Final = ("rate_interval", "burst")


def _policy(rows: Sequence[Row[Any]]) -> dict[str, Any] | None:
    """Return the columns of a stored limit that changes are compared by; None if there is no limit."""
    return {name: getattr(rows[0], name) for name in (*_RATE, "hold")} if rows and rows[0].limited else None


def _columns(limit: Limit | None) -> dict[str, Any]:
    rate = None if limit is None else limit.rate
    return {
        "limited": limit is not None,
        "concurrency": None if limit is None else limit.concurrency,
        "rate_count": None if rate is None else rate.count,
        "rate_seconds": None if rate is None else rate.per,
        # Rounded up to what the database stores, so that it is never faster than asked for.
        "rate_interval": None if rate is None else timedelta(microseconds=math.ceil(rate.interval * 1e6 - 1e-6)),
        "burst": None if rate is None else rate.burst,
        "hold": None if limit is None else limit.hold,
    }
