"""The lines that tasks log: a stream `$log` without blocks, which a single statement opens and writes.

No line is superseded, and no reader comes to the end before that of the task. `block_id` is the last write, so that one
whose reply was lost is not written twice.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, Text, Uuid, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.types import TypeEngine

from ..models import Stream, StreamItems
from .expressions import as_json, clock, constant, rows
from .fencing import is_in, locked_rows
from .streams import LAST_POSITION

LOG: Final = "$log"
"""The name of the stream."""

LINE_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "keys": Uuid(),
    "counts": BigInteger(),
    "lines": Text(),
}
"""The arrays of written lines, one row for each task."""

_row = rows("new", **LINE_COLUMNS)
_locked = locked_rows(select(_row.c.task_ids, _row.c.fences).subquery("fenced"))
_opening = insert(Stream).from_select(
    ["task_id", "name", "block_id", "step_key", "try_id", "last_position", "reserved", "opened_at"],
    select(
        _row.c.task_ids,
        constant(LOG),
        _row.c["keys"],
        _row.c["keys"],
        _row.c["keys"],
        _row.c.counts,
        _row.c.counts,
        clock(),
    )
    .where(is_in(_row.c.task_ids, _locked))
    .order_by(_row.c.task_ids),
)
_last = func.least(Stream.last_position, constant(LAST_POSITION)) + _opening.excluded.last_position
_opened = (
    _opening.on_conflict_do_update(
        index_elements=[Stream.task_id, Stream.name],
        set_={"block_id": _opening.excluded.block_id, "last_position": _last, "reserved": _last},
        where=Stream.block_id.is_distinct_from(_opening.excluded.block_id),
    )
    .returning(Stream.task_id, Stream.last_position)
    .cte("opened")
)
_written = (
    insert(StreamItems)
    .from_select(
        ["task_id", "name", "position", "step_key", "try_id", "items", "written_at"],
        select(
            _row.c.task_ids,
            constant(LOG),
            _opened.c.last_position,
            _row.c["keys"],
            _row.c["keys"],
            as_json(_row.c.lines),
            clock(),
        ).join(_opened, _opened.c.task_id == _row.c.task_ids),
    )
    .cte("written")
)
WRITE_LINES = select(_locked.c.task_id).add_cte(_written)
"""Append lines to the streams `$log` of tasks."""
