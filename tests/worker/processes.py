"""Workers in processes of their own, which tests stop, continue and kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import URL


class WorkerProcess:
    """One run of `tests.worker.program`; `name` is the label of its row in `workers`.

    `under` is a command that it runs under, in another network or with another clock.
    """

    def __init__(self, url: URL, ledger: Path, name: str, *, under: Sequence[str] = (), **options: Any) -> None:
        self.name = name
        self.log = ledger.with_name(f"{name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(*under, sys.executable, "-W", "error", "-m", "tests.worker.program"),
                    *(str(ledger), json.dumps({"worker_id": name, **options})),
                ],
                env={
                    **os.environ,
                    "DURABLE_DATABASE_URL": url.render_as_string(hide_password=False),
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self, within: float = 20.0) -> int:
        """Wait for its end."""
        return await asyncio.to_thread(self.process.wait, within)

    def end(self) -> None:
        """Make sure that it has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
