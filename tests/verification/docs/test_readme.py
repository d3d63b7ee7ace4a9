"""The README's code runs as it stands, and prints what the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from sqlalchemy import URL

from tests.verification.docs import snippets

README = snippets.ROOT / "README.md"
BLOCKS = list(snippets.blocks(README))


def file(path: str) -> str:
    return snippets.file(README, path)


async def test_snippets_run_one_after_another_and_print_what_they_say(database_url: URL) -> None:
    typed = [block for block in BLOCKS if block.language == "python" and block.file is None]
    assert len(typed) > 0
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


def test_its_commands_and_their_options_exist() -> None:
    commands = list(snippets.durable_commands(BLOCKS))
    assert len(commands) > 1
    for line in commands:
        snippets.check_durable_command(line)


def test_its_commands_have_their_database_named() -> None:
    (deployed,) = [block.text for block in BLOCKS if "durable migrate" in block.text]
    assert deployed.startswith("export DURABLE_DATABASE_URL=")


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.read_text().splitlines()) <= 250


@pytest.mark.parametrize("link", re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]+)", README.read_text()))
def test_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link).exists()
