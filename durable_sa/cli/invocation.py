"""One call of a command: its client, its output, and its errors as messages and exit codes."""

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

OK, FAILED, USAGE = 0, 1, 2

_USAGE_ERRORS = (InvalidConfiguration, InvalidCron, InvalidName, InvalidTaskParams, PayloadTooLarge, SerializationError)

Url = Annotated[
    str | None,
    typer.Option(
        help="The database. Prefer the variable: other users can read the arguments of a process. "
        "Without either, the embedded Postgres is used.",
        envvar="DURABLE_DATABASE_URL",
        show_default=False,
    ),
]
SchemaName = Annotated[str, typer.Option(help="The schema of durable's tables.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Invocation:
    """The client and the output of a command."""

    def __init__(self, durable: Durable[Any], output: Output) -> None:
        self.durable = durable
        self.output = output


def connected(function: Callable[Concatenate[Invocation, P], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Turn a coroutine function of an `Invocation` into a command with the options `--url`, `--schema` and `--json`."""

    @functools.wraps(function)
    def run(*, url: str | None, schema: str, as_json: bool, **arguments: Any) -> None:
        async def main() -> None:
            async with Durable(url, schema=schema) as durable:
                await function(Invocation(durable, Output(as_json=as_json)), **arguments)  # type: ignore[call-arg]

        with exit_on_errors(url):
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
def exit_on_package_errors() -> Generator[None]:
    """Turn errors of this package into a message on stderr, without a traceback, and an exit code."""
    try:
        yield
    except DurableError as error:
        fail(str(error), USAGE if isinstance(error, _USAGE_ERRORS) else FAILED)


@contextmanager
def exit_on_errors(url: str | None = None) -> Generator[None]:
    """Turn errors of this package and of the database into a message, which never contains the password."""
    try:
        with exit_on_package_errors():
            yield
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed the pipe.
        raise
    except Exception as error:
        if not isinstance(error, SQLAlchemyError | OSError) and sqlstate(error) is None:
            raise
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        message = str(cause).strip().splitlines() or [type(cause).__name__]
        fail(f"The database at {place(url)} failed: {message[0]}", FAILED)


def fail(message: str, code: int) -> None:
    """Print an error and exit.

    Raises:
        typer.Exit: always.
    """
    make_console(stderr=True).print(f"error: {clean(message)}", soft_wrap=True)
    raise typer.Exit(code)


def examples(*commands: str) -> str:
    """Format example commands as the epilog of a help text."""
    return "\n\n".join([f"Example{'s' if commands[1:] else ''}:", *commands])


def place(url: str | None) -> str:
    """Return the location of a database without user and password."""
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
