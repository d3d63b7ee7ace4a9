"""SQLAlchemy takes a parameter that is named as a column of an UPDATE or INSERT for a value to set."""

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.sql import ClauseElement

from durable_sa import statements


def found_in(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The statements of a module: its constants, and what its cached functions build."""
    for name in dir(module):
        value = getattr(module, name)
        if name.isupper() and isinstance(value, ClauseElement):
            yield name, value
        elif hasattr(value, "cache_info") and value.__module__ == module.__name__:
            options = list(inspect.signature(value).parameters)
            for chosen in itertools.product((False, True), repeat=len(options)):
                yield f"{name}{chosen}", value(**dict(zip(options, chosen, strict=True)))


STATEMENTS = {
    f"{each.name}.{name}": statement
    for each in pkgutil.iter_modules(statements.__path__)
    for name, statement in found_in(importlib.import_module(f"{statements.__name__}.{each.name}"))
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_is_the_same_with_its_parameters_as_without(name: str) -> None:
    plain = STATEMENTS[name].compile(dialect=dialect())
    executed = STATEMENTS[name].compile(dialect=dialect(), column_keys=list(plain.params))
    assert str(executed) == str(plain)
