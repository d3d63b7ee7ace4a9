"""`durable worker --processes N`: the process that starts the workers' processes, and replaces those that end.

It imports nothing of the application, runs no task and has no connection, so that neither can end or block it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from typing import Any

from ..errors import InvalidConfiguration
from ..worker.health import Answer, start_probes
from ..worker.interrupts import ENDING_TIMEOUT, RELEASING, SIGNALS, is_for_nohup
from .children import Child, Overdue
from .invocation import FAILED, OK, USAGE

logger = logging.getLogger("durable_sa")

FIRST_PAUSE = 0.1
"""Seconds before a process is restarted that has ended unplanned; they double with each such end in a row."""
LONGEST_PAUSE = 2.0
"""The longest pause if the worker had started. Tasks that kill their process hold up the others for so long."""
LONGEST_PAUSE_BEFORE_START = 30.0
"""The longest pause if it had not: the application or the database has to change first."""
STEADY_AFTER = 30.0
"""Seconds after which the end of a process counts as the first in a row."""
ACTING_GRACE = 1.0
"""Seconds past a `hard_timeout` after which a process is killed that does not act on it itself."""
GIVING_BACK_GRACE = 20.0
"""Seconds that a process which acts on a `hard_timeout` has for giving its other runs back and ending: its threads may
take 6, its last writes 10."""
PROBE_TIMEOUT = 3.0


class Watcher:
    """Keeps `count` processes running until a signal ends them."""

    def __init__(self, command: list[str], count: int, shutdown_timeout: float, health_port: int | None) -> None:
        self._command = command
        self._count = count
        self._shutdown_timeout = shutdown_timeout
        self._health_port = health_port
        self._loop = asyncio.get_running_loop()
        self._children: dict[int, Child] = {}
        self._ends: dict[int, int] = dict.fromkeys(range(1, count + 1), 0)
        """How many unplanned ends in a row each process has had."""
        self._planned: set[int] = set()
        """Processes whose replacement is planned, until that has started."""
        self._restarts: dict[int, asyncio.TimerHandle] = {}
        self._lost: dict[str, tuple[Overdue | None, Child | None]] = {}
        """Workers whose runs are to be settled, and the process that does it."""
        self._signals = 0
        self._stopping = False
        self._exit_code = OK
        self._ended = asyncio.Event()

    async def run(self) -> int:
        """Watch until all processes have ended after a signal, and return the exit code.

        Raises:
            InvalidConfiguration: the port for probes cannot be had.
        """
        probes: asyncio.Server | None = None
        if self._health_port is not None:
            try:
                probes = await start_probes(None, self._health_port, live=self._live, ready=self._ready)
            except OSError as error:
                problem = f"{self._health_port} cannot be had: {error.strerror}"
                raise InvalidConfiguration("health_port", problem) from error
        for number in SIGNALS:
            if not is_for_nohup(number):
                self._loop.add_signal_handler(number, self._signalled, number)
        self._loop.add_signal_handler(signal.SIGCHLD, self._look)
        for number in self._ends:
            self._start(number)
        logger.info("watching %d processes", self._count)
        await self._ended.wait()
        if probes is not None:
            probes.close()
        return self._exit_code

    def _start(self, number: int) -> None:
        self._restarts.pop(number, None)
        try:
            self._children[number] = Child(number, self._command, self._reported)
        except OSError as error:
            logger.error("process %d cannot be started: %s", number, error.strerror)
            self._restart(number, LONGEST_PAUSE_BEFORE_START)

    def _restart(self, number: int, pause: float) -> None:
        self._restarts[number] = self._loop.call_later(pause, self._start, number)

    def _look(self) -> None:
        """Take note of the processes that have ended."""
        for child in list(self._children.values()):
            if child.process.poll() is not None:
                self._child_ended(child)

    def _child_ended(self, child: Child) -> None:
        code = child.process.returncode
        child.close()
        del self._children[child.number]
        if child.worker_id is not None and (code != OK or child.overdue is not None):
            self._lost[child.worker_id] = child.overdue, None
        for worker_id, (overdue, settler) in self._lost.items():
            if settler is child:
                self._lost[worker_id] = overdue, None
        self._settle()
        if self._stopping:
            if not self._children:
                self._ended.set()
        elif child.worker_id is None and code == USAGE:
            # The arguments are at fault, and will be for each process.
            self._exit_code = USAGE
            self._stop("stop")
        else:
            self._replace(child, code)

    def _replace(self, child: Child, code: int) -> None:
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"has ended with exit code {code}"
        if child.ending:
            logger.info("%s %s as planned, and is replaced", child, how)
            self._ends[child.number] = 0
            self._restart(child.number, 0.0)
            return
        self._planned.discard(child.number)
        if time.monotonic() - child.began_at > STEADY_AFTER:
            self._ends[child.number] = 0
        longest = LONGEST_PAUSE_BEFORE_START if child.worker_id is None else LONGEST_PAUSE
        pause = min(longest, FIRST_PAUSE * 2 ** min(self._ends[child.number], 20))
        self._ends[child.number] += 1
        logger.warning("%s %s, and is restarted in %g s", child, how, pause)
        self._restart(child.number, pause)

    def _reported(self, child: Child, report: dict[str, Any]) -> None:
        match report["what"]:
            case "started":
                child.worker_id, child.port = report["worker_id"], report["port"]
                self._planned.discard(child.number)
                self._settle()
            case "ending":
                child.ending = True
                self._planned.add(child.number)
            case "began":
                run = _overdue(report)
                self._kill_in(run.timeout + ACTING_GRACE, child, run)
            case "ended":
                if child.overdue is None:
                    child.forget((report["task_id"], report["fence"]))
            case "overdue":
                # It knows by itself, and gives its other runs back first.
                child.overdue = _overdue(report)
                self._kill_in(GIVING_BACK_GRACE, child, child.overdue)
            case "settled":
                self._lost.pop(report["worker_id"], None)
            case _:
                pass

    def _kill_in(self, seconds: float, child: Child, run: Overdue) -> None:
        child.watch((run.task_id, run.fence), self._loop.call_later(seconds, self._kill, child, run))

    def _kill(self, child: Child, overdue: Overdue) -> None:
        """Kill a process because of a run. Another process then stores the failure, and gives the others back."""
        logger.error(
            "%s is killed: task %s has exceeded its hard_timeout of %g s", child, overdue.task_id, overdue.timeout
        )
        child.ending = True
        self._planned.add(child.number)
        child.overdue = overdue
        child.kill()

    def _settle(self) -> None:
        """Have processes that run settle the runs of those that have ended."""
        able = [child for child in self._children.values() if child.worker_id is not None and not child.ending]
        if not able:
            return
        for worker_id, (overdue, settler) in self._lost.items():
            if settler is None:
                self._lost[worker_id] = overdue, able[0]
                able[0].send("lost", worker_id=worker_id, overdue=None if overdue is None else overdue._asdict())

    def _signalled(self, number: int) -> None:
        self._signals += 1
        self._stop("release" if self._signals > 1 or number == RELEASING else "stop")

    def _stop(self, command: str) -> None:
        for child in self._children.values():
            child.send(command)
        if self._stopping:
            return
        self._stopping = True
        for timer in self._restarts.values():
            timer.cancel()
        if not self._children:
            self._ended.set()
        self._loop.call_later(self._shutdown_timeout + ENDING_TIMEOUT + PROBE_TIMEOUT, self._kill_all)

    def _kill_all(self) -> None:
        """Kill the processes that have not ended, nor ended themselves by force: code holds the interpreter's lock."""
        for child in self._children.values():
            logger.critical("%s does not end, and is killed", child)
            self._exit_code = FAILED
            child.kill()

    async def _live(self) -> Answer:
        """Say if the event loops of all workers turn. A process that starts anew is no reason to restart the others."""
        answers = await self._ask("/live")
        return _together({number: answer for number, answer in answers.items() if answer is not None})

    async def _ready(self) -> Answer:
        """Say if all processes are ready, apart from those whose replacement is planned while others are ready."""
        answers = await self._ask("/ready")
        ready = any(answer is not None and answer[0] for answer in answers.values())
        starting: Answer = False, {"problem": "the process is not running yet"}
        return _together(
            {
                number: answer or starting
                for number, answer in answers.items()
                if not (ready and number in self._planned and not self._stopping)
            }
        )

    async def _ask(self, path: str) -> dict[int, Answer | None]:
        """Return the answer of each process; None of one that has not started."""
        children = {number: self._children.get(number) for number in self._ends}
        answers = await asyncio.gather(*(_probe(child, path) for child in children.values()))
        return dict(zip(children, answers, strict=True))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _overdue(report: dict[str, Any]) -> Overdue:
    return Overdue(report["task_id"], report["fence"], report["timeout"])


async def _probe(child: Child | None, path: str) -> Answer | None:
    if child is None or child.port is None:
        return None
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", child.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
        body: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
        return body.pop("ok"), body
    except (OSError, TimeoutError, ValueError) as error:
        return False, {"problem": f"the process does not answer: {type(error).__name__}"}


def _together(answers: dict[int, Answer]) -> Answer:
    body: dict[str, Any] = {
        "processes": {str(number): {"ok": well, **rest} for number, (well, rest) in answers.items()}
    }
    for number, (well, rest) in answers.items():
        if not well:
            return False, {**body, "problem": f"process {number}: {rest.get('problem', 'it is not well')}"}
    return True, body


def watch(count: int, shutdown_timeout: float, health_port: int | None) -> int:
    """Run this command in `count` processes until a signal ends them, and return the exit code.

    Raises:
        InvalidConfiguration: the port for probes cannot be had.
    """

    async def main() -> int:
        return await Watcher(command, count, shutdown_timeout, health_port).run()

    command = [sys.executable, "-m", "durable_sa.cli", *sys.argv[1:]]
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(main())
    return OK
