"""The database of a command: from its options, the environment or an application, and never by chance."""

from __future__ import annotations

import os
import shlex
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .. import Durable
from ..errors import InvalidConfiguration
from ..models import SCHEMA
from .loading import load

VARIABLE = "DURABLE_DATABASE_URL"

Url = Annotated[
    str | None,
    typer.Option(
        help=f"The database. Prefer the variable {VARIABLE}: other users can read the arguments of a process.",
        show_default=False,
    ),
]
Embedded = Annotated[
    bool, typer.Option("--embedded", help="Use the embedded server, and start it if it is not running.")
]
App = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:DURABLE",
        help="Use the database, schema and tasks of your application's Durable, such as app.tasks:durable.",
        show_default=False,
    ),
]
SchemaName = Annotated[
    str | None, typer.Option(help="The schema of durable's tables.", show_default=f"the application's, else {SCHEMA}")
]


class Source(NamedTuple):
    """The options that say which database a command uses."""

    url: str | None = None
    embedded: bool = False
    app: str | None = None
    schema: str | None = None

    def client(self) -> Durable[Any]:
        """Create the client, or import the application's. Nothing is connected yet.

        Raises:
            InvalidConfiguration: options contradict each other, or the application cannot be imported.
        """
        if self.url is not None and self.embedded:
            raise InvalidConfiguration("--embedded", "--url names another database", "Give one of the two.")
        if self.app is None:
            return Durable(self._address(), schema=self.schema or SCHEMA)
        address = self._address()
        if address is not None:
            # An application may read the variable itself.
            os.environ[VARIABLE] = address
        durable = load(self.app)
        if address is not None and has_own_database(durable):
            option = "--embedded" if self.embedded else "--url"
            raise InvalidConfiguration(option, f"{self.app} has a database of its own", f"Leave out {option}.")
        if self.schema not in (None, durable.schema):
            raise InvalidConfiguration(
                "--schema", f"the tables of {self.app} are in schema {durable.schema!r}", "Leave out --schema."
            )
        return durable

    def options(self) -> str:
        """Return the options as they are typed in a shell, without the address, in which there may be a password."""
        words = [] if self.url is None else ["--url", "URL"]
        words += ["--embedded"] if self.embedded else []
        for option, value in (("--app", self.app), ("--schema", self.schema)):
            words += [] if value is None else [option, value]
        return shlex.join(words)

    def _address(self) -> str | None:
        if not self.embedded:
            return self.url
        from ..embedded import server

        return server().url().render_as_string(hide_password=False)


def has_own_database(durable: Durable[Any]) -> bool:
    """Return whether a client was made with an engine or a URL, so that the environment does not count."""
    return durable._bind is not None  # pyright: ignore[reportPrivateUsage]


def require_database(durable: Durable[Any], app: str | None = None) -> None:
    """Refuse to act on a database that was not named, by an application neither if `app` is given.

    Raises:
        InvalidConfiguration: the client would start the embedded server by itself.
    """
    if has_own_database(durable) or os.environ.get(VARIABLE):
        return
    if app is not None:
        raise InvalidConfiguration(
            app,
            "it names no database",
            f"Pass it a URL, or set {VARIABLE}, or give --embedded for the embedded server.",
        )
    raise InvalidConfiguration(
        "database",
        "none is named",
        f"Set {VARIABLE}=postgresql://user:password@host/database, or give --app MODULE:DURABLE for the database "
        "of your application, or --embedded for the embedded server.",
    )


def description(durable: Durable[Any]) -> str:
    """Return the database and, unless it is the usual one, the schema of a client, without user and password."""
    schema = "" if durable.schema == SCHEMA else f", schema {durable.schema}"
    return f"{place(durable.engine.url)}{schema}"


def place(url: str | URL) -> str:
    """Return the location of a database without driver, user and password."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return "the given URL"
    name = parsed.drivername.partition("+")[0]
    bare = URL.create(name, host=parsed.host, port=parsed.port, database=parsed.database)
    socket = f" (in {parsed.query['host']})" if "host" in parsed.query else ""
    return f"{bare.render_as_string()}{socket}"
