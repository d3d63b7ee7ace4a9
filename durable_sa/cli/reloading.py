"""`durable worker --reload`: the same command in a child process, restarted when a file changes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .output import make_console

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 3.0
_RELEASE_SECONDS = 12.0
"""Longer than the 6 seconds after which code in a thread is left behind, and a write."""
_IGNORED = frozenset({"__pycache__", "node_modules", "site-packages"})


def supervise(directories: Sequence[Path]) -> int:
    """Run this command without `--reload`, and restart it after each change of a Python file below the directories.

    Returns the exit code 0 after SIGTERM or SIGINT. A worker that exits by itself, for instance because of a syntax
    error, is restarted at the next change.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    console = make_console(stderr=True)
    command = [sys.executable, "-m", "durable_sa.cli", *(part for part in sys.argv[1:] if part != "--reload")]
    child = subprocess.Popen(command)
    try:
        for path in changes(directories, stopping):
            console.print(f"{path} changed, restarting", soft_wrap=True)
            _stop(child)
            child = subprocess.Popen(command)
    finally:
        _stop(child)
    return 0


def changes(directories: Sequence[Path], stopping: threading.Event) -> Iterator[Path]:
    """Yield a changed, new or removed Python file after each change, until `stopping` is set."""
    known = _times(directories)
    while not stopping.wait(_POLL_SECONDS):
        current = _times(directories)
        changed = {path for path, _ in known.items() ^ current.items()}
        known = current
        if changed:
            yield min(changed)


def _times(directories: Sequence[Path]) -> dict[Path, int]:
    """Return when each file was last changed, without virtual environments and hidden directories."""
    times: dict[Path, int] = {}
    pending = list(directories)
    while pending:
        entries: list[Path] = []
        with contextlib.suppress(OSError):
            entries.extend(pending.pop().iterdir())
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _IGNORED:
                continue
            # A dangling link, or a file that was just deleted, is skipped.
            with contextlib.suppress(OSError):
                if entry.is_dir():
                    if not (entry / "pyvenv.cfg").exists():
                        pending.append(entry)
                elif entry.suffix == ".py":
                    times[entry] = entry.stat().st_mtime_ns
    return times


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Stop a worker: by SIGTERM, by a second SIGTERM, which gives its runs back at once, and then by SIGKILL."""
    for end, seconds in ((child.terminate, _GRACE_SECONDS), (child.terminate, _RELEASE_SECONDS), (child.kill, None)):
        _send(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return


def _send(end: Callable[[], None]) -> None:
    with contextlib.suppress(ProcessLookupError):
        end()
