"""The conductor's side of the conversation: a system in a process of its own, told what to do over pipes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import IO, Any

import psutil

from .environments import ROOT
from .protocol import LINE_BYTES

START_SECONDS = 60.0
STOP_SECONDS = 5.0


class DriverError(Exception):
    """Raised when a driver reports an error or ends; carries what it said."""


class Driver:
    """A running driver."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())
        self.facts: dict[str, Any] = {}
        """Versions and the kind of event loop, as the driver reports them."""

    @classmethod
    async def start(cls, python: Path, system: str, loop: str, log: Path, path: str) -> Driver:
        """Start a driver and wait until its system is imported. `path` goes to the front of its PATH."""
        file = log.open("ab")
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", "benchmarks.protocol", system, loop),
            cwd=ROOT,
            env={**os.environ, "PATH": f"{path}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            limit=LINE_BYTES,
        )
        driver = cls(process, file)
        try:
            async with asyncio.timeout(START_SECONDS):
                driver.facts = await driver._ready
        except BaseException:
            await driver.stop()
            raise
        return driver

    @property
    def resident_bytes(self) -> int:
        """The memory of the process."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """Let the driver call a method of its system, and wait for what it returns.

        Raises:
            DriverError: it raised, or the driver has ended.
        """
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        if self._reading.done():
            raise self._ended()
        self._process.stdin.write(json.dumps({"go": name, "id": number, "args": arguments}).encode() + b"\n")
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    async def stop(self) -> None:
        """End the process: asked to, then made to."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await asyncio.wait([self._reading])
        self._log.close()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            if "ready" in message:
                self._ready.set_result(message["ready"])
            elif (answer := self._answers.get(message["id"])) is not None and not answer.done():
                if "error" in message:
                    answer.set_exception(DriverError(message["error"]))
                else:
                    answer.set_result(message["result"])
        for answer in (self._ready, *self._answers.values()):
            if not answer.done():
                answer.set_exception(self._ended())

    def _ended(self) -> DriverError:
        said = Path(self._log.name).read_text(errors="replace")[-2000:]
        return DriverError(f"the driver has ended; its log:\n{said}")
