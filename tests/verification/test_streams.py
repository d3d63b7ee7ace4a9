"""Workers that are killed, replies that are lost, readers that come and go: each reads every item of one telling."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, SpawnResult, StreamRestart

from ..support import eventually
from .proxy import Proxy
from .stories import CHAPTERS, LINES, tell

TASKS = 3
KILLS = 4
LOST_SHARE = 0.03


def start(url: URL) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DURABLE_DATABASE_URL": url.render_as_string(hide_password=False)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.verification.stories"],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_readers_see_each_item_of_one_try_of_each_step(durable: Durable, engine: AsyncEngine) -> None:
    chance = random.Random(17)
    durable.register(tell)
    stories = [await durable.spawn(tell) for _ in range(TASKS)]
    url = engine.url
    host, port = url.host or str(url.query["host"]), url.port or int(str(url.query.get("port", 5432)))
    async with Proxy(host, port) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port, query={})

        def lose(statement: str) -> str | None:
            if "durable." not in statement or chance.random() > LOST_SHARE:
                return None
            return chance.choice(["reply", "request"])

        proxy.lose(lose)
        workers = [start(through) for _ in range(2)]
        readers = [Reader(durable, story, random.Random(number)) for number in range(2) for story in stories]
        killing = asyncio.ensure_future(kill(workers, through, readers, chance))
        try:
            async with asyncio.timeout(240):
                await asyncio.gather(*(reader.run() for reader in readers))
        finally:
            killing.cancel()
            await asyncio.wait([killing])
            for worker in workers:
                worker.kill()
                worker.wait()
        assert proxy.happened > 3
    assert any(reader.restarts for reader in readers)
    for story in stories:
        told = [(item.position, item.value) async for item in durable.read_stream(story, "story")]  # type: ignore[union-attr]
        lines = [(number, line) for _, (number, _, line) in told]
        assert lines == [(number, line) for number in range(CHAPTERS) for line in range(LINES)] + [(CHAPTERS, 0)]
        assert len({author for _, (_, author, _) in told}) == CHAPTERS + 1
        assert all(reader.read == told for reader in readers if reader.story is story)


class Reader:
    """Follows a story, goes away now and then, and comes back at its position."""

    def __init__(self, durable: Durable, story: SpawnResult[None], chance: random.Random) -> None:
        self.durable = durable
        self.story = story
        self.chance = chance
        self.read: list[tuple[int, Any]] = []
        self.restarts = 0
        self.seen = 0

    async def run(self) -> None:
        position = 0
        while not self.read or self.read[-1][1][0] < CHAPTERS:
            patience = self.chance.randrange(100, 500)
            async for entry in self.durable.read_stream(self.story, "story", after=position):
                position = entry.position
                if isinstance(entry, StreamRestart):
                    self.restarts += 1
                    self.read = [line for line in self.read if line[0] <= position]
                    continue
                self.check(entry.value)
                self.read.append((position, entry.value))
                self.seen += 1
                if (patience := patience - 1) == 0:
                    break

    def check(self, line: Any) -> None:
        """No item of another try follows without a notice."""
        chapter, author, number = line
        if number:
            assert self.read[-1][1] == [chapter, author, number - 1]
        else:
            assert not self.read or self.read[-1][1][0] == chapter - 1


async def kill(workers: list[subprocess.Popen[bytes]], url: URL, readers: list[Reader], chance: random.Random) -> None:
    """Kill both workers in turns, each time after readers have seen some more, in the middle of a chapter."""
    for number in range(KILLS):
        seen = sum(reader.seen for reader in readers) + chance.randrange(300, 1500)
        await eventually(lambda: sum(reader.seen for reader in readers) > seen, within=200)  # noqa: B023
        index = number % len(workers)
        workers[index].kill()
        await asyncio.to_thread(workers[index].wait)
        workers[index] = start(url)
