"""The driver's side of the conversation: a process that runs one system, told over pipes what to do.

Messages are JSON, one a line. The driver says ``{"ready": {...}}`` when its system is imported. For each
``{"go": "spawn", "id": 7, "args": {...}}`` it calls that method of the system and answers ``{"id": 7, "result": ...}``
or ``{"id": 7, "error": "..."}``. It ends with its input.

Run as ``python -m benchmarks.protocol SYSTEM LOOP``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import traceback
from typing import IO, Any

from .systems.base import System

LINE_BYTES = 64 * 1024 * 1024


def load_system(name: str) -> System:
    """The system of that name, from its module."""
    module = importlib.import_module(f"benchmarks.systems.{name}")
    system: System = module.SYSTEM()
    return system


async def answer(system: System, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a message asks for."""
    try:
        return {"id": request["id"], "result": await getattr(system, request["go"])(**request["args"])}
    except Exception:  # noqa: BLE001 - the conductor reports it
        return {"id": request["id"], "error": traceback.format_exc()}


async def converse(system: System, replies: IO[str], *, tuned: bool) -> None:
    """Answer until the input ends.

    In a `tuned` process, whatever the system, what is in memory when it begins to work is left out of garbage
    collections, as those who run workers in processes of their own do.
    """

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    loop = asyncio.get_running_loop()
    requests = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    version = importlib.metadata.version(system.distribution)
    say({"ready": {"version": version, "python": platform.python_version(), "loop": type(loop).__module__}})
    pending: set[asyncio.Task[None]] = set()

    async def serve(request: dict[str, Any]) -> None:
        reply = await answer(system, request)
        if tuned and request["go"] == "work":
            gc.collect()
            gc.freeze()
        say(reply)

    while line := await requests.readline():
        task = asyncio.create_task(serve(json.loads(line)))
        pending.add(task)
        task.add_done_callback(pending.discard)
    with contextlib.suppress(Exception):
        await system.rest()


def main() -> None:
    """Serve one system."""
    name, loop = sys.argv[1:]
    # What libraries print must not get between the messages.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING)
    if loop == "uvloop":
        import uvloop

        # The policy and not just this loop: some systems run their tasks in a loop of their own.
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(converse(load_system(name), replies, tuned=loop == "uvloop"))
    # Threads that a system leaves behind must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
