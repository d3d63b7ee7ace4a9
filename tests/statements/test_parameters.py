"""SQLAlchemy takes a parameter that is named as a column of an UPDATE or INSERT for a value to set."""

import importlib
import pkgutil

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.sql import ClauseElement

from durable_sa import statements

STATEMENTS = {
    f"{module.name}.{name}": value
    for module in pkgutil.iter_modules(statements.__path__)
    for name, value in vars(importlib.import_module(f"{statements.__name__}.{module.name}")).items()
    if isinstance(value, ClauseElement) and name.isupper()
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_is_the_same_with_its_parameters_as_without(name: str) -> None:
    plain = STATEMENTS[name].compile(dialect=dialect())
    executed = STATEMENTS[name].compile(dialect=dialect(), column_keys=list(plain.params))
    assert str(executed) == str(plain)
