"""What is new, told to those whom it concerns: what this worker has committed, and hints from here and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row

from ..database.hint import Hint
from ..database.notifier import HintSender
from ..execution.writes import Kind, Write
from .claims import Claimer
from .maintenance import Maintenance


class News:
    """Tells the claims and the tender of this worker what there is to do, and other workers what it leaves to them."""

    def __init__(self, claims: Claimer, maintenance: Maintenance, hints: HintSender) -> None:
        self._claims = claims
        self._maintenance = maintenance
        self._hints = hints

    def committed(self, kind: Kind, writes: list[Write], rows: Sequence[Row[Any]]) -> None:
        """Follow up on what the writer has just committed."""
        self._claims.written()
        if kind is Kind.COMPLETION:
            if children := rows[0].child_task_ids:
                self._maintenance.ended(children)
        elif kind is Kind.FAILURE:
            given_up = [row for row in rows if row.state == "failed"]
            if given_up:
                self._maintenance.ended(
                    (row.task_id for row in given_up if row.parent_task_id is not None),
                    cascade=(row.task_id for row in given_up),
                )
            self.announce(Hint().add_rows(row for row in rows if row.state != "failed"))
        elif kind is Kind.SUSPENSION:
            waiting = {write.task_id for write in writes if any(wait.kind != "sleep" for wait in write.waits)}
            if waiting:
                self._maintenance.resolve(row.task_id for row in rows if row.task_id in waiting)
            self.announce(Hint().add_rows(rows))
        elif kind is Kind.EVENT:
            self._maintenance.deliver()
        elif kind in (Kind.CHILD, Kind.RELEASE):
            self.announce(Hint().add_rows(rows))

    def announce(self, hint: Hint) -> None:
        """Tell this worker, and the others if it cannot take all of it at once."""
        if hint and not self.offer(hint):
            self._hints.send(hint)

    def offer(self, hint: Hint) -> bool:
        """Take a hint that comes from this process. False if others have to hear of it, too."""
        self._take(hint)
        return self._claims.offer(hint)

    def hinted(self, payload: str) -> None:
        """A hint arrived."""
        hint = Hint.decode(payload)
        if hint is None:
            self._claims.look_everywhere()
            self._maintenance.look_within(0.0)
        else:
            self._take(hint)

    def _take(self, hint: Hint) -> None:
        self._claims.note(hint)
        if hint.events:
            self._maintenance.deliver()
        if hint.cancelled:
            self._maintenance.check()
        if hint.limits:
            self._maintenance.look_within(0.0)
