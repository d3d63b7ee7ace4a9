"""Statements as text, rendered once for a dialect and a schema.

SQLAlchemy finds the text of a statement by hashing all that it consists of, each time. For statements of this size that
takes as long as the rest of what the client does. They are constants, so it is enough to do it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from sqlalchemy import ARRAY, Executable
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.types import TypeEngine

Translations: TypeAlias = dict[str | None, str | None]
"""Schemas as the statements name them, and what they are called in the database."""


class Rendered(NamedTuple):
    """The text of a statement for a driver, and what it binds."""

    text: str
    names: list[str] | None
    """In the order of their positions; None where the driver binds by name."""
    constants: dict[str, Any]
    """Binds whose values belong to the statement."""
    processors: dict[str, Callable[[Any], Any]]

    def bind(self, parameters: Mapping[str, Any] | None) -> tuple[Any, ...] | dict[str, Any]:
        """The values as the driver takes them."""
        values = {**self.constants, **(parameters or {})}
        for name, process in self.processors.items():
            values[name] = process(values[name])
        return values if self.names is None else tuple([values[name] for name in self.names])


_rendered: weakref.WeakKeyDictionary[
    Dialect, weakref.WeakKeyDictionary[Executable, dict[frozenset[Any], Rendered | None]]
] = weakref.WeakKeyDictionary()


def render(statement: Executable, dialect: Dialect, translations: Translations | None) -> Rendered | None:
    """The text of a statement; None of one whose text depends on its values, as that of `in_()` does."""
    statements = _rendered.get(dialect)
    if statements is None:
        statements = _rendered[dialect] = weakref.WeakKeyDictionary()
    texts = statements.get(statement)
    if texts is None:
        texts = statements[statement] = {}
    key = frozenset(translations.items()) if translations else frozenset[Any]()
    if key not in texts:
        texts[key] = _render(statement, dialect, translations)
    return texts[key]


def _render(statement: Executable, dialect: Dialect, translations: Translations | None) -> Rendered | None:
    compiled = cast("ClauseElement", statement).compile(
        dialect=dialect, schema_translate_map=translations, render_schema_translate=bool(translations)
    )
    if not isinstance(compiled, SQLCompiler) or compiled.post_compile_params or compiled.literal_execute_params:
        return None
    constants = {name: bind.effective_value for bind, name in compiled.bind_names.items() if not bind.required}
    # A type's conversion of what it binds. SQLAlchemy has no public name for it, in 2.0 and 2.1 the same one.
    processors = dict(cast("dict[str, Callable[[Any], Any]]", compiled._bind_processors))  # pyright: ignore[reportPrivateUsage]
    if dialect.driver == "asyncpg":
        for bind, name in compiled.bind_names.items():
            if _is_only_copied(bind.type, dialect):
                processors.pop(name, None)
    return Rendered(compiled.string, compiled.positiontup if compiled.positional else None, constants, processors)


def _is_only_copied(kind: TypeEngine[Any], dialect: Dialect) -> bool:
    """Whether what a type does to a value is to make a list of it. asyncpg takes whatever sequence there is."""
    if not isinstance(kind, ARRAY):
        return False
    item_type: TypeEngine[Any] = cast("ARRAY[Any]", kind).item_type
    return item_type.dialect_impl(dialect).bind_processor(dialect) is None
