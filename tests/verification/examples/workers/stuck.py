"""A worker of examples/support_agent whose model stops after three words: `durable worker stuck:durable`."""

import asyncio
from collections.abc import AsyncIterator

from agent import scripted
from agent.main import durable


async def three_words(text: str) -> AsyncIterator[str]:
    for word in text.split()[:3]:
        yield f"{word} "
    await asyncio.Event().wait()


__all__ = ["durable"]

scripted.words = three_words
