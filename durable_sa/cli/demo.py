"""`durable demo`: a task survives the kill of the worker that runs it."""

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
from ..errors import InvalidState
from ..statements import inspection
from . import history
from .connection import place
from .invocation import FAILED, exit_on_errors, exit_on_package_errors
from .output import Output
from .research import LEDGER_VARIABLE, Entry, Question, Report, read_ledger, research

_QUEUE_PREFIX = "demo-"
_KILLED_IN = "read a book on durable execution"
_CLAIM_TIMEOUT = 1.5
_PROGRESS_TIMEOUT = 40.0
_KEEP_SECONDS = 3600
_STYLES = {"worker 1": "cyan", "worker 2": "magenta"}


def demo() -> None:
    """Watch a task survive the kill of its worker. Needs no setup: the `embedded` extra contains PostgreSQL.

    A research task runs in a worker process, which is killed with SIGKILL in the middle of a step. Another worker takes
    over. A file outside the database counts how often each step was executed: steps that were finished before the kill
    must not be executed a second time, or the exit code is 1. Takes about 15 seconds.
    """
    output = Output(as_json=False)
    with exit_on_package_errors(), output.console.status("Starting PostgreSQL ..."):
        from ..embedded import server

        url = server().url()
    output.note(f"database: {place(url)}")
    with exit_on_errors(url):
        if not asyncio.run(_demo(url, output)):
            raise Exit(FAILED)


async def _demo(url: URL, output: Output) -> bool:
    async with _client(url) as durable:
        output.say("PostgreSQL is running, and durable's tables are created.")
        with tempfile.TemporaryDirectory(prefix="durable-demo-") as directory:
            return await Stage(durable, url, Path(directory), output).play()


@asynccontextmanager
async def _client(url: URL) -> AsyncGenerator[Durable]:
    """Open a client with a queue of its own, and drop the queues that earlier demos have left."""
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
    """One run of the demo: its worker processes, their ledger and log."""

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
        """Run the task, kill its worker, and return whether no finished step was executed twice."""
        spawned = await self.durable.spawn(research, Question(topic="durable execution"))
        self._tell(f"Spawned task {spawned.task_id}: research on durable execution.")
        with self.output.console.status("Working ..."):
            with self._worker("worker 1") as first:
                await self._watch(first, spawned, _KILLED_IN)
                await asyncio.sleep(0.2)
                first.send_signal(signal.SIGKILL)
                first.wait()
            finished = await self._finished_steps(spawned.task_id)
            self._tell(
                f"\nworker 1 was killed with SIGKILL during a step, after {len(finished)} finished steps.", "bold red"
            )
            with self._worker("worker 2") as second:
                self._tell(f"worker 2 takes over once worker 1 has been silent for {_CLAIM_TIMEOUT} seconds.\n")
                await self._watch(second, spawned)
        result = await self.durable.wait_for_result(spawned)
        entries = self._entries()
        await self._show_timeline(spawned.task_id)
        self._show_executions(entries)
        return self._judge(result, entries, finished)

    @contextmanager
    def _worker(self, name: str) -> Generator[subprocess.Popen[bytes]]:
        """Start a worker in a process of its own, with the command `durable worker`."""
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
        self._tell(f"{name} started (process {process.pid}).")
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()

    def _entries(self) -> list[Entry]:
        """Read the ledger, and print its new entries."""
        entries = read_ledger(self._ledger)
        for entry in entries[self._shown :]:
            name = self._workers[entry.pid]
            self._tell(f"  {name}  {entry.step} {entry.event}", _STYLES[name])
        self._shown = len(entries)
        return entries

    async def _watch(
        self, worker: subprocess.Popen[bytes], task: SpawnResult[Report], until_step: str | None = None
    ) -> None:
        """Print the worker's ledger entries until the step begins or the task has ended."""
        deadline = time.monotonic() + _PROGRESS_TIMEOUT
        while True:
            if any(entry.step == until_step and entry.event == "begins" for entry in self._entries()):
                return
            result = await self.durable.get_task_result(task)
            if result is not None and result.status.finished:
                return
            if worker.poll() is not None or time.monotonic() > deadline:
                self._tell(self._log.read_text(errors="replace"))
                self._show_executions(self._entries())
                raise InvalidState(
                    "the worker", "no longer running" if worker.poll() is not None else "making no progress"
                )
            await asyncio.sleep(0.05)

    async def _finished_steps(self, task_id: uuid.UUID) -> list[str]:
        """Return the steps whose results are in the database; called after the worker was killed."""
        recorded = await self.durable.get_history(task_id)
        stored = sum((entry.kind, entry.status) == ("step", "completed") for entry in recorded)
        return [entry.step for entry in self._entries() if entry.event == "ends"][:stored]

    async def _show_timeline(self, task_id: uuid.UUID) -> None:
        self._tell("\nThe history in the database:", "bold")
        task, recorded = await self.durable.get_task(task_id), await self.durable.get_history(task_id)
        history.print_timeline(history.timeline(task, recorded), self.output, everything=True)

    def _show_executions(self, entries: Sequence[Entry]) -> None:
        counts = Counter((entry.step, self._workers[entry.pid]) for entry in entries if entry.event == "begins")
        columns = {"step": "step", **{name: name for name in self._workers.values()}}
        rows = [
            {"step": step, **{name: counts[step, name] or "-" for name in self._workers.values()}}
            for step in dict.fromkeys(entry.step for entry in entries)
        ]
        self._tell("Executions of each step, counted in a file outside the database:", "bold")
        self.output.print_table(rows, columns)

    def _judge(self, result: TaskPollResult[Report], entries: Sequence[Entry], finished: Sequence[str]) -> bool:
        executions = Counter(entry.step for entry in entries if entry.event == "begins")
        repeated = [step for step in finished if executions[step] != 1]
        if result.status is not TaskStatus.COMPLETED or result.output is None:
            self._tell(f"The task is {result.status}: {result.error}", "bold red")
            return False
        self._tell(f"Result: {result.output.summary}")
        if not finished:
            self._tell("Not shown: no step was finished before the kill.", "bold red")
            return False
        if repeated:
            self._tell(f"Not held: finished steps were executed more than once: {', '.join(repeated)}.", "bold red")
            return False
        self._tell(
            f"Held: {len(finished)} steps were finished before the kill, and none of them was executed again. "
            "Only the interrupted step was repeated.",
            "bold green",
        )
        self._tell(f"Show the task: durable tasks show {result.task_id} --embedded")
        return True

    def _tell(self, text: str, style: str = "") -> None:
        self.output.console.print(text, style=style, soft_wrap=True)
