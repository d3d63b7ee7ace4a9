"""URLs as platforms and libpq write them, with either driver."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL

from durable_sa import Durable, TaskContext, task
from durable_sa.database import private
from durable_sa.database.closing import driver_of
from durable_sa.database.urls import dial, resolve_url
from durable_sa.errors import InvalidConfiguration

from ..verification.proxy import Proxy

PARAMETERS = {
    "application_name": "shop",
    "options": "-c statement_timeout=54321 --lock-timeout=4321",
    "connect_timeout": "7",
    "keepalives": "1",
    "keepalives_idle": "33",
    "keepalives_interval": "11",
    "keepalives_count": "3",
    "client_encoding": "utf8",
    "sslmode": "prefer",
    "target_session_attrs": "read-write",
}


@task
async def noop(ctx: TaskContext) -> int:
    return 7


def with_query(url: URL, driver: str, **query: str) -> URL:
    return url.set(drivername=f"postgresql+{driver}").update_query_dict(query)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_parameters_of_libpq(durable: Durable, database_url: URL, driver: str) -> None:
    host = database_url.host or str(database_url.query["host"])
    async with Proxy(host, int(str(database_url.query.get("port", database_url.port or 5432)))) as proxy:
        url = database_url.set(host="127.0.0.1", port=proxy.port, query={})
        async with Durable(with_query(url, driver, **PARAMETERS), tasks=[noop]) as client:
            async with client.worker():
                spawned = await client.spawn(noop)
                assert (await client.wait_for_result(spawned, timeout=10)).output == 7
            async with client.engine.connect() as connection:
                names = ("application_name", "statement_timeout", "lock_timeout")
                shown = [(await connection.execute(sa.text(f"SHOW {name}"))).scalar() for name in names]
                assert shown == ["shop", "54321ms", "4321ms"]
                driver_connection: Any = driver_of(connection)
                if driver == "asyncpg":
                    sock = private.transport_of(driver_connection).get_extra_info("socket")
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 33
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


def test_the_pooler_is_a_parameter() -> None:
    found = dial(resolve_url("postgres://somewhere/shop?pooler=transaction"))
    assert (found.connect_args["statement_cache_size"], found.connect_args["prepared_statement_cache_size"]) == (0, 0)
    name = found.connect_args["prepared_statement_name_func"]
    assert name() != name()
    found = dial(resolve_url("postgresql+psycopg://somewhere/shop?pooler=transaction"))
    assert found.connect_args == {"prepare_threshold": None}
    assert dict(found.url.query) == {}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_client_works_with_it(durable: Durable, database_url: URL, driver: str) -> None:
    url = with_query(database_url, driver, pooler="transaction")
    async with Durable(url, tasks=[noop]) as client, client.worker():
        spawned = await client.spawn(noop)
        assert (await client.wait_for_result(spawned, timeout=10)).output == 7


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("pooler=statement", "pooler=statement is neither transaction nor session"),
        ("client_encoding=latin1", "asyncpg speaks UTF-8, not client_encoding=latin1"),
        ("channel_binding=require", "asyncpg has no channel_binding"),
        ("connect_timeout=soon", "connect_timeout=soon is not a number"),
        ("options=-x", "options has '-x'"),
    ],
)
def test_what_a_driver_cannot_do_is_refused(query: str, said: str) -> None:
    with pytest.raises(InvalidConfiguration, match=said):
        dial(resolve_url(f"postgresql://somewhere/shop?{query}"))
