"""The link of a worker's process to the one that watches it: see `durable worker --processes`.

Both send lines of JSON. Those of the watcher reach a thread, because the event loop may be blocked. The end of the file
shows that the watcher has ended, which ends this process as well.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Literal

VARIABLE: Final = "DURABLE_WORKER_PROCESS"
"""The environment variable with the number of the process and the descriptors of both pipes, `2:5:6`."""

Ending = Literal["stop", "release"]
"""The command to shut down: `stop` lets runs end, `release` gives them back at once."""


class Supervision:
    """One end of the link: reports go to the watcher, commands come from it."""

    def __init__(self, number: int, commands: int, reports: int) -> None:
        self.number = number
        """The number of the process, from 1."""
        self.max_runs: int | None = None
        """The number of runs that the process may claim."""
        self.max_memory: int | None = None
        """Bytes of resident memory above which the process is replaced."""
        self.on_ending: Callable[[Ending], None] = _terminate
        """Called, in the thread, with the command to shut down."""
        self.on_lost: Callable[[dict[str, Any]], None] | None = None
        """Called, in the thread, with a report of another process that has ended without giving its runs back."""
        self._commands = commands
        self._reports = reports
        self._lock = threading.Lock()

    @classmethod
    def of_this_process(cls) -> Supervision | None:
        """Return the link, and start its thread; None for a process that no watcher has started."""
        value = os.environ.pop(VARIABLE, None)
        if value is None:
            return None
        number, commands, reports = map(int, value.split(":"))
        for descriptor in (commands, reports):
            # Processes that tasks start must not keep the pipes open.
            os.set_inheritable(descriptor, False)
        link = cls(number, commands, reports)
        threading.Thread(target=link._listen, name="durable-supervision", daemon=True).start()
        return link

    def report(self, what: str, **details: Any) -> None:
        """Send a report. Safe to call from any thread."""
        line = json.dumps({"what": what, **details}).encode() + b"\n"
        with self._lock, suppress(OSError):  # the watcher has ended
            os.write(self._reports, line)

    def _listen(self) -> None:
        with os.fdopen(self._commands, "rb") as lines:
            for line in lines:
                command = json.loads(line)
                if command["what"] == "lost":
                    if self.on_lost is not None:
                        self.on_lost(command)
                else:
                    self.on_ending(command["what"])
        # The pipes of the log are closed, and must not fail the tasks that print something before they are given back.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        self.on_ending("release")


def _terminate(_: Ending) -> None:
    """End a process whose worker has not begun to start."""
    os.kill(os.getpid(), signal.SIGTERM)
