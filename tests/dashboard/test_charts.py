"""Charts of ended tasks: numbers per minute and queue, per period and task name."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from durable_sa import Durable
from durable_sa.dashboard import Access, charts
from tests.dashboard.support import Browser, serving

FILL = """
INSERT INTO durable.task_minutes
    (queue_name, minute, task_name, worker_id, completed, failed, cancelled, milliseconds, slowest)
SELECT :queue, date_trunc('minute', now()) - make_interval(mins => :ago), :task, gen_random_uuid(), 30, :failed, 2,
    60000, 9000
FROM generate_series(1, 2)
"""


async def fill(durable: Durable, queue: str, task: str, ago: int, failed: int = 0) -> None:
    async with durable.engine.begin() as connection:
        await connection.execute(text(FILL), {"queue": queue, "task": task, "ago": ago, "failed": failed})


async def test_the_overview_has_the_last_hour_of_each_queue(durable: Durable, browser: Browser) -> None:
    await durable.create_queue("mail")
    await fill(durable, "default", "work", 3, failed=5)
    await fill(durable, "default", "other", 3)
    await fill(durable, "default", "work", 90)
    for path in ("/", "/queues"):
        found = (await browser.data(path))["throughput"]
        assert set(found) == {"default"}
        [minute] = found["default"]
        assert (minute["completed"], minute["failed"]) == (120, 10)
        page = await browser.page(path)
        assert page.count('<svg class="spark"') == 1
        assert "120 done" in page
        assert "10 failed" in page
        assert "style=" not in page


async def test_a_queue_has_charts_of_a_window_by_task_name(durable: Durable, browser: Browser) -> None:
    await fill(durable, "default", "work", 3, failed=5)
    await fill(durable, "default", "other", 3)
    await fill(durable, "default", "work", 60 * 5)
    await fill(durable, "default", "<b>old</b>", 60 * 24 * 3)
    sums = {}
    for window in charts.WINDOWS:
        chart = (await browser.data(f"/queues/default?window={window.name}"))["chart"]
        assert len(chart["periods"]) == window.periods
        sums[window.name] = sum(period["completed"] for period in chart["periods"])
        assert sum(row["completed"] for row in chart["tasks"]) == sums[window.name]
        page = await browser.page(f"/queues/default?window={window.name}")
        assert page.count('<svg class="chart"') == 2
        assert "<b>old" not in page
        assert "style=" not in page
    assert sums == {"1h": 120, "24h": 180, "7d": 240}

    chart = (await browser.data("/queues/default"))["chart"]
    assert [row["task_name"] for row in chart["tasks"]] == ["work", "other"]
    [period] = [period for period in chart["periods"] if period["completed"]]
    assert datetime.now(UTC) - datetime.fromisoformat(period["at"]) < timedelta(minutes=6)
    assert period | {"at": None} == {
        "at": None,
        "completed": 120,
        "failed": 10,
        "cancelled": 8,
        "mean_seconds": pytest.approx(240 / 130),
        "slowest_seconds": 9.0,
    }
    chart = (await browser.data("/queues/default?task_name=other"))["chart"]
    assert [row["task_name"] for row in chart["tasks"]] == ["other"]
    assert sum(period["completed"] for period in chart["periods"]) == 60
    assert "There is no window" in (await browser.data("/queues/default?window=2h", 400))["error"]


async def test_a_queue_without_ended_tasks_says_so(durable: Durable, browser: Browser) -> None:
    page = await browser.page("/queues/default")
    assert "No task has ended in this time" in page
    assert 'id="numbers"' not in page


async def test_only_the_queues_of_a_user_are_in_charts(durable: Durable) -> None:
    for queue in ("mail", "secret"):
        await durable.create_queue(queue)
        await fill(durable, queue, f"{queue}-task", 3)
    async with serving(durable, Access("eve", queues={"mail"})) as (browser, _):
        for path in ("/", "/queues"):
            assert set((await browser.data(path))["throughput"]) == {"mail"}
            assert "secret" not in await browser.page(path)
        await browser.data("/queues/secret?window=7d", 404)
        page = await browser.page("/queues/mail?task_name=secret-task")
        assert "No task has ended in this time" in page


@pytest.mark.parametrize(
    ("completed", "failed", "line"), [([], [], 100), ([0, 4], [0, 0], 100), ([0, 0], [3, 0], 0), ([3, 1], [0, 1], 75)]
)
def test_bars_fill_the_height_on_both_sides_of_the_line(completed: list[int], failed: list[int], line: int) -> None:
    bars = charts.bars(completed, failed)
    assert bars.line == line
    assert max((height for _, height in bars.up), default=line) == line
    assert max((height for _, height in bars.down), default=100 - line) == 100 - line


def test_the_smallest_number_beside_a_large_one_can_be_seen() -> None:
    for bars in (charts.bars([1_000_000, 1], [0, 1]), charts.bars([0, 1], [1_000_000, 1])):
        assert min(height for _, height in bars.up + bars.down) >= charts.LEAST
        assert max(bars.line, 100 - bars.line) <= 100


def test_lines_are_interrupted_where_nothing_ended() -> None:
    assert charts.points([1.0, None, 2.0], 2.0) == ["0,51.0 1,51.0", "2,2.0 3,2.0"]
    assert charts.points([0.0], 0.0) == ["0,100.0 1,100.0"]
