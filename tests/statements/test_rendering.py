"""Statements that are rendered once say and bind what SQLAlchemy's own execution of them would."""

import gc
import uuid
import weakref
from typing import Any

import pytest
from sqlalchemy import ARRAY, Boolean, Integer, Uuid, bindparam, column, func, select
from sqlalchemy.dialects.postgresql import asyncpg, psycopg, psycopg2
from sqlalchemy.engine import Dialect

from durable_sa import TaskRow
from durable_sa.database import private
from durable_sa.database.rendering import render
from durable_sa.statements.expressions import array

from .test_parameters import STATEMENTS

DIALECTS = {"asyncpg": asyncpg.dialect, "psycopg": psycopg.dialect, "psycopg2": psycopg2.dialect}


def value(bind: Any) -> Any:
    """What the type of a bind takes, and tells it from others."""
    item = getattr(bind.type, "item_type", bind.type)
    single = True if isinstance(item, Boolean) else bind.key
    return [single] if isinstance(bind.type, ARRAY) else single


@pytest.mark.parametrize("driver", DIALECTS)
@pytest.mark.parametrize("name", STATEMENTS)
def test_each_statement_is_rendered_as_sqlalchemy_would(name: str, driver: str) -> None:
    dialect: Dialect = DIALECTS[driver]()
    rendered = render(STATEMENTS[name], dialect, None)
    compiled: Any = STATEMENTS[name].compile(dialect=dialect)
    assert not compiled.post_compile_params
    assert not compiled.literal_execute_params
    assert rendered.text == str(compiled)
    given = {bind: value(parameter) for parameter, bind in compiled.bind_names.items() if parameter.required}
    expected = compiled.construct_params(given)
    order = compiled.positiontup if compiled.positional else list(expected)
    bound: Any = rendered.bind(given)
    values = dict(zip(order, bound, strict=True)) if compiled.positional else bound
    assert {bind: values[bind] for bind in given} == given
    assert values.keys() == expected.keys()


@pytest.mark.parametrize("name", STATEMENTS)
def test_results_are_what_the_driver_gives(name: str) -> None:
    """Types that have something to convert would need SQLAlchemy to know what the columns are."""
    dialect = asyncpg.dialect()
    compiled: Any = STATEMENTS[name].compile(dialect=dialect)
    if name != "expressions.INTROSPECT_TYPES":
        for entry in compiled._result_columns:
            assert isinstance(entry.type, ARRAY) or entry.type.result_processor(dialect, None) is None, entry


def test_a_schema_of_another_name_is_in_the_text() -> None:
    dialect = asyncpg.dialect()
    statement = select(TaskRow.task_id)
    for schema, name in (("other", "other"), ('its "own"', '"its ""own"""')):
        rendered = render(statement, dialect, {"durable": schema})
        assert f"FROM {name}.tasks" in rendered.text
    plain = render(statement, dialect, None)
    assert "FROM durable.tasks" in plain.text


def test_values_that_belong_to_the_statement_and_those_that_are_bound() -> None:
    statement = select(func.coalesce(bindparam("number", type_=Integer()), 7), array("ids", Uuid()))
    some = uuid.uuid4()
    by_position = render(statement, asyncpg.dialect(), None)
    assert by_position.bind({"number": None, "ids": (some,)}) == (None, 7, (some,))
    by_name = render(statement, psycopg.dialect(), None)
    bound = by_name.bind({"number": None, "ids": (some,)})
    assert isinstance(bound, dict)
    assert (bound["number"], bound["ids"]) == (None, [some])


def test_what_is_rendered_is_kept_no_longer_than_its_statement() -> None:
    dialect = asyncpg.dialect()
    statement = select(column("number", Integer()))
    render(statement, dialect, None)
    gone = weakref.ref(statement)
    del statement
    gc.collect()
    assert gone() is None


def test_dialects_share_what_is_rendered_unless_their_settings_differ() -> None:
    statement = select(TaskRow.task_id)
    first = render(statement, asyncpg.dialect(), None)
    assert render(statement, asyncpg.dialect(), None) is first
    for other in (
        psycopg.dialect(),
        asyncpg.dialect(json_serializer=str),
        asyncpg.dialect(json_deserializer=str),
        asyncpg.dialect(label_length=20),
    ):
        assert render(statement, other, None) is not first
    old = asyncpg.dialect()
    old.server_version_info = (14, 0)
    assert render(statement, old, None) is not first


def test_each_dialect_renders_for_itself_where_its_serializers_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "SERIALIZERS", {"renamed"})
    statement = select(TaskRow.task_id)
    assert render(statement, asyncpg.dialect(), None) is not render(statement, asyncpg.dialect(), None)
