"""The few expressions that the statements share: the clock, arrays as rows, JSON as text, spans of time."""

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

from ..models import READABLE


class _Clock(FunctionElement[Any]):
    type = DateTime(timezone=True)
    inherit_cache = True
    name = "clock"


class _StatementTime(FunctionElement[Any]):
    type = DateTime(timezone=True)
    inherit_cache = True
    name = "statement_time"


# Both are written with their schema, as nothing else in an application is: time travel in tests finds them by that.
@compiles(_Clock)
def _compile_clock(element: _Clock, compiler: Any, **_: Any) -> str:
    return "pg_catalog.clock_timestamp()"


@compiles(_StatementTime)
def _compile_statement_time(element: _StatementTime, compiler: Any, **_: Any) -> str:
    return "pg_catalog.now()"


def clock() -> ColumnElement[Any]:
    """The database's time at this very moment, for values that are written."""
    return _Clock()


def statement_time() -> ColumnElement[Any]:
    """The database's time at the start of the transaction, for range conditions.

    Every statement of a worker is a transaction of its own, so this is when it began; unlike :func:`clock` it is
    stable, which lets the planner use it as the bound of an index scan.
    """
    return _StatementTime()


def constant(value: str | int) -> ColumnElement[Any]:
    """A constant in the statement's text, where a bound parameter would be sent with every execution."""
    if isinstance(value, int):
        return literal_column(str(value), Integer())
    return literal_column(f"'{value}'", Text())


def rows(name: str, /, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """Arrays bound under the columns' names, as the rows of a table; a bind may hold nulls."""
    return _unnest(columns).table_valued(*_typed(columns), name=name).render_derived(name=name)


def numbered_rows(name: str, position: str, /, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """As :func:`rows`, with a column that counts them from 1."""
    aliased = _unnest(columns).table_valued(*_typed(columns), with_ordinality=position, name=name)
    return aliased.render_derived(name=name)


def one_row(name: str, /, **columns: TypeEngine[Any]) -> FromClause:
    """Values bound under the columns' names, as a table of one row.

    Arrays of one element mean the same, but binding and unnesting twenty of them is half of the work of writing a row.
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
    """The number of elements of a bound list."""
    return func.cardinality(opaque(array(name, type_)))


def opaque(bind: ColumnElement[Any]) -> ColumnElement[Any]:
    """A bind whose value the planner does not look at.

    What it would learn is the length of a batch, which says little, and costs much: each execution would be planned
    anew, which takes longer than a statement for a single task, and a long batch on a short table would be joined by
    reading that table as a whole.
    """
    return select(bind).scalar_subquery()


def array(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """A bound list, for ``= ANY(...)``."""
    return bindparam(name, type_=ARRAY(type_))


def arrays(names: Iterable[str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows as the arrays that a statement binds under these names."""
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
    """Encoded text on its way into a ``json`` column."""
    return cast(text, JSON(none_as_null=True))


def as_jsonb(text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Encoded text on its way into a ``jsonb`` column."""
    return cast(text, JSONB(none_as_null=True))


def as_text(json: ColumnElement[Any] | InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """A JSON column on its way out, as it stands."""
    return cast(json, Text())


def interval(seconds: ColumnElement[Any]) -> ColumnElement[Any]:
    """Seconds, with their fraction, as an interval."""
    zero = constant(0)
    return func.make_interval(zero, zero, zero, zero, zero, zero, cast(seconds, Float(53)), type_=Interval())


def clamped_time(moment: ColumnElement[Any] | InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """A time on its way out: one that drivers cannot read, infinite or not in the years 1 to 9999, as the nearest.

    Somebody may have written it by hand, and would keep all others from reading the rows beside it.
    """
    first, last = (func.to_timestamp(constant(bound), type_=DateTime(timezone=True)) for bound in READABLE)
    clamped = case((moment < first, first), (moment > last, last), else_=moment)
    return clamped.label(moment.key) if isinstance(moment, InstrumentedAttribute) else clamped


def clamped_limit(limit: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """A limit on time as it is stored, to be added to the clock. One that is beyond all limits would fail a batch."""
    none, most = (cast(constant(text), Interval()) for text in ("0", "36525 days"))
    return case((limit < none, none), (limit > most, most), else_=limit)


def next_fence(fence: ColumnElement[int] | InstrumentedAttribute[int]) -> ColumnElement[Any]:
    """The next fence. One that somebody has set beyond all limits would fail all tasks of a batch by its overflow."""
    return func.least(fence, constant(2**62)) + constant(1)


def lock_timeout() -> CTE:
    """Joined to the source of an insert, lets that one statement fail with 55P03 instead of waiting for a lock.

    It does not wait then for an open transaction of somebody else that has inserted the same key, which would hold up
    what others send in the same statement.
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
"""What asyncpg asks the server about arrays, once a connection, takes 10 ms: better now than with the first task."""
NO_ARRAYS: dict[str, list[Any]] = {name: [] for name in _ARRAYS}
