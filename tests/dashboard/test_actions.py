"""Actions go through the client, are logged, and are passed to the application's hooks."""

import logging
import uuid
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
from sqlalchemy import text, update

from durable_sa import Durable, Hooks, Limit, TaskContext, TaskFilter, TaskRow, task
from durable_sa.dashboard import Access, actions
from tests.dashboard.support import EVERYTHING, serving


class Audit(Hooks):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, list[uuid.UUID]]] = []

    def on_admin_action(self, user: str, action: str, task_ids: Sequence[uuid.UUID]) -> None:
        self.seen.append((user, action, list(task_ids)))
        if action == "emit":
            raise ZeroDivisionError


@task("noted")
async def noted(ctx: TaskContext) -> None:
    pass


@pytest.fixture
def audit() -> Audit:
    return Audit()


@pytest.fixture
async def durable(engine: Any, audit: Audit) -> Any:
    async with Durable(engine, hooks=[audit], tasks=[noted]) as durable:
        yield durable


async def end(durable: Durable, outcome: str, *where: Any) -> None:
    async with durable.engine.begin() as connection:
        values = {"state": outcome, "outcome": outcome, "finished_at": TaskRow.created_at}
        await connection.execute(update(TaskRow).where(*where).values(values))


async def test_each_action_is_done_logged_and_passed_on(
    durable: Durable, audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    task_id = spawned.task_id
    await durable.create_schedule("nightly", task=noted, cron_expression="0 3 * * *")
    named = {"name": "nightly", "queue_name": "default"}
    async with serving(durable) as (browser, _):

        async def act(path: str, **fields: Any) -> Any:
            answer = await browser.act(path, **fields)
            assert answer.status_code == 200, answer.text
            return answer.json()

        assert await act("/tasks/cancel", task_id=str(task_id)) == {
            "message": "Cancelled 1 task.",
            "done": 1,
            "skipped": 0,
            "complete": True,
            "task_ids": [str(task_id)],
        }
        assert (await durable.get_task(task_id)).status == "cancelled"
        assert (await act("/tasks/cancel", task_id=str(task_id)))["message"] == "Cancelled 0 tasks; 1 could not be."
        await act("/tasks/retry", task_id=str(task_id))
        assert (await durable.get_task(task_id)).status == "pending"
        await act("/queues/pause", queue_name="default")
        assert (await durable.queue_statistics("default"))[0].paused
        await act("/queues/resume", queue_name="default")
        assert not (await durable.queue_statistics("default"))[0].paused
        (triggered,) = (await act("/schedules/trigger", **named))["task_ids"]
        assert (await durable.get_task(uuid.UUID(triggered))).task_name == "noted"
        await act("/schedules/pause", **named)
        assert (await browser.data("/schedules"))["schedules"][0]["next_tick_at"] is None
        await act("/schedules/resume", **named)
        assert (await browser.data("/schedules"))["schedules"][0]["next_tick_at"] is not None
        await act("/schedules/delete", **named)
        assert await durable.list_schedules() == []
        assert (await act("/events/emit", name="paid", queue_name="default", payload='{"n": 1}'))["done"] == 1
        assert (await act("/events/emit", name="paid", queue_name="default"))["done"] == 0
        paid = "/events?name=paid&queue_name=default"
        assert (await browser.data(paid))["event"]["payload"] == {"n": 1}
        assert "/events/replace" in await browser.page(paid)
        assert await act("/events/replace", name="paid", queue_name="default", payload='{"n": 2}') == {
            "message": "Replaced the payload of event 'paid'.",
            "done": 1,
            "skipped": 0,
            "complete": True,
            "task_ids": [],
        }
        assert (await browser.data(paid))["event"]["payload"] == {"n": 2}
        for status, fields in ((400, {}), (400, {"payload": "{"}), (409, {"name": "unknown", "payload": "1"})):
            wrong = await browser.act("/events/replace", **{"name": "paid", "queue_name": "default", **fields})
            assert wrong.status_code == status, wrong.text
        assert (await browser.data(paid))["event"]["payload"] == {"n": 2}
        await end(durable, "failed", TaskRow.task_id == task_id)
        await act("/tasks/delete", task_id=str(task_id))
        await browser.data(f"/tasks/{task_id}", 404)
    assert audit.seen == [
        ("ada", "cancel", [task_id]),
        ("ada", "cancel", []),
        ("ada", "retry", [task_id]),
        ("ada", "pause", []),
        ("ada", "pause", []),
        ("ada", "trigger", [uuid.UUID(triggered)]),
        ("ada", "pause", []),
        ("ada", "pause", []),
        ("ada", "delete", []),
        ("ada", "emit", []),
        ("ada", "emit", []),
        ("ada", "emit", []),
        ("ada", "delete", [task_id]),
    ]
    logged = [record.getMessage() for record in caplog.records if record.getMessage().startswith("dashboard: ")]
    assert len(logged) == len(audit.seen)
    assert logged[0] == f"dashboard: 'ada' did tasks/cancel on {task_id}"
    assert logged[3] == "dashboard: 'ada' did queues/pause on 'default'"
    # A hook that fails takes nothing back.
    assert "on_admin_action failed for emit of 'ada'" in caplog.text


async def test_limits_are_set_and_keys_closed_and_opened(
    durable: Durable, audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(durable) as (browser, _):

        async def act(path: str, status: int = 200, **fields: Any) -> str:
            answer = await browser.act(path, **{"queue_name": "default", **fields})
            assert answer.status_code == status, answer.text
            return str(answer.json().get("message"))

        async def states() -> list[tuple[str, str]]:
            return [(key["limit_key"], key["state"]) for key in (await browser.data("/queues/default"))["limit_keys"]]

        async def policy(key: str) -> tuple[int | None, int | None]:
            (found,) = [row for row in (await browser.data("/queues/default"))["limits"] if row["limit_key"] == key]
            return found["concurrency"], found["weight"]

        assert (await browser.data("/limits"))["queues"] == []
        assert await states() == []
        assert (
            await act("/limits/set", concurrency="5", rate="60/1min", burst="10", key="ignored")
            == "Set the limit of queue 'default'."
        )
        await act("/limits/set", scope="per_key", concurrency="2", hold="task")
        await act("/limits/set", scope="key", key="acme", rate="5/10")
        (queue,) = (await browser.data("/limits"))["queues"]
        assert [
            (row["scope"], row["limit_key"], row["concurrency"], row["rate_count"], row["rate_seconds"], row["hold"])
            for row in queue["policies"]
        ] == [
            ("queue", "", 5, 60, 60.0, "run"),
            ("per_key", "", 2, None, None, "task"),
            ("key", "acme", None, 5, 10.0, "run"),
        ]
        assert "60 in 1" in await browser.page("/queues/default")
        assert "limited" in await browser.page("/")
        await act("/limits/close", key="acme", **{"for": "10min"})
        assert await states() == [("acme", "closed")]
        assert (await durable.list_limit_keys("default"))[0].state == "closed"
        assert (await browser.data("/limits"))["queues"][0]["keys"]["closed"] == 1
        assert (await browser.data("/queues/default?limit_state=full"))["limit_keys"] == []
        await browser.data("/queues/default?limit_state=x", 400)
        await act("/limits/open", key="acme")
        assert await states() == [("acme", "open")]
        assert await act("/limits/set", scope="key", key="acme", concurrency="7", weight="3") == (
            "Set the limit and the weight of key 'acme' of queue 'default'."
        )
        assert await policy("acme") == (7, 3)
        assert await act("/limits/set", scope="key", key="acme", weight="4") == (
            "Set the weight of key 'acme' of queue 'default', which has the limit of each key."
        )
        assert await policy("acme") == (None, 4)
        assert "weight 4" in await browser.page("/limits")
        assert "7 at once" not in await browser.page("/limits")
        assert await act("/limits/set", scope="key", key="acme", clear="1") == (
            "Removed the limit of key 'acme' of queue 'default'."
        )
        assert await policy("acme") == (None, 4)
        async with durable.engine.begin() as connection:
            await connection.execute(text("DELETE FROM durable.limits WHERE scope = 'key'"))
        await act("/limits/set", scope="per_key", clear="1")
        await act("/limits/set", clear="1")
        assert (await browser.data("/limits"))["queues"][0]["policies"] == []
        for path, fields in (
            ("/limits/set", {}),
            ("/limits/set", {"scope": "all", "concurrency": "1"}),
            ("/limits/set", {"scope": "key", "concurrency": "1"}),
            ("/limits/set", {"concurrency": "x"}),
            ("/limits/set", {"rate": "5"}),
            ("/limits/set", {"weight": "3"}),
            ("/limits/set", {"scope": "per_key", "concurrency": "1", "weight": "3"}),
            ("/limits/set", {"scope": "key", "key": "acme", "weight": "0"}),
            ("/limits/set", {"scope": "key", "key": "acme", "weight": "x"}),
            ("/limits/set", {"rate": "5/x"}),
            ("/limits/set", {"concurrency": "1", "hold": "x"}),
            ("/limits/close", {"key": "acme", "for": "x"}),
            ("/limits/close", {"key": "acme", "for": "999999999w"}),
            ("/limits/close", {"for": "1h"}),
        ):
            await act(path, 400, **fields)
    assert audit.seen == [("ada", "limit", [])] * 10
    logged = [record.getMessage() for record in caplog.records if record.getMessage().startswith("dashboard: ")]
    assert len(logged) == 10
    assert logged[0] == "dashboard: 'ada' did limits/set on 'default'"
    assert logged[3] == "dashboard: 'ada' did limits/close on key 'acme' of 'default'"


async def test_a_page_returns_with_a_sentence_once(durable: Durable) -> None:
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    async with serving(durable) as (browser, _):
        answer = await browser.act("/tasks/cancel", headers={"accept": "text/html"}, task_id=str(spawned.task_id))
        assert (answer.status_code, answer.headers["location"]) == (303, f"/tasks/{spawned.task_id}")
        assert "Cancelled 1 task." in await browser.page(answer.headers["location"])
        assert "Cancelled 1 task." not in await browser.page(answer.headers["location"])


async def test_an_action_on_all_that_match_counts_first(durable: Durable, audit: Audit) -> None:
    for number in range(5):
        await durable.spawn_by_name("mine" if number < 4 else "other", unchecked=True)
    await end(durable, "failed", TaskRow.task_name == "mine")
    async with serving(durable) as (browser, _):
        counted = await browser.data("/tasks/all?action=retry&task_name=mine")
        assert (counted["matched"], counted["more"]) == (4, False)
        assert "<b>4</b> tasks would be retried" in await browser.page("/tasks/all?action=retry&task_name=mine")
        assert (await browser.data("/tasks/all?action=cancel&task_name=mine"))["matched"] == 0
        assert (await browser.data("/tasks/all?action=cancel&task_name=mine&state=failed"))["matched"] == 0
        assert (await browser.data("/tasks/all?action=delete"))["matched"] == 4
        answer = await browser.act("/tasks/all/retry", task_name="mine", until=counted["until"])
        assert answer.json()["done"] == 4
    assert [(action, len(ids)) for _, action, ids in audit.seen] == [("retry", 4)]
    assert len((await durable.list_tasks(TaskFilter(state="pending"))).items) == 5


async def test_what_fails_once_more_is_not_retried_without_an_end(durable: Durable) -> None:
    await durable.spawn_by_name("mine", unchecked=True)
    await end(durable, "failed")
    async with serving(durable) as (browser, _):
        until = (await browser.data("/tasks/all?action=retry"))["until"]
        async with durable.engine.begin() as connection:
            await connection.execute(text("UPDATE durable.tasks SET finished_at = now() + interval '1 s'"))
        assert (await browser.act("/tasks/all/retry", until=until)).json()["done"] == 0
        assert (await browser.act("/tasks/all/retry")).status_code == 400


async def test_an_action_on_many_goes_on_where_it_stopped(durable: Durable, audit: Audit) -> None:
    await durable.spawn_many([(noted, None)] * 1200)
    with mock.patch.object(actions, "SLICE", 0.0):
        async with serving(durable) as (browser, _):
            until = (await browser.data("/tasks/all?action=cancel"))["until"]
            answer = await browser.act("/tasks/all/cancel", headers={"accept": "text/html"}, until=until)
            assert answer.status_code == 200
            assert "<b>500</b> tasks so far" in answer.text
            assert "data-continue" in answer.text
            answer = await browser.act("/tasks/all/cancel", until=until)
            assert (answer.json()["done"], answer.json()["complete"]) == (500, False)
            answer = await browser.act("/tasks/all/cancel", until=until)
            assert answer.json()["done"] == 200
            answer = await browser.act("/tasks/all/cancel", headers={"accept": "text/html"}, until=until, done="1200")
            assert answer.status_code == 303
            assert "Cancelled 0 tasks. 1,200 before that." in await browser.page(answer.headers["location"])
    assert sum(len(ids) for _, _, ids in audit.seen) == 1200


async def test_an_action_on_many_that_fails_reports_what_it_has_done(
    durable: Durable, audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    spawned = await durable.spawn_many([(noted, None)] * 600)
    last = max(one.task_id for one in spawned)
    async with durable.engine.begin() as connection:
        await connection.execute(
            text(
                "CREATE FUNCTION durable.refuse() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN IF NEW.task_id = '{last}' THEN RAISE 'disk full'; END IF; RETURN NEW; END $$"
            )
        )
        await connection.execute(
            text("CREATE TRIGGER refuse BEFORE UPDATE ON durable.tasks FOR EACH ROW EXECUTE FUNCTION durable.refuse()")
        )
    try:
        async with serving(durable) as (browser, _):
            until = (await browser.data("/tasks/all?action=cancel"))["until"]
            with caplog.at_level(logging.INFO):
                assert (await browser.act("/tasks/all/cancel", until=until)).status_code == 500
    finally:
        async with durable.engine.begin() as connection:
            await connection.execute(text("DROP FUNCTION durable.refuse() CASCADE"))
    assert [(action, len(ids)) for _, action, ids in audit.seen] == [("cancel", 500)]
    assert "'ada' did tasks/all/cancel" in caplog.text


async def test_blanks_around_a_name_are_part_of_it(durable: Durable) -> None:
    await durable.create_queue(" mail")
    await durable.create_queue("mail")
    async with serving(durable) as (browser, _):
        assert (await browser.act("/queues/pause", queue_name=" mail")).status_code == 200
        await browser.act("/events/emit", name="go ", queue_name="mail", payload=" 1 ")
        assert (await browser.data("/events?name=go%20&queue_name=mail"))["event"]["payload"] == 1
        assert (await browser.data("/events?name=go&queue_name=mail"))["event"] is None
        assert (await browser.data("/tasks?version=%201%20&spawned_after=%2024h&limit=5"))["tasks"] == []
    assert [one.queue_name for one in await durable.queue_statistics() if one.paused] == [" mail"]


async def test_numbers_that_cannot_be_meant_are_refused(durable: Durable) -> None:
    await durable.create_queue("mail", limit=Limit(concurrency=1))
    long = "9" * 5000
    async with serving(durable) as (browser, _):
        for path in (f"/tasks?version={long}", f"/tasks?limit={long}"):
            await browser.data(path, 400)
        until = (await browser.data("/tasks/all?action=cancel"))["until"]
        html = {"accept": "text/html"}
        assert (await browser.act("/tasks/all/cancel", headers=html, until=until, done=long)).status_code == 303
        for length in ("-5", "0", "nan", long):
            refused = await browser.act("/limits/close", queue_name="mail", key="a", **{"for": length})
            assert refused.status_code == 400, length


async def test_buttons_are_shown_to_those_who_may_press_them(durable: Durable) -> None:
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    path = f"/tasks/{spawned.task_id}"
    async with serving(durable, Access("eve")) as (browser, _):
        for page in ("/", "/tasks", path, "/queues/default", "/schedules", "/events"):
            text_ = await browser.page(page)
            assert 'method="post"' not in text_
            assert 'name="token"' not in text_
        await browser.data("/tasks/all?action=retry", 403)
    async with serving(durable, EVERYTHING) as (browser, _):
        assert "/tasks/cancel" in await browser.page(path)
        assert "/tasks/retry" not in await browser.page(path)
        assert "/queues/pause" in await browser.page("/queues/default")
