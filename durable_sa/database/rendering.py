"""Statements as text, rendered once for each dialect and schema.

SQLAlchemy finds the text of a statement by hashing all its elements for each execution. For statements of this size
that takes as long as the rest of the client's work. The statements are constants, so rendering them once is enough.
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

from . import private

Translations: TypeAlias = dict[str | None, str | None]
"""Names of schemas in the database by their names in the statements."""


class Rendered(NamedTuple):
    """The text of a statement for a driver, and the values that it binds."""

    text: str
    names: list[str] | None
    """Names of the binds in the order of their positions; None where the driver binds by name."""
    constants: dict[str, Any]
    """Values of the binds that are part of the statement."""
    processors: dict[str, Callable[[Any], Any]]

    def bind(self, parameters: Mapping[str, Any] | None) -> tuple[Any, ...] | dict[str, Any]:
        """Return the values as the driver takes them."""
        values = {**self.constants, **(parameters or {})}
        for name, process in self.processors.items():
            values[name] = process(values[name])
        return values if self.names is None else tuple([values[name] for name in self.names])


_Texts: TypeAlias = weakref.WeakKeyDictionary[Executable, dict[frozenset[Any], Rendered]]

_texts_of_dialects: weakref.WeakKeyDictionary[Dialect, _Texts] = weakref.WeakKeyDictionary()
_texts_of_settings: dict[frozenset[Any], _Texts] = {}
"""Texts that dialects of the same settings share: rendering those of a worker takes 50 ms, and each test of a suite may
have an engine of its own."""


def render(statement: Executable, dialect: Dialect, translations: Translations | None) -> Rendered:
    """Render a statement, whose text must not depend on its values, as that of `in_()` does."""
    texts_of_dialect = _texts_of_dialects.get(dialect)
    if texts_of_dialect is None:
        texts_of_dialect = _texts_of_dialects[dialect] = _texts_of(dialect)
    texts = texts_of_dialect.get(statement)
    if texts is None:
        texts = texts_of_dialect[statement] = {}
    key = frozenset(translations.items()) if translations else frozenset[Any]()
    if key not in texts:
        texts[key] = _render(statement, dialect, translations)
    return texts[key]


def _texts_of(dialect: Dialect) -> _Texts:
    """Return what dialects of these settings share; a dialect with serializers of the application has its own."""
    if private.has_serializers(dialect):
        return weakref.WeakKeyDictionary()
    settings: set[Any] = {(name, value) for name, value in vars(dialect).items() if isinstance(value, str | int)}
    settings.add(("class", type(dialect)))
    settings.add(("version", dialect.server_version_info))
    return _texts_of_settings.setdefault(frozenset(settings), weakref.WeakKeyDictionary())


def _render(statement: Executable, dialect: Dialect, translations: Translations | None) -> Rendered:
    element = cast("ClauseElement", statement)
    compiled = cast(
        "SQLCompiler",
        element.compile(dialect=dialect, schema_translate_map=translations, render_schema_translate=bool(translations)),
    )
    constants = {name: bind.effective_value for bind, name in compiled.bind_names.items() if not bind.required}
    processors: dict[str, Callable[[Any], Any]] = {}
    for bind, name in compiled.bind_names.items():
        process = _processor(bind.type, dialect)
        # asyncpg takes any sequence for an array; all that a type of plain elements does is to copy it into a list.
        if process is not None and not (dialect.driver == "asyncpg" and _has_plain_elements(bind.type, dialect)):
            processors[name] = process
    return Rendered(compiled.string, compiled.positiontup if compiled.positional else None, constants, processors)


def _processor(kind: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return a type's conversion of the values that are bound."""
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _has_plain_elements(kind: TypeEngine[Any], dialect: Dialect) -> bool:
    return isinstance(kind, ARRAY) and _processor(cast("ARRAY[Any]", kind).item_type, dialect) is None
