"""The output of commands: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, cast

from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Row

from . import tables

_UNLIMITED = 10_000
"""Width in columns of an output that is not a terminal, so that nothing is wrapped or cut off."""

_STYLES = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "sleeping": "blue",
}


def make_console(*, stderr: bool = False) -> Console:
    """Create a console that prints text without markup and, where it is not a terminal, without wrapping."""
    stream = sys.stderr if stderr else sys.stdout
    # Python has none for a descriptor that is closed.
    width = None if stream is not None and stream.isatty() else _UNLIMITED  # pyright: ignore[reportUnnecessaryComparison]
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


class Output:
    """Prints results as text or as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = make_console()

    def json(self, data: Any) -> None:
        """Print data as JSON, with times in ISO 8601 and durations in seconds."""
        print(to_json(data, indent=2, timedelta_mode="float").decode(), flush=True)  # noqa: T201

    def say(self, message: str, /, **data: Any) -> None:
        """Print a sentence, or the data as JSON."""
        if self.as_json:
            self.json(data)
        else:
            self.console.print(clean(message), soft_wrap=True)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, empty: str) -> None:
        """Print a table, with `columns` mapping keys to headings; or the whole rows as JSON."""
        if self.as_json:
            self.json(rows)
        elif rows:
            self.print_table(rows, columns)
        else:
            self.console.print(empty)

    def print_table(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, headed: bool = True
    ) -> None:
        """Print a table, also if JSON was requested: for a terminal as wide as it is, else with tabs between cells."""
        headings = list(columns.values()) if headed else None
        cells = [[shown(row[key]) for key in columns] for row in rows]
        if not self.console.is_terminal:
            lines = map(tables.plain_line, [*([headings] if headings else []), *cells])
            print("\n".join(lines), flush=True)  # noqa: T201 - a console would expand the tabs
            return
        unbroken = {number for number, key in enumerate(columns) if key.endswith(("_id", "_at"))}
        for text in tables.render(headings, cells, self.console.width, _STYLES, unbroken=unbroken):
            self.console.print(text, soft_wrap=True)

    def heading(self, text: str) -> None:
        """Print the heading of a section, below an empty line."""
        self.console.print(f"\n{clean(text)}", style="bold", soft_wrap=True)

    def note(self, message: str) -> None:
        """Print a remark on stderr, where it does not mix with the result."""
        make_console(stderr=True).print(clean(message), soft_wrap=True)

    @contextmanager
    def paged(self, *, enabled: bool) -> Generator[None]:
        """Show what is printed through the pager if it is longer than the terminal.

        The pager is `PAGER`, else `less`. Without a terminal, or without a pager, everything is printed.
        """
        pager = shlex.split(os.environ.get("PAGER") or "less")
        if not enabled or self.as_json or not self.console.is_terminal or not shutil.which(pager[0]):
            yield
            return
        with self.console.capture() as captured:
            yield
        text = captured.get()
        if text.count("\n") < self.console.height:
            self.console.file.write(text)
            return
        self.console.file.flush()
        subprocess.run(pager, input=text, text=True, check=False, env={"LESS": "FRX", **os.environ})

    @contextmanager
    def progress(self, label: str) -> Generator[Callable[[int, int | None], None]]:
        """Show a progress bar on stderr; yields a function of the number done and, if it is known, of that of all."""
        console = make_console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def as_dicts(rows: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    """Convert rows to dictionaries by column name, and Decimal, the type of selected seconds, to float."""
    return [
        {key: float(value) if isinstance(value, Decimal) else value for key, value in row._mapping.items()}  # pyright: ignore[reportPrivateUsage]
        for row in rows
    ]


def shown(value: object) -> str:
    """Format a value for people."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, cast(list[object], value)))
    return clean(str(value))


def clean(text: str) -> str:
    """Escape control characters, so that the text cannot control the terminal."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode("ascii") for char in text
    )
