"""SQL expressions that the statements share: the clock, arrays as rows, JSON as text, clamped values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    ColumnClause,
    ColumnElement,
    DateTime,
    Float,
    Function,
    Integer,
    Interval,
    Select,
    SmallInteger,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    column,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.sql.selectable import CTE, FromClause, TableValuedAlias
from sqlalchemy.types import TypeEngine

from ..models import READABLE, WorkerRow


class _Clock(FunctionElement[Any]):
    type = DateTime(timezone=True)
    inherit_cache = True
    name = "clock"


class _StatementTime(FunctionElement[Any]):
    type = DateTime(timezone=True)
    inherit_cache = True
    name = "statement_time"


# Both are rendered with the schema `pg_catalog`, which applications never write: time travel in tests replaces them.
@compiles(_Clock)
def _compile_clock(element: _Clock, compiler: Any, **_: Any) -> str:
    return "pg_catalog.clock_timestamp()"


@compiles(_StatementTime)
def _compile_statement_time(element: _StatementTime, compiler: Any, **_: Any) -> str:
    return "pg_catalog.now()"


def clock() -> ColumnElement[Any]:
    """Return the database's current time, for values that are written."""
    return _Clock()


def statement_time() -> ColumnElement[Any]:
    """Return the database's time at the start of the transaction, for range conditions.

    A worker's statement is a transaction of its own, so this is the start of the statement. Unlike :func:`clock` it is
    a stable function, which the planner can use as the bound of an index scan.
    """
    return _StatementTime()


def constant(value: str | int) -> ColumnElement[Any]:
    """Write a constant into the statement's text; a bound parameter would be sent with every execution."""
    if isinstance(value, int):
        return literal_column(str(value), Integer())
    return literal_column(f"'{value}'", Text())


def rows(name: str, /, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """Unnest arrays, bound under the columns' names, as the rows of a table. Elements may be null."""
    return _unnest(columns).table_valued(*_typed(columns), name=name).render_derived(name=name)


def numbered_rows(name: str, position: str, /, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """Unnest arrays as :func:`rows` does, and number the rows from 1 in the column `position`."""
    aliased = _unnest(columns).table_valued(*_typed(columns), with_ordinality=position, name=name)
    return aliased.render_derived(name=name)


def one_row(name: str, /, **columns: TypeEngine[Any]) -> FromClause:
    """Select values, bound under the columns' names, as a table of one row.

    Arrays of one element would mean the same, but binding and unnesting twenty of them is half of the work of writing a
    row.
    """
    values = (cast(bindparam(column_name, type_=type_), type_) for column_name, type_ in columns.items())
    return select(*(value.label(column_name) for column_name, value in zip(columns, values, strict=True))).subquery(
        name
    )


def _unnest(columns: Mapping[str, TypeEngine[Any]]) -> Function[Any]:
    return func.unnest(*(opaque(array(name, type_)) for name, type_ in columns.items()))


def _typed(columns: Mapping[str, TypeEngine[Any]]) -> list[ColumnClause[Any]]:
    return [column(name, type_) for name, type_ in columns.items()]


def length(name: str, type_: TypeEngine[Any]) -> ColumnElement[int]:
    """Return the number of elements of a bound array."""
    return func.cardinality(opaque(array(name, type_)))


def opaque(bind: ColumnElement[Any]) -> ColumnElement[Any]:
    """Hide the value of a bind from the planner.

    The value would tell the planner the length of a batch. Each execution would then be planned anew, which takes
    longer than executing a statement for a single task, and a long batch would be joined with a short table by reading
    the whole table.
    """
    return select(bind).scalar_subquery()


def array(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """Bind a list as an array, for ``= ANY(...)``."""
    return bindparam(name, type_=ARRAY(type_))


def arrays(names: Iterable[str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Transpose rows into the arrays that a statement binds under these names."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=True)) if columns else {name: [] for name in names}


def count_or_ids(written: FromClause, expected: ColumnElement[int], *, columns: Sequence[str]) -> Select[Any]:
    """Select the number of rows written, and these columns of them as arrays only if fewer than `expected` were.

    Mostly all are, and reading one row for each is a tenth of the client's time for a step.
    """
    count = func.count()
    arrays = (case((count < expected, func.array_agg(written.c[name]))).label(f"{name}s") for name in columns)
    return select(count.label("written"), *arrays).select_from(written)


def as_json(text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Cast encoded JSON for a ``json`` column."""
    return cast(text, JSON(none_as_null=True))


def long_steps() -> TableValuedAlias:
    """Return the elements of `workers.long_steps` as rows with a `value`, to be selected from beside the workers."""
    elements = case((func.json_typeof(WorkerRow.long_steps) == constant("array"), WorkerRow.long_steps))
    return func.json_array_elements(elements).table_valued(column("value", JSON()), name="long", joins_implicitly=True)


def as_jsonb(text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Cast encoded JSON for a ``jsonb`` column."""
    return cast(text, JSONB(none_as_null=True))


def as_text(json: ColumnElement[Any] | InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """Cast a JSON column to text, so that no JSON deserializer of the engine touches it."""
    return cast(json, Text())


def interval(seconds: ColumnElement[Any]) -> ColumnElement[Any]:
    """Convert seconds, including fractions, to an interval."""
    zero = constant(0)
    return func.make_interval(zero, zero, zero, zero, zero, zero, cast(seconds, Float(53)), type_=Interval())


def clamped_time(moment: ColumnElement[Any] | InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """Clamp a selected time to the years 1 to 9999, which drivers can read.

    One infinite or distant time, written by hand, would otherwise make every row of the result unreadable.
    """
    first, last = (func.to_timestamp(constant(bound), type_=DateTime(timezone=True)) for bound in READABLE)
    clamped = case((moment < first, first), (moment > last, last), else_=moment)
    return clamped.label(moment.key) if isinstance(moment, InstrumentedAttribute) else clamped


def clamped_limit(limit: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """Clamp a stored time limit before it is added to the clock, because an overflow would fail the whole batch."""
    none, most = (cast(constant(text), Interval()) for text in ("0", "36525 days"))
    return case((limit < none, none), (limit > most, most), else_=limit)


def next_fence(fence: ColumnElement[int] | InstrumentedAttribute[int]) -> ColumnElement[Any]:
    """Increment a fence, clamped first, because the overflow of one set by hand would fail the whole batch."""
    return func.least(fence, constant(2**62)) + constant(1)


def lock_timeout() -> CTE:
    """Set a lock timeout of 5 ms for one statement, when joined to the source of its rows: it fails with 55P03.

    An insert would otherwise wait for another open transaction that inserted the same key, and delay everything else
    that the statement inserts.
    """
    setting = func.pg_catalog.set_config(constant("lock_timeout"), constant("5ms"), true())
    return select(setting.label("lock_timeout")).cte("lock_timeout").prefix_with("MATERIALIZED", dialect="postgresql")


_ARRAYS: dict[str, TypeEngine[Any]] = {
    "uuids": Uuid(),
    "texts": Text(),
    "numbers": BigInteger(),
    "integers": Integer(),
    "small_integers": SmallInteger(),
    "flags": Boolean(),
    "floats": Float(53),
    "times": DateTime(timezone=True),
}
INTROSPECT_TYPES = select(*(array(name, type_) for name, type_ in _ARRAYS.items()))
"""Make asyncpg look up the array types where it does not know them (see `private.declare_array_types`): once per
connection, 10 ms that the first task would wait for otherwise."""
NO_ARRAYS: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
