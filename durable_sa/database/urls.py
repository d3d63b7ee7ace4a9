"""URLs of databases, as users and platforms write them."""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import InvalidConfiguration

_SOCKET: Final[dict[str, str]] = {
    "keepalives": "",
    "keepalives_idle": "TCP_KEEPIDLE",
    "keepalives_interval": "TCP_KEEPINTVL",
    "keepalives_count": "TCP_KEEPCNT",
    "tcp_user_timeout": "TCP_USER_TIMEOUT",
}
"""The name of the socket option of each of libpq's parameters."""
_CERTIFICATES: Final[tuple[str, ...]] = (
    *("sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version"),
)
"""libpq's parameters that asyncpg takes in the URL of its own alone."""
_UNKNOWN: Final[dict[str, str]] = {
    "channel_binding": "disable prefer",
    "gssencmode": "disable prefer",
    "gssdelegation": "0",
    "hostaddr": "",
    "load_balance_hosts": "disable",
    "max_protocol_version": "3.0",
    "min_protocol_version": "3.0",
    "replication": "false off no 0",
    "require_auth": "",
    "requirepeer": "",
    "sslcertmode": "allow",
    "sslcompression": "0",
    "sslcrldir": "",
    "sslnegotiation": "postgres",
    "sslsni": "1",
}
"""libpq's parameters that asyncpg does not have, each with the values for which none is needed."""
_TRANSLATED: Final = frozenset(
    {
        *("application_name", "fallback_application_name", "options", "connect_timeout", "client_encoding", "pooler"),
        *(*_CERTIFICATES, *_UNKNOWN, *_SOCKET),
    }
)


def resolve_url(url: str | URL, what: str = "bind") -> URL:
    """Parse a URL as users and platforms write it: asyncpg is the default driver, and calls `sslmode` `ssl`.

    Raises:
        InvalidConfiguration: it is not a URL, or not one of an asynchronous PostgreSQL driver.
    """
    parsed = _parse(url, what)
    if parsed.drivername not in ("postgresql+asyncpg", "postgresql+psycopg", "postgresql+psycopg_async"):
        raise InvalidConfiguration(
            what,
            f"{parsed.drivername!r} has no asyncio mode, which workers and awaited calls need",
            "Use postgresql+asyncpg:// or postgresql+psycopg://, or call the `_with` methods with a Session.",
        )
    if parsed.drivername == "postgresql+asyncpg" and "sslmode" in parsed.query:
        query = dict(parsed.query)
        parsed = parsed.set(query={"ssl": query.pop("sslmode"), **query})
    return parsed


def synchronous_url(url: str | URL, what: str = "bind") -> URL | None:
    """Parse a URL as `resolve_url` does, for a synchronous engine; None if its driver has no such form.

    Raises:
        InvalidConfiguration: it is not a URL, or not one of a PostgreSQL driver.
    """
    parsed = _parse(url, what)
    if parsed.drivername == "postgresql+psycopg_async":
        return parsed.set(drivername="postgresql+psycopg")
    return None if parsed.drivername == "postgresql+asyncpg" else parsed


def _parse(url: str | URL, what: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Their messages may quote the URL, with the password.
        raise InvalidConfiguration(
            what, "it is not a database URL", "Write postgresql://user:password@host/database."
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+asyncpg")
    if not parsed.drivername.startswith("postgresql+"):
        raise InvalidConfiguration(
            what,
            f"{parsed.drivername!r} is no PostgreSQL driver",
            "Use postgresql+asyncpg:// or postgresql+psycopg://.",
        )
    return parsed


class Dialed(NamedTuple):
    """A URL as its driver takes it."""

    url: URL
    connect_args: dict[str, Any]
    socket_options: dict[str, int]
    """Values of libpq's `keepalives*` and `tcp_user_timeout` for asyncpg, which leaves the socket to its caller."""


def dial(url: URL, what: str = "bind") -> Dialed:
    """Translate libpq's parameters of a resolved URL for asyncpg, and `pooler` for both drivers.

    Raises:
        InvalidConfiguration: the driver cannot do what a parameter asks for.
    """
    query: dict[str, Any] = dict(url.query)
    for name in query.keys() & _TRANSLATED:
        if not isinstance(query[name], str):
            query[name] = query[name][-1]  # of a parameter that occurs twice
    arguments: dict[str, Any] = {}
    is_asyncpg = url.drivername == "postgresql+asyncpg"
    pooler = query.pop("pooler", "session")
    if pooler == "transaction":
        if is_asyncpg:
            arguments.update(_for_pooler())
        elif url.drivername.startswith("postgresql+psycopg") and url.drivername != "postgresql+psycopg2":
            arguments["prepare_threshold"] = None  # other drivers prepare nothing
    elif pooler != "session":
        raise InvalidConfiguration(what, f"pooler={pooler} is neither transaction nor session")
    options = _for_asyncpg(query, arguments, what) if is_asyncpg else {}
    return Dialed(url.set(query=query), arguments, options)


def _for_pooler() -> dict[str, Any]:
    # asyncpg prepares every statement, so each needs a name that no other client of the pooler has.
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
    }


def _for_asyncpg(query: dict[str, Any], arguments: dict[str, Any], what: str) -> dict[str, int]:
    """Move libpq's parameters out of a query into asyncpg's arguments, and return those of the socket."""
    fallback = query.pop("fallback_application_name", None)
    settings = _settings(query.pop("options", ""), what)
    if name := query.pop("application_name", fallback):
        settings["application_name"] = name
    if settings:
        arguments["server_settings"] = settings
    if (seconds := _number(query, "connect_timeout", what)) is not None and seconds > 0:
        arguments["timeout"] = float(max(2, seconds))  # as libpq does
    encoding = query.pop("client_encoding", "auto")
    if encoding.lower().replace("-", "").replace("_", "") not in ("auto", "utf8", "unicode"):
        raise InvalidConfiguration(
            what, f"asyncpg speaks UTF-8, not client_encoding={encoding}", "Remove the parameter, or use psycopg."
        )
    for name in _UNKNOWN.keys() & query:
        if (value := query.pop(name)) not in ("", *_UNKNOWN[name].split()):
            raise InvalidConfiguration(what, f"asyncpg has no {name}={value}", "Remove the parameter, or use psycopg.")
    if certificates := {name: query.pop(name) for name in _CERTIFICATES if name in query}:
        if certificates.get("sslrootcert") == "system":
            raise InvalidConfiguration(
                what, "asyncpg has no sslrootcert=system", "Name the system's file of certificates, or use psycopg."
            )
        arguments["dsn"] = f"postgresql://?{urlencode(certificates)}"
    found = {name: _number(query, name, what) for name in _SOCKET}
    options = {name: value for name, value in found.items() if value is not None}
    if options:
        with socket.socket() as sock:
            set_socket_options(sock, options, what)
    return options


def _settings(options: str, what: str) -> dict[str, str]:
    """Parse libpq's `options`, which are those of the server's command line: `-c name=value` and `--name=value`."""
    settings: dict[str, str] = {}
    # Words end at blanks, and only a backslash takes a blank, or another backslash, for a character of the word.
    words = iter(re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|\S)+", options))
    for word in words:
        assignment = next(words, "") if word == "-c" else word.removeprefix("--" if word[:2] == "--" else "-c")
        name, equals, value = assignment.partition("=")
        if not word.startswith(("-c", "--")) or not equals:
            raise InvalidConfiguration(
                what, f"options has {word!r}, which asyncpg cannot send", "Write options=-c name=value."
            )
        settings[name.replace("-", "_")] = value
    return settings


def _number(query: dict[str, Any], name: str, what: str) -> int | None:
    value = query.pop(name, None)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise InvalidConfiguration(what, f"{name}={value} is not a number") from None


def set_socket_options(sock: Any, options: Mapping[str, int], what: str = "bind") -> None:
    """Set libpq's parameters of a TCP socket, as far as the platform has them; a value of 0 is the system's.

    Raises:
        InvalidConfiguration: the system refuses a value.
    """
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, options.get("keepalives", 1) != 0)
    for name, option in _SOCKET.items():
        if option and options.get(name, 0) > 0 and hasattr(socket, option):
            try:
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), options[name])
            except (OSError, OverflowError, TypeError) as error:
                raise InvalidConfiguration(
                    what, f"the system refuses {name}={options[name]}", "Use another value, or remove the parameter."
                ) from error


def default_bind() -> str | URL:
    """Return the URL of the default database: `DURABLE_DATABASE_URL`, else the embedded server."""
    if url := os.environ.get("DURABLE_DATABASE_URL"):
        return url
    from ..embedded import server

    return server().url()
