"""Wake-ups: LISTEN where it works, polling where it does not, and nothing that depends on either."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import pytest
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from durable_sa import Durable, InvalidConfiguration, RetryStrategy, Spawn, TaskContext, task
from durable_sa.database.connections import Database
from durable_sa.database.hint import Hint
from durable_sa.database.listener import Listener
from durable_sa.database.notifier import HintSender
from durable_sa.worker import claims
from durable_sa.worker.maintenance import do_batch

from ..support import eventually
from .conftest import Rows
from .stories import Parts, Story, assert_stories_ended_well, create_bookings, named

LISTENING = "SELECT pid FROM pg_stat_activity WHERE application_name = 'victim' AND query ILIKE 'LISTEN%'"


async def listener(sql: Rows, *, other_than: int = 0) -> int:
    """The backend of the worker that listens."""

    async def found() -> list[Any]:
        return [pid for (pid,) in await sql(LISTENING) if pid != other_than]

    return int((await eventually(found))[0])


async def latencies(sql: Rows) -> list[float]:
    """How long tasks waited for their first start."""
    rows = await sql(
        "SELECT extract(epoch FROM first_started_at - available_at)::float FROM durable.tasks"
        " WHERE task_name = 'quick' ORDER BY created_at"
    )
    return [late for (late,) in rows]


@pytest.fixture
async def quick(durable: Durable) -> Any:
    @durable.task
    async def quick(ctx: TaskContext) -> None:
        return None

    return quick


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("sender", ["client", "connection", "session", "emission"])
@pytest.mark.slow
async def test_an_idle_worker_is_woken_within_a_tenth_of_a_second(
    database_url: URL, engine: AsyncEngine, durable: Durable, quick: Any, sql: Rows, sender: str, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    victim = Durable(create_async_engine(url), tasks=[quick])

    @victim.task
    async def waiting(ctx: TaskContext, name: str) -> None:
        await ctx.await_event(name)
        await ctx.spawn("quick", quick)

    sync_engine = create_engine(database_url.set(drivername="postgresql+psycopg2"))
    # Far beyond what is measured, so that it is not a poll that finds them.
    async with victim.worker(poll_interval=10) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        for number in range(7):
            await asyncio.sleep(0.05)
            match sender:
                case "client":
                    await durable.spawn(quick)
                case "connection":
                    async with engine.begin() as connection:
                        await durable.spawn_with(connection, quick)
                case "session":
                    with Session(sync_engine) as session:
                        durable.spawn_with(session, quick)
                        session.commit()
                case "emission":
                    spawned = await durable.spawn(waiting, f"event-{number}")
                    await eventually(lambda: _sleeps(sql, spawned.task_id))  # noqa: B023 - awaited here
                    emitted = time.monotonic()
                    await durable.emit_event(f"event-{number}")
                    await durable.wait_for_result(spawned, timeout=3)
                    assert time.monotonic() - emitted < 1.0

        async def all_started() -> bool:
            rows = await sql("SELECT count(*) FROM durable.tasks WHERE task_name = 'quick' AND outcome IS NOT NULL")
            return rows == [(7,)]

        await eventually(all_started, within=5)
    sync_engine.dispose()
    await victim.engine.dispose()
    assert median(await latencies(sql)) < 0.1


async def _sleeps(sql: Rows, task_id: uuid.UUID) -> bool:
    return bool(await sql("SELECT 1 FROM durable.tasks WHERE task_id = :id AND state = 'sleeping'", id=task_id))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.slow
async def test_a_listen_connection_lost_before_it_was_checked_is_not_taken_for_a_pooler(
    database_url: URL, quick: Any, sql: Rows, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Listener._probe
    terminated: list[int] = []

    async def terminate_first(listener_: Listener, payload: str) -> None:
        if not terminated:
            terminated.append(await listener(sql))
            await sql("SELECT pg_terminate_backend(:pid)", pid=terminated[0])
        else:
            await probe(listener_, payload)

    monkeypatch.setattr(Listener, "_probe", terminate_first)
    async with named(database_url.set(drivername=f"postgresql+{driver}"), "victim") as victim:
        victim.register(quick)
        async with victim.worker(poll_interval=10) as worker:
            await eventually(lambda: worker._listener is not None and worker._listener.working)
            assert await listener(sql) not in terminated


@pytest.mark.slow
async def test_a_lost_listen_connection_is_replaced_each_time(
    database_url: URL, durable: Durable, quick: Any, sql: Rows
) -> None:
    async with named(database_url, "victim") as victim:
        victim.register(quick)
        async with victim.worker(poll_interval=10) as worker:
            pid = await listener(sql)
            for _ in range(4):
                await sql("SELECT pg_terminate_backend(:pid)", pid=pid)
                lost = time.monotonic()
                pid = await listener(sql, other_than=pid)
                await eventually(lambda: worker._listener is not None and worker._listener.working)
                assert time.monotonic() - lost < 3.0
                spawned = await durable.spawn(quick)
                await durable.wait_for_result(spawned, timeout=2)


@pytest.mark.slow
async def test_a_listener_tries_again_however_often_it_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of some hours is more than a thousand tries."""
    tries = 0

    async def refuse(*_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0)
        raise OSError

    monkeypatch.setattr("durable_sa.database.listener.LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(AsyncConnection, "start", refuse)
    listener = Listener(Database("postgresql+asyncpg://u:p@127.0.0.1:1/d"), None, lambda _: None)
    listening = asyncio.create_task(listener.run())
    await eventually(lambda: tries > 1200 or listening.done())
    assert not listening.done()
    listening.cancel()
    await asyncio.wait([listening])


@pytest.mark.slow
async def test_polling_begins_as_soon_as_listen_is_lost(
    database_url: URL, durable: Durable, quick: Any, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with named(database_url, "victim") as victim:
        victim.register(quick)
        async with victim.worker(poll_interval=0.1) as worker:
            pid = await listener(sql)
            await eventually(lambda: worker._listener is not None and worker._listener.working)

            async def never(*_: Any) -> None:
                await asyncio.sleep(60)

            monkeypatch.setattr(worker._listener, "_listen", never)
            await sql("SELECT pg_terminate_backend(:pid)", pid=pid)
            await eventually(lambda: not worker._listener or not worker._listener.working)
            for _ in range(3):
                await durable.wait_for_result(await durable.spawn(quick), timeout=1)


@pytest.mark.slow
async def test_hints_that_are_lost_cost_a_poll_interval(
    durable: Durable, quick: Any, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.claims.LISTENING_POLL_INTERVAL", 0.5)
    monkeypatch.setattr(HintSender, "send", lambda *_: None)
    async with durable.worker() as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        for _ in range(3):
            await durable.wait_for_result(await durable.spawn(quick), timeout=3)
    assert max(await latencies(sql)) < 1.5


@pytest.mark.slow
async def test_a_hint_of_more_lanes_than_it_can_name_still_finds_them_all(durable: Durable, quick: Any) -> None:
    priorities = range(-1000, 1000, 3)
    assert len(Hint({("default", priority): _now() for priority in priorities}).encode()) < 8000
    async with durable.worker(concurrency=50) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        other = Durable(durable.engine)
        spawned = await other.spawn_many([Spawn(quick, priority=priority) for priority in priorities])
        for spawn in spawned:
            await durable.wait_for_result(spawn, timeout=10)


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


@pytest.mark.slow
@pytest.mark.parametrize(
    "payload",
    [
        "",
        "garbage",
        "null",
        "[]",
        "[[],0,0]",
        '[[["default",0]],0,0,0]',
        '[[["default","x",1]],0,0,0]',
        '[[["default",0,1e300]],1,1,1]',
        '[[["default",0,-9000000000000000000]],1,1,1]',
        "[[[null,99999999,null]],0,0,0]",
        '[{"a":1},1,1,1]',
        "[" * 3000,
        '[[["default",123456,0]],0,0,0]',
        '[[["other",0,0]],0,0,0]',
        "\N{SNOWMAN}" * 1000,
    ],
)
async def test_whatever_is_sent_to_the_channel_the_worker_goes_on(
    durable: Durable, quick: Any, sql: Rows, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.worker.claims.LISTENING_POLL_INTERVAL", 600)
    async with durable.worker(poll_interval=10) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        for _ in range(3):
            await sql("SELECT pg_notify('durable', :payload)", payload=payload)
        await asyncio.sleep(0.05)
        await durable.wait_for_result(await durable.spawn(quick), timeout=20)
        await durable.wait_for_result(await durable.spawn(quick), timeout=20)
        assert worker._listener is not None
        assert worker._listener.working
        assert not [service for service in worker._background.services.values() if service.done()]


@pytest.mark.slow
async def test_a_flood_of_notifications_does_not_drown_the_worker(durable: Durable, quick: Any, sql: Rows) -> None:
    async with durable.worker() as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        flood = "SELECT pg_notify('durable', json_build_array(null, 1, 1, 1, number)::text)"
        await sql(f"{flood} FROM generate_series(1, 10000) AS number")
        hint = Hint({("default", number): _now() for number in range(50)}).encode()
        await sql("SELECT pg_notify('durable', :hint || repeat(' ', n)) FROM generate_series(1, 500) AS n", hint=hint)
        await durable.wait_for_result(await durable.spawn(quick), timeout=5)


@pytest.mark.slow
async def test_a_task_that_wakes_while_its_worker_is_full_is_taken_by_another_in_time(
    durable: Durable, engine: AsyncEngine, sql: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short enough for the other worker to know the task before it wakes, too long to find it by polling in time.
    monkeypatch.setattr(claims, "LISTENING_POLL_INTERVAL", 1.5)
    release = asyncio.Event()
    idle = Durable(engine)

    @durable.task
    async def nap(ctx: TaskContext) -> None:
        await ctx.sleep_for("nap", 3.0)

    @durable.task
    async def hold(ctx: TaskContext) -> None:
        await release.wait()

    async with durable.worker(concurrency=1) as full, idle.worker(poll_interval=10) as other:
        for worker in (full, other):
            await eventually(lambda: worker._listener is not None and worker._listener.working)  # noqa: B023
        naps, holds = await durable.spawn_many([Spawn(nap), Spawn(hold, priority=1)])
        await eventually(lambda: _is(sql, "hold", "running"))
        await eventually(lambda: _is(sql, "nap", "sleeping"))
        # From now on both might run it, but the one that it was put to sleep by has something else to do.
        idle.register(nap)
        await durable.wait_for_result(naps, timeout=12)
        release.set()
        await durable.wait_for_result(holds, timeout=5)
    ((late,),) = await sql(
        "SELECT extract(epoch FROM finished_at - available_at)::float FROM durable.tasks WHERE task_name = 'nap'"
    )
    assert late < 1.0


async def _is(sql: Rows, task_name: str, state: str) -> bool:
    return await sql("SELECT state FROM durable.tasks WHERE task_name = :name", name=task_name) == [(state,)]


@pytest.mark.slow
async def test_a_retry_is_made_in_time(durable: Durable, sql: Rows) -> None:
    @durable.task(max_attempts=2, retry_strategy=RetryStrategy.fixed(0.3))
    async def second_time_lucky(ctx: TaskContext) -> int:
        if ctx.attempt == 1:
            raise ValueError
        return ctx.attempt

    async with durable.worker(concurrency=1) as worker:
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        for _ in range(3):
            spawned = await durable.spawn(second_time_lucky)
            assert (await durable.wait_for_result(spawned, timeout=2)).output == 2
    late = await sql(
        "SELECT extract(epoch FROM b.started_at - a.finished_at)::float - 0.3 FROM durable.runs a"
        " JOIN durable.runs b ON a.task_id = b.task_id AND a.attempt = 1 AND b.attempt = 2"
    )
    assert len(late) == 3
    assert all(0 <= seconds < 0.3 for (seconds,) in late), late


class PgBouncer:
    """A pooler in transaction mode in front of a server."""

    PROGRAM = "/usr/sbin/pgbouncer"

    def __init__(self, url: URL) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = URL.create("postgresql+asyncpg", "postgres", None, "127.0.0.1", self.port, url.database)
        self._directory = Path(tempfile.mkdtemp(prefix="durable-pgbouncer-", dir="/tmp"))
        host = str(url.query.get("host") or url.host)
        target = {"host": host, "port": url.query.get("port") or url.port or 5432, "user": url.username}
        if url.password:
            target["password"] = url.password
        (self._directory / "pgbouncer.ini").write_text(
            f"""
            [databases]
            * = {" ".join(f"{key}={value}" for key, value in target.items())}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = any
            pool_mode = transaction
            default_pool_size = 3
            max_client_conn = 100
            ignore_startup_parameters = extra_float_digits
            """.replace("\n            ", "\n")
        )
        # It refuses to run as root, and has to reach the server's socket.
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = Path(host).stat().st_uid if host.startswith("/") else 65534
            self._user = {"user": owner, "group": owner, "extra_groups": ()}
            os.chown(self._directory, owner, owner)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.PROGRAM, str(self._directory / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **self._user,
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._directory / "log").read_text()
                assert time.monotonic() < deadline, (self._directory / "log").read_text()
                time.sleep(0.02)

    def restart(self, **settings: str) -> None:
        """With other settings."""
        self.stop()
        with (self._directory / "pgbouncer.ini").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        self.start()

    async def command(self, command: str) -> None:
        """On its console, which knows the simple protocol only."""
        connection = await asyncpg.connect(
            host="127.0.0.1", port=self.port, user="postgres", database="pgbouncer", statement_cache_size=0
        )
        try:
            await connection.execute(command)
        finally:
            connection.terminate()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._directory)


@pytest.fixture
def bouncer(database_url: URL) -> Generator[PgBouncer]:
    if not Path(PgBouncer.PROGRAM).exists():
        pytest.skip("pgbouncer is not installed")
    bouncer = PgBouncer(database_url)
    try:
        bouncer.start()
        yield bouncer
    finally:
        bouncer.remove()


def pooled_engine(bouncer: PgBouncer, driver: str) -> AsyncEngine:
    """As the documentation of the drivers says for poolers in transaction mode."""
    url = bouncer.url.set(drivername=f"postgresql+{driver}")
    if driver == "psycopg":
        return create_async_engine(url, connect_args={"prepare_threshold": None})
    arguments = {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
    }
    return create_async_engine(url, connect_args=arguments)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.slow
async def test_everything_works_through_a_pooler_in_transaction_mode_and_listen_is_replaced_by_polling(
    engine: AsyncEngine,
    durable: Durable,
    sql: Rows,
    bouncer: PgBouncer,
    driver: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("durable_sa.database.listener.ARRIVAL_DEADLINE", 0.5)
    await create_bookings(engine)
    caplog.set_level(logging.WARNING, "durable_sa")
    pooled = pooled_engine(bouncer, driver)
    async with Durable(pooled) as first, Durable(pooled) as second:
        stories = [Story(client) for client in (first, second)]
        async with first.worker(concurrency=10, poll_interval=0.1) as worker, second.worker(poll_interval=0.1):
            spawned = [await first.spawn(stories[0].task, Parts()) for _ in range(20)]
            for spawn in spawned:
                assert (await first.wait_for_result(spawn, timeout=20)).output == 3
            await eventually(lambda: len(_warnings(caplog)) == 2)
            assert worker._listener is not None
            assert not worker._listener.working
            began = time.monotonic()
            spawned.append(await first.spawn(stories[0].task, Parts(steps=1, sleep=0)))
            await first.wait_for_result(spawned[-1], timeout=5)
            assert time.monotonic() - began < 3.0
    await pooled.dispose()
    await assert_stories_ended_well(sql, spawned)
    # One line a worker, and not a word of anything else.
    said = _warnings(caplog)
    assert len(said) == 2
    assert all("LISTEN has no effect" in message and "listen_url" in message for message in said), said


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "durable_sa"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.slow
async def test_a_url_that_leads_around_the_pooler_is_used_to_listen(
    database_url: URL, durable: Durable, quick: Any, bouncer: PgBouncer, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "durable_sa")
    pooled = pooled_engine(bouncer, driver)
    direct = database_url.set(drivername=f"postgresql+{driver}")
    async with (
        Durable(pooled, tasks=[quick]) as victim,
        Durable(pooled) as other,
        # Far beyond what is waited for, so that it is not a poll that finds them.
        victim.worker(poll_interval=30, listen_url=direct) as worker,
    ):
        await eventually(lambda: worker._listener is not None and worker._listener.working)
        for _ in range(5):
            # Hints are sent through the pooler, and none of them gets lost there.
            await other.wait_for_result(await other.spawn(quick), timeout=2)
    await pooled.dispose()
    assert _warnings(caplog) == []


@pytest.mark.slow
async def test_a_url_that_leads_elsewhere_is_noticed(
    database_url: URL,
    durable: Durable,
    quick: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("durable_sa.database.listener.ARRIVAL_DEADLINE", 0.3)
    elsewhere = database_url.set(database="postgres").render_as_string(hide_password=False)
    async with durable.worker(listen_url=elsewhere, poll_interval=0.05):
        await eventually(lambda: _warnings(caplog))
        await durable.wait_for_result(await durable.spawn(quick), timeout=2)
    (message,) = _warnings(caplog)
    assert "another database" in message


async def test_a_url_to_listen_that_cannot_be_is_refused(durable: Durable) -> None:
    with pytest.raises(InvalidConfiguration, match="listen_url"):
        await durable.start_worker(listen_url="mysql://localhost/other")


async def test_statements_that_the_driver_keeps_behind_a_pooler_are_explained(
    durable: Durable, quick: Any, bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
) -> None:
    unprepared = create_async_engine(bouncer.url)
    async with Durable(unprepared) as victim:
        for _ in range(20):
            if _warnings(caplog):
                break
            with contextlib.suppress(DBAPIError):
                await asyncio.gather(
                    *(victim.spawn(quick) for _ in range(5)), *(victim.list_queues() for _ in range(5))
                )
    await unprepared.dispose()
    (message,) = _warnings(caplog)
    assert "statement_cache_size=0" in message


async def test_a_pooler_in_statement_mode_is_refused(durable: Durable, bouncer: PgBouncer) -> None:
    await asyncio.to_thread(bouncer.restart, pool_mode="statement")
    pooled = pooled_engine(bouncer, "asyncpg")
    async with Durable(pooled) as victim:
        with pytest.raises(InvalidConfiguration, match="pool_mode"):
            await victim.start_worker()
    await pooled.dispose()


@pytest.mark.slow
async def test_a_restart_of_the_pooler_fails_no_task(
    engine: AsyncEngine, durable: Durable, sql: Rows, bouncer: PgBouncer
) -> None:
    await create_bookings(engine)
    pooled = pooled_engine(bouncer, "asyncpg")
    async with Durable(pooled) as victim:
        story = Story(victim)
        async with victim.worker(concurrency=10, poll_interval=0.1):
            spawned = await durable.spawn_many([(story.task, Parts(steps=20, pause=0.02))] * 10)
            await eventually(lambda: len(story.executed) > 40)
            await asyncio.to_thread(bouncer.stop)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(bouncer.start)
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=20)).output == sum(range(20))
    await pooled.dispose()
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]


@pytest.mark.slow
async def test_what_operators_do_to_a_pooler_fails_no_task(
    engine: AsyncEngine, durable: Durable, sql: Rows, bouncer: PgBouncer, database_url: URL
) -> None:
    """Its connections live for a second, and it sends away who waits for one for longer than that."""
    bouncer.restart(server_lifetime="1", query_wait_timeout="1", server_login_retry="1", admin_users="postgres")
    await create_bookings(engine)
    pooled = pooled_engine(bouncer, "asyncpg")
    async with Durable(pooled) as victim:
        story = Story(victim)
        async with victim.worker(concurrency=10, poll_interval=0.1):
            spawned = await durable.spawn_many([(story.task, Parts(steps=40, pause=0.1))] * 10)
            await eventually(lambda: len(story.executed) > 40)
            await bouncer.command("RELOAD")
            await bouncer.command("PAUSE")
            await asyncio.sleep(2.0)
            await bouncer.command("RESUME")
            executed = len(story.executed)
            await eventually(lambda: len(story.executed) > executed + 20, within=10)
            await bouncer.command(f"KILL {database_url.database}")
            await asyncio.sleep(0.5)
            await bouncer.command(f"RESUME {database_url.database}")
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=30)).output == sum(range(40))
    await pooled.dispose()
    await assert_stories_ended_well(sql, spawned)
    assert await sql("SELECT DISTINCT attempt, lease_losses FROM durable.tasks") == [(1, 0)]


async def test_a_worker_beside_the_client_hears_of_a_spawn_directly(durable: Durable, quick: Any) -> None:
    async with durable.worker(listen=False, poll_interval=30.0) as worker:
        for _ in range(3):
            await eventually(lambda: not worker._agenda.claim.is_set())
            await durable.wait_for_result(await durable.spawn(quick), timeout=5)


@pytest.mark.slow
async def test_others_hear_of_children_that_their_parents_worker_has_no_slots_for(
    durable: Durable, engine: AsyncEngine
) -> None:
    runners: set[str] = set()

    @task
    async def child(ctx: TaskContext) -> None:
        runners.add(ctx.state)
        await eventually(lambda: len(runners) == 2, within=3.0)

    @task
    async def parent(ctx: TaskContext) -> None:
        for number in range(30):
            await ctx.spawn(f"child-{number}", child)

    async with (
        Durable(engine, state="first", tasks=[parent, child]) as first,
        Durable(engine, state="second", tasks=[child]) as second,
        second.worker(concurrency=20) as idle,
        first.worker(concurrency=20),
    ):
        await eventually(lambda: idle._listener is not None and idle._listener.working)
        await durable.spawn_by_name("parent", unchecked=True)
        await eventually(lambda: len(runners) == 2, within=3.0)


async def test_what_is_listed_during_its_own_batch_is_done_once_more() -> None:
    receiver, other = uuid.uuid4(), uuid.uuid4()
    listed, done = {receiver, other}, list[list[uuid.UUID]]()

    async def work(batch: list[uuid.UUID]) -> None:
        done.append(batch)
        if len(done) == 2:
            raise ConnectionError
        listed.add(receiver)

    await do_batch(listed, work)
    assert listed == {receiver}
    with pytest.raises(ConnectionError):
        await do_batch(listed, work)
    assert listed == {receiver}
    assert done == [sorted([receiver, other]), [receiver]]
