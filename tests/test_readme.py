"""The README's code runs as it stands, and prints what the README says."""

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import migrations
from durable_sa.testing.database import TestServer
from tests.cli.support import CommandLine

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.py)\n")
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The path in the first line, of a block that is a file; other blocks are typed in one after another."""
        found = FILE.match(self.text)
        return found[1] if found else None


def blocks() -> Iterator[Block]:
    text = README.read_text()
    for found in BLOCK.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)


def file(path: str) -> str:
    (found,) = [block for block in blocks() if block.file == path]
    return found.text


def environment(url: URL) -> dict[str, str]:
    return {**os.environ, "DURABLE_DATABASE_URL": url.render_as_string(hide_password=False)}


async def test_snippets_run_one_after_another_and_print_what_they_say(database_url: URL) -> None:
    snippets = [block for block in blocks() if block.language == "python" and block.file is None]
    assert len(snippets) > 10
    module = types.ModuleType("readme")
    with mock.patch.dict(os.environ, environment(database_url)), mock.patch.dict(sys.modules, readme=module):
        try:
            for block in snippets:
                # Compiled at its place in the file, so that errors say where they are.
                source = "\n" * block.line + block.text
                code = compile(source, str(README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    done = eval(code, vars(module))
                    if done is not None:
                        await done
                assert out.getvalue().splitlines() == PRINTED.findall(block.text), f"line {block.line}"
        finally:
            await vars(module)["durable"].close()


def test_the_quickstart_prints_what_follows_it(database_url: URL, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(file("app.py"))
    (expected,) = [block.text for block in blocks() if block.language == "text"]
    result = subprocess.run(
        [sys.executable, "-W", "error", "app.py"],
        cwd=tmp_path,
        env=environment(database_url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == (expected, "")


def test_the_test_passes(durable_server: TestServer, tmp_path: Path) -> None:
    (tmp_path / "test_reminders.py").write_text(file("test_reminders.py"))
    url = durable_server.url.render_as_string(hide_password=False)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "DURABLE_TEST_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in result.stdout, result.stdout + result.stderr


def test_env_py_has_revisions_written() -> None:
    context = mock.Mock()
    with mock.patch.dict(sys.modules, {"alembic.context": context}), mock.patch("alembic.context", context):
        exec(file("alembic/env.py"), {})
    context.configure.assert_called_once_with(process_revision_directives=migrations.autogenerate)


async def test_the_revision_makes_the_tables_and_removes_them(durable_server: TestServer) -> None:
    revision: dict[str, Any] = {}
    exec(file("alembic/versions/0001_durable_tables.py"), revision)
    url = durable_server.create_database()
    engine = create_async_engine(url)

    def run(connection: Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)):
            revision["upgrade"]()
            assert migrations.current(connection) == migrations.head()
            revision["downgrade"]()
            assert migrations.current(connection) is None

    try:
        async with engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()
        durable_server.drop_database(url)


def test_its_commands_and_their_options_exist() -> None:
    consoles = "".join(block.text for block in blocks() if block.language == "console")
    commands = [line for line in consoles.splitlines() if line.startswith("durable ")]
    assert len(commands) > 5
    for line in commands:
        words = [word for word in line.split()[1:3] if re.fullmatch("[a-z]+", word)]
        shown = CommandLine("unused").run(*words, "--help")
        assert shown.code == 0, line
        assert all(option in shown.stdout for option in re.findall(r" (--[a-z-]+)", line)), line


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))
def test_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()
