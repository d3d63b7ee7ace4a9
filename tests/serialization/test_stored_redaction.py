"""Errors without values: what drivers, the server, SQLAlchemy and pydantic put into messages is cut out."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import ChildFailed, UserError
from durable_sa.ids import new_id
from durable_sa.serialization.failures import describe
from durable_sa.serialization.stored_redaction import message_of, traceback_of, without_values

SECRET = "hunter2"

STATEMENTS = [
    ("SELECT CAST(CAST(:value AS text) AS integer)", SECRET),
    ("INSERT INTO pg_temp.people VALUES (:value)", SECRET),
    ("INSERT INTO pg_temp.people VALUES (:value || 'x'), (:value || 'x')", SECRET),
    (f"SELECT '{SECRET}'::integer, CAST(:value AS text)", "x"),
    (f"SELECT no_such_column, '{SECRET}', CAST(:value AS text)", SECRET),
    (f"SELECT '{SECRET}' FROM nowhere WHERE CAST(:value AS text) = 'a'", SECRET),
    ("SELECT CAST(CAST(:value AS text) AS timestamp)", SECRET),
    ("SELECT CAST(CAST(:value AS text) AS json)", f'{{"a": {SECRET}}}'),
    ("SELECT CAST(CAST(:value AS text) AS uuid)", SECRET),
]
SETUP = text("CREATE TEMP TABLE people (name text PRIMARY KEY CHECK (name <> 'hunter2'))")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg2"])
def test_errors_of_the_database(database_url: URL, driver: str) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")

    async def attempt_async(statement: str, value: str) -> BaseException:
        engine = create_async_engine(url)
        try:
            async with engine.connect() as connection:
                await connection.execute(SETUP)
                await connection.execute(text(statement), {"value": value})
        except SQLAlchemyError as error:
            return error
        finally:
            await engine.dispose()
        raise AssertionError(statement)

    def attempt(statement: str, value: str) -> BaseException:
        if driver != "psycopg2":
            return asyncio.run(attempt_async(statement, value))
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                connection.execute(SETUP)
                connection.execute(text(statement), {"value": value})
        except SQLAlchemyError as error:
            return error
        finally:
            engine.dispose()
        raise AssertionError(statement)

    for statement, value in STATEMENTS:
        failure = describe(attempt(statement, value))
        assert SECRET in failure["message"]
        message = without_values(failure["message"])
        assert SECRET not in message, message
        assert "[SQL: " in message
        shortened = traceback_of(failure["traceback"], f"{failure['name']}: {message}")
        assert shortened is not None
        assert SECRET not in shortened.replace(SECRET_CODE, ""), shortened
        assert "connection.execute(text(statement)" in shortened


SECRET_CODE = "name <> 'hunter2'"


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    age: int
    tags: dict[str, int] = {}


class Odd:
    def __repr__(self) -> str:
        return f"{SECRET}, input_type=str]\n{SECRET}"


@pytest.mark.parametrize(
    "data", [{"age": SECRET}, {"age": 1, "other": SECRET}, {"age": Odd()}, SECRET, {"age": f"{SECRET}, input_type=x]"}]
)
def test_errors_of_pydantic(data: Any) -> None:
    try:
        Person.model_validate(data)
    except ValueError as error:
        failure = describe(error)
    message = without_values(failure["message"])
    assert SECRET in failure["message"]
    assert SECRET not in message
    assert "validation error for Person" in message
    assert "input_type=" in message
    assert SECRET not in str(traceback_of(failure["traceback"], f"ValidationError: {message}"))


def test_data_of_a_user_error_is_a_value() -> None:
    assert message_of("UserError", SECRET, has_data=True) is None
    assert message_of("MyUserError", SECRET, has_data=True) is None
    assert message_of("UserError", SECRET, has_data=False) is None
    child = ChildFailed(new_id(), "UserError", SECRET, {"a": SECRET})
    message = message_of("ChildFailed", str(child), has_data=True)
    assert message == f"Child task {child.task_id} failed: UserError"
    assert SECRET not in without_values(
        f"Child task {child.task_id} failed: ChildFailed: x failed: UserError: {SECRET}"
    )


def test_other_messages_stay() -> None:
    text = "cannot reach mail.example:25\nafter 3 tries"
    assert message_of("ConnectError", text, has_data=False) == text
    assert message_of("ConnectError", None, has_data=False) is None


def failing() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        error.add_note(f"a note with {SECRET}")
        raise ExceptionGroup("several", [ValueError(f"first {SECRET}\nsecond: {SECRET}"), UserError(SECRET)]) from error


def test_a_traceback_keeps_frames_and_classes() -> None:
    try:
        failing()
    except ExceptionGroup as error:
        failure = describe(error)
    assert SECRET in failure["traceback"]
    kept = traceback_of(failure["traceback"], "ExceptionGroup: several")
    assert kept is not None
    assert SECRET not in kept
    for part in (
        "in failing",
        "raise KeyError(SECRET)",
        "KeyError",
        "ValueError",
        "UserError",
        "ExceptionGroup: several",
    ):
        assert part in kept, kept


def test_code_without_a_file_is_a_value() -> None:
    try:
        exec(compile(f"\n{SECRET}", "<string>", "exec"))
    except NameError as error:
        failure = describe(error)
    assert SECRET not in str(traceback_of(failure["traceback"], "NameError"))
