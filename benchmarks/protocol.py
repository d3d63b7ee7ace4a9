"""The driver's side of the pipe: a process that runs one system for the benchmarks.

Messages are JSON, one per line. The driver sends ``{"ready": {...}}`` when its system is imported. For each
``{"go": "spawn", "id": 7, "args": {...}}`` it calls that method of the system and answers ``{"id": 7, "result": ...}``
or ``{"id": 7, "error": "..."}``. It exits at the end of its input.

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
"""The limit of a message. The times of a run exceed asyncio's default of 64 KB."""


async def serve(system: System, replies: IO[str], *, tuned: bool) -> None:
    """Answer requests until the input ends.

    A `tuned` process of any system excludes from garbage collection what is in memory when its worker starts, as
    deployments with dedicated worker processes do.
    """

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    async def answer(request: dict[str, Any]) -> None:
        try:
            result = await getattr(system, request["go"])(**request["args"])
            if tuned and request["go"] == "work":
                gc.collect()
                gc.freeze()
            send({"id": request["id"], "result": result})
        except Exception:  # noqa: BLE001 - the benchmarks report it
            send({"id": request["id"], "error": traceback.format_exc()})

    loop = asyncio.get_running_loop()
    requests = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    version = importlib.metadata.version(system.distribution)
    send({"ready": {"version": version, "python": platform.python_version(), "loop": type(loop).__module__}})
    pending: set[asyncio.Task[None]] = set()
    while line := await requests.readline():
        task = asyncio.create_task(answer(json.loads(line)))
        pending.add(task)
        task.add_done_callback(pending.discard)
    with contextlib.suppress(Exception):
        await system.rest()


def main() -> None:
    name, loop = sys.argv[1:]
    # Standard output becomes standard error, so that the output of libraries does not mix with the messages.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING)
    if loop == "uvloop":
        import uvloop

        # The policy also covers the event loops that some systems create for their tasks.
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    system = importlib.import_module(f"benchmarks.systems.{name}").SYSTEM()
    asyncio.run(serve(system, replies, tuned=loop == "uvloop"))
    # A normal exit would wait for the threads that some systems leave running.
    os._exit(0)


if __name__ == "__main__":
    main()
