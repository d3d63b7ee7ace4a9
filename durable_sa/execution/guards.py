"""The guard of a transaction step: only the engine ends its transaction."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, NoReturn

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from ..errors import InvalidState

_COMMITTED: Final = (
    "committed by the engine, together with the checkpoint",
    "Remove the commit(); use begin_nested() for a part that may be rolled back alone.",
)
_ROLLED_BACK: Final = (
    "rolled back by the engine if its function raises",
    "Raise an exception instead of calling rollback().",
)
_CLOSED: Final = (
    "closed by the engine, and what is written before that is undone by a close() of one's own",
    "Remove the close(), or the `async with` or `with` around the session.",
)
_ONE_BIND: Final = (
    "Give the client a sessionmaker whose sessions leave the choice to their bind, and go to other databases in a step."
)
_ENDING: Final = re.compile(
    r"\s*(?:(?P<commit>commit|end|prepare\s+transaction)|(?:rollback|abort)(?!\s+(?:work\s+|transaction\s+)?to\b))\b",
    re.IGNORECASE,
)


@contextmanager
def guarded(session: Session, connection: Connection, name: str, *, joined: bool) -> Generator[list[Connection]]:
    """Refuse to let the code inside end the whole transaction, even if it catches the refusal.

    Refused are a commit, a rollback, either of them as SQL, and a close of the session, which undoes its writes.
    Savepoints are allowed. Another connection is refused as well, because its transaction would never be committed: a
    session may have classes of another database, or choose its engine by itself. Yields the list of those.

    The session has either `joined` the transaction of the connection or begun it. One that has begun it rolls it back
    if a flush fails, so that counts only if the code inside catches the error.
    """
    what = f"The session of transaction {name!r}"
    refusals: list[InvalidState] = []
    others: list[Connection] = []

    def refuse(refusal: tuple[str, str]) -> NoReturn:
        refusals.append(InvalidState(what, *refusal))
        raise refusals[0]

    def refuse_commit(target: object) -> None:
        if target is connection or not session.in_nested_transaction():
            refuse(_COMMITTED)

    def refuse_rollback(_: object, previous: SessionTransaction | None = None) -> None:
        if previous is None or previous.parent is None:
            refuse(_ROLLED_BACK)

    def note_rollback(_: object) -> None:
        refusals.append(InvalidState(what, *_ROLLED_BACK))

    def refuse_sql(_: object, __: object, statement: str, *___: object) -> None:
        if ending := _ENDING.match(statement):
            refuse(_COMMITTED if ending["commit"] else _ROLLED_BACK)

    def note_close(_: object, ended: SessionTransaction) -> None:
        # Noted, not raised: a session is also closed because of an exception, which must not be replaced.
        if ended.parent is None:
            refusals.append(InvalidState(what, *_CLOSED))

    def refuse_others(_: object, __: object, begun: Connection) -> None:
        if begun is not connection:
            others.append(begun)
            database = begun.engine.url.database
            refuse((f"about to use another connection, to {database!r}, whose transaction is not this one", _ONE_BIND))

    listeners: list[tuple[object, str, Callable[..., None]]] = [
        (session, "after_begin", refuse_others),
        (session, "before_commit", refuse_commit),
        (session, "after_soft_rollback", refuse_rollback),
        (session, "after_transaction_end", note_close),
        (connection, "commit", refuse_commit),
        (connection, "rollback", refuse_rollback if joined else note_rollback),
        (connection, "before_cursor_execute", refuse_sql),
    ]
    for target, event_name, listener in listeners:
        event.listen(target, event_name, listener)
    try:
        yield others
        if refusals:
            raise refusals[0]
    finally:
        for target, event_name, listener in listeners:
            event.remove(target, event_name, listener)
