"""The messages, values, streams and log lines of a task, for its page."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    func,
    null,
    select,
    true,
    union_all,
)

from ..models import Message, Stream, StreamItems, TaskValueRow
from .expressions import as_text, clamped_time, constant
from .log_lines import LOG

MOST: Final = 100
"""Messages, values and streams of a task that are shown, of each kind."""
LINE_ROWS: Final = 20
"""The last rows of lines that are shown, each with the lines of 50 ms."""
LONGEST: Final = 64 * 1024
"""Bytes of a value that is read."""

_task = bindparam("task_id", type_=Uuid())
_payloads = bindparam("payloads", type_=Boolean())


def _content(value: Any) -> list[ColumnElement[Any]]:
    text = as_text(value)
    shown = case((and_(_payloads, func.octet_length(text) <= constant(LONGEST)), text))
    return [func.octet_length(text).label("size"), shown.label("content")]


def _part(
    part: str, name: Any, position: Any, at: Any, ended: Any, content: list[ColumnElement[Any]]
) -> list[ColumnElement[Any]]:
    return [
        constant(part).label("part"),
        cast(name, Text()).label("name"),
        cast(position, BigInteger()).label("position"),
        cast(at, DateTime(timezone=True)).label("at"),
        cast(ended, Boolean()).label("ended"),
        *content,
    ]


_NO_END = null()


def _some(statement: Select[Any], most: int) -> Select[Any]:
    return select(statement.limit(constant(most)).subquery())


_messages = (
    select(
        *_part("message", Message.topic, Message.seq, clamped_time(Message.sent_at), _NO_END, _content(Message.payload))
    )
    .where(Message.task_id == _task, Message.received_at.is_(None))
    .order_by(Message.topic, Message.seq)
)
_values = (
    select(
        *_part(
            "value",
            TaskValueRow.name,
            TaskValueRow.version,
            clamped_time(TaskValueRow.updated_at),
            _NO_END,
            _content(TaskValueRow.value),
        )
    )
    .where(TaskValueRow.task_id == _task)
    .order_by(TaskValueRow.name)
)
_last = (
    select(StreamItems.position, StreamItems.items, StreamItems.written_at)
    .where(StreamItems.task_id == Stream.task_id, StreamItems.name == Stream.name)
    .order_by(StreamItems.position.desc())
    .limit(constant(1))
    .correlate(Stream)
    .lateral("last")
)
_streams = (
    select(
        *_part(
            "stream",
            Stream.name,
            func.coalesce(_last.c.position, constant(0)),
            func.coalesce(clamped_time(_last.c.written_at), clamped_time(Stream.opened_at)),
            Stream.closed_at.is_not(None),
            _content(_last.c["items"]),
        )
    )
    .select_from(Stream)
    .outerjoin(_last, true())
    .where(Stream.task_id == _task, Stream.name != constant(LOG))
    .order_by(Stream.name)
)
_lines = (
    select(
        *_part(
            "line",
            StreamItems.name,
            StreamItems.position,
            clamped_time(StreamItems.written_at),
            _NO_END,
            _content(StreamItems.items),
        )
    )
    .where(StreamItems.task_id == _task, StreamItems.name == constant(LOG))
    .order_by(StreamItems.position.desc())
)
_all = union_all(
    _some(_messages, MOST), _some(_values, MOST), _some(_streams, MOST), _some(_lines, LINE_ROWS)
).subquery("parts")
PARTS = select(_all).order_by(_all.c.part, _all.c.name, _all.c.position)
"""The waiting messages, the values, the streams with their last items, and the last lines of a task.

`content` is JSON, or null: of a value that is too long, or without `payloads`.
"""
