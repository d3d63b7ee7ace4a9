"""Tables that fit the width of a terminal without losing a character.

Columns that do not fit beside the others continue on indented lines below, the headings likewise. Text is wrapped at
words, and ids and times are never broken, so that they can be copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.text import Text

_GAP = 2
_INDENT = 4
_NARROWEST = 36
"""Width of an id: text that contains one is not wrapped to less, unless the terminal is narrower."""

_PIECE = re.compile(r"[^-_./:,;@=]*[-_./:,;@=]+|[^-_./:,;@=]+")

Styles = Mapping[str, str]


def plain_line(cells: Sequence[str]) -> str:
    """Return a row as one line with tabs between the cells, for other programs."""
    return "\t".join(cell.replace("\n", "\\n") for cell in cells)


def render(
    headings: Sequence[str] | None, rows: Sequence[Sequence[str]], width: int, styles: Styles, *, unbroken: set[int]
) -> Iterator[Text]:
    """Yield the lines of a table at most `width` cells wide; `unbroken` are the columns that are never wrapped."""
    lines = _arrange([*([headings] if headings else []), *rows], width, unbroken)
    if headings:
        rendered = list(_render_row(headings, lines, {}))
        for line in rendered:
            line.stylize("bold")
            yield line
        yield Text("-" * max(_INDENT * (number > 0) + _width(line) for number, line in enumerate(lines)))
    for row in rows:
        yield from _render_row(row, lines, styles)


_Line = dict[int, int]
"""The columns that share a line, with their widths."""


def _width(line: _Line) -> int:
    return sum(line.values()) + _GAP * (len(line) - 1)


def _arrange(rows: Sequence[Sequence[str]], width: int, unbroken: set[int]) -> list[_Line]:
    """Distribute the columns over lines, and the room that is left among columns whose text would be wrapped."""
    natural = [max(_natural_width(cell) for cell in column) for column in zip(*rows, strict=True)]
    longest = max(_NARROWEST, width // 3)
    lines: list[_Line] = [{}]
    for column, wanted in enumerate(natural):
        least = wanted if column in unbroken else min(wanted, longest)
        line = lines[-1]
        room = width - (_INDENT if len(lines) > 1 else 0)
        if line and _width({**line, column: least}) > room:
            lines.append({})
            line, room = lines[-1], width - _INDENT
        line[column] = min(least, room)
    for number, line in enumerate(lines):
        for column in line:
            spare = width - (_INDENT if number else 0) - _width(line)
            line[column] += max(0, min(natural[column] - line[column], spare))
    return lines


def _natural_width(cell: str) -> int:
    return max((cell_len(line) for line in cell.split("\n")), default=0)


def _render_row(cells: Sequence[str], lines: Sequence[_Line], styles: Styles) -> Iterator[Text]:
    for number, line in enumerate(lines):
        if number and not any(cells[column] for column in line):
            continue
        wrapped = [list(wrap(cells[column], width)) for column, width in line.items()]
        for parts in zip_longest(*wrapped, fillvalue=""):
            text = Text(" " * _INDENT if number else "")
            for (column, width), part in zip(line.items(), parts, strict=True):
                text.append(part, styles.get(cells[column], ""))
                text.append(" " * (width - cell_len(part) + _GAP))
            text.rstrip()
            yield text


def wrap(text: str, width: int) -> Iterator[str]:
    """Wrap text at its spaces; a word that is too long is broken behind punctuation, else anywhere."""
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if cell_len(joined) <= width:
                line = joined
                continue
            if line:
                yield line
            *full, line = _broken(word, width)
            yield from full
        yield line


def _broken(word: str, width: int) -> list[str]:
    parts = [""]
    for piece in _PIECE.findall(word) if cell_len(word) > width else [word]:
        if parts[-1] and cell_len(parts[-1] + piece) > width:
            parts.append("")
        for character in piece:
            if parts[-1] and cell_len(parts[-1] + character) > width:
                parts.append("")
            parts[-1] += character
    return parts
