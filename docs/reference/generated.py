"""Write the generated parts of the reference: `python docs/reference/generated.py`, or `make reference`.

A page asks for a part by a pair of comments, and the part is replaced between them:

    <!-- api durable_sa.RetryStrategy members: none fixed exponential -->
    ...
    <!-- end -->

`api` documents an object from its docstrings and annotations, `text` a module's docstring alone; `commands`, `errors`,
`columns` and `metrics` are read from the package. With `--check` nothing is written, and the exit code is 1 if a page
is out of date.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import griffe
import typer.main
from opentelemetry.metrics import Meter
from sqlalchemy.dialects import postgresql

import durable_sa
from durable_sa import errors, models
from durable_sa.cli.app import app
from durable_sa.serialization.failures import is_retryable
from durable_sa.telemetry.meters import Meters

PAGES = Path(__file__).parent
ROOT = PAGES.parents[1]
WIDTH = 80
"""Characters in a line of code."""

PART = re.compile(r"<!-- (\w+)([^>]*?) -->\n(.*?)<!-- end -->", re.DOTALL)
ROLE = re.compile(r":(?:meth|class|func|data):`([^`]+)`")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SECTIONS = {
    "parameters": "Parameters",
    "raises": "Raises",
    "returns": "Returns",
    "yields": "Yields",
}


class Request(NamedTuple):
    """The object that an `api` comment asks for."""

    path: str
    members: list[str] | None
    """Names of the members in their order; without a list, all public ones that have a docstring."""
    level: int
    constructor: bool
    """Include the signature and the parameters of `__init__`."""


def parse(arguments: str) -> Request:
    """Read the arguments of an `api` comment."""
    options, separator, members = arguments.partition("members:")
    words = options.split()
    level = next(
        (
            int(word.removeprefix("level="))
            for word in words
            if word.startswith("level=")
        ),
        2,
    )
    return Request(
        words[0], members.split() if separator else None, level, "init" in words
    )


@cache
def package() -> Any:
    return griffe.load("durable_sa", search_paths=[ROOT], resolve_aliases=True)


def find(path: str) -> Any:
    return package()[path.removeprefix("durable_sa.")]


def members(request: Request) -> list[Any]:
    """Return the members of an object that its page shows."""
    everything = find(request.path).all_members
    if request.members is not None:
        return [everything[name] for name in request.members]
    return [
        member
        for name, member in everything.items()
        if not name.startswith("_") and is_shown(member)
    ]


def is_shown(member: Any) -> bool:
    """Return whether a public member has a docstring, or is a field that its name explains."""
    if (
        member.docstring is not None
        or not member.is_attribute
        or "property" in member.labels
    ):
        return member.docstring is not None
    return member.annotation is not None or "class-attribute" in member.labels


def title(path: str) -> str:
    """Return the heading of an object: `Durable.spawn` for a method, and never that of another object on the page."""
    parts = path.split(".")
    owner = len(parts) > 2 and find(".".join(parts[:-1])).is_class
    name = ".".join(parts[-2:]) if owner else parts[-1]
    return f"class `{name}`" if find(path).is_class else f"`{name}`"


def slug(heading: str) -> str:
    """Return the anchor of a heading, which is the same on GitHub and on the site."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


@cache
def anchors() -> dict[str, tuple[str, str]]:
    """Return the page and the anchor of each documented object."""
    found: dict[str, tuple[str, str]] = {}
    for page in sorted(PAGES.glob("*.md")):
        for kind, arguments, _ in PART.findall(page.read_text()):
            requests = (
                [parse(arguments)]
                if kind == "api"
                else error_requests()
                if kind == "errors"
                else []
            )
            for request in requests:
                found[request.path] = (page.name, slug(title(request.path)))
                for member in members(request):
                    if member.is_function:
                        path = f"{request.path}.{member.name}"
                        found[path] = (page.name, slug(title(path)))
    return found


def link(path: str, text: str, page: str) -> str:
    """Link to an object if the reference has it."""
    if path not in anchors():
        return f"`{text}`"
    target, anchor = anchors()[path]
    return f"[`{text}`]({'' if target == page else target}#{anchor})"


def markdown(text: str, page: str, owner: str = "") -> str:
    """Turn a docstring into Markdown: roles become links, examples are as narrow as the page."""

    def linked(found: re.Match[str]) -> str:
        name = found[1]
        path = name if name.startswith("durable_sa.") else f"{owner}.{name}"
        return link(path, name.removeprefix("durable_sa."), page)

    text = re.sub(r"(?<!`)``(?!`)", "`", ROLE.sub(linked, text))
    return CODE.sub(lambda found: f"```python\n{formatted(found[1])}```", text)


@cache
def formatted(code: str) -> str:
    """Format code to the width of the pages; a comment that makes a line too long goes above it."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--config",
        f"line-length={WIDTH}",
        "-",
    ]
    done = subprocess.run(
        command,
        input=code,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return re.sub(
        rf"^(?=.{{{WIDTH + 1}}})( *)(.*?)  (# .*)$",
        r"\1\3\n\1\2",
        done.stdout,
        flags=re.MULTILINE,
    )


def signature(function: Any) -> str:
    """Return the signature of a function with what it returns; griffe leaves that out of some."""
    returned = f" -> {function.returns}" if function.returns else ""
    return f"{function.signature().removesuffix(returned)}{returned}"


def signatures(function: Any) -> str:
    """Return the signatures of a function, one for each overload."""
    keyword = "async def" if "async" in function.labels else "def"
    stubs = [
        f"{keyword} {signature(each)}: ...\n"
        for each in function.overloads or [function]
    ]
    return re.sub(r": \.\.\.\n+", "\n", formatted("".join(stubs)))


def class_signature(path: str) -> str:
    """Return the call that makes an object of a class."""
    made = (
        find(path).all_members["__init__"].signature().removesuffix(" -> None")
    )
    stub = made.replace("__init__", f"def {path.rsplit('.', 1)[1]}", 1)
    return (
        formatted(f"{stub}: ...").removeprefix("def ").replace(": ...\n", "\n")
    )


def sections(documented: Any, page: str, owner: str) -> Iterator[str]:
    """Return the docstring of an object, its sections as lists."""
    if documented.docstring is None:
        return
    for section in documented.docstring.parse("google", warnings=False):
        kind = section.kind.value
        if kind == "text":
            yield markdown(section.value, page, owner)
        elif kind in SECTIONS:
            yield f"{SECTIONS[kind]}:"
            yield "\n".join(
                item(kind, entry, page, owner) for entry in section.value
            )
        elif kind == "admonition":
            yield f"{section.title}: {markdown(section.value.description, page, owner)}"
        else:
            raise ValueError(
                f"{documented.path}: what is written for a section of {kind}?"
            )


def item(kind: str, entry: Any, page: str, owner: str) -> str:
    """Return a line about a parameter, an error or a result."""
    text = " ".join(markdown(entry.description, page, owner).split())
    if kind == "parameters":
        return f"- `{entry.name}`: {text}"
    if kind != "raises":
        return f"- {text}"
    names = re.findall(r"\w+", str(entry.annotation))
    return f"- {', '.join(link(f'durable_sa.{name}', name, page) for name in names)}: {text}"


def api(request: Request, page: str) -> Iterator[str]:
    """Document an object, and the members that are asked for."""
    documented = find(request.path)
    yield f"{'#' * request.level} {title(request.path)}"
    if documented.is_function:
        yield f"```python\n{signatures(documented)}```"
        yield from sections(documented, page, request.path.rsplit(".", 1)[0])
        return
    if request.constructor:
        yield f"```python\n{class_signature(request.path)}```"
    yield from sections(documented, page, request.path)
    if request.constructor:
        yield from sections(
            documented.all_members["__init__"], page, request.path
        )
    attributes = [
        member for member in members(request) if not member.is_function
    ]
    if attributes:
        yield "Attributes:"
        yield "\n".join(
            attribute(member, page, request.path) for member in attributes
        )
    for member in members(request):
        if member.is_function:
            yield f"{'#' * (request.level + 1)} {title(f'{request.path}.{member.name}')}"
            yield f"```python\n{signatures(member)}```"
            yield from sections(member, page, request.path)


def attribute(member: Any, page: str, owner: str) -> str:
    """Return a line about an attribute."""
    annotation = str(member.annotation) if member.annotation else ""
    kind = (
        f" `{annotation}`"
        if annotation
        else f" = `{member.value}`"
        if "instance-attribute" not in member.labels
        else ""
    )
    text = (
        markdown(member.docstring.value, page, owner)
        if member.docstring
        else ""
    )
    return (
        f"- `{member.name}`{kind}{': ' if text else ''}{' '.join(text.split())}"
    )


def commands() -> Iterator[str]:
    """Return each command with its help text, as the command line prints it without colours and boxes."""
    root = typer.main.get_command(app)
    for path, command in walk(root, ()):
        command.rich_markup_mode = None
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
        ):
            root(
                [*path, "--help"],
                prog_name="durable",
                terminal_width=WIDTH,
                max_content_width=WIDTH,
            )
        text = "\n".join(
            line.rstrip() for line in printed.getvalue().strip().splitlines()
        )
        yield f"{'##' if len(path) < 2 else '###'} {' '.join(('durable', *path))}"
        yield f"```text\n{text}\n```"


def walk(
    command: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


def public_errors() -> list[type[errors.DurableError]]:
    """Return the errors in the order of their module."""
    found = [error for error in vars(errors).values() if inspect.isclass(error)]
    return [
        error
        for error in found
        if issubclass(error, errors.DurableError)
        and error.__name__ in durable_sa.__all__
    ]


def error_requests() -> list[Request]:
    return [
        Request(f"durable_sa.{error.__name__}", None, 3, constructor=False)
        for error in public_errors()
    ]


def table_of_errors(page: str) -> Iterator[str]:
    """Return the errors: the meaning of each, and if a task that raises it is retried; then each in detail."""
    rows = [
        "| error | also a | when | retried in a task |",
        "| --- | --- | --- | --- |",
    ]
    for error in public_errors():
        bases = [
            base.__name__
            for base in error.__bases__
            if not issubclass(base, errors.DurableError)
        ]
        others = ", ".join(f"`{base}`" for base in bases if base != "Exception")
        summary = " ".join(
            (inspect.getdoc(error) or "").split("\n\n")[0].split()
        )
        retried = (
            ""
            if error in (errors.DurableError, errors.TaskError)
            else "yes; no, if a context raises it"
            if hasattr(error, "final")
            else "yes"
            if is_retryable(error.__new__(error))
            else "no"
        )
        name = link(f"durable_sa.{error.__name__}", error.__name__, page)
        rows.append(
            f"| {name} | {others} | {markdown(summary, page)} | {retried} |"
        )
    yield "\n".join(rows)


def columns(model: str) -> Iterator[str]:
    """Return the columns of a mapped class, with the comments they have in the database."""
    rows = ["| column | type | |", "| --- | --- | --- |"]
    for column in getattr(models, model).__table__.columns:
        kind = column.type.compile(dialect=postgresql.dialect()).lower()
        rows.append(
            f"| `{column.name}` | {kind}{', null' if column.nullable else ''} | {column.comment or ''} |"
        )
    yield "\n".join(rows)


def metrics() -> Iterator[str]:
    """Return the instruments that are made on a meter."""
    rows = ["| metric | kind | unit | |", "| --- | --- | --- | --- |"]

    class Listing:
        def __getattr__(self, method: str) -> Any:
            signature = inspect.signature(getattr(Meter, method))

            def create(*args: Any, **options: Any) -> None:
                given = signature.bind(self, *args, **options).arguments
                kind = method.removeprefix("create_").removeprefix(
                    "observable_"
                )
                rows.append(
                    f"| `{given['name']}` | {kind} | {given.get('unit', '')} | {given['description']} |"
                )

            return create

    meter: Any = Listing()
    Meters(meter)
    yield "\n".join(rows)


def error_details(page: str) -> Iterator[str]:
    for request in error_requests():
        yield from api(request, page)


def generated(text: str, page: str) -> str:
    """Return the text of a page with its parts made anew."""
    makers: dict[str, Callable[[str], Iterable[str]]] = {
        "api": lambda arguments: api(parse(arguments), page),
        "text": lambda arguments: sections(
            find(arguments.strip()), page, arguments.strip()
        ),
        "commands": lambda _: commands(),
        "errors": lambda _: (
            table_of_errors(page)
            if _.strip() == "table"
            else error_details(page)
        ),
        "columns": lambda arguments: columns(arguments.strip()),
        "metrics": lambda _: metrics(),
    }

    def made(found: re.Match[str]) -> str:
        body = "\n\n".join(
            part.strip("\n") for part in makers[found[1]](found[2])
        )
        return f"<!-- {found[1]}{found[2]} -->\n\n{body}\n\n<!-- end -->"

    return PART.sub(made, text)


def main(arguments: Sequence[str]) -> int:
    outdated = []
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        new = generated(text, page.name)
        if new != text:
            outdated.append(page.name)
            if "--check" not in arguments:
                page.write_text(new)
    for name in outdated:
        sys.stdout.write(f"{name} was out of date\n")
    return int(bool(outdated) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
