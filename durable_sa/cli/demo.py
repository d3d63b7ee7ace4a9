"""`durable demo`: a task outlives the worker that runs it, which is killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from sqlalchemy import URL
from typer import Exit

from .. import Durable, SpawnResult, TaskPollResult, TaskStatus
from ..errors import InvalidState, TaskNotFound
from ..statements import inspection
from . import history
from .invocation import WRONG, reported
from .output import Output
from .research import LEDGER_VARIABLE, Entry, Question, Report, read_ledger, research

_QUEUE_PREFIX = "demo-"
_KILLED_IN = "read a book on durable execution"
_CLAIM_TIMEOUT = 1.5
_PATIENCE = 40.0
_KEEP_SECONDS = 3600
_STYLES = {"worker 1": "cyan", "worker 2": "magenta"}


def demo() -> None:
    """Watch a task survive the kill of its worker. Needs no set-up: PostgreSQL comes with the `embedded` extra.

    A research task runs in a worker process, which is killed with SIGKILL in the middle of a step. Another worker takes
    over. A file outside the database counts how often each step was executed: those that had finished before the kill
    must not run again. Takes about 15 seconds. The exit code is 0 only if that held.
    """
    with reported():
        if not asyncio.run(_demo()):
            raise Exit(WRONG)


async def _demo() -> bool:
    from ..embedded import server

    output = Output(as_json=False)
    with output.console.status("Starting PostgreSQL ..."):
        url = server().url()
    async with _client(url) as durable:
        output.say("PostgreSQL runs, and has durable's tables.")
        with tempfile.TemporaryDirectory(prefix="durable-demo-") as directory:
            return await Stage(durable, url, Path(directory), output).play()


@asynccontextmanager
async def _client(url: URL) -> AsyncGenerator[Durable]:
    """A client with a queue of its own; what demos of earlier days have left is removed."""
    async with Durable(url, queue_name=f"{_QUEUE_PREFIX}{secrets.token_hex(3)}", tasks=[research]) as durable:
        await durable.migrate()
        old = await durable.database.execute(
            inspection.OLD_QUEUES, {"prefix": _QUEUE_PREFIX, "age": float(_KEEP_SECONDS)}
        )
        for row in old:
            await durable.drop_queue(row.queue_name)
        await durable.create_queue()
        yield durable


class Stage:
    """One performance."""

    def __init__(self, durable: Durable, url: URL, directory: Path, output: Output) -> None:
        self.durable = durable
        self.output = output
        self._url = url.render_as_string(hide_password=False)
        self._ledger = directory / "ledger"
        self._ledger.touch()
        self._log = directory / "log"
        self._workers: dict[int, str] = {}
        self._shown = 0

    async def play(self) -> bool:
        """Run the task with a kill in the middle, and say whether all that was promised came true."""
        spawned = await self.durable.spawn(research, Question(topic="durable execution"))
        self._tell(f"Spawned task {spawned.task_id}: research on durable execution.")
        with self.output.console.status("Working ..."):
            with self._worker("worker 1") as first:
                await self._watch(first, spawned, _KILLED_IN)
                await asyncio.sleep(0.2)
                first.send_signal(signal.SIGKILL)
                first.wait()
            finished = await self._finished_steps(spawned.task_id)
            self._tell(f"\nworker 1 is killed with SIGKILL in a step, after {len(finished)} finished ones.", "bold red")
            with self._worker("worker 2") as second:
                self._tell(f"It takes over when worker 1 has been silent for {_CLAIM_TIMEOUT} seconds.\n")
                await self._watch(second, spawned)
        result = await self.durable.wait_for_result(spawned)
        entries = self._entries()
        await self._show_timeline(spawned.task_id)
        self._show_executions(entries)
        return self._judge(result, entries, finished)

    @contextmanager
    def _worker(self, name: str) -> Generator[subprocess.Popen[bytes]]:
        """A worker in a process of its own, as `durable worker` starts it anywhere."""
        command = [sys.executable, "-m", "durable_sa.cli", "worker", "durable_sa.cli.research:durable"]
        options = {
            "--queue": self.durable.queue_name,
            "--concurrency": "4",
            "--claim-timeout": str(_CLAIM_TIMEOUT),
            "--worker-id": name,
        }
        arguments = [part for option in options.items() for part in option]
        environment = {**os.environ, "DURABLE_DATABASE_URL": self._url, LEDGER_VARIABLE: str(self._ledger)}
        with self._log.open("ab") as log:
            process = subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log)
        self._workers[process.pid] = name
        self._tell(f"{name} starts (process {process.pid}).")
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

    def _entries(self) -> list[Entry]:
        """The ledger; what is new in it is shown."""
        entries = read_ledger(self._ledger)
        for entry in entries[self._shown :]:
            name = self._workers[entry.pid]
            self._tell(f"  {name}  {entry.step} {entry.event}", _STYLES[name])
        self._shown = len(entries)
        return entries

    async def _watch(
        self, worker: subprocess.Popen[bytes], task: SpawnResult[Report], until_step: str | None = None
    ) -> None:
        """Show what the worker does, until the step begins or the task has ended."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            if any(entry.step == until_step and entry.event == "begins" for entry in self._entries()):
                return
            result = await self.durable.get_task_result(task)
            if result is not None and result.status.finished:
                return
            if worker.poll() is not None or time.monotonic() > deadline:
                self._tell(self._log.read_text(errors="replace"))
                self._show_executions(self._entries())
                raise InvalidState("the worker", "gone" if worker.poll() is not None else "making no progress")
            await asyncio.sleep(0.05)

    async def _history(self, task_id: uuid.UUID) -> history.History:
        loaded = await history.load(self.durable.database, task_id)
        if loaded is None:
            raise TaskNotFound(task_id)
        return loaded

    async def _finished_steps(self, task_id: uuid.UUID) -> list[str]:
        """The steps whose results are in the database, asked when the worker is dead."""
        checkpoints = (await self._history(task_id)).checkpoints
        stored = sum(checkpoint["kind"] == "step" for checkpoint in checkpoints)
        return [entry.step for entry in self._entries() if entry.event == "ends"][:stored]

    async def _show_timeline(self, task_id: uuid.UUID) -> None:
        self._tell("\nWhat the database says:", "bold")
        (await self._history(task_id)).print_timeline(self.output)

    def _show_executions(self, entries: Sequence[Entry]) -> None:
        counts = Counter((entry.step, self._workers[entry.pid]) for entry in entries if entry.event == "begins")
        columns = {"step": "step", **{name: name for name in self._workers.values()}}
        rows = [
            {"step": step, **{name: counts[step, name] or "-" for name in self._workers.values()}}
            for step in dict.fromkeys(entry.step for entry in entries)
        ]
        self._tell("What the steps wrote into a file, outside of the database: how often each was executed.", "bold")
        self.output.print_table(rows, columns)

    def _judge(self, result: TaskPollResult[Report], entries: Sequence[Entry], finished: Sequence[str]) -> bool:
        executions = Counter(entry.step for entry in entries if entry.event == "begins")
        again = [step for step in finished if executions[step] != 1]
        if result.status is not TaskStatus.COMPLETED or result.output is None:
            self._tell(f"The task has {result.status}: {result.error}", "bold red")
            return False
        self._tell(f"Result: {result.output.summary}")
        if again or not finished:
            self._tell(f"It did not hold. Executed more than once: {', '.join(again) or 'nothing'}.", "bold red")
            return False
        self._tell(
            f"It held: {len(finished)} steps were finished before the kill, and none of them ran again. "
            "The one that the kill cut off did.",
            "bold green",
        )
        if "DURABLE_DATABASE_URL" not in os.environ:
            self._tell(f"Look at it yourself: durable tasks show {result.task_id}")
        return True

    def _tell(self, text: str, style: str = "") -> None:
        self.output.console.print(text, style=style, soft_wrap=True)
