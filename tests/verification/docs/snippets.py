"""The code in Markdown pages, and how it is run: as a reader would who types in one block after another."""

import ast
import asyncio
import codeop
import configparser
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import tomllib
import types
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast
from unittest import mock

from sqlalchemy import URL

from durable_sa import Durable
from tests.cli.support import CommandLine

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"

WIDTH = 80
"""Columns of code and of terminals."""

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w/]+\.py)\n")
_PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
_MASKS = (
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?Z?"), "TIME"),
    (re.compile(r"(?:\d+ min )?\d+(?:\.\d+)? ?s\b"), "SECONDS"),
    (re.compile(r'(?<=File ")/.*/'), ""),
    (re.compile(r"-{5,}|─+|[~^]{3,}"), ""),
)


class Block(NamedTuple):
    """A block of code, its language, and where it begins."""

    language: str
    title: str | None
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The path of a block that is a file, from its title or its first line; others are typed in."""
        found = _FILE.match(self.text) if self.language == "python" else None
        return self.title or (found[1] if found else None)


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        yield Block(found[1], found[2], found[3], text.count("\n", 0, found.start()) + 1)


def file(page: Path, path: str) -> str:
    """The one block of a page that is this file."""
    (found,) = [block for block in blocks(page) if block.file == path]
    return found.text


def environment(**urls: URL) -> dict[str, str]:
    """The variables of this process, with others that name databases."""
    rendered = {name: url.render_as_string(hide_password=False) for name, url in urls.items()}
    return {**os.environ, **rendered}


async def run_python(page: Path, block: Block, module: types.ModuleType) -> None:
    """Run a block in a module, with `await` at its top level, and compare what it prints with what it says."""
    # Compiled at its place in the file, so that errors say where they are.
    source = "\n" * block.line + block.text
    code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        done = eval(code, vars(module))
        if done is not None:
            await done
    printed = out.getvalue()
    assert printed.splitlines() == _PRINTED.findall(block.text), f"{page.name}, line {block.line}:\n{printed}"


@contextlib.asynccontextmanager
async def module(name: str) -> AsyncGenerator[types.ModuleType]:
    """An empty module; the clients that its code makes are closed at the end."""
    made = types.ModuleType(name)
    # Not by patch.dict, which would also forget what is imported meanwhile: a driver has classes of errors only once.
    before = sys.modules.get(name)
    sys.modules[name] = made
    try:
        yield made
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        for value in list(vars(made).values()):
            if isinstance(value, Durable):
                await value.close()


def check_typed(page: Path, block: Block) -> None:
    """Whether a prompt takes the block line by line: there a blank line ends what is indented, and nothing else does."""
    compile_so_far = codeop.CommandCompiler()
    compile_so_far.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    statement: list[str] = []
    for number, line in enumerate([*block.text.splitlines(), ""], start=block.line + 1):
        statement.append(line)
        try:
            if compile_so_far("\n".join(statement), str(page), "single") is not None:
                statement = []
        except SyntaxError as error:
            raise AssertionError(f"{page.name}, line {number}: {error.msg}") from error
    assert not any(statement)


class Shell:
    """One bash for all commands of a page, so that a worker in its background stays.

    Its output is a terminal of 80 columns without colours or pages, so that commands print what a reader sees.
    """

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        path = os.pathsep.join((os.path.dirname(sys.executable), variables["PATH"]))  # noqa: PTH120
        terminal = {"TERM": "dumb", "COLUMNS": str(WIDTH), "PAGER": "cat", "TZ": "UTC"}
        quick = {"PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
        self._directory = directory
        self._variables = {**variables, "PATH": path, **terminal, **quick}
        self._bash: asyncio.subprocess.Process | None = None
        self._output: asyncio.StreamReader | None = None
        self._transport: asyncio.ReadTransport | None = None

    async def run(self, commands: str, *, within: float = 60) -> str:
        """What the commands print, without what goes to stderr. Each has to succeed."""
        if self._bash is None:
            await self._start()
            commands = f"set -eu; trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n{commands}"
        assert self._bash is not None
        assert self._bash.stdin is not None
        assert self._output is not None
        end = f"end of {uuid.uuid4()}"
        self._bash.stdin.write(f"{commands}\necho '{end}'\n".encode())
        printed = ""
        async with asyncio.timeout(within):
            while not printed.endswith(f"{end}\n"):
                line = (await self._output.readline()).decode().replace("\r\n", "\n")
                assert line, f"{commands} failed: {printed}{(self._directory / 'stderr.log').read_text()}"
                printed += line
        return printed.removesuffix(f"{end}\n")

    async def _start(self) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
        with (self._directory / "stderr.log").open("w") as log, os.fdopen(theirs, "wb", 0) as terminal:
            self._bash = await asyncio.create_subprocess_exec(
                "bash",
                stdin=subprocess.PIPE,
                stdout=terminal,
                stderr=log,
                cwd=self._directory,
                env=self._variables,
                start_new_session=True,
            )
        self._output = asyncio.StreamReader()
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(cast("asyncio.StreamReader", self._output)), os.fdopen(ours, "rb", 0)
        )

    async def close(self) -> None:
        """End what runs in the background, by force if a command hangs."""
        if self._bash is None or self._bash.stdin is None:
            return
        self._bash.stdin.close()
        try:
            async with asyncio.timeout(20):
                await self._bash.wait()
        except TimeoutError:
            os.killpg(self._bash.pid, signal.SIGKILL)
            await self._bash.wait()
            raise
        finally:
            if self._transport is not None:
                self._transport.close()


async def run_page(page: Path, directory: Path, **urls: URL) -> None:
    """Run a page from its top to its bottom.

    Files are written, Python is run in one module, `console` in one shell, whose output the `text` block that follows
    has. `sh` is for commands that belong elsewhere: their syntax is checked, and so is that of files.
    """
    shell = Shell(directory, environment(**urls))
    found = list(blocks(page))
    with mock.patch.dict(os.environ, environment(**urls)):
        async with module(f"docs_{page.stem}") as namespace, contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(shell.close)
            for block, following in zip(found, [*found[1:], None], strict=True):
                if block.file is not None:
                    check(block)
                    (directory / block.file).parent.mkdir(parents=True, exist_ok=True)
                    (directory / block.file).write_text(block.text)
                elif block.language == "python":
                    await run_python(page, block, namespace)
                elif block.language == "console":
                    printed = await shell.run(block.text)
                    if following is not None and following.language == "text":
                        assert matches(printed, following.text), f"{page.name}, line {block.line}:\n{printed}"
                else:
                    check(block)


def masked(text: str) -> str:
    """Output without what differs from run to run: ids, times, directories, and the widths of columns with these."""
    for pattern, name in _MASKS:
        text = pattern.sub(name, text)
    return " ".join(text.split())


def matches(printed: str, expected: str) -> bool:
    """Whether output is what a page says, where a line of three dots stands for any output."""
    parts = [re.escape(masked(part)) for part in re.split(r"^\.\.\.$", expected, flags=re.MULTILINE)]
    return re.fullmatch(".*?".join(parts), masked(printed)) is not None


def check(block: Block) -> None:
    """Whether a block that is not run could be read by what it is for."""
    match block.language:
        case "python":
            ast.parse(block.text)
        case "ini":
            configparser.RawConfigParser(strict=False).read_string(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            import yaml  # comes with the tools that build the site

            assert list(yaml.safe_load_all(block.text))
        case "json":
            json.loads(block.text)
        case "sh" | "console":
            bash = shutil.which("bash")
            assert bash is not None
            subprocess.run([bash, "-n"], input=block.text, text=True, check=True)
        case "text" | "sql" | "pycon" | "javascript":
            pass
        case other:
            raise AssertionError(f"line {block.line}: what is done with {other!r}?")


def durable_commands(found: Sequence[Block]) -> Iterator[str]:
    """The lines in which the `durable` command is called, wherever they are."""
    for block in found:
        if block.language in ("sh", "console", "ini", "yaml"):
            text = block.text.replace("\\\n", " ")
            if block.language == "yaml":  # where arguments are a list
                text = re.sub(r"[\"\[\],]+", "", text)
            for line in text.splitlines():
                if call := re.search(r"(?<!\")\bdurable ((?:[a-z]|--).*)", line):
                    yield call[0]


def check_durable_command(line: str) -> None:
    """Whether a call names a command there is, with options it has."""
    words = [word for word in line.split()[1:3] if re.fullmatch("[a-z]+", word)]
    with mock.patch.dict(os.environ, COLUMNS="200"):
        shown = CommandLine("unused").run(*words, "--help")
        if shown.code != 0:  # the second word is an argument
            shown = CommandLine("unused").run(*words[:1], "--help")
    assert shown.code == 0, line
    assert all(option in shown.stdout for option in re.findall(r" (--[a-z-]+)", line)), line
