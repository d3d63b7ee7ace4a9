"""Messages to tasks: sent by inserts, received in order, each exactly once.

A message is received by the statement that records it as the outcome of a call and deletes it. Nothing else consumes
messages, and each such statement holds the lock of the task's row. So a message that was found is only deleted if its
record was written: a call that has a record already leaves it to the next.

The rule of waits holds for messages, too: a waiter commits its wait and then looks for messages, a sender commits its
message and then looks for waits.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Float,
    Integer,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import aliased
from sqlalchemy.sql.selectable import CTE, FromClause
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, Message, TaskRow, Wait
from .checkpoints import CHECKPOINT_COLUMNS
from .expressions import (
    array,
    as_json,
    as_text,
    clock,
    constant,
    interval,
    lock_timeout,
    next_fence,
    numbered_rows,
    rows,
    statement_time,
)
from .fencing import is_in, locked_rows, materialized
from .spawning import arrivals, optional_lock_timeout
from .waits import for_messages, locked_waiters, resolving

MESSAGE_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "message_ids": Uuid(),
    "receiver_ids": Uuid(),
    "topics": Text(),
    "payloads": Text(),
    "message_keys": Text(),
}
"""The arrays of sent messages: one element per message."""

RECEIVE_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "keys": Uuid(),
    "topics": Text(),
}
"""The arrays of calls that receive."""

RACE_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    **CHECKPOINT_COLUMNS,
    "winner_keys": Uuid(),
    "topics": Text(),
}
"""The arrays of decided races: the checkpoint of each, the call that won, and the topic, if that call is to receive."""

LOSER_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {"loser_task_ids": Uuid(), "race_keys": Uuid(), "loser_keys": Uuid()}
"""The arrays of calls that have lost a race."""

_COLUMNS = ["message_id", "task_id", "topic", "payload", "idempotency_key", "sent_at"]
_task_ids = array("task_ids", Uuid())
_waiting = aliased(Message, name="waiting")


def _values(source: FromClause) -> tuple[ColumnElement[Any], ...]:
    c = source.c
    return c.message_ids, c.receiver_ids, c.topics, as_json(c.payloads), c.message_keys, clock()


_new = numbered_rows("new", "position", **MESSAGE_COLUMNS)
_receiver = TaskRow.__table__.alias("receiver")
SEND = (
    insert(Message)
    .from_select(
        _COLUMNS,
        select(*_values(_new))
        .join(_receiver, (_receiver.c.task_id == _new.c.receiver_ids) & _receiver.c.finished_at.is_(None))
        .join(optional_lock_timeout(), true())
        .order_by(_new.c.position),
    )
    .on_conflict_do_nothing()
    .returning(Message.message_id, Message.task_id)
)
"""Send messages to unfinished tasks, without locking these. One that was sent before is missing from the rows.

With a `lock_timeout`, the statement fails with 55P03 after it if an open transaction of another session has sent a
message with one of the idempotency keys.
"""

_asked = rows("asked", message_ids=Uuid(), receiver_ids=Uuid())
SENT = (
    select(_asked.c.message_ids.label("message_id"))
    .where(
        or_(
            exists().where(Message.task_id == _asked.c.receiver_ids, Message.message_id == _asked.c.message_ids),
            exists().where(
                Checkpoint.task_id == _asked.c.receiver_ids,
                Checkpoint.kind == constant("message"),
                Checkpoint.child_task_id == _asked.c.message_ids,
            ),
        )
    )
    .select_from(_asked)
)
"""Which of these messages were sent, received or not. It reads the receivers' journals: for sends of lost replies."""

RECEIVER_STATES = select(TaskRow.task_id, TaskRow.state, TaskRow.outcome).where(TaskRow.task_id == func.any(_task_ids))
"""The states of tasks to which messages could not be sent."""

_entry = numbered_rows("entry", "position", **CHECKPOINT_COLUMNS, **MESSAGE_COLUMNS)
_locked = locked_rows(select(_entry.c.task_ids, _entry.c.fences).distinct().subquery("fenced"))
_sendable = materialized(
    "sendable",
    select(_entry)
    .join(_receiver, (_receiver.c.task_id == _entry.c.receiver_ids) & _receiver.c.finished_at.is_(None))
    .where(is_in(_entry.c.task_ids, _locked)),
)
_recorded = (
    insert(Checkpoint)
    .from_select(
        ["task_id", "key", "kind", "name", "status", "created_at"],
        select(
            _sendable.c.task_ids,
            _sendable.c["keys"],
            _sendable.c.kinds,
            _sendable.c.names,
            _sendable.c.statuses,
            clock(),
        ),
    )
    .on_conflict_do_nothing()
    .returning(Checkpoint.task_id, Checkpoint.key)
    .cte("recorded")
)
_sent = (
    insert(Message)
    .from_select(
        _COLUMNS,
        select(*_values(_sendable))
        .join(_recorded, (_recorded.c.task_id == _sendable.c.task_ids) & (_recorded.c.key == _sendable.c["keys"]))
        .join(lock_timeout(), true())
        .order_by(_sendable.c.position),
    )
    .on_conflict_do_nothing()
    .cte("sent")
)
RECORD_MESSAGES = (
    select(_recorded.c.task_id, _recorded.c.key, _sendable.c.receiver_ids.label("receiver_id"))
    .join(_sendable, (_recorded.c.task_id == _sendable.c.task_ids) & (_recorded.c.key == _sendable.c["keys"]))
    .add_cte(_sent)
)
"""Send messages from tasks, with checkpoints; neither if the receiver has ended or the key is taken."""


def _next_message(wanted: CTE, *conditions: ColumnElement[bool]) -> FromClause:
    """Select and lock the message of each row's topic at the row's rank, the oldest being the first.

    None is found if another transaction has locked it, as marking does for a moment: a later one would come out of its
    sender's order. A message that was received since the statement began is not found either, because the lock reads
    the newest version.
    """
    first = (
        select(_waiting.message_id)
        .where(
            _waiting.task_id == wanted.c.task_id,
            _waiting.topic == wanted.c.topic,
            _waiting.received_at.is_(None),
            *conditions,
        )
        .order_by(_waiting.seq)
        .offset(wanted.c.rank - constant(1))
        .limit(literal_column("1"))
        .correlate(wanted)
        .scalar_subquery()
    )
    return (
        select(Message.message_id, as_text(Message.payload).label("payload"))
        .where(Message.task_id == wanted.c.task_id, Message.message_id == first, Message.received_at.is_(None))
        .with_for_update(skip_locked=True, of=Message)
        .correlate(wanted)
        .lateral("next_message")
    )


def _consume(recorded: CTE) -> tuple[CTE, ...]:
    """Remove the messages whose records were written. Those with an idempotency key stay, to refuse it from then on."""
    same = (Message.task_id == recorded.c.task_id) & (Message.message_id == recorded.c.child_task_id)
    return (
        delete(Message).where(same, Message.idempotency_key.is_(None)).cte("consumed"),
        update(Message)
        .where(same, Message.idempotency_key.is_not(None))
        .values(payload=null(), received_at=clock(), delivered_at=func.coalesce(Message.delivered_at, clock()))
        .cte("kept"),
    )


_calls = numbered_rows("call", "position", **RECEIVE_COLUMNS)
_locked = locked_rows(select(_calls.c.task_ids, _calls.c.fences).distinct().subquery("fenced"))
_receiving = materialized(
    "receiving",
    select(
        _calls.c.task_ids.label("task_id"),
        _calls.c["keys"].label("key"),
        _calls.c.topics.label("topic"),
        func.row_number()
        .over(partition_by=(_calls.c.task_ids, _calls.c.topics), order_by=_calls.c.position)
        .label("rank"),
    ).where(
        is_in(_calls.c.task_ids, _locked),
        ~exists().where(Checkpoint.task_id == _calls.c.task_ids, Checkpoint.key == _calls.c["keys"]),
    ),
)
_next = _next_message(_receiving)
_found = materialized("found", select(_receiving, _next.c.message_id, _next.c.payload).join(_next, true()))
_recorded = (
    insert(Checkpoint)
    .from_select(
        ["task_id", "key", "kind", "name", "status", "value", "child_task_id", "created_at"],
        select(
            _found.c.task_id,
            _found.c.key,
            constant("message"),
            _found.c.topic,
            constant("completed"),
            as_json(_found.c.payload),
            _found.c.message_id,
            clock(),
        ),
    )
    .on_conflict_do_nothing()
    .returning(Checkpoint.task_id, Checkpoint.key, Checkpoint.child_task_id)
    .cte("recorded")
)
RECEIVE = (
    select(
        _receiving.c.task_id,
        _receiving.c.key,
        _found.c.payload.label("value"),
        _found.c.message_id.is_not(None).label("found"),
    )
    .outerjoin(_found, (_found.c.task_id == _receiving.c.task_id) & (_found.c.key == _receiving.c.key))
    .outerjoin(_recorded, (_recorded.c.task_id == _receiving.c.task_id) & (_recorded.c.key == _receiving.c.key))
    .where(or_(_found.c.message_id.is_(None), _recorded.c.key.is_not(None)))
    .add_cte(*_consume(_recorded))
)
"""Receive the next message of a topic for each call, in the calls' order, if there is one: `found`.

A call is missing from the rows if its run has lost the task, or if it has a record already.
"""

_entry = numbered_rows("entry", "position", **RACE_COLUMNS)
_locked = locked_rows(select(_entry.c.task_ids, _entry.c.fences).distinct().subquery("fenced"))
_racing = materialized(
    "racing",
    select(
        _entry.c.task_ids.label("task_id"),
        _entry.c["keys"].label("key"),
        *(_entry.c[name] for name in ("kinds", "names", "statuses", "values", "winner_keys")),
        _entry.c.topics.label("topic"),
        func.row_number()
        .over(partition_by=(_entry.c.task_ids, _entry.c.topics), order_by=_entry.c.position)
        .label("rank"),
    ).where(
        is_in(_entry.c.task_ids, _locked),
        ~exists().where(Checkpoint.task_id == _entry.c.task_ids, Checkpoint.key == _entry.c["keys"]),
    ),
)
_next = _next_message(_racing)
_decided = materialized(
    "decided",
    select(_racing, _next.c.message_id, _next.c.payload)
    .outerjoin(_next, true())
    .where(or_(_racing.c.topic.is_(None), _next.c.message_id.is_not(None))),
)
_recorded = (
    insert(Checkpoint)
    .from_select(
        ["task_id", "key", "kind", "name", "status", "value", "created_at"],
        select(
            _decided.c.task_id,
            _decided.c.key,
            _decided.c.kinds,
            _decided.c.names,
            _decided.c.statuses,
            as_json(_decided.c["values"]),
            clock(),
        ),
    )
    .on_conflict_do_nothing()
    .returning(Checkpoint.task_id, Checkpoint.key)
    .cte("recorded")
)
_won = (_recorded.c.task_id == _decided.c.task_id) & (_recorded.c.key == _decided.c.key)
_received = (
    insert(Checkpoint)
    .from_select(
        ["task_id", "key", "kind", "name", "status", "value", "child_task_id", "created_at"],
        select(
            _decided.c.task_id,
            _decided.c.winner_keys,
            constant("message"),
            _decided.c.topic,
            constant("completed"),
            as_json(_decided.c.payload),
            _decided.c.message_id,
            clock(),
        )
        .join(_recorded, _won)
        .where(_decided.c.message_id.is_not(None)),
    )
    .on_conflict_do_nothing()
    .returning(Checkpoint.task_id, Checkpoint.child_task_id)
    .cte("received")
)
_losers = rows("loser", **LOSER_COLUMNS)
_lost = (_recorded.c.task_id == _losers.c.loser_task_ids) & (_recorded.c.key == _losers.c.race_keys)
_over = materialized(
    "over",
    union_all(
        select(_losers.c.loser_task_ids.label("task_id"), _losers.c.loser_keys.label("key")).join(_recorded, _lost),
        select(_decided.c.task_id, _decided.c.winner_keys).join(_recorded, _won),
    ),
)
RECORD_RACE = (
    select(
        _racing.c.task_id,
        _racing.c.key,
        _decided.c.payload.label("value"),
        _decided.c.key.is_not(None).label("found"),
    )
    .outerjoin(_decided, (_decided.c.task_id == _racing.c.task_id) & (_decided.c.key == _racing.c.key))
    .outerjoin(_recorded, (_recorded.c.task_id == _racing.c.task_id) & (_recorded.c.key == _racing.c.key))
    .where(or_(_decided.c.key.is_(None), _recorded.c.key.is_not(None)))
    .add_cte(
        *_consume(_received),
        delete(Wait).where(Wait.task_id == _over.c.task_id, Wait.key == _over.c.key).cte("withdrawn"),
        delete(Checkpoint)
        .where(Checkpoint.task_id == _losers.c.loser_task_ids, Checkpoint.key == _losers.c.loser_keys, _lost)
        .cte("dropped"),
    )
)
"""Record the winners of races, receive the message that has won, if one has, and delete what is stored of the losers.

`found` is false if the message that was to win does not exist any more; nothing is recorded then.
"""


def _waiters(kind: str) -> CTE:
    """Lock the tasks with a stored wait of a kind and a message for it."""
    message = exists().where(Message.task_id == Wait.task_id, Message.topic == Wait.name, Message.received_at.is_(None))
    return locked_waiters(exists().where(Wait.task_id == TaskRow.task_id, Wait.kind == constant(kind), message))


_receiving_tasks = _waiters("message")
_waits = materialized(
    "mail_waits",
    select(Wait.task_id, Wait.key, Wait.name.label("topic"), Wait.due_at, Wait.created_at, _receiving_tasks.c.state)
    .join(_receiving_tasks, _receiving_tasks.c.task_id == Wait.task_id)
    .where(Wait.kind == constant("message"))
    .with_for_update(skip_locked=True, of=Wait),
)
_ranked = materialized(
    "ranked",
    select(
        _waits,
        func.row_number()
        .over(partition_by=(_waits.c.task_id, _waits.c.topic), order_by=(_waits.c.created_at, _waits.c.key))
        .label("rank"),
    ),
)
_next = _next_message(
    _ranked, or_(_ranked.c.due_at.is_(None), _ranked.c.due_at > clock(), _waiting.sent_at <= _ranked.c.due_at)
)
_settled = materialized(
    "settled",
    select(
        _ranked.c.task_id,
        _ranked.c.key,
        _ranked.c.state,
        constant("completed").label("status"),
        _next.c.payload.label("value"),
        _next.c.message_id.label("child_task_id"),
    ).join(_next, true()),
)
DELIVER = resolving(_settled, _consume)
"""Receive messages for the stored waits of these tasks, the earliest wait first, and make sleeping tasks claimable.

A message counts if it was sent before the wait's deadline, even if it is only seen afterwards.
"""


_for_messages = for_messages(Wait.kind)
_has_wait = exists().where(Wait.task_id == Message.task_id, _for_messages, Wait.name == Message.topic)

_receivers = rows("receivers", task_ids=Uuid())
_kinds = (
    select(Wait.kind)
    .where(
        Wait.task_id == _receivers.c.task_ids,
        _for_messages,
        exists().where(Message.task_id == Wait.task_id, Message.topic == Wait.name, Message.received_at.is_(None)),
    )
    .correlate(_receivers)
    .lateral("kinds")
)
WITH_MAIL = (
    select(_receivers.c.task_ids.label("task_id"), _kinds.c.kind)
    .select_from(_receivers.join(_kinds, true()))
    .distinct()
)
"""Which of these tasks have a stored wait and a message for it, and the kinds of these waits."""

_racing_tasks = _waiters("race message")
_woken = (
    update(TaskRow)
    .where(
        TaskRow.task_id == _racing_tasks.c.task_id,
        _racing_tasks.c.state == constant("sleeping"),
        or_(TaskRow.available_at.is_(None), TaskRow.available_at > clock()),
    )
    .values(
        available_at=clock(),
        fence=next_fence(TaskRow.fence),
        resumes_at=case((TaskRow.limit_key.is_not(None), clock())),
    )
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key)
    .cte("woken")
)
WAKE_RACING = select(_woken.c.task_id, _woken.c.queue_name, _woken.c.priority, _woken.c.available_at).add_cte(
    arrivals(_woken)
)
"""Make tasks claimable that wait for messages in a race. The message is received by the run that decides the race."""

_page = (
    select(Message.task_id, Message.message_id)
    .where(
        Message.delivered_at.is_(None),
        Message.sent_at <= statement_time() - interval(bindparam("age", type_=Float(53))),
    )
    .order_by(Message.sent_at)
    .limit(bindparam("wanted", type_=Integer()))
    .offset(bindparam("passed", type_=Integer()))
)
UNDELIVERED_MAIL = _page
"""A page of messages that no worker has looked for a wait for, or whose wait is locked by another transaction.

`passed` skips those already seen.
"""

_marked = rows("marked", task_ids=Uuid(), message_ids=Uuid())
_free = materialized(
    "free_messages",
    select(Message.task_id, Message.message_id)
    .join(_marked, (Message.task_id == _marked.c.task_ids) & (Message.message_id == _marked.c.message_ids))
    .with_for_update(skip_locked=True, key_share=True, of=Message),
)
MARK_MAIL = (
    update(Message)
    .where(Message.task_id == _free.c.task_id, Message.message_id == _free.c.message_id, ~_has_wait)
    .values(delivered_at=clock())
    .returning(Message.message_id)
)
"""Mark messages without a stored wait as delivered. Tasks that begin to wait later find the message themselves."""

UNDELIVERED_WAITS = (
    select(Wait.task_id)
    .where(
        _for_messages,
        Wait.created_at < clock() - interval(bindparam("age", type_=Float(53))),
        exists().where(Message.task_id == Wait.task_id, Message.topic == Wait.name, Message.received_at.is_(None)),
    )
    .distinct()
    .limit(bindparam("wanted", type_=Integer()))
)
"""Tasks with waits that should have been resolved: a crash between a wait's commit and the look for messages."""

_peek = rows("peek", task_ids=Uuid(), topics=Text())
WITH_MESSAGE = select(_peek.c.task_ids.label("task_id"), _peek.c.topics.label("topic")).where(
    exists().where(Message.task_id == _peek.c.task_ids, Message.topic == _peek.c.topics, Message.received_at.is_(None))
)
"""For which of these tasks and topics there is a message."""
