"""The planned end of a worker's process: after a number of runs, or above an amount of memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_memory() -> int:
    """Return the bytes of memory that the process occupies; where there is no /proc, the most that it ever has."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Lifetime:
    """Counts the runs of a worker, and looks at its memory after each. At a limit it calls `on_end` with the reason."""

    def __init__(self, max_runs: int | None, max_memory: int | None, on_end: Callable[[str], None]) -> None:
        self._max_runs = max_runs
        self._max_memory = max_memory
        self._on_end = on_end
        self._runs = 0

    def most(self, wanted: int) -> int:
        """Return how many of the wanted runs may be claimed."""
        return wanted if self._max_runs is None else min(wanted, self._max_runs - self._runs)

    def claimed(self, count: int) -> None:
        """Count claimed runs."""
        if self._max_runs is not None and count:
            self._runs += count
            if self._runs >= self._max_runs:
                self._on_end(f"has claimed {self._runs} run{'' if self._runs == 1 else 's'}")

    def run_ended(self) -> None:
        """Look at the memory, which takes 10 µs."""
        if self._max_memory is not None and (used := resident_memory()) > self._max_memory:
            self._on_end(f"occupies {used / 2**20:.0f} MiB of memory, and may occupy {self._max_memory / 2**20:.0f}")
