"""The few expressions that the statements share: the clock, arrays as rows, JSON as text, spans of time."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    Interval,
    Text,
    bindparam,
    cast,
    column,
    func,
    literal_column,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeEngine


class clock(FunctionElement[Any]):
    """The database's time at this very moment, for values that are written."""

    type = DateTime(timezone=True)
    inherit_cache = True
    name = "clock"


class statement_time(FunctionElement[Any]):
    """The database's time at the start of the transaction, for range conditions.

    Every statement of a worker is a transaction of its own, so this is when it began; unlike :class:`clock` it is
    stable, which lets the planner use it as the bound of an index scan.
    """

    type = DateTime(timezone=True)
    inherit_cache = True
    name = "statement_time"


# Both are written with their schema, as nothing else in an application is: time travel in tests finds them by that.
@compiles(clock)
def _compile_clock(element: clock, compiler: Any, **_: Any) -> str:
    return "pg_catalog.clock_timestamp()"


@compiles(statement_time)
def _compile_statement_time(element: statement_time, compiler: Any, **_: Any) -> str:
    return "pg_catalog.now()"


def constant(value: str | int) -> ColumnElement[Any]:
    """A constant in the statement's text, where a bound parameter would be sent with every execution."""
    if isinstance(value, int):
        return literal_column(str(value), Integer())
    return literal_column(f"'{value}'", Text())


def rows(name: str, /, *, ordinality: str | None = None, **columns: TypeEngine[Any]) -> TableValuedAlias:
    """Arrays bound under the columns' names, as the rows of a table; a bind may hold nulls."""
    arrays = [bindparam(key, type_=ARRAY(type_)) for key, type_ in columns.items()]
    typed = [column(key, type_) for key, type_ in columns.items()]
    function = func.unnest(*arrays)
    if ordinality is None:
        return function.table_valued(*typed, name=name).render_derived(name=name)
    return function.table_valued(*typed, with_ordinality=ordinality, name=name).render_derived(name=name)


def array(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """A bound list, for ``= ANY(...)``."""
    return bindparam(name, type_=ARRAY(type_))


def as_json(text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Encoded text on its way into a ``json`` column."""
    return cast(text, JSON(none_as_null=True))


def as_jsonb(text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Encoded text on its way into a ``jsonb`` column."""
    return cast(text, JSONB(none_as_null=True))


def as_text(json: ColumnElement[Any]) -> ColumnElement[Any]:
    """A JSON column on its way out, as it stands."""
    return cast(json, Text())


def interval(seconds: ColumnElement[Any]) -> ColumnElement[Any]:
    """Seconds, with their fraction, as an interval."""
    zero = constant(0)
    return func.make_interval(zero, zero, zero, zero, zero, zero, cast(seconds, Float(53)), type_=Interval())
