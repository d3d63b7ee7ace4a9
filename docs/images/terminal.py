"""Draw what `durable demo` prints as a terminal: `python docs/images/terminal.py` runs it and writes demo.svg.

The demo starts real workers and kills one, so the script takes about 20 seconds and needs the `embedded` and `cli`
extras. It uses an empty database. The table of the task's history is left out of the picture, because its lines are
too long for one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = Path(__file__).with_name("demo.svg")

COLUMNS = 72
CELL = 8.4
LINE = 19
TOP = 58
LEFT = 18

FOREGROUND = "#d6dde6"
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "35": "#d2a8ff", "36": "#79c0ff"}

SGR = re.compile(r"\x1b\[([\d;]*)m")
OTHER_ESCAPES = re.compile(r"\x1b\[[?\d;]*[A-Za-ln-z]")
RULE = re.compile(r" ?[─ ]*─{3,}[─ ]*")

Style = tuple[str, ...]
Span = tuple[str, Style]


def run_demo() -> str:
    """Run the demo on an empty database and return its output, with its colours."""
    with tempfile.TemporaryDirectory(prefix="durable-picture-") as directory:
        variables = {
            **os.environ,
            "FORCE_COLOR": "1",
            "TTY_INTERACTIVE": "0",
            "DURABLE_EMBEDDED_DIR": directory,
        }
        variables.pop("DURABLE_DATABASE_URL", None)
        command = [sys.executable, "-m", "durable_sa.cli", "demo"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return OTHER_ESCAPES.sub("", done.stdout)


def without_history(lines: Sequence[str]) -> list[str]:
    """Leave out the first of the two tables, from its title to the blank line below it."""
    plain = [SGR.sub("", line).rstrip() for line in lines]
    rule = next(
        number for number, line in enumerate(plain) if RULE.fullmatch(line)
    )
    title = next(number for number in range(rule - 2, 0, -1) if plain[number])
    end = plain.index("", rule)
    return [*lines[:title], *lines[end + 1 :]]


def spans(line: str) -> Iterator[Span]:
    """Split a line where its style changes."""
    style: Style = ()
    parts = SGR.split(line)
    for number, part in enumerate(parts):
        if number % 2:
            style = () if part in ("", "0") else tuple(part.split(";"))
        elif part:
            yield part, style


def wrapped(line: str) -> Iterator[list[Span]]:
    """Wrap a line at its words; a line in more than one style, which is a row of a table, stays as it is."""
    found = list(spans(line.rstrip()))
    if len(found) == 1 and len(found[0][0]) > COLUMNS:
        text, style = found[0]
        yield from (
            [(part, style)]
            for part in textwrap.wrap(text, COLUMNS, break_long_words=False)
        )
    else:
        yield found


def draw(lines: Sequence[Sequence[Span]]) -> str:
    """Draw lines in a window."""
    width = round(2 * LEFT + COLUMNS * CELL)
    height = TOP + LINE * len(lines) + 4
    shapes = [
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>',
        f'<path d="M0 8a8 8 0 0 1 8-8h{width - 16}a8 8 0 0 1 8 8v26H0z" fill="#21262d"/>',
        *(
            f'<circle cx="{20 + 18 * number}" cy="17" r="5.5" fill="{fill}"/>'
            for number, fill in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
    ]
    for number, line in enumerate(lines):
        column = 0
        for text, style in line:
            if text.strip():
                shapes.append(
                    draw_text(text, style, column, TOP + LINE * number)
                )
            column += len(text)
    body = "\n".join(shapes)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>The output of durable demo: worker 1 is killed in its fourth step, and worker 2 completes the task</title>
<style>text {{ font: 13.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; \
white-space: pre }}</style>
{body}
</svg>
"""


def draw_text(text: str, style: Style, column: int, y: int) -> str:
    """Draw text of one style, as wide as its cells in whatever font the reader has."""
    shown = text.strip()
    x = LEFT + CELL * (column + len(text) - len(text.lstrip()))
    fill = next(
        (COLOURS[code] for code in style if code in COLOURS), FOREGROUND
    )
    weight = ' font-weight="700"' if "1" in style else ""
    length = (
        f'textLength="{CELL * len(shown):.1f}" lengthAdjust="spacingAndGlyphs"'
    )
    return f'<text x="{x:.1f}" y="{y}" fill="{fill}"{weight} {length}>{escape(shown, quote=False)}</text>'


def main() -> None:
    printed = [
        "\x1b[1m$ durable demo\x1b[0m",
        *without_history(run_demo().splitlines()),
    ]
    PICTURE.write_text(
        draw([part for line in printed for part in wrapped(line)])
    )


if __name__ == "__main__":
    main()
