"""Messages, values, streams and lines on the page of a task: its own alone, and payloads only for those who may see."""

import logging
import uuid
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, TaskContext
from durable_sa.dashboard import Access
from durable_sa.dashboard.access import ACTIONS
from tests.dashboard.support import EVERYTHING, Browser, serving
from tests.dashboard.test_hostile import HOSTILE, SECRET, assert_intact
from tests.support import eventually

SECTIONS = ("messages", "published", "streams", "log")


async def fill(durable: Durable, name: str = "part") -> uuid.UUID:
    """A task that waits, with two messages, and something of all else, each with the secret."""

    @durable.task(f"talk {name}")
    async def talk(ctx: TaskContext) -> Any:
        ctx.logger.info("%s %s", name, SECRET)
        await ctx.publish(name, {"card": SECRET})
        async with ctx.stream(name) as stream:
            for number in range(30):
                await stream.write(f"{number} {SECRET}")
        async with ctx.stream("open", keep_open=True) as stream:
            await stream.write(1)
        return await ctx.receive("never")

    async with durable.worker():
        spawned = await durable.spawn(talk)

        async def waits() -> bool:
            return (await durable.get_task(spawned)).status == "sleeping"

        await eventually(waits)
    await durable.send(spawned, name, {"card": SECRET})
    await durable.send(spawned, "other")
    return spawned.task_id


async def test_each_has_a_section(engine: AsyncEngine) -> None:
    async with Durable(engine, keep_logs=logging.INFO) as durable, serving(durable) as (browser, _):
        task_id = await fill(durable)
        data = await browser.data(f"/tasks/{task_id}")
        assert [(row["topic"], row["value"]) for row in data["messages"]] == [
            ("other", None),
            ("part", {"card": SECRET}),
        ]
        assert [(row["name"], row["value"]) for row in data["published"]] == [("part", {"card": SECRET})]
        ended, kept_open = sorted(data["streams"], key=lambda row: row["name"], reverse=True)
        assert (ended["name"], ended["position"], ended["ended"]) == ("part", 30, True)
        assert ended["items"][-1] == f"29 {SECRET}"
        assert len(ended["items"]) <= 20
        assert (kept_open["name"], kept_open["position"], kept_open["ended"]) == ("open", 1, False)
        (line,) = data["log"]["lines"]
        assert (line["level"], line["message"]) == ("INFO", f"part {SECRET}")
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta()
        page = await browser.page(f"/tasks/{task_id}")
        for title in ("Waiting messages", "Published values", "Streams", "Log"):
            assert f">{title}</h2>" in page


async def test_without_payloads_there_are_names_alone(engine: AsyncEngine) -> None:
    async with Durable(engine, keep_logs=logging.INFO) as durable:
        task_id = await fill(durable)
        async with serving(durable, Access("eve", actions=ACTIONS)) as (browser, _):
            data = await browser.data(f"/tasks/{task_id}")
            assert SECRET not in str(data) + await browser.page(f"/tasks/{task_id}")
            assert [row["topic"] for row in data["messages"]] == ["other", "part"]
            assert data["log"] == {"position": 1, "lines": None}

        def redact(name: str, path: tuple[str | int, ...], value: Any) -> Any:
            seen.add(path[:2])
            return "***" if isinstance(value, str) and SECRET in value else value

        seen: set[tuple[str | int, ...]] = set()
        async with serving(durable, redact=redact) as (browser, _):
            assert SECRET not in str(await browser.data(f"/tasks/{task_id}"))
        assert {("message", "part"), ("value", "part"), ("stream", "part"), ("log", 0)} <= seen


async def test_what_is_hostile_or_too_long_is_shown_as_text_or_left_out(engine: AsyncEngine) -> None:
    async with Durable(engine, keep_logs=logging.INFO) as durable, serving(durable) as (browser, _):
        for name in (HOSTILE[0], HOSTILE[5]):
            task_id = await fill(durable, name)
            assert_intact(await browser.page(f"/tasks/{task_id}"))
            assert (await browser.data(f"/tasks/{task_id}"))["published"][0]["name"] == name
        await durable.send(task_id, "long", "x" * 100_000)
        long = next(row for row in (await browser.data(f"/tasks/{task_id}"))["messages"] if row["topic"] == "long")
        assert (long["size"], "value" in long) == (100_002, False)
        async with engine.begin() as connection:
            # As changed by hand.
            await connection.execute(text("UPDATE durable.stream_items SET items = '{\"a\": 1}'"))
        data = await browser.data(f"/tasks/{task_id}")
        assert data["log"]["lines"] == []
        assert_intact(await browser.page(f"/tasks/{task_id}"))


async def test_a_message_is_sent(durable: Durable, browser: Browser) -> None:
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    fields = {"task_id": str(spawned.task_id), "topic": "note"}
    answer = (await browser.act("/tasks/send", **fields, payload='{"n": 1}')).json()
    assert answer["task_ids"] == [str(spawned.task_id)]
    assert [row["value"] for row in (await browser.data(f"/tasks/{spawned.task_id}"))["messages"]] == [{"n": 1}]
    for change, status in (
        ({"payload": "{"}, 400),
        ({"topic": ""}, 400),
        ({"topic": "$x"}, 400),
        ({"task_id": str(uuid.uuid4())}, 404),
    ):
        assert (await browser.act("/tasks/send", **{**fields, **change})).status_code == status, change
    await durable.cancel_task(spawned)
    assert (await browser.act("/tasks/send", **fields)).status_code == 409
    assert EVERYTHING.may("send")


async def test_a_page_has_a_bounded_number_of_characters(durable: Durable, browser: Browser) -> None:
    spawned = await durable.spawn_by_name("long", ["z" * 19_000] * 800, unchecked=True)
    params = (await browser.data(f"/tasks/{spawned.task_id}"))["values"]["params"]
    assert 900_000 < sum(map(len, params)) < 1_100_000
    assert params[-1].endswith("more)")
