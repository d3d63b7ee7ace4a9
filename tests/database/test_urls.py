"""URLs as platforms and libpq write them, with either driver."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine

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
        ("require_auth=scram-sha-256", "asyncpg has no require_auth=scram-sha-256"),
        ("sslnegotiation=direct", "asyncpg has no sslnegotiation=direct"),
        ("hostaddr=127.0.0.1", "asyncpg has no hostaddr=127.0.0.1"),
        ("sslrootcert=system", "asyncpg has no sslrootcert=system"),
        ("keepalives_idle=100000000", "the system refuses keepalives_idle=100000000"),
        ("keepalives_idle=100000000000", "the system refuses keepalives_idle=100000000000"),
    ],
)
def test_what_a_driver_cannot_do_is_refused(query: str, said: str) -> None:
    with pytest.raises(InvalidConfiguration, match=said):
        dial(resolve_url(f"postgresql://somewhere/shop?{query}"))


def test_defaults_of_libpq_are_left_out() -> None:
    found = dial(resolve_url("postgresql://somewhere/shop?sslsni=1&sslcompression=0&load_balance_hosts=disable"))
    assert (dict(found.url.query), found.connect_args) == ({}, {})


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_options_are_split_as_libpq_does(durable: Durable, database_url: URL, driver: str) -> None:
    url = with_query(database_url, driver, options=r"-c application_name=it's\ \"7\\8\" -c lock_timeout=4321")
    async with Durable(url) as client, client.engine.connect() as connection:
        names = ("application_name", "lock_timeout")
        shown = [(await connection.execute(sa.text(f"SHOW {name}"))).scalar() for name in names]
        assert shown == ['it\'s "7\\8"', "4321ms"]


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslcrl"])
async def test_certificates_are_read_from_their_files(database_url: URL, tmp_path: Path, name: str) -> None:
    query = {"sslmode": "verify-full" if name == "sslrootcert" else "require", name: str(tmp_path / "missing & gone")}
    found = dial(resolve_url(with_query(database_url, "asyncpg", **query)))
    engine = create_async_engine(found.url, connect_args=found.connect_args)
    with pytest.raises(FileNotFoundError):
        async with engine.connect():
            pass
    await engine.dispose()
