"""One call of a command: its client, its output, and its errors as messages and exit codes."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Annotated, Any, Concatenate, NoReturn, ParamSpec, cast, get_type_hints

import typer
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from .. import Durable, __version__
from ..database_errors import sqlstate
from ..errors import DurableError
from ..validation import UNSTORABLE
from .connection import App, Embedded, SchemaName, Source, Url, description, place, require_database
from .messages import USAGE_ERRORS, message
from .output import Output, clean, make_console

P = ParamSpec("P")

OK, FAILED, USAGE = 0, 1, 2

_WATCH_SECONDS = 2.0
_pause = asyncio.sleep

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Repeat every two seconds, until Ctrl-C.")]

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "url": (Url, None),
    "app": (App, None),
    "embedded": (Embedded, False),
    "schema": (SchemaName, None),
    "as_json": (AsJson, False),
}
"""The options of every command that uses a database, with their defaults."""


class Invocation:
    """The client and the output of a command."""

    def __init__(self, durable: Durable[Any], output: Output, source: Source | None = None) -> None:
        source = source or Source()
        self.durable = durable
        self.output = output
        self.app = source.app
        """The MODULE:DURABLE of which the client is, with its tasks; None if it was made for the command."""
        self.options = " ".join(filter(None, [source.options(), "--json" if output.as_json else ""]))
        """The options of the database and the output, as they are typed in a shell."""

    def announce(self) -> None:
        """Say on stderr which database the command speaks to.

        Raises:
            InvalidConfiguration: none was named.
        """
        require_database(self.durable, self.app)
        self.output.note(f"database: {description(self.durable)}")


Command = Callable[Concatenate[Invocation, P], Coroutine[Any, Any, None]]


def connected(function: Command[P]) -> Callable[..., None]:
    """Turn a coroutine function of an `Invocation` into a command with options for the database and `--json`."""
    return _command(function, _once)


def listing(function: Command[P]) -> Callable[..., None]:
    """Turn a coroutine function into a command as `connected` does, with the option `--watch`."""
    return _command(function, _watched, watch=(Watch, False))


def offline(function: Command[P]) -> Callable[..., None]:
    """Turn a coroutine function into a command as `connected` does, which announces its database itself, or none."""
    return _command(function, _once, announced=False)


def _command(
    function: Command[P], perform: Callable[..., Coroutine[Any, Any, None]], *, announced: bool = True, **more: Any
) -> Callable[..., None]:
    options = _OPTIONS | more

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(name, default) for name, (_, default) in options.items()}
        as_json, watch = given.pop("as_json"), given.pop("watch", False)
        source = Source(**given)
        _refuse_unreadable(chain(given.values(), arguments.values()))

        async def main(durable: Durable[Any]) -> None:
            async with durable:
                invocation = Invocation(durable, Output(as_json=as_json), source)
                if announced:
                    invocation.announce()
                await perform(functools.partial(function, invocation, **arguments), invocation, watch)

        # Errors of an application that is imported keep their traceback.
        with exit_on_package_errors():
            durable = source.client()
        with exit_on_errors(durable):
            asyncio.run(main(durable))

    hints = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(function).parameters.values())[1:]
    ]
    for name, (annotation, default) in options.items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    del run.__wrapped__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _refuse_unreadable(values: Iterable[object]) -> None:
    """Refuse arguments that are not UTF-8, or have another character that no stored text has."""
    texts = chain.from_iterable(cast(list[object], value) if isinstance(value, list) else [value] for value in values)
    for value in texts:
        if isinstance(value, str) and UNSTORABLE.search(value):
            fail(f"The argument {value!r} is not UTF-8.", USAGE)


async def _once(act: Callable[[], Coroutine[Any, Any, None]], invocation: Invocation, watch: bool) -> None:
    await act()


async def _watched(act: Callable[[], Coroutine[Any, Any, None]], invocation: Invocation, watch: bool) -> None:
    if not watch:
        await act()
        return
    working: asyncio.Task[None] | None = None
    try:
        while True:
            invocation.output.console.clear()
            working = asyncio.create_task(act())
            await asyncio.shield(working)
            await _pause(_WATCH_SECONDS)
    except asyncio.CancelledError:
        # Ctrl-C cancels the command; it is how this one ends. A query in flight gets a moment, because the driver
        # complains on stderr of one that is cut off.
        if working is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(working, _WATCH_SECONDS)
        raise typer.Exit(OK) from None


@contextmanager
def exit_on_package_errors() -> Generator[None]:
    """Turn errors of this package into a message on stderr, without a traceback, and an exit code."""
    try:
        yield
    except DurableError as error:
        fail(message(error), USAGE if isinstance(error, USAGE_ERRORS) else FAILED)


@contextmanager
def exit_on_errors(database: Durable[Any] | URL | str) -> Generator[None]:
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
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        where = place(database.engine.url) if isinstance(database, Durable) else place(database)
        fail(f"The database at {where} failed: {lines[0]}", FAILED)


def fail(problem: str, code: int) -> NoReturn:
    """Print an error and exit.

    Raises:
        typer.Exit: always.
    """
    make_console(stderr=True).print(f"error: {clean(problem)}", soft_wrap=True)
    raise typer.Exit(code)


def examples(*commands: str) -> str:
    """Format example commands as the epilog of a help text."""
    return "\n\n".join([f"Example{'s' if commands[1:] else ''}:", *commands])


def print_version(wanted: bool) -> None:
    """Print the version of the package and exit, if it is wanted."""
    if wanted:
        print(f"durable_sa {__version__}")  # noqa: T201
        raise typer.Exit(OK)
