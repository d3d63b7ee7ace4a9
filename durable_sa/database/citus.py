"""Citus: a client warns once that it sees the extension, and asyncpg connects without a setting that slows it down."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine

from ..database_errors import sqlstate

logger = logging.getLogger("durable_sa")

INSTALLED = "EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'citus')"
"""An SQL expression: True if the database has the extension."""

_GUIDE = "docs/guides/scaling.md"
_SETTING = "citus.override_table_visibility"
_PROTOCOL_VIOLATION = "08P01"

_seen: weakref.WeakKeyDictionary[Dialect, bool] = weakref.WeakKeyDictionary()
"""Dialects of engines whose database has the extension. True if its connections may set `_SETTING`."""


def notice(dialect: Dialect) -> None:
    """Note that the database of an engine has the extension, and warn the first time."""
    if dialect not in _seen:
        _seen[dialect] = True
        logger.warning(
            "the database has the extension Citus; durable's tables have to stay ordinary tables, and not every "
            "transaction over several nodes is atomic: see the guide 'When one server is not enough' (%s)",
            _GUIDE,
        )


def connect_faster(engine: Engine) -> None:
    """Have an engine of asyncpg set `_SETTING` on its connections, once the extension was seen.

    asyncpg looks up types in the catalog when it connects. Citus hides its shards there, which takes 270 ms.
    """
    if engine.dialect.driver == "asyncpg":
        event.listen(engine, "do_connect", _connect)


def _connect(dialect: Dialect, _: object, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    if not _seen.get(dialect, False):
        return None
    settings = {_SETTING: "off", **options.get("server_settings", {})}
    try:
        return dialect.connect(*arguments, **{**options, "server_settings": settings})
    except Exception as error:
        if sqlstate(error) != _PROTOCOL_VIOLATION:
            raise
        # PgBouncer refuses parameters that it does not know.
        _seen[dialect] = False
        return None
