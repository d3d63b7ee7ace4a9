"""What the reference has that is no page: the commands' help texts, the table of errors, and docstrings as Markdown.

mkdocs calls `on_page_markdown` for each page; a page asks for a part by a comment, such as `<!-- commands -->`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Iterator
from typing import Any

import griffe
import typer.main
from opentelemetry.metrics import Meter
from sqlalchemy.dialects import postgresql

from durable_sa import errors, models
from durable_sa.cli.app import app
from durable_sa.serialization.failures import is_retryable
from durable_sa.telemetry.meters import Meters

WIDTH = 96


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated parts where a page asks for them."""
    parts = {"commands": commands, "errors": table_of_errors, "columns": columns, "metrics": metrics}

    def generated(found: re.Match[str]) -> str:
        return "\n".join(parts[found[1]](*found[2].split()))

    return re.sub(rf"<!-- ({'|'.join(parts)})((?: \w+)*) -->", generated, markdown)


def commands() -> Iterator[str]:
    """Each command with its help text, as the command line prints it without colours and boxes."""
    root = typer.main.get_command(app)
    for path, command in _walk(root, ()):
        command.rich_markup_mode = None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            root([*path, "--help"], prog_name="durable", terminal_width=WIDTH, max_content_width=WIDTH)
        yield f"{'##' if len(path) < 2 else '###'} {' '.join(('durable', *path))}\n"
        yield f"```text\n{printed.getvalue().rstrip()}\n```\n"


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*path, name))


def table_of_errors() -> Iterator[str]:
    """The errors in the order of their module: when each is raised, and whether a task that raises it is retried."""
    yield "| error | also a | when | retried in a task |\n| --- | --- | --- | --- |"
    for name, error in vars(errors).items():
        if not (inspect.isclass(error) and issubclass(error, errors.DurableError)):
            continue
        bases = [base.__name__ for base in error.__bases__ if not issubclass(base, errors.DurableError)]
        others = ", ".join(f"`{base}`" for base in bases if base != "Exception")
        summary = " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())
        retried = "" if error.__subclasses__() else "yes" if is_retryable(error.__new__(error)) else "no"
        yield f"| [`{name}`][durable_sa.{name}] | {others} | {summary} | {retried} |"


def columns(model: str) -> Iterator[str]:
    """The columns of a mapped class, with the comments they have in the database."""
    yield "| column | type | |\n| --- | --- | --- |"
    for column in getattr(models, model).__table__.columns:
        kind = column.type.compile(dialect=postgresql.dialect()).lower()
        yield f"| `{column.name}` | {kind}{', null' if column.nullable else ''} | {column.comment or ''} |"
    yield ""


def metrics() -> Iterator[str]:
    """The instruments that are made on a meter."""
    rows: list[str] = []

    class Listing:
        def __getattr__(self, method: str) -> Any:
            signature = inspect.signature(getattr(Meter, method))

            def create(*args: Any, **options: Any) -> None:
                given = signature.bind(self, *args, **options).arguments
                kind = method.removeprefix("create_").removeprefix("observable_")
                rows.append(f"| `{given['name']}` | {kind} | {given.get('unit', '')} | {given['description']} |")

            return create

    meter: Any = Listing()
    Meters(meter)
    yield "| metric | kind | unit | |\n| --- | --- | --- | --- |"
    yield from rows


class Roles(griffe.Extension):
    """Turns the roles in docstrings, such as ``:meth:`spawn```, into what Markdown has for them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            text = re.sub(r":(?:meth|class|func):`([^`]+)`", _link, obj.docstring.value)
            obj.docstring.value = re.sub(r"(?<!`)``(?!`)", "`", text)


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f"[`{name.removeprefix('durable_sa.')}`][{name}]" if name.startswith("durable_sa.") else f"`{name}`"
