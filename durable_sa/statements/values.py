"""Values that tasks publish: written under the fence, and read by clients."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, Text, Uuid, and_, bindparam, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.types import TypeEngine

from ..models import TaskRow, TaskValueRow
from .expressions import as_json, as_text, clamped_time, clock, constant, rows
from .fencing import is_in, locked_rows

VALUE_COLUMNS: Final[dict[str, TypeEngine[Any]]] = {"value_task_ids": Uuid(), "names": Text(), "values": Text()}
"""The arrays of published values. A statement has one value of each name of a task."""

_locked = locked_rows(rows("publishing", task_ids=Uuid(), fences=BigInteger()))
_new = rows("new", **VALUE_COLUMNS)
_publication = insert(TaskValueRow).from_select(
    ["task_id", "name", "value", "updated_at"],
    select(_new.c.value_task_ids, _new.c.names, as_json(_new.c["values"]), clock())
    .where(is_in(_new.c.value_task_ids, _locked))
    .order_by(_new.c.value_task_ids, _new.c.names),
)
_published = (
    _publication.on_conflict_do_update(
        index_elements=[TaskValueRow.task_id, TaskValueRow.name],
        set_={
            "value": _publication.excluded.value,
            "version": func.least(TaskValueRow.version, constant(2**62)) + constant(1),
            "updated_at": clock(),
        },
    )
    .returning(TaskValueRow.task_id)
    .cte("published")
)
PUBLISH = select(_published.c.task_id).distinct()
"""Write the values of runs, which replace those of before."""

_run = rows("run", task_ids=Uuid())
FOLLOW_LOSS = (
    select(TaskRow.task_id).join(_run, TaskRow.task_id == _run.c.task_ids).where(TaskRow.lease_losses > constant(0))
)
"""The tasks whose last run was lost with its worker."""

_asked = rows("asked", task_ids=Uuid(), names=Text())
GET_VALUES = (
    select(
        TaskRow.task_id,
        _asked.c.names.label("name"),
        TaskRow.outcome,
        TaskValueRow.version,
        as_text(TaskValueRow.value).label("value"),
    )
    .select_from(_asked)
    .join(TaskRow, TaskRow.task_id == _asked.c.task_ids)
    .outerjoin(TaskValueRow, and_(TaskValueRow.task_id == _asked.c.task_ids, TaskValueRow.name == _asked.c.names))
)
"""The values of these names, null where none was published, with the outcomes of the tasks. One row per task."""

LIST_VALUES = (
    select(TaskValueRow.name, clamped_time(TaskValueRow.updated_at), as_text(TaskValueRow.value).label("value"))
    .where(TaskValueRow.task_id == bindparam("task_id", type_=Uuid()))
    .order_by(TaskValueRow.name)
)
"""The values of a task."""
