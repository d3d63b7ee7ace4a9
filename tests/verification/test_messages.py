"""Many senders, many receivers, workers that are killed, replies that are lost: each message is received once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import Durable, SpawnResult

from .mailbox import inbox, sink
from .proxy import Proxy

SENDERS = 20
RECEIVERS = 200
EACH = 3
"""Messages of a sender to each of its receivers."""
CHOSEN = 30
"""Receivers of a sender."""
LOST_SHARE = 0.03
KILLS = 6


def start(url: URL) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DURABLE_DATABASE_URL": url.render_as_string(hide_password=False)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.verification.mailbox"],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_each_message_is_received_once_and_in_order(durable: Durable, engine: AsyncEngine) -> None:
    chance = random.Random(17)
    for each in (inbox, sink):
        durable.register(each)
    pairs = {
        (sender, receiver): EACH for sender in range(SENDERS) for receiver in chance.sample(range(RECEIVERS), CHOSEN)
    }
    counts = Counter[int]()
    for (_, receiver), number in pairs.items():
        counts[receiver] += number
    collector = await durable.spawn(sink, RECEIVERS)
    spawned = [await durable.spawn(inbox, (counts[receiver], collector.task_id)) for receiver in range(RECEIVERS)]

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
        sending = [asyncio.ensure_future(send_all(through, sender, pairs, spawned)) for sender in range(SENDERS)]
        killing = asyncio.ensure_future(kill(workers, through, engine, counts.total(), chance))
        try:
            await asyncio.gather(*sending)
            result = await durable.wait_for_result(collector, timeout=300)
            killed = await asyncio.wait_for(killing, 10)
        finally:
            for each in (killing, *sending):
                each.cancel()
            await asyncio.wait([killing, *sending])
            for worker in workers:
                worker.kill()
                worker.wait()
        assert killed == KILLS
        assert proxy.happened > 3
    received = dict(result.output or [])
    assert len(received) == RECEIVERS == len(result.output or [])
    for receiver, task in enumerate(spawned):
        messages = received[str(task.task_id)]
        assert len(messages) == counts[receiver]
        for sender in range(SENDERS):
            numbers = [number for who, number in messages if who == sender]
            assert numbers == list(range(pairs.get((sender, receiver), 0)))
    async with engine.connect() as connection:
        left = await connection.scalar(text("SELECT count(*) FROM durable.messages WHERE received_at IS NULL"))
        assert left == 0


async def send_all(
    url: URL, sender: int, pairs: dict[tuple[int, int], int], spawned: list[SpawnResult[list[object]]]
) -> None:
    """Send the messages of one sender: some in transactions, some with keys, and some that are rolled back."""
    chance = random.Random(sender)
    engine = create_async_engine(url)
    async with Durable(engine) as durable:
        for number in range(EACH):
            for receiver in range(RECEIVERS):
                if (sender, receiver) not in pairs:
                    continue
                task, payload = spawned[receiver], [sender, number]
                key = f"{sender}:{number}"
                match chance.randrange(4):
                    case 0:
                        # The caller does not know whether a commit without a reply has happened: the key decides.
                        while True:
                            with contextlib.suppress(DBAPIError, OSError):
                                async with AsyncSession(engine) as session:
                                    await durable.send_with(session, task, "note", payload, idempotency_key=key)
                                    await session.commit()
                                break
                    case 1:
                        await until_sent(durable, task, payload, key)
                        await until_sent(durable, task, payload, key)
                    case 2:
                        with contextlib.suppress(DBAPIError, OSError):
                            async with AsyncSession(engine) as session:
                                await durable.send_with(session, task, "note", [sender, -1])
                                await session.rollback()
                        await until_sent(durable, task, payload, key)
                    case _:
                        await durable.send(task, "note", payload)
    await engine.dispose()


async def until_sent(durable: Durable, task: SpawnResult[list[object]], payload: object, key: str) -> None:
    while True:
        with contextlib.suppress(DBAPIError, OSError):
            await durable.send(task, "note", payload, idempotency_key=key)
            return


async def kill(
    workers: list[subprocess.Popen[bytes]], url: URL, engine: AsyncEngine, total: int, chance: random.Random
) -> int:
    """Kill a worker, at a random moment, whenever a further part of the messages is received. Return how often."""
    for number in range(KILLS):
        while await received(engine) < (number + 0.5) / KILLS * total:
            await asyncio.sleep(0.1)
        await asyncio.sleep(chance.uniform(0, 0.2))
        index = chance.randrange(len(workers))
        workers[index].kill()
        await asyncio.to_thread(workers[index].wait)
        workers[index] = start(url)
    return KILLS


async def received(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(text("SELECT count(*) FROM durable.checkpoints WHERE kind = 'message'")) or 0
