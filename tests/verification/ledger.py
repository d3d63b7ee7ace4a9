"""What processes write down outside of the database: lines of JSON, a file a process, there even after a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Ledger:
    """Appends to a file of its own. A line is one write, so no kill leaves half of one before another."""

    def __init__(self, directory: Path, name: str) -> None:
        self._descriptor = os.open(directory / f"{name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, what: str, **details: Any) -> None:
        """Note that something happens."""
        entry = {"what": what, "pid": os.getpid(), "at": time.monotonic(), **details}
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")


def entries(directory: Path) -> Iterator[dict[str, Any]]:
    """What all processes have written, each in its order."""
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            yield json.loads(line)
