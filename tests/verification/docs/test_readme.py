"""The README's code runs as it stands, and prints what the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import migrations
from durable_sa.testing.database import TestServer
from tests.verification.docs import snippets

README = snippets.ROOT / "README.md"
BLOCKS = list(snippets.blocks(README))


def file(path: str) -> str:
    return snippets.file(README, path)


async def test_snippets_run_one_after_another_and_print_what_they_say(database_url: URL) -> None:
    typed = [block for block in BLOCKS if block.language == "python" and block.file is None]
    assert len(typed) > 10
    with mock.patch.dict(os.environ, snippets.environment(DURABLE_DATABASE_URL=database_url)):
        async with snippets.module("readme") as module:
            for block in typed:
                await snippets.run_python(README, block, module)


def test_the_quickstart_prints_what_follows_it(database_url: URL, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(file("app.py"))
    (expected,) = [block.text for block in BLOCKS if block.language == "text"]
    result = subprocess.run(
        [sys.executable, "-W", "error", "app.py"],
        cwd=tmp_path,
        env=snippets.environment(DURABLE_DATABASE_URL=database_url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == (expected, "")


def test_the_test_passes(durable_server: TestServer, tmp_path: Path) -> None:
    (tmp_path / "test_reminders.py").write_text(file("test_reminders.py"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=snippets.environment(DURABLE_TEST_DATABASE_URL=durable_server.url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in result.stdout, result.stdout + result.stderr


def test_env_py_has_revisions_written(monkeypatch: pytest.MonkeyPatch) -> None:
    context = mock.Mock()
    monkeypatch.setitem(sys.modules, "alembic.context", context)
    with mock.patch("alembic.context", context):
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
    commands = list(snippets.durable_commands(BLOCKS))
    assert len(commands) > 5
    for line in commands:
        snippets.check_durable_command(line)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))
def test_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()
