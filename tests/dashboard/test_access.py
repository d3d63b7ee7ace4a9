"""Queues and tasks that a user may not see are in no page, and nothing can be done to them."""

import asyncio

import pytest
from sqlalchemy import Select, Text, Uuid, cast, column, func, select, table, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, Limit, TaskContext, TaskFilter, TaskRow, task
from durable_sa.dashboard import Access
from durable_sa.dashboard.access import ACTIONS as NAMES
from durable_sa.dashboard.actions import ACTIONS
from durable_sa.dashboard.pages import PAGES
from tests.dashboard.support import serving
from tests.support import eventually


async def nothing(ctx: TaskContext) -> None:
    pass


async def fill(durable: Durable) -> dict[str, str]:
    ids = {}
    for queue in ("default", "mail", "secret"):
        await durable.create_queue(queue, limit=Limit(concurrency=3))
        await durable.set_limit(queue, Limit(concurrency=1), key=f"{queue}-key")
        durable.register(task(f"{queue}-task")(nothing))
        spawned = await durable.spawn_by_name(f"{queue}-task", unchecked=True, queue_name=queue)
        await durable.emit_event(f"{queue}-event", queue_name=queue)
        await durable.create_schedule(
            f"{queue}-tick", task=f"{queue}-task", cron_expression="0 3 * * *", queue_name=queue
        )
        ids[queue] = str(spawned.task_id)
    return ids


@pytest.mark.parametrize("queues", [{"mail"}, {"mail", "default"}])
async def test_queues_restrict_every_page_and_action(durable: Durable, queues: set[str]) -> None:
    ids = await fill(durable)
    async with serving(durable, Access("eve", actions=NAMES, queues=queues)) as (browser, _):
        for page in PAGES:
            if "{" in page.path or page.path == "/tasks/all":
                continue
            if page.all_queues:
                await browser.data(page.path, 403)
                continue
            for text in (await browser.page(page.path), str(await browser.data(page.path))):
                assert "secret" not in text, page.path
        assert {task["queue_name"] for task in (await browser.data("/tasks"))["tasks"]} == queues
        listed = await browser.data("/tasks?state=pending&state=failed")
        assert {task["queue_name"] for task in listed["tasks"]} == queues
        for query in ("queue_name=secret", "task_name=secret-task", "state=pending&queue_name=secret"):
            assert (await browser.data(f"/tasks?{query}"))["tasks"] == []
        assert (await browser.data("/tasks/all?action=cancel"))["matched"] == len(queues)
        assert (await browser.data("/tasks/all?action=cancel&queue_name=secret"))["matched"] == 0
        for path in (f"/tasks/{ids['secret']}", "/queues/secret", "/events?name=secret-event&queue_name=secret"):
            await browser.data(path, 404)
        for path, fields in (
            ("/tasks/cancel", {"task_id": ids["secret"]}),
            ("/tasks/cancel", {"task_id": [ids["mail"], ids["secret"]]}),
            ("/queues/pause", {"queue_name": "secret"}),
            ("/schedules/trigger", {"name": "secret-tick", "queue_name": "secret"}),
            ("/events/emit", {"name": "x", "queue_name": "secret"}),
            ("/events/replace", {"name": "secret-event", "queue_name": "secret", "payload": "1"}),
            ("/tasks/send", {"task_id": ids["secret"], "topic": "x"}),
            ("/limits/set", {"queue_name": "secret", "concurrency": "1"}),
            ("/limits/close", {"queue_name": "secret", "key": "x", "for": "1h"}),
            ("/limits/open", {"queue_name": "secret", "key": "x"}),
        ):
            assert (await browser.act(path, **fields)).status_code == 404, path
        until = (await browser.data("/tasks/all?action=cancel"))["until"]
        assert (await browser.act("/tasks/all/cancel", until=until)).json()["done"] == len(queues)
        assert (await browser.data(f"/tasks/{ids['mail']}"))["task"]["status"] == "cancelled"
    assert (await durable.list_tasks(TaskFilter(queue_name="secret"))).items[0].status == "pending"


@pytest.mark.parametrize(
    "where",
    [TaskFilter(task_name="mine"), select(TaskRow.task_id).where(TaskRow.task_name == "mine")],
    ids=["filter", "select"],
)
async def test_where_restricts_tasks_and_refuses_everything_else(
    durable: Durable, where: TaskFilter | Select[tuple[object]]
) -> None:
    mine = await durable.spawn_by_name("mine", unchecked=True)
    other = await durable.spawn_by_name("other", unchecked=True)
    async with serving(durable, Access("eve", actions=NAMES, where=where)) as (browser, _):
        for page in PAGES:
            if "{" not in page.path and page.path != "/tasks/all":
                await browser.data(page.path, 200 if page.about_tasks else 403)
        await browser.data("/queues/default", 403)
        for action in ACTIONS:
            if not action.about_tasks:
                fields = {"name": "x", "queue_name": "default"}
                assert (await browser.act(action.path, **fields)).status_code == 403, action.path
        for query in ("", "?task_name=other", "?order=running", "?order=oldest", "?queue_name=default"):
            listed = (await browser.data(f"/tasks{query}"))["tasks"]
            assert {task["task_name"] for task in listed} <= {"mine"}
        await browser.data(f"/tasks/{other.task_id}", 404)
        page = await browser.page(f"/tasks/{mine.task_id}")
        assert "/queues/" not in page
        assert "/events" not in page
        assert (await browser.act("/tasks/cancel", task_id=str(other.task_id))).status_code == 404
        assert (await browser.act("/tasks/send", task_id=str(other.task_id), topic="x")).status_code == 404
        until = (await browser.data("/tasks/all?action=cancel"))["until"]
        assert (await browser.act("/tasks/all/cancel", until=until)).json()["task_ids"] == [str(mine.task_id)]
    assert (await durable.get_task(other)).status == "pending"


async def test_where_with_two_tables_keeps_its_limit(durable: Durable, engine: AsyncEngine) -> None:
    """SQLAlchemy would take the tasks of the select for those of the statement around it."""
    spawned = [await durable.spawn_by_name(name, unchecked=True) for name in ("old", "new")]
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders AS SELECT task_id FROM durable.tasks"))
    orders = table("orders", column("task_id", Uuid))
    both = select(TaskRow.task_id).where(TaskRow.task_id == orders.c.task_id)
    latest = both.order_by(TaskRow.created_at.desc()).limit(1)
    greatest = both.with_only_columns(cast(func.max(cast(TaskRow.task_id, Text)), Uuid))
    for where in (latest, greatest):
        async with serving(durable, Access("eve", actions=NAMES, where=where)) as (browser, _):
            for query in ("", "?order=oldest", "?order=running", "?state=pending"):
                listed = (await browser.data(f"/tasks{query}"))["tasks"]
                assert {task["task_name"] for task in listed} <= {"new"}
            await browser.data(f"/tasks/{spawned[0].task_id}", 404)
            await browser.data(f"/tasks/{spawned[1].task_id}")
            await browser.data("/failures")
            assert (await browser.data("/tasks/all?action=cancel"))["matched"] == 1
            assert (await browser.act("/tasks/cancel", task_id=str(spawned[0].task_id))).status_code == 404
    async with serving(durable, Access("eve", actions=NAMES, where=latest)) as (browser, _):
        until = (await browser.data("/tasks/all?action=cancel"))["until"]
        assert (await browser.act("/tasks/all/cancel", until=until)).json()["task_ids"] == [str(spawned[1].task_id)]
    assert (await durable.get_task(spawned[0])).status == "pending"


async def test_relatives_that_may_not_be_seen_are_not_named(durable: Durable) -> None:
    await durable.create_queue("secret")
    parent = await durable.spawn_by_name("secret-parent", unchecked=True, queue_name="secret")
    mine = await durable.spawn_by_name("mine", unchecked=True)
    child = await durable.spawn_by_name("secret-child", unchecked=True, queue_name="secret")
    async with durable.engine.begin() as connection:
        for row, above in ((mine, parent), (child, mine)):
            await connection.execute(
                update(TaskRow).where(TaskRow.task_id == row.task_id).values(parent_task_id=above.task_id)
            )
    path = f"/tasks/{mine.task_id}"
    async with serving(durable, Access("eve", queues={"default"})) as (browser, _):
        for text in (await browser.page(path), str(await browser.data(path))):
            assert "secret" not in text
            assert str(parent.task_id) not in text
            assert str(child.task_id) not in text
    async with serving(durable, Access("eve")) as (browser, _):
        text = await browser.page(path)
        assert "secret-parent" in text
        assert "secret-child" in text


async def test_subtasks_that_may_not_be_seen_are_not_waited_for_by_id(durable: Durable) -> None:
    @task("secret-child")
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("never")

    @task("mine")
    async def mine(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("secret-name", child))

    durable.register(child)
    durable.register(mine)
    spawned = await durable.spawn(mine)
    path = f"/tasks/{spawned.task_id}"

    async def joins() -> bool:
        return "task" in ((await durable.get_task(spawned)).waits_for or "")

    async with durable.worker():
        await eventually(joins)
    found = await durable.list_tasks(TaskFilter(task_name="secret-child"))
    child_id = str(found.items[0].task_id)
    async with serving(durable, Access("eve", where=TaskFilter(task_name="mine"), payloads=True)) as (browser, _):
        for page in ("/tasks", path):
            for shown in (await browser.page(page), str(await browser.data(page))):
                assert child_id not in shown, page
        assert (await browser.data("/tasks"))["tasks"][0]["waits_for"] == "a subtask"
        # A search does not tell a name either.
        assert (await browser.data(f"{path}?text=secret"))["entries"]["found"] == 0
    async with serving(durable, Access("eve", where=TaskFilter(task_name="secret-child"))) as (browser, _):
        assert str(spawned.task_id) not in str(await browser.data("/tasks"))
    async with serving(durable, Access("ada")) as (browser, _):
        assert child_id in await browser.page(path)
        assert child_id in str(await browser.data("/tasks"))


async def test_runs_of_other_queues_are_not_counted(durable: Durable) -> None:
    for queue in ("mail", "secret"):
        await durable.create_queue(queue)
    gate = asyncio.Event()

    @task("hold")
    async def hold(ctx: TaskContext) -> None:
        await gate.wait()

    durable.register(hold)
    spawned = await durable.spawn(hold, queue_name="secret")

    async def runs() -> bool:
        return (await durable.get_task(spawned)).status == "running"

    async with durable.worker(queue_names=["mail", "secret"]):
        await eventually(runs)
        for access, running in ((Access("eve", queues={"mail"}), 0), (Access("ada"), 1)):
            async with serving(durable, access) as (browser, _):
                for path in ("/workers", "/", "/queues/mail"):
                    assert [row["running"] for row in (await browser.data(path))["workers"]] == [running], path
        gate.set()
