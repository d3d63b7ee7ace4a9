"""Pages read on connections of their own, in read-only transactions, and never for long."""

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Connection

from durable_sa import Durable, InvalidState
from durable_sa.dashboard import reader
from tests.dashboard.support import serving
from tests.support import eventually


async def test_a_page_that_takes_too_long_says_so_and_shows_the_rest(durable: Durable) -> None:
    async with serving(durable) as (browser, app), durable.engine.connect() as other:
        app.reader.statement_timeout = 0.1
        await other.execute(text("LOCK TABLE durable.workers IN ACCESS EXCLUSIVE MODE"))
        data = await browser.data("/")
        assert data["late"] == ["queues", "workers", "schedules", "the last hour"]
        page = await browser.page("/workers")
        assert "took too long for: workers" in page
        assert page.rstrip().endswith("</html>")
        # What needs nothing of it is shown.
        data = await browser.data("/schedules")
        assert (data["late"], data["schedules"]) == ([], [])
        assert (await browser.data("/events"))["late"] == []
        assert (await browser.data("/doctor"))["ok"] is False
        await other.rollback()
        assert (await browser.data("/"))["late"] == []


async def test_sections_after_a_late_one_are_read(durable: Durable) -> None:
    async with serving(durable) as (_, app):
        app.reader.statement_timeout = 0.05
        async with app.reader.sections() as sections:
            assert await sections.read("slow", lambda one: one.execute(text("SELECT pg_sleep(5)")).all()) is None
            assert await sections.read("quick", lambda one: one.execute(text("SELECT 1")).scalar()) == 1
            assert await sections.read("slow too", lambda one: one.execute(text("SELECT pg_sleep(5)")).all()) is None
            # Enough is enough.
            assert await sections.read("left out", lambda one: one.execute(text("SELECT 1")).scalar()) is None
            assert sections.late == ["slow", "slow too", "left out"]


async def test_transactions_are_read_only(durable: Durable) -> None:
    async with serving(durable) as (_, app), app.reader.sections() as sections:
        with pytest.raises(InvalidState, match="read-only"):
            await sections.read("x", lambda one: one.execute(text("DELETE FROM durable.tasks")))
        shown = await sections.read("y", lambda one: one.execute(text("SHOW statement_timeout")).scalar())
        assert shown == "2s"


async def test_pages_take_few_connections_of_their_own(durable: Durable) -> None:
    async with serving(durable) as (browser, app):
        most, lent = 0, 0
        connections = app.reader._per_loop.get()
        assert connections.engine.sync_engine.pool is not durable.engine.sync_engine.pool

        def out(*_: Any) -> None:
            nonlocal most, lent
            lent += 1
            most = max(most, lent)

        def back(*_: Any) -> None:
            nonlocal lent
            lent -= 1

        event.listen(connections.engine.sync_engine, "checkout", out)
        event.listen(connections.engine.sync_engine, "checkin", back)
        paths = ["/", "/tasks", "/queues", "/workers", "/schedules", "/events"] * 4
        answers = await asyncio.gather(*(browser.get(path) for path in paths))
        assert {answer.status_code for answer in answers} == {200}
        assert (most, lent) == (reader.CONNECTIONS, 0)


async def test_a_page_that_gets_no_connection_says_so(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CONNECTION_TIMEOUT", 0.05)
    async with serving(durable) as (browser, app):
        free = app.reader._per_loop.get().free
        for _ in range(reader.CONNECTIONS):
            await free.acquire()
        began = time.monotonic()
        assert (await browser.data("/tasks"))["late"] == ["tasks"]
        assert time.monotonic() - began < 2
        for _ in range(reader.CONNECTIONS):
            free.release()
        assert (await browser.data("/tasks"))["late"] == []


async def test_a_connection_that_died_is_replaced(durable: Durable) -> None:
    async with serving(durable) as (browser, app):
        await browser.data("/tasks")
        async with app.reader.sections() as sections:
            pid = await sections.read("pid", lambda one: one.execute(text("SELECT pg_backend_pid()")).scalar())
        async with durable.engine.connect() as other:
            await other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        await asyncio.sleep(0.05)
        assert (await browser.data("/tasks"))["late"] == []


def counted(app: Any) -> list[str]:
    """The statements that are sent from now on, without those that begin a page's transaction."""
    sent: list[str] = []

    @event.listens_for(app.reader._per_loop.get().engine.sync_engine, "before_cursor_execute")
    def before(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        if "FROM durable." in statement:
            sent.append(statement)

    return sent


async def test_open_pages_share_what_they_refresh(durable: Durable) -> None:
    spawned = [await durable.spawn_by_name("x", unchecked=True) for _ in range(10)]
    async with serving(durable) as (browser, app):
        refresh = {"hx-request": "true"}
        sent = counted(app)
        answers = await asyncio.gather(*(browser.get("/", headers=refresh) for _ in range(50)))
        assert {answer.status_code for answer in answers} <= {200, 204}
        assert len(sent) <= 4
        sent.clear()
        # Pages that cannot share take turns; those whose turn it is not stay as they are.
        began = time.monotonic()
        answers = await asyncio.gather(
            *(browser.get(f"/tasks/{one.task_id}", headers=refresh) for one in spawned for _ in range(5))
        )
        assert {answer.status_code for answer in answers} <= {200, 204}
        # One page reads ten, and the next comes when they are made up for.
        assert len(sent) <= reader.REFRESHES_PER_SECOND * (1 + time.monotonic() - began) + reader.USUAL
        # Who loads a page gets it.
        assert (await browser.get("/")).status_code == 200
        assert (await browser.get(f"/tasks/{spawned[0].task_id}")).status_code == 200


async def test_a_page_that_is_loaded_shows_what_is_new(durable: Durable) -> None:
    async with serving(durable) as (browser, _):
        refresh = {"hx-request": "true", "accept": "application/json"}
        assert (await browser.get("/queues", headers=refresh)).json()["queues"][0]["paused_at"] is None
        await durable.pause_queue()
        assert (await browser.data("/queues"))["queues"][0]["paused_at"] is not None
        # And the others see it, too.
        assert (await browser.get("/queues", headers=refresh)).json()["queues"][0]["paused_at"] is not None


async def test_closing_the_client_closes_the_connections(durable: Durable) -> None:
    client = Durable(durable.engine)
    async with serving(client) as (browser, _):
        await browser.data("/tasks")
        await client.close()

        async def left() -> bool:
            async with durable.engine.connect() as one:
                rows = await one.execute(
                    text(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                        "AND query LIKE '%transaction_read_only%' AND pid <> pg_backend_pid()"
                    )
                )
                return rows.scalar() == 0

        await eventually(left)
        # It works on: a client can be used after it was closed.
        assert (await browser.data("/tasks"))["late"] == []
