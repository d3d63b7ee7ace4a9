"""SQLAlchemy takes a parameter that is named as a column of an UPDATE or INSERT for a value to set."""

import importlib
import pkgutil

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.sql import ClauseElement

from durable_sa import statements

STATEMENTS = {
    f"{found.name}.{name}": getattr(module, name)
    for found in pkgutil.iter_modules(statements.__path__)
    for module in [importlib.import_module(f"{statements.__name__}.{found.name}")]
    for name in dir(module)
    if name.isupper() and isinstance(getattr(module, name), ClauseElement)
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_is_the_same_with_its_parameters_as_without(name: str) -> None:
    plain = STATEMENTS[name].compile(dialect=dialect())
    executed = STATEMENTS[name].compile(dialect=dialect(), column_keys=list(plain.params))
    assert str(executed) == str(plain)
