"""An example application, run as its README says: `alembic`, a web server and workers, driven over HTTP."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import URL

EXAMPLES = Path(__file__).parents[3] / "examples"
PASSWORD = "a secret of tests"


class Application:
    """A directory, a database and processes."""

    def __init__(self, name: str, url: URL, driver: str, logs: Path, **environment: str) -> None:
        self.url = url
        self._directory = EXAMPLES / name
        variable = f"{name.partition('_')[2].upper()}_DATABASE_URL"
        url = url.set(drivername=f"postgresql+{driver}")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DURABLE_")},
            variable: url.render_as_string(hide_password=False),
            "PYTHONPATH": str(self._directory),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        self._logs = logs
        self._processes: list[subprocess.Popen[bytes]] = []

    def alembic(self, *commands: tuple[str, ...]) -> str:
        """Run `alembic` with these arguments, one after another, in one process to save time; what it printed."""
        script = f"from alembic.config import main\nfor command in {commands}: main(command)"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self._directory,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, module: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a process; it and its log."""
        log = self._logs / f"{len(self._processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        return process, log

    def serve(self, module: str, *arguments: str) -> Any:
        """Start a web server on a free port; a client for it."""
        process, log = self.start(module, *arguments)
        found = until(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()), process, log)
        return httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=10)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> Any:
    """Return the value of the condition once it is true, within 30 seconds and while the process lives."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        said = "" if log is None else log.read_text()
        assert process is None or process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    return value


Run = Callable[..., Application]


def has_a_dashboard(http: Any) -> None:
    """Check that the dashboard is shown to the operator, and to no one else."""
    assert http.get("/durable/tasks").status_code == 401
    assert http.get("/durable/tasks", auth=("operator", "guessed")).status_code == 401
    page = http.get("/durable/tasks", auth=("operator", PASSWORD))
    assert page.status_code == 200, page.text
    assert "<h1" in page.text
