import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from durable_sa.current import context_or_none, current_context, heartbeat, running
from durable_sa.errors import InvalidState


class Context:
    def __init__(self) -> None:
        self.beats: list[Any] = []

    async def heartbeat(self, duration: Any = None) -> None:
        await asyncio.sleep(0)
        self.beats.append(duration)


class BlockingContext(Context):
    def heartbeat(self, duration: Any = None) -> None:  # type: ignore[override]
        self.beats.append(duration)


def test_outside_a_task_there_is_none() -> None:
    assert context_or_none() is None
    with pytest.raises(
        InvalidState, match=r"^`current_context\(\)` is called where no task runs\. Call it from a task"
    ):
        current_context()


async def test_it_is_there_in_all_that_the_block_starts() -> None:
    context = Context()

    async def below() -> Any:
        return current_context()

    with running(context), ThreadPoolExecutor(1) as pool:
        assert current_context() is context
        assert await asyncio.create_task(below()) is context
        assert list(await asyncio.gather(below(), asyncio.to_thread(current_context))) == [context, context]
        assert pool.submit(contextvars.copy_context().run, current_context).result() is context
        with running(other := Context()):
            assert current_context() is other
        assert current_context() is context
    assert context_or_none() is None


@pytest.mark.parametrize("context", [Context(), BlockingContext()])
async def test_a_heartbeat_is_the_contexts(context: Context) -> None:
    with running(context):
        await heartbeat()
        await heartbeat(5)
    assert context.beats == [None, 5]


async def test_outside_a_task_a_heartbeat_does_nothing() -> None:
    await heartbeat()
