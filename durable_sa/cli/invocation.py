"""One call of a command: its connection, its output, and how its errors reach the shell."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from .. import Durable
from ..database_errors import sqlstate
from ..errors import (
    DurableError,
    InvalidConfiguration,
    InvalidCron,
    InvalidName,
    InvalidTaskParams,
    PayloadTooLarge,
    SerializationError,
)
from ..models import SCHEMA
from .output import Output, clean, make_console

P = ParamSpec("P")

OK, WRONG, USAGE = 0, 1, 2

_USAGE_ERRORS = (InvalidConfiguration, InvalidCron, InvalidName, InvalidTaskParams, PayloadTooLarge, SerializationError)

Url = Annotated[
    str | None,
    typer.Option(
        help="The database. Rather set the variable: others can read the arguments of a process. "
        "With neither, the embedded Postgres is used.",
        envvar="DURABLE_DATABASE_URL",
        show_default=False,
    ),
]
SchemaName = Annotated[str, typer.Option(help="The schema that durable's tables are in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Invocation:
    """What a command works with."""

    def __init__(self, durable: Durable[Any], output: Output) -> None:
        self.durable = durable
        self.output = output


def connected(function: Callable[Concatenate[Invocation, P], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a command of a coroutine function: it gets an `Invocation`, its command `--url`, `--schema` and `--json`."""

    @functools.wraps(function)
    def run(*, url: str | None, schema: str, as_json: bool, **arguments: Any) -> None:
        async def main() -> None:
            async with Durable(url, schema=schema) as durable:
                await function(Invocation(durable, Output(as_json=as_json)), **arguments)  # type: ignore[call-arg]

        with reported(url):
            asyncio.run(main())

    hints = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(function).parameters.values())[1:]
    ]
    for name, annotation, default in (("url", Url, None), ("schema", SchemaName, SCHEMA), ("as_json", AsJson, False)):
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    del run.__wrapped__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@contextmanager
def refused() -> Generator[None]:
    """Turn an error of this package into one message on stderr, without a traceback, and an exit code."""
    try:
        yield
    except DurableError as error:
        fail(str(error), USAGE if isinstance(error, _USAGE_ERRORS) else WRONG)


@contextmanager
def reported(url: str | None = None) -> Generator[None]:
    """Do so with errors of the database as well. The message says where it is, without the password."""
    try:
        with refused():
            yield
    except BrokenPipeError:
        # Whoever reads the output has enough of it, as `head` has.
        raise
    except Exception as error:
        if not isinstance(error, SQLAlchemyError | OSError) and sqlstate(error) is None:
            raise
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        message = str(cause).strip().splitlines() or [type(cause).__name__]
        fail(f"The database at {place(url)} does not answer as it should: {message[0]}", WRONG)


def fail(message: str, code: int) -> None:
    """Print an error and exit.

    Raises:
        typer.Exit: always.
    """
    make_console(stderr=True).print(f"error: {clean(message)}", soft_wrap=True)
    raise typer.Exit(code)


def examples(*commands: str) -> str:
    """The last part of a help text."""
    return "\n\n".join([f"Example{'s' if commands[1:] else ''}:", *commands])


def place(url: str | None) -> str:
    """Where a database is, without what may be secret."""
    url = url or os.environ.get("DURABLE_DATABASE_URL")
    if url is None:
        return "the embedded server"
    try:
        parsed = make_url(url)
    except ArgumentError:
        return "the given URL"
    bare = URL.create(parsed.drivername, host=parsed.host, port=parsed.port, database=parsed.database)
    socket = f" (in {parsed.query['host']})" if "host" in parsed.query else ""
    return f"{bare.render_as_string()}{socket}"
