"""The output of commands: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, cast

from pydantic_core import to_json
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy import Row

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
    width = None if stream.isatty() else _UNLIMITED
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


class Output:
    """Prints results as text or as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = make_console()

    def json(self, data: Any) -> None:
        """Print data as JSON, with times in ISO 8601 and durations in seconds."""
        print(to_json(data, indent=2, timedelta_mode="float").decode())  # noqa: T201

    def say(self, message: str, **data: Any) -> None:
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

    def print_table(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
        """Print a table, also if JSON was requested."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for key, heading in columns.items():
            table.add_column(heading, overflow="fold", no_wrap=key.endswith(("_id", "_at")), min_width=len(heading))
        for row in rows:
            table.add_row(*(cell(row[key]) for key in columns))
        self.console.print(table)

    @contextmanager
    def progress(self, label: str, total: int | None) -> Generator[Callable[[int], None]]:
        """Show a progress bar on stderr; yields a function that adds to the count."""
        console = make_console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)


def as_dicts(rows: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    """Convert rows to dictionaries by column name, and Decimal, the type of selected seconds, to float."""
    return [
        {key: float(value) if isinstance(value, Decimal) else value for key, value in row._mapping.items()}  # pyright: ignore[reportPrivateUsage]
        for row in rows
    ]


def cell(value: Any) -> Text:
    """Format a value for a table, with the style of a task's state."""
    text = shown(value)
    return Text(text, style=_STYLES.get(text, ""))


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


def span(seconds: float | None) -> str:
    """Format a duration in its two largest units, such as `2 h 5 min`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s"
    rest, parts = round(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        if len(parts) == 2 or (parts and not count):
            break
    return " ".join(parts)
