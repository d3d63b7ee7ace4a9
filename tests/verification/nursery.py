"""A process that has imported everything and forks workers and producers, so that one takes milliseconds to start.

`python -m tests.verification.nursery` reads what to fork from standard input, one line of JSON each, and answers with a
process id, and later with how that process has ended. Everything it has forked ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, Self

ROOT = Path(__file__).parents[2]


class Child:
    """A process that a nursery has forked."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.stopped = False
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Its exit code, or the signal that killed it, negative."""

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return not self.ended.done()

    def send(self, number: signal.Signals) -> bool:
        """Send it a signal; False if it has ended."""
        if not self.alive:
            return False
        self.stopped = number == signal.SIGSTOP if number in (signal.SIGSTOP, signal.SIGCONT) else self.stopped
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


class Nursery:
    """Starts processes. With `prefix`, a command such as faketime, all of them run under it."""

    def __init__(self, *prefix: str, environment: dict[str, str] | None = None) -> None:
        self._prefix = prefix
        self._environment = environment or {}
        self._children: dict[int, Child] = {}
        self._asked: asyncio.Queue[asyncio.Future[int]] = asyncio.Queue()
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(*self._prefix, sys.executable, "-m", "tests.verification.nursery"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **self._environment},
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading

    async def fork(self, role: str, name: str, log: Path, **settings: Any) -> Child:
        """Start a process that plays a role with these settings, writing what it says to `log`."""
        assert self._process.stdin is not None
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async with self._lock:
            await self._asked.put(answer)
            request = {"role": role, "log": str(log), "settings": {"name": name, **settings}}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            pid = await answer
        child = self._children.setdefault(pid, Child(name, pid))
        child.name = name
        return child

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            kind, pid, status = json.loads(line)
            if kind == "forked":
                self._children[pid] = Child("", pid)
                self._asked.get_nowait().set_result(pid)
            elif (child := self._children.pop(pid, None)) is not None:
                child.ended.set_result(status)


def _say(*answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _become(role: Callable[[dict[str, Any]], Awaitable[None]], request: dict[str, Any]) -> NoReturn:
    descriptor = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(0)
    try:
        asyncio.run(role(request["settings"]))  # type: ignore[arg-type]
    except BaseException:  # noqa: BLE001 - this is a process of its own
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Where there is no room for what it has said, that is gone.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Fork until the input ends."""
    from . import producer, workload

    roles = {"worker": workload.work, "producer": producer.produce}
    running: set[int] = set()
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        if readable:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if (pid := os.fork()) == 0:
                    _become(roles[request["role"]], request)
                running.add(pid)
                _say("forked", pid, 0)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            running.discard(pid)
            _say("ended", pid, os.waitstatus_to_exitcode(status))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
