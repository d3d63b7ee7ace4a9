"""What commands print: tables and sentences for people, JSON for programs."""

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
"""Columns of an output that is no terminal: nothing is wrapped or cut off there."""

_STYLES = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "sleeping": "blue",
}


def make_console(*, stderr: bool = False) -> Console:
    """A console that cuts nothing off where no terminal is, and takes no text for markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _UNLIMITED
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


class Output:
    """Prints each result in the form that was asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = make_console()

    def json(self, data: Any) -> None:
        """Print data as JSON. Times are ISO 8601, spans of time are seconds."""
        print(to_json(data, indent=2, timedelta_mode="float").decode())  # noqa: T201

    def say(self, message: str, **data: Any) -> None:
        """Print a sentence; as JSON, the data."""
        if self.as_json:
            self.json(data)
        else:
            self.console.print(clean(message), soft_wrap=True)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, empty: str) -> None:
        """Print rows under the headings that `columns` gives their keys; as JSON, all that is in the rows."""
        if self.as_json:
            self.json(rows)
        elif rows:
            self.print_table(rows, columns)
        else:
            self.console.print(empty)

    def print_table(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
        """Print a table for people."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for key, heading in columns.items():
            table.add_column(heading, overflow="fold", no_wrap=key.endswith(("_id", "_at")), min_width=len(heading))
        for row in rows:
            table.add_row(*(cell(row[key]) for key in columns))
        self.console.print(table)

    @contextmanager
    def progress(self, label: str, total: int | None) -> Generator[Callable[[int], None]]:
        """A bar on stderr while something takes long; gives a function that says how much more is done."""
        console = make_console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)


def as_dicts(rows: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    """Rows by the names of their columns; numbers of seconds, which come as Decimal, as floats."""
    return [
        {key: float(value) if isinstance(value, Decimal) else value for key, value in row._mapping.items()}  # pyright: ignore[reportPrivateUsage]
        for row in rows
    ]


def cell(value: Any) -> Text:
    """A value in a table."""
    text = shown(value)
    return Text(text, style=_STYLES.get(text, ""))


def shown(value: object) -> str:
    """A value for people."""
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
    """Text that cannot drive the terminal: control characters are written as escapes."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def span(seconds: float | None) -> str:
    """A span of time in its two largest units, such as `2 h 5 min`."""
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
