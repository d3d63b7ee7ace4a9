"""URLs of databases, as users and platforms write them."""

from __future__ import annotations

import os

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import InvalidConfiguration


def resolve_url(url: str | URL, what: str = "bind") -> URL:
    """Parse a URL as users and platforms write it: asyncpg is the default driver, and calls `sslmode` `ssl`.

    Raises:
        InvalidConfiguration: it is not a URL, or not one of an asynchronous PostgreSQL driver.
    """
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
    if parsed.drivername not in ("postgresql+asyncpg", "postgresql+psycopg", "postgresql+psycopg_async"):
        raise InvalidConfiguration(
            what,
            f"{parsed.drivername!r} has no asyncio mode",
            "Use postgresql+asyncpg:// or postgresql+psycopg://.",
        )
    if parsed.drivername == "postgresql+asyncpg" and "sslmode" in parsed.query:
        query = dict(parsed.query)
        parsed = parsed.set(query={"ssl": query.pop("sslmode"), **query})
    return parsed


def default_bind() -> str | URL:
    """Return the URL of the default database: `DURABLE_DATABASE_URL`, else the embedded server."""
    if url := os.environ.get("DURABLE_DATABASE_URL"):
        return url
    from ..embedded import server

    return server().url()
