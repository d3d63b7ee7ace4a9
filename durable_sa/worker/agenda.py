"""The agenda of a worker: work that is known and not begun.

The dispatcher (after commits), the executor (when a slot is freed) and the listener (when a hint arrives) write to it.
Claims and maintenance each wait for one event of it and do what it lists.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence

from ..database.clock import LocalClock
from ..database.hint import Hint
from .cursors import ClaimCursors
from .limited import LimitedQueues

FULL_SCAN_DELAY = 0.01
"""Seconds that a full scan is put off while other work is pending."""


class Agenda:
    """The work that claims and maintenance of one worker have to do next."""

    def __init__(self, queue_names: Sequence[str], clock: LocalClock) -> None:
        self._clock = clock
        self._full_scan_timer: asyncio.TimerHandle | None = None
        self._deferred_ended: set[uuid.UUID] = set()
        self._deferred_cascades: set[uuid.UUID] = set()
        self._deferred_receivers: set[uuid.UUID] = set()

        self.claim = asyncio.Event()
        """Set when tasks may be claimable."""
        self.cursors = ClaimCursors(queue_names)
        self.limited = LimitedQueues()
        self.hinted = False
        """Tasks were named by a hint since the last claim."""
        self.offered = 0
        """Tasks spawned in this process and offered to this worker since the last claim."""
        self.claim_when_freed = True
        """Claims fill a freed slot at once: more tasks may be ready than the last one took, or hints do not arrive."""
        self.claim_when_written = False
        """Claims wait for the writer, which has too many results to write."""

        self.maintain = asyncio.Event()
        """Set when maintenance has something to do."""
        self.waits: set[uuid.UUID] = set()
        """Suspended tasks whose waits may be over already."""
        self.ended: set[uuid.UUID] = set()
        """Ended tasks for which a parent may wait."""
        self.cascades: set[uuid.UUID] = set()
        """Failed or cancelled tasks whose descendants are to be cancelled."""
        self.deliver = False
        """Events were emitted, and tasks may wait for them."""
        self.receivers: set[uuid.UUID] = set()
        """Tasks that may have a stored wait and a message for it."""
        self.waiting_for_mail: set[uuid.UUID] = set()
        """Suspended tasks that have begun to wait for messages, of which some may have come before."""
        self.look_for_messages = False
        """Messages were sent, and not all of their receivers are known."""
        self.check_runs = False
        """Tasks were cancelled, and some of them may be running here."""
        self.look_at = 0.0
        """When maintenance looks at the database next, on the local monotonic clock."""

    def note(self, hint: Hint) -> None:
        """Add what a hint names."""
        if hint.lanes:
            self.cursors.lower(hint, self._clock.now())
            for queue_name, _ in hint.lanes:
                self.limited.hinted(queue_name)
            self.hinted = True
            self.claim.set()
        if hint.events:
            self.deliver_events()
        if hint.receivers:
            self.deliver_messages(hint.receivers)
        if hint.messages:
            self.look_for_messages = True
            self.maintain.set()
        if hint.cancelled:
            self.check_runs = True
            self.maintain.set()
            if self.limited.queues:
                self.keys_changed()
        if hint.timers:
            self.look_within(0.0)

    def receive(self, payload: str) -> None:
        """Add what a notification names; everything if the payload names nothing."""
        hint = Hint.decode(payload)
        if hint is None:
            self.scan_all()
            self.look_within(0.0)
        else:
            self.note(hint)

    def scan_all(self) -> None:
        """Have the next claim scan all lanes from their start."""
        self.cursors.require_full_scan()
        self.limited.scan_all()
        self.claim.set()

    def keys_changed(self) -> None:
        """Have keys with limits claimed from: slots of theirs were given back."""
        self.limited.changed()
        self.claim.set()

    def slot_freed(self) -> None:
        """Have the freed slot filled, or else a full scan made when it is due.

        The scan finds tasks that no hint announced. It is delayed a little, so that the result of the run that freed
        the slot is sent first.
        """
        if self.claim_when_freed:
            self.claim.set()
        else:
            self.scan_soon()

    def scan_soon(self) -> None:
        """Have a full scan made when it is due."""
        if self._full_scan_timer is None:
            delay = max(FULL_SCAN_DELAY, self.cursors.full_scan_in)
            self._full_scan_timer = asyncio.get_running_loop().call_later(delay, self._full_scan)

    def _full_scan(self) -> None:
        self._full_scan_timer = None
        self.claim.set()

    def results_written(self) -> None:
        """Let claims go on that wait for the writer."""
        if self.claim_when_written:
            self.claim.set()

    def resolve_waits(self, task_ids: Iterable[uuid.UUID]) -> None:
        """Have the waits of suspended tasks resolved, where they are over."""
        self.waits.update(task_ids)
        self.maintain.set()

    def wake_parents(self, task_ids: Iterable[uuid.UUID]) -> None:
        """Have the parents of ended tasks woken, where they wait."""
        self.ended.update(task_ids)
        self.maintain.set()

    def cascade(self, task_ids: Iterable[uuid.UUID]) -> None:
        """Have the descendants of failed or cancelled tasks cancelled."""
        self.cascades.update(task_ids)
        self.maintain.set()

    def deliver_events(self) -> None:
        """Have emitted events delivered."""
        self.deliver = True
        self.maintain.set()

    def deliver_messages(self, task_ids: Iterable[uuid.UUID]) -> None:
        """Have messages delivered to these tasks, where they wait for them."""
        self.receivers.update(task_ids)
        self.maintain.set()

    def look_for_mail(self, task_ids: Iterable[uuid.UUID]) -> None:
        """Have tasks that have begun to wait looked at: a message may have come before."""
        self.waiting_for_mail.update(task_ids)
        self.maintain.set()

    def look_within(self, seconds: float) -> None:
        """Have the database looked at within so many seconds."""
        self.look_at = min(self.look_at, time.monotonic() + max(0.0, seconds))
        self.maintain.set()

    def defer_ended(self, task_ids: Iterable[uuid.UUID], seconds: float) -> None:
        """Retry at the next look to wake the parents of these tasks: another transaction holds their rows locked."""
        self._deferred_ended.update(task_ids)
        self.look_within(seconds)

    def defer_cascade(self, task_id: uuid.UUID, seconds: float) -> None:
        """Retry a cascade at the next look: another transaction holds rows of descendants locked."""
        self._deferred_cascades.add(task_id)
        self.look_within(seconds)

    def defer_receivers(self, task_ids: Iterable[uuid.UUID], seconds: float) -> None:
        """Retry at the next look to deliver messages to these tasks: another transaction holds their rows locked."""
        self._deferred_receivers.update(task_ids)
        self.look_within(seconds)

    def resume_deferred(self) -> None:
        """List deferred work for the retry."""
        self.receivers |= self._deferred_receivers
        self._deferred_receivers.clear()
        self.ended |= self._deferred_ended
        self._deferred_ended.clear()
        self.cascades |= self._deferred_cascades
        self._deferred_cascades.clear()
