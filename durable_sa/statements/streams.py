"""Streams: opened, written and closed by the batches of the writer, and read by pages.

The items of a stream are in rows of many, written without waiting for the disk. What must survive a crash of the server
is in the row of the stream: the block that may write, and the positions that readers may have seen. Opening a block and
closing it wait for the disk, and so does a write that reserves further positions.

A block is opened under the lock of its task, and written under the lock of its stream. So what a block writes is
committed before another one is opened, which finds it, or it is not written.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    Text,
    Uuid,
    and_,
    case,
    column,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.types import TypeEngine

from ..models import Checkpoint, Stream, StreamItems, TaskRow
from .expressions import as_json, as_text, clock, constant, rows
from .fencing import is_in, locked_rows, materialized

FIRST_RESERVATION: Final = 1_000
"""Positions that are reserved with the opening of a block."""
LAST_POSITION: Final = 2**62
PAGE: Final = 100
"""Rows of items that a reader reads at once."""
PAGE_BYTES: Final = 1024 * 1024
"""Bytes of JSON from which on a reader reads no further row at once."""

OPENING_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "keys": Uuid(),
    "names": Text(),
    "step_keys": Uuid(),
    "try_ids": Uuid(),
}
"""The arrays of opened blocks; the keys are the ids of the blocks."""

_block = rows("block", **OPENING_COLUMNS)
_locked = locked_rows(select(_block.c.task_ids, _block.c.fences).distinct().subquery("fenced"))
_opening = insert(Stream).from_select(
    ["task_id", "name", "block_id", "step_key", "try_id", "began_after", "last_position", "reserved", "opened_at"],
    select(
        _block.c.task_ids,
        _block.c.names,
        _block.c["keys"],
        _block.c.step_keys,
        _block.c.try_ids,
        constant(0),
        constant(0),
        constant(FIRST_RESERVATION),
        clock(),
    )
    .where(is_in(_block.c.task_ids, _locked))
    .order_by(_block.c.task_ids, _block.c.names),
)
_new = _opening.excluded
_repeated = Stream.block_id == _new.block_id
_last = func.least(
    # A block that was not left may have written as many items as there were positions reserved for it.
    case((or_(_repeated, Stream.block_id.is_(None)), Stream.last_position), else_=Stream.reserved),
    constant(LAST_POSITION),
)
_opened = (
    _opening.on_conflict_do_update(
        index_elements=[Stream.task_id, Stream.name],
        set_={
            "block_id": _new.block_id,
            "step_key": _new.step_key,
            "try_id": _new.try_id,
            "began_after": case((or_(_repeated, Stream.step_key == _new.step_key), Stream.began_after), else_=_last),
            "last_position": _last,
            "reserved": _last + constant(FIRST_RESERVATION),
            "opened_at": clock(),
            "closed_at": literal_column("NULL"),
        },
        where=or_(
            Stream.closed_at.is_(None),
            _repeated,
            and_(Stream.step_key == _new.step_key, Stream.try_id != _new.try_id),
        ),
    )
    .returning(Stream.task_id, Stream.block_id, Stream.last_position)
    .cte("opened")
)
OPEN_STREAMS = (
    select(
        _block.c.task_ids.label("task_id"),
        _block.c["keys"].label("key"),
        _opened.c.last_position,
    )
    .select_from(_block)
    .outerjoin(_opened, (_opened.c.task_id == _block.c.task_ids) & (_opened.c.block_id == _block.c["keys"]))
    .outerjoin(Stream, (Stream.task_id == _block.c.task_ids) & (Stream.name == _block.c.names))
    .where(or_(_opened.c.task_id.is_not(None), Stream.closed_at.is_not(None)))
)
"""Let blocks write their streams, instead of any other; returns no position for a stream that has ended.

A stream that an earlier try of the same step has ended is opened once more.
"""

SUPERSESSION_COLUMNS: Final = OPENING_COLUMNS
"""The arrays of blocks that supersede what earlier tries of their steps have written."""

_block = rows("block", **SUPERSESSION_COLUMNS)
_locked = locked_rows(select(_block.c.task_ids, _block.c.fences).distinct().subquery("fenced"))


def _length(items: InstrumentedAttribute[Any]) -> ColumnElement[int]:
    return func.json_array_length(
        case((func.json_typeof(items) == constant("array"), items), else_=as_json(constant("[]"))), type_=Integer()
    )


_superseded = (
    delete(StreamItems)
    .where(
        StreamItems.task_id == _block.c.task_ids,
        StreamItems.name == _block.c.names,
        StreamItems.step_key == _block.c.step_keys,
        StreamItems.try_id != _block.c.try_ids,
        is_in(_block.c.task_ids, _locked),
    )
    .returning(
        StreamItems.task_id,
        StreamItems.name,
        (StreamItems.position - _length(StreamItems.items)).label("before"),
    )
    .cte("superseded")
)
# A join would take time quadratic in the batch, because the planner cannot estimate the number of deleted rows.
_candidates = union_all(
    select(_superseded.c.task_id, _superseded.c.name, _superseded.c.before),
    select(Stream.task_id, Stream.name, Stream.began_after).join(
        _block,
        (Stream.task_id == _block.c.task_ids)
        & (Stream.name == _block.c.names)
        & (Stream.block_id == _block.c["keys"])
        & is_in(_block.c.task_ids, _locked),
    ),
).subquery("candidates")
_lows = (
    select(_candidates.c.task_id, _candidates.c.name, func.min(_candidates.c.before).label("low"))
    .group_by(_candidates.c.task_id, _candidates.c.name)
    .subquery("lows")
)
_restarts = (
    func.unnest(Stream.restarts_after, Stream.restarts_through)
    .table_valued(column("after", BigInteger()), column("through", BigInteger()), name="restart")
    .render_derived(name="restart")
)


def _kept(name: str) -> ColumnElement[Any]:
    """Return the earlier restarts but for those that the new one includes."""
    kept = select(_restarts.c[name]).where(_restarts.c.after < _lows.c.low).order_by(_restarts.c.after)
    return func.array(kept.correlate(Stream, _lows).scalar_subquery())


_told = (
    update(Stream)
    .where(Stream.task_id == _lows.c.task_id, Stream.name == _lows.c.name, _lows.c.low < Stream.last_position)
    .values(
        began_after=_lows.c.low,
        restarts_after=func.array_append(_kept("after"), _lows.c.low),
        restarts_through=func.array_append(_kept("through"), Stream.last_position),
    )
    .cte("told")
)
SUPERSEDE = (
    select(_block.c.task_ids.label("task_id"), _block.c["keys"].label("key"))
    .where(is_in(_block.c.task_ids, _locked))
    .add_cte(_told)
)
"""Delete what earlier tries of the steps of blocks have written, and note that for readers who have read it."""

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
"""The arrays of written rows, one for each stream."""

_row = rows("new", **ITEM_COLUMNS)
_is_open = (Stream.task_id == _row.c.task_ids) & (Stream.name == _row.c.names) & (Stream.block_id == _row.c.block_ids)
_has_fence = (TaskRow.task_id == _row.c.task_ids) & (TaskRow.fence == _row.c.fences)
_valid = materialized(
    "valid",
    select(_row)
    .join(Stream, _is_open)
    .join(TaskRow, _has_fence)
    .order_by(Stream.task_id, Stream.name)
    .with_for_update(of=Stream, skip_locked=True, key_share=True),
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
_reserved = (
    update(Stream)
    .where(
        Stream.task_id == _valid.c.task_ids,
        Stream.name == _valid.c.names,
        Stream.reserved < _valid.c.reservations,
    )
    .values(reserved=_valid.c.reservations)
    .cte("reserved")
)
_is_valid = _row.c["keys"].in_(select(_valid.c["keys"])).is_(true())
_reserves = select(func.bool_or(_row.c.reservations.is_not(None))).scalar_subquery()
_setting = materialized(
    "setting",
    select(
        func.pg_catalog.set_config(
            constant("synchronous_commit"),
            case((_reserves, func.current_setting(constant("synchronous_commit"))), else_=constant("off")),
            true(),
        ).label("setting")
    ),
)
WRITE_ITEMS = (
    select(
        _row.c.task_ids.label("task_id"),
        _row.c["keys"].label("key"),
        _is_valid.label("valid"),
    )
    .select_from(_row)
    .join(_setting, true())
    .join(TaskRow, _has_fence)
    .outerjoin(Stream, _is_open)
    .where(or_(_is_valid, Stream.task_id.is_(None)))
    .add_cte(_written, _reserved)
)
"""Write rows of items whose block is still the open one of its stream; `valid` says which those are.

A row is missing if its stream is locked or its fence is lost. The commit waits for the disk only if further positions
are reserved.
"""

CLOSING_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {
    "task_ids": Uuid(),
    "fences": BigInteger(),
    "keys": Uuid(),
    "names": Text(),
    "block_ids": Uuid(),
    "positions": BigInteger(),
    "ends": Boolean(),
    "checkpoint_keys": Uuid(),
}
"""The arrays of blocks that were left; those in the body of a task have a checkpoint."""

_left = rows("block", **CLOSING_COLUMNS)
_locked = locked_rows(select(_left.c.task_ids, _left.c.fences).distinct().subquery("fenced"))
_closed = (
    update(Stream)
    .where(
        Stream.task_id == _left.c.task_ids,
        Stream.name == _left.c.names,
        Stream.block_id == _left.c.block_ids,
        is_in(_left.c.task_ids, _locked),
    )
    .values(
        block_id=literal_column("NULL"),
        last_position=_left.c.positions,
        reserved=_left.c.positions,
        closed_at=case((_left.c.ends, clock())),
    )
    .cte("closed")
)
_recorded = (
    insert(Checkpoint)
    .from_select(
        ["task_id", "key", "kind", "name", "created_at"],
        select(_left.c.task_ids, _left.c.checkpoint_keys, constant("stream"), _left.c.names, clock()).where(
            _left.c.checkpoint_keys.is_not(None), is_in(_left.c.task_ids, _locked)
        ),
    )
    .on_conflict_do_nothing()
    .cte("recorded")
)
CLOSE_STREAMS = (
    select(_left.c.task_ids.label("task_id"), _left.c["keys"].label("key"))
    .where(is_in(_left.c.task_ids, _locked))
    .add_cte(_closed, _recorded)
)
"""Leave blocks; where that `ends` a stream, readers come to the end."""

_step = rows("step", task_ids=Uuid(), names=Text(), step_keys=Uuid(), positions=BigInteger())
_is_ended = exists().where(
    Stream.task_id == _step.c.task_ids,
    Stream.name == _step.c.names,
    Stream.step_key != _step.c.step_keys,
    Stream.closed_at.is_not(None),
)
_has_later = exists().where(
    StreamItems.task_id == _step.c.task_ids,
    StreamItems.name == _step.c.names,
    StreamItems.position > _step.c.positions,
    StreamItems.step_key != _step.c.step_keys,
    Checkpoint.task_id == StreamItems.task_id,
    Checkpoint.key == StreamItems.step_key,
)
OVERTAKEN = select(_step.c.task_ids.label("task_id")).where(or_(_is_ended, _has_later))
"""The steps whose streams others have ended, or have written behind a position and are recorded."""

_asked = rows("asked", task_ids=Uuid(), names=Text(), afters=BigInteger())
_next = (
    select(StreamItems.position, as_text(StreamItems.items).label("items"))
    .where(
        StreamItems.task_id == _asked.c.task_ids,
        StreamItems.name == _asked.c.names,
        StreamItems.position > _asked.c.afters,
    )
    .order_by(StreamItems.position)
    .limit(constant(PAGE))
    .correlate(_asked)
    .subquery("following")
)
_through = func.sum(func.octet_length(_next.c["items"])).over(order_by=_next.c.position)
_sized = select(_next, _through.label("through")).subquery("sized")
_page = (
    select(_sized).where(_sized.c.through - func.octet_length(_sized.c["items"]) < constant(PAGE_BYTES)).lateral("page")
)
_restart = (
    select(func.min(_restarts.c.after))
    .where(_restarts.c.after < _asked.c.afters, _asked.c.afters <= _restarts.c.through)
    .correlate(_asked, Stream)
    .scalar_subquery()
)
READ_STREAMS = (
    select(
        _asked.c.task_ids.label("task_id"),
        _asked.c.names.label("name"),
        _asked.c.afters.label("after"),
        or_(TaskRow.outcome.is_not(None), and_(Stream.task_id.is_not(None), Stream.closed_at.is_not(None))).label(
            "over"
        ),
        _restart.label("restart"),
        _page.c.position,
        _page.c["items"].label("texts"),
        _page.c.through,
    )
    .select_from(_asked)
    .join(TaskRow, TaskRow.task_id == _asked.c.task_ids)
    .outerjoin(Stream, (Stream.task_id == _asked.c.task_ids) & (Stream.name == _asked.c.names))
    .outerjoin(_page, true())
    .order_by(_asked.c.task_ids, _asked.c.names, _asked.c.afters, _page.c.position)
)
"""The items behind these positions, with the state of each stream and its task: a row at least if the task exists.

`restart` is the position from which on what a reader has read is superseded; null if it is not.
"""
