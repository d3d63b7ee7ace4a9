"""Statements written as SQL text, for those that expressions would make unreadable.

In the text `{tasks}` is the table of a mapped class, in the schema of the installation, `{now}` and `{clock}` are the
times of :mod:`durable_sa.statements.expressions`, and `:name` is a bind parameter, whose type is given by name.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.expression import Executable
from sqlalchemy.types import TypeEngine

from ..models import metadata
from .expressions import clock, statement_time

_TABLES = {table.name: table for table in metadata.tables.values()}
_TIMES = {"now": statement_time, "clock": clock}
_PART = re.compile(r"\{(\w+)\}|(?<!:):(\w+)")


class Sql(Executable, ClauseElement):
    """A statement of SQL text, with the types of its bind parameters.

    The values of those that are `opaque` are hidden from the planner, as :func:`.expressions.opaque` does: a statement
    of this size takes longer to be planned for its values than to be executed.
    """

    inherit_cache = False

    def __init__(self, text: str, *opaque: str, **types: TypeEngine[Any]) -> None:
        self.text = text
        self.opaque = opaque
        self.binds = {name: bindparam(name, type_=type_) for name, type_ in types.items()}


@compiles(Sql)
def _compile(element: Sql, compiler: Any, **options: Any) -> str:
    def replace(match: re.Match[str]) -> str:
        name, bind = match.groups()
        if bind is not None:
            value = str(compiler.process(element.binds[bind], **options))
            return f"(SELECT {value})" if bind in element.opaque else value
        if name in _TIMES:
            return str(compiler.process(_TIMES[name](), **options))
        return str(compiler.preparer.format_table(_TABLES[name]))

    return _PART.sub(replace, element.text)
