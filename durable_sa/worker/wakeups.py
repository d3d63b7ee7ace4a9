"""Waking tasks: waits that are over are resolved, parents are woken, events are delivered."""

from __future__ import annotations

import time
import uuid

from ..database.channel import DedicatedConnection
from ..database.hint import Hint
from ..execution.waits import warn_of_waiters_elsewhere
from ..statements import messages, waits
from .agenda import Agenda
from .dispatcher import Dispatcher
from .executor import Executor

BATCH = 500
DELIVERY_EVENTS = 50
UNHINTED_AGE = 1.0
"""Seconds after which messages are looked for whose hints were lost."""
LOCKED_RETRY_DELAY = 0.1
"""Seconds until tasks whose rows another transaction holds locked are looked at again."""
LOCKED_PAUSE_RATIO = 4
"""Least delay of that retry, as a multiple of the time that passing over the locked rows took."""


class WakeUps:
    """Resolves waits, in batches that skip the rows that other transactions hold locked."""

    def __init__(
        self, connection: DedicatedConnection, agenda: Agenda, dispatcher: Dispatcher, executor: Executor
    ) -> None:
        self._connection = connection
        self._agenda = agenda
        self._dispatcher = dispatcher
        self._executor = executor
        self._locked_events = 0
        """Undelivered events whose waiters are locked; deliveries pass over so many until the time below."""
        self._retry_locked_at = 0.0

    async def resolve(self, task_ids: list[uuid.UUID]) -> None:
        """Resolve what is over of the waits of these suspended tasks."""
        rows = await self._connection.execute(waits.RESOLVE_FREE, {"task_ids": task_ids})
        self._dispatcher.announce(Hint().add_rows(rows))

    async def wake_parents(self, task_ids: list[uuid.UUID]) -> None:
        """Resolve the waits for these ended tasks."""
        rows = await self._connection.execute(waits.WAITING_FOR, {"task_ids": task_ids})
        if not rows:
            return
        await self.resolve(sorted({row.task_id for row in rows}))
        self._executor.poll()
        if await self._connection.execute(waits.WAITING_FOR, {"task_ids": task_ids}):
            # The transaction that holds a waiter locked may look at the same wait, but as it was before the task ended.
            self._agenda.defer_ended(task_ids, LOCKED_RETRY_DELAY)

    async def deliver_messages(self, task_ids: list[uuid.UUID]) -> None:
        """Deliver messages to these tasks, where they wait for them."""
        if looking := self._executor.messages_came(set(task_ids)):
            task_ids = [task_id for task_id in task_ids if task_id not in looking]
        if not task_ids:
            return
        rows = await self._connection.execute(messages.DELIVER, {"task_ids": task_ids})
        self._dispatcher.announce(Hint().add_rows(rows))
        others = sorted(set(task_ids) - {row.task_id for row in rows})
        if not others:
            return
        # They do not wait, or run with a stored wait, or another transaction holds their rows locked.
        self._executor.poll(others)
        left = await self._connection.execute(messages.WITH_MAIL, {"task_ids": others})
        racing = sorted({row.task_id for row in left if row.kind != "message"})
        if racing:
            rows = await self._connection.execute(messages.WAKE_RACING, {"task_ids": racing})
            self._dispatcher.announce(Hint().add_rows(rows))
        locked = {row.task_id for row in left if row.kind == "message"} - self._agenda.receivers
        if locked:
            self._agenda.defer_receivers(locked, LOCKED_RETRY_DELAY)

    async def look_for_mail(self, task_ids: list[uuid.UUID]) -> None:
        """Have messages delivered that were sent before these tasks have begun to wait for them."""
        rows = await self._connection.execute(messages.WITH_MAIL, {"task_ids": task_ids})
        self._agenda.deliver_messages(row.task_id for row in rows)

    async def look_for_messages(self, age: float) -> None:
        """Deliver messages that are older than `age` seconds and that no worker has delivered, page by page."""
        passed = 0
        while True:
            rows = await self._connection.execute(
                messages.UNDELIVERED_MAIL, {"age": age, "wanted": BATCH, "passed": passed}
            )
            if rows:
                await self.deliver_messages(sorted({row.task_id for row in rows}))
                marked = await self._connection.execute(
                    messages.MARK_MAIL,
                    {"task_ids": [row.task_id for row in rows], "message_ids": [row.message_id for row in rows]},
                )
                passed += len(rows) - len(marked)
            if len(rows) < BATCH:
                return

    async def deliver_events(self) -> None:
        """Deliver emitted events page by page, passing over those whose waiters are locked."""
        began = time.monotonic()
        retry_locked = began >= self._retry_locked_at
        passed = 0 if retry_locked else self._locked_events
        previous: set[uuid.UUID] = set()
        while True:
            rows = await self._connection.execute(
                waits.UNDELIVERED, {"wanted_events": DELIVERY_EVENTS, "wanted_waits": BATCH, "passed": passed}
            )
            if not rows:
                break
            for row in rows:
                if row.elsewhere is not None:
                    warn_of_waiters_elsewhere(row.name, row.queue_name, row.elsewhere)
            waiting = {task_id for row in rows for task_id in row.task_ids or ()}
            if waiting:
                await self.resolve(sorted(waiting))
            marked = await self._connection.execute(
                waits.MARK_DELIVERED,
                {"queue_names": [row.queue_name for row in rows], "names": [row.name for row in rows]},
            )
            left = len(rows) - len(marked)
            if left and waiting != previous:
                # The page shows a batch of waiters, and there are more; or another transaction has just released one.
                previous = waiting
                continue
            passed += left
            previous = set()
            if len(rows) < DELIVERY_EVENTS:
                break
        self._locked_events = passed
        if passed:
            now = time.monotonic()
            if retry_locked:
                self._retry_locked_at = now + max(LOCKED_RETRY_DELAY, LOCKED_PAUSE_RATIO * (now - began))
            self._agenda.look_within(self._retry_locked_at - now)
        self._executor.poll()
