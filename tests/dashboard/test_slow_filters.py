"""Pages whose statements would take long: a part of the tasks is searched, and slow checks come after the page."""

from typing import Any

import pytest
from sqlalchemy import select, text

from durable_sa import Durable, TaskRow
from durable_sa.dashboard import Access
from durable_sa.dashboard.pages import doctor, tasks
from durable_sa.statements import reading
from tests.dashboard.support import EVERYTHING, serving

ACCESS = {
    "everything": EVERYTHING,
    "a queue": Access("ada", queues={"default"}),
    "a select": Access("ada", where=select(TaskRow.task_id).where(TaskRow.queue_name == "default")),
}


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_a_part_is_searched_at_a_time(
    durable: Durable, access: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tasks, reading):
        monkeypatch.setattr(module, "SEARCHED", 10)
    wanted = []
    for number in range(35):
        name = "rare" if number in (1, 2, 3, 17, 34) else "usual"
        spawned = await durable.spawn_by_name(name, unchecked=True)
        wanted += [str(spawned.task_id)] * (name == "rare")
    async with serving(durable, ACCESS[access]) as (browser, _):
        found, after, pages = [], "", 0
        while after is not None:
            path = f"/tasks?task_name=rare&search=part&limit=2&order={order}&after={after}"
            data = await browser.data(path)
            page = await browser.page(path)
            assert len(data["tasks"]) <= 2
            assert ("10 tasks were searched" in page) is (data["searched"] == 10)
            assert ("Search further" in page) is (data["searched"] == 10)
            found += [task["task_id"] for task in data["tasks"]]
            after, pages = data["next"], pages + 1
        assert found == (wanted if order == "oldest" else wanted[::-1])
        assert pages > 3
        # All tasks are searched on request.
        data = await browser.data(f"/tasks?task_name=rare&search=all&order={order}")
        assert [task["task_id"] for task in data["tasks"]] == found
        assert data["searched"] is None


async def test_what_takes_long_among_all_is_searched_in_part(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tasks, reading):
        monkeypatch.setattr(module, "SEARCHED", 2)
    for name in ("usual", "rare", "usual", "usual"):
        await durable.spawn_by_name(name, unchecked=True)

    def sleep(connection: Any, *_: Any, **__: Any) -> Any:
        return connection.execute(text("SELECT pg_sleep(30)"))

    monkeypatch.setattr(durable, "list_tasks_with", sleep)
    async with serving(durable) as (browser, app):
        data = await browser.data("/tasks?task_name=rare")
        assert (data["tasks"], data["searched"], data["late"]) == ([], 2, [])
        data = await browser.data(f"/tasks?task_name=rare&search=part&after={data['next']}")
        assert [task["task_name"] for task in data["tasks"]] == ["rare"]
        # No task is left to search.
        assert (data["searched"], data["next"]) == (None, None)
        app.reader.statement_timeout = 0.1
        assert (await browser.data("/tasks?search=all"))["late"] == ["tasks"]


async def test_slow_checks_come_after_the_page(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ALL_QUICK", -1.0)
    async with serving(durable) as (browser, _):
        data = await browser.data("/doctor")
        assert {check["status"] for check in data["checks"]} == {"late"}
        assert (data["ok"], data["complete"], data["late"]) == (False, False, [])
        page = await browser.page("/doctor")
        assert 'hx-get="/doctor?thorough=1" hx-trigger="load"' in page
        data = await browser.data("/doctor?thorough=1")
        assert (data["ok"], data["complete"]) == (True, True)
        assert "hx-get" not in await browser.page("/doctor?thorough=1")
