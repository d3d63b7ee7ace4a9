"""The way back from a commit: what it makes possible becomes work of this worker, or a hint for other workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from ..database.hint import Hint
from ..database.notifier import HintSender
from ..execution.waits import MESSAGE_WAITS
from ..execution.writes import Kind, Write
from .agenda import Agenda
from .registration import Registration
from .settings import Settings
from .slots import Slots

_NOT_TO_RESOLVE = MESSAGE_WAITS | {"sleep"}
"""Kinds of waits that are over by their time, or by a message, and by nothing else that may have happened before."""


class Dispatcher:
    """Writes to the agenda, and sends hints about tasks for which this worker has no slots."""

    def __init__(
        self, settings: Settings, agenda: Agenda, slots: Slots, registration: Registration, hints: HintSender
    ) -> None:
        self._queue_names = frozenset(settings.queue_names)
        self._agenda = agenda
        self._slots = slots
        self._registration = registration
        self._hints = hints

    def committed(self, kind: Kind, writes: list[Write], rows: Sequence[Row[Any]]) -> None:
        """Follow up on writes of one kind, with the rows that their statement returned."""
        agenda = self._agenda
        agenda.results_written()
        if writes[0].limited:
            agenda.keys_changed()
            if self._slots.free <= 0:
                # Another worker has to take what the slots of these keys are free for.
                self._hints.send(_lanes(agenda.limited.queues))
        match kind:
            case Kind.COMPLETION:
                if children := rows[0].child_task_ids:
                    agenda.wake_parents(children)
            case Kind.FAILURE:
                failed = [row for row in rows if row.state == "failed"]
                if failed:
                    agenda.wake_parents(row.task_id for row in failed if row.parent_task_id is not None)
                    agenda.cascade(row.task_id for row in failed)
                self.announce(Hint().add_rows(row for row in rows if row.state != "failed").add_follow_ups(failed))
            case Kind.SUSPENSION:
                kinds = {write.task_id: {wait.kind for wait in write.waits} for write in writes}
                if waiting := {row.task_id for row in rows if kinds[row.task_id] - _NOT_TO_RESOLVE}:
                    agenda.resolve_waits(waiting)
                if receiving := {row.task_id for row in rows if kinds[row.task_id] & MESSAGE_WAITS}:
                    agenda.look_for_mail(receiving)
                self.announce(Hint().add_rows(rows))
            case Kind.EVENT:
                agenda.deliver_events()
            case Kind.MESSAGE:
                agenda.deliver_messages(row.receiver_id for row in rows)
            case Kind.CHILD | Kind.RELEASE:
                self.announce(Hint().add_rows(rows))
            case Kind.CHECKPOINT | Kind.RECEIPT | Kind.RACE | Kind.PUBLICATION | Kind.WAITS:
                pass
            case Kind.OPENING | Kind.SUPERSESSION | Kind.ITEMS | Kind.CLOSING | Kind.LINES:
                pass

    def announce(self, hint: Hint, *, everywhere: bool = False) -> None:
        """Note a hint for this worker, and send it to other workers unless this one has slots for all its tasks.

        With `everywhere` it is sent in any case.
        """
        if hint and (not self.offer(hint) or everywhere):
            self._hints.send(hint)

    def offer(self, hint: Hint) -> bool:
        """Note a hint that comes from this process. Return False if other workers must be notified as well."""
        self._agenda.note(hint)
        self._agenda.offered += hint.tasks
        if not hint.lanes and (hint.receivers or hint.messages) and not hint.cancelled:
            # Any worker delivers messages to tasks of any queue.
            return self._registration.active
        return (
            not hint.cancelled
            and self._registration.active
            and not self._agenda.claim_when_written
            and all(queue_name in self._queue_names for queue_name, _ in hint.lanes)
            and self._slots.free >= self._agenda.offered
            and self._slots.mostly_free
        )


def _lanes(queue_names: Iterable[str]) -> Hint:
    hint = Hint()
    for name in queue_names:
        hint.add(name, 0, datetime(1970, 1, 1, tzinfo=UTC))
    return hint
