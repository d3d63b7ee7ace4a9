"""The benchmarks' side of the pipe: starts the process of a system and calls its methods."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import IO, Any

import psutil

from .catalogue import System
from .protocol import LINE_BYTES

START_SECONDS = 60.0
STOP_SECONDS = 5.0


class DriverError(Exception):
    """Raised when a driver reports an error or exits; carries the traceback or the log."""


class Driver:
    """A running driver process."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())
        self.process = psutil.Process(process.pid)
        self.facts: dict[str, Any] = {}
        """The versions and the event loop that the driver reports."""

    @classmethod
    async def start(cls, python: Path, system: System, loop: str, directory: Path, programs: Path) -> Driver:
        """Start a driver and wait until its system is imported.

        `directory` has a link to this package, which is all that the driver finds there, and receives its log. The
        driver imports durable_sa from the system's checkout. `programs` is put first in its PATH.
        """
        log = (directory / f"{system.name}.log").open("ab")
        process = await asyncio.create_subprocess_exec(
            *(str(python), "-m", "benchmarks.protocol", system.driver, loop),
            cwd=directory,
            env={
                **os.environ,
                "PATH": os.pathsep.join((str(programs), os.environ.get("PATH", ""))),
                "PYTHONPATH": str(system.checkout),
                "PYTHONUNBUFFERED": "1",
            },
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=LINE_BYTES,
        )
        driver = cls(process, log)
        try:
            async with asyncio.timeout(START_SECONDS):
                driver.facts = await driver._ready
        except BaseException:
            await driver.stop()
            raise
        return driver

    @property
    def resident_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the process, in user and system mode."""
        return float(sum(self.process.cpu_times()[:2]))

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """Call a method of the driver's system and return its result.

        Raises:
            DriverError: the method raised, or the driver has exited.
        """
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        if self._reading.done():
            raise self._exited()
        self._process.stdin.write(json.dumps({"go": name, "id": number, "args": arguments}).encode() + b"\n")
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    async def stop(self) -> None:
        """Close the driver's input; kill the process if it does not exit in time."""
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
                answer.set_exception(self._exited())

    def _exited(self) -> DriverError:
        log = Path(self._log.name).read_text(errors="replace")[-2000:]
        return DriverError(f"the driver has exited; its log:\n{log}")
