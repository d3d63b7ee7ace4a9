"""Streams: opened and closed in short transactions, written in batches, and read by pages.

The items of a stream are in rows of many, written without waiting for the disk. What must survive a crash of the server
is in the row of the stream: the block that may write, and the positions that readers may have seen. Opening a block and
closing it wait for the disk, and so does a write that reserves further positions.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    func,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, Stream, StreamItems, TaskRow
from .expressions import as_json, as_text, clock, constant, rows
from .fencing import materialized

_task_id = bindparam("stream_task_id", type_=Uuid())
_name = bindparam("stream_name", type_=Text())
_is_it = (Stream.task_id == _task_id) & (Stream.name == _name)

LOCK_STREAM = (
    select(
        Stream.block_id,
        Stream.step_key,
        Stream.try_id,
        Stream.began_after,
        Stream.last_position,
        Stream.reserved,
        as_text(Stream.restarts).label("restarts"),
        Stream.closed_at.is_not(None).label("closed"),
    )
    .where(_is_it)
    .with_for_update()
)
"""Lock and read the row of a stream."""

SUPERSEDE = (
    delete(StreamItems)
    .where(
        StreamItems.task_id == _task_id,
        StreamItems.name == _name,
        StreamItems.step_key == bindparam("of_step", type_=Uuid()),
        StreamItems.try_id != bindparam("of_try", type_=Uuid()),
    )
    .returning((StreamItems.position - func.json_array_length(StreamItems.items)).label("before"))
)
"""Delete the items of earlier tries of a step; returns the positions before the first ones of their rows."""

_opened = insert(Stream).values(
    task_id=_task_id,
    name=_name,
    block_id=bindparam("new_block", type_=Uuid()),
    step_key=bindparam("new_step", type_=Uuid()),
    try_id=bindparam("new_try", type_=Uuid()),
    began_after=bindparam("new_began_after", type_=BigInteger()),
    last_position=bindparam("new_last", type_=BigInteger()),
    reserved=bindparam("new_reserved", type_=BigInteger()),
    restarts=as_json(bindparam("new_restarts", type_=Text())),
    opened_at=clock(),
)
OPEN_STREAM = _opened.on_conflict_do_update(
    index_elements=[Stream.task_id, Stream.name],
    set_={
        **{
            name: _opened.excluded[name]
            for name in ("block_id", "step_key", "try_id", "began_after", "last_position", "reserved", "restarts")
        },
        "closed_at": literal_column("NULL"),
    },
).returning(Stream.block_id)
"""Let a block write a stream, instead of any other."""

CLOSE_STREAM = (
    update(Stream)
    .where(_is_it, Stream.block_id == bindparam("open_block", type_=Uuid()))
    .values(
        block_id=literal_column("NULL"),
        last_position=bindparam("new_last", type_=BigInteger()),
        reserved=bindparam("new_last", type_=BigInteger()),
        closed_at=case((bindparam("ends", type_=Boolean()), clock())),
    )
    .returning(Stream.name)
)
"""Leave a block; if it `ends` the stream, readers come to the end."""

RECORD_BLOCK = (
    insert(Checkpoint)
    .values(
        task_id=_task_id,
        key=bindparam("block_key", type_=Uuid()),
        kind=constant("stream"),
        name=_name,
        created_at=clock(),
    )
    .on_conflict_do_nothing()
    .returning(Checkpoint.key)
)
"""Write the checkpoint of a block in the task's body that was left."""

ITEM_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "keys": Uuid(),
    "names": Text(),
    "block_ids": Uuid(),
    "positions": BigInteger(),
    "step_keys": Uuid(),
    "try_ids": Uuid(),
    "items": Text(),
    "reservations": BigInteger(),
}
"""The arrays of written rows."""

_new = rows("new", **ITEM_COLUMNS)
_valid = materialized(
    "valid",
    select(_new)
    .join(
        Stream,
        (Stream.task_id == _new.c.task_ids) & (Stream.name == _new.c.names) & (Stream.block_id == _new.c.block_ids),
    )
    .join(TaskRow, (TaskRow.task_id == _new.c.task_ids) & (TaskRow.fence == _new.c.fences)),
)
_written = (
    insert(StreamItems)
    .from_select(
        ["task_id", "name", "position", "step_key", "try_id", "items", "written_at"],
        select(
            _valid.c.task_ids,
            _valid.c.names,
            _valid.c.positions,
            _valid.c.step_keys,
            _valid.c.try_ids,
            as_json(_valid.c["items"]),
            clock(),
        ),
    )
    .on_conflict_do_nothing()
    .cte("written")
)
_most = (
    select(_valid.c.task_ids, _valid.c.names, func.max(_valid.c.reservations).label("most"))
    .where(_valid.c.reservations.is_not(None))
    .group_by(_valid.c.task_ids, _valid.c.names)
    .subquery("most")
)
_reserved = (
    update(Stream)
    .where(Stream.task_id == _most.c.task_ids, Stream.name == _most.c.names, Stream.reserved < _most.c.most)
    .values(reserved=_most.c.most)
    .cte("reserved")
)
_lazily = func.set_config(
    constant("synchronous_commit"),
    case(
        (
            select(func.bool_or(_new.c.reservations.is_not(None))).scalar_subquery(),
            func.current_setting(constant("synchronous_commit")),
        ),
        else_=constant("off"),
    ),
    true(),
)
_setting = materialized("setting", select(_lazily.label("setting")))
WRITE_ITEMS = (
    select(_new.c.task_ids.label("task_id"), _new.c["keys"].label("key"), _valid.c["keys"].is_not(None).label("valid"))
    .select_from(_new)
    .join(_setting, true())
    .outerjoin(_valid, _valid.c["keys"] == _new.c["keys"])
    .add_cte(_written, _reserved)
)
"""Write rows of items whose block is still the open one of its stream; `valid` says which those are.

The commit waits for the disk only if further positions are reserved.
"""

PAGE = 100
"""Rows of items that a reader reads at once."""

_asked = rows("asked", task_ids=Uuid(), names=Text(), afters=BigInteger())
_page = (
    select(StreamItems.position, as_text(StreamItems.items).label("items"))
    .where(
        StreamItems.task_id == _asked.c.task_ids,
        StreamItems.name == _asked.c.names,
        StreamItems.position > _asked.c.afters,
    )
    .order_by(StreamItems.position)
    .limit(constant(PAGE))
    .correlate(_asked)
    .lateral("page")
)
READ_STREAMS = (
    select(
        _asked.c.task_ids.label("task_id"),
        _asked.c.names.label("name"),
        _asked.c.afters.label("after"),
        TaskRow.outcome,
        Stream.closed_at.is_not(None).label("closed"),
        as_text(Stream.restarts).label("restarts"),
        _page.c.position,
        _page.c["items"].label("texts"),
    )
    .select_from(_asked)
    .join(TaskRow, TaskRow.task_id == _asked.c.task_ids)
    .outerjoin(Stream, (Stream.task_id == _asked.c.task_ids) & (Stream.name == _asked.c.names))
    .outerjoin(_page, true())
    .order_by(_asked.c.task_ids, _asked.c.names, _asked.c.afters, _page.c.position)
)
"""The items behind these positions, with the state of each stream and its task: a row at least if the task exists."""

LIST_STREAMS = (
    select(Stream.name, Stream.last_position, Stream.closed_at, Stream.opened_at)
    .where(Stream.task_id == _task_id)
    .order_by(Stream.name)
)
"""The streams of a task."""
