"""Runs commands in this process, and processes with commands."""

import asyncio
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import URL

from durable_sa.cli.app import app


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    """Without the line that names the database."""
    database: str = ""

    @property
    def json(self) -> Any:
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)


class Terminal(io.StringIO):
    """What is printed on a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class CommandLine:
    """`durable` with its URL set, run in a thread, since commands have an event loop of their own."""

    def __init__(self, url: URL | str) -> None:
        self.url = url.render_as_string(hide_password=False) if isinstance(url, URL) else url

    async def at(self, width: int, *arguments: object, **environment: str) -> Result:
        """The command in a terminal of this width."""
        environment = {"COLUMNS": str(width), "LINES": "50", "TERM": "xterm", **environment}
        return await asyncio.to_thread(self.run, *arguments, terminal=True, **environment)

    async def with_environment(self, *arguments: object, **environment: str) -> Result:
        return await asyncio.to_thread(self.run, *arguments, **environment)

    async def typed(self, line: str) -> Result:
        """The command as it is typed in a shell."""
        return await self(*shlex.split(line)[1:])

    async def __call__(self, *arguments: object, stdin: str = "") -> Result:
        return await asyncio.to_thread(self.run, *arguments, stdin=stdin)

    def run(self, *arguments: object, stdin: str = "", terminal: bool = False, **environment: str) -> Result:
        out, err = Terminal() if terminal else io.StringIO(), io.StringIO()
        code: Any = 0
        with (
            mock.patch.dict(os.environ, {"DURABLE_DATABASE_URL": self.url, **environment}),
            mock.patch("sys.stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                app([str(argument) for argument in arguments], prog_name="durable")
            except SystemExit as ended:
                code = ended.code
        first, newline, rest = err.getvalue().partition("\n")
        if newline and first.startswith("database: "):
            return Result(code, out.getvalue(), rest, first)
        return Result(code, out.getvalue(), err.getvalue())


class Process:
    """`durable` in a process of its own; what it says is kept."""

    def __init__(self, *arguments: str, url: str, cwd: Path, **environment: str) -> None:
        self._log = (cwd / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "durable_sa.cli", *arguments],
            cwd=cwd,
            env={**os.environ, "DURABLE_DATABASE_URL": url, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 20) -> int:
        return self._process.wait(seconds)

    def until_said(self, text: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.running, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def process(*arguments: str, url: str, cwd: Path, **environment: str) -> Generator[Process]:
    running = Process(*arguments, url=url, cwd=cwd, **environment)
    with contextlib.closing(running):
        yield running
