"""A worker process as its watcher sees it: its pipes, its lines and its reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from ..worker.supervision import VARIABLE

DRAINED_READS = 2
"""Reads of 64 KiB that empty a pipe, whose capacity that is, unless others go on writing."""

logger = logging.getLogger("durable_sa")


RunKey: TypeAlias = tuple[str, int]
"""The id of a task, and the fence of its run."""


class Overdue(NamedTuple):
    """A run with a `hard_timeout`."""

    task_id: str
    fence: int
    timeout: float


class Lines:
    """Splits what comes out of a pipe into lines, for as long as the event loop runs."""

    def __init__(self, descriptor: int, on_line: Callable[[bytes], None]) -> None:
        self._descriptor = descriptor
        self._on_line = on_line
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def _read(self) -> bool:
        """Read once, and return whether there may be more."""
        try:
            data = os.read(self._descriptor, 64 * 1024)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line)
        return True

    def drain(self) -> None:
        """Read what the process has written before its end, and close the pipe, which others may keep open."""
        for _ in range(DRAINED_READS):
            if self._descriptor < 0 or not self._read():
                break
        self.close()

    def close(self) -> None:
        """Pass on a last line without an end, and close the pipe."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            if self._rest:
                self._on_line(self._rest)


class Child:
    """One process. `on_report` is called with it and each of its reports."""

    def __init__(self, number: int, command: list[str], on_report: Callable[[Child, dict[str, Any]], None]) -> None:
        self.number = number
        self.began_at = time.monotonic()
        self.worker_id: str | None = None
        """The id of its worker, once that has started."""
        self.port: int | None = None
        """The port that answers its probes."""
        self.ending = False
        """True once its end is planned."""
        self.overdue: Overdue | None = None
        """The run for which the process ends, or is killed."""
        self._on_report = on_report
        self._deadlines: dict[RunKey, asyncio.TimerHandle] = {}
        commands, self._commands = os.pipe()
        reports, its_reports = os.pipe()
        out, its_out = os.pipe()
        errors, its_errors = os.pipe()
        theirs = commands, its_reports, its_out, its_errors
        try:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, VARIABLE: f"{number}:{commands}:{its_reports}", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=its_out,
                stderr=its_errors,
                pass_fds=(commands, its_reports),
                # So that Ctrl-C reaches the watcher alone.
                start_new_session=True,
            )
        except BaseException:
            for descriptor in (self._commands, reports, out, errors):
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        os.set_blocking(self._commands, False)
        self._pipes = (
            Lines(reports, self._report),
            Lines(out, lambda line: self._log(line, sys.stdout.buffer)),
            Lines(errors, lambda line: self._log(line, sys.stderr.buffer)),
        )

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.process.pid})"

    def send(self, what: str, **details: Any) -> None:
        """Send a command."""
        with contextlib.suppress(OSError):  # it has ended, or does not read
            os.write(self._commands, json.dumps({"what": what, **details}).encode() + b"\n")

    def kill(self) -> None:
        """Kill the process."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)

    def watch(self, key: RunKey, timer: asyncio.TimerHandle) -> None:
        """Set the time at which the process is killed for a run."""
        self.forget(key)
        self._deadlines[key] = timer

    def forget(self, key: RunKey) -> None:
        """Do not kill the process for a run."""
        if key in self._deadlines:
            self._deadlines.pop(key).cancel()

    def close(self) -> None:
        """Release all that belongs to the process, which has ended."""
        for pipe in self._pipes:
            pipe.drain()
        os.close(self._commands)
        for key in list(self._deadlines):
            self.forget(key)

    def _report(self, line: bytes) -> None:
        with contextlib.suppress(ValueError):  # cut off by the end of the process
            self._on_report(self, json.loads(line))

    def _log(self, line: bytes, stream: BinaryIO) -> None:
        write_line(stream, str(self.number), line)


def write_line(stream: BinaryIO, process: str, line: bytes) -> None:
    """Write a line of the log with its process: before it, or, if it is a JSON object, as its first member."""
    if line.startswith(b'{"') and line.rstrip().endswith(b"}"):
        line = b'{"worker_process": ' + json.dumps(process).encode() + b", " + line[1:]
    else:
        line = b"[" + process.encode() + b"] " + line
    with contextlib.suppress(OSError, ValueError):  # the reader of the log has ended
        stream.write(line + b"\n")
        stream.flush()
