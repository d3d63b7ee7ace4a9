"""Each page of the documentation is run from its top to its bottom, and its commands and links exist."""

from pathlib import Path

import pytest
from sqlalchemy import URL

from durable_sa.testing.database import TestServer

from .snippets import DOCS, ROOT, blocks, check_durable_command, check_typed, durable_commands, run_page

README = ROOT / "README.md"
PAGES = sorted(path for path in DOCS.rglob("*.md") if any(blocks(path)))
COMMANDS = {line for page in PAGES for line in durable_commands(list(blocks(page)))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS).with_suffix("")))
async def test_a_page_runs_and_prints_what_it_says(
    page: Path, database_url: URL, durable_server: TestServer, tmp_path: Path
) -> None:
    await run_page(page, tmp_path, DURABLE_DATABASE_URL=database_url, DURABLE_TEST_DATABASE_URL=durable_server.url)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_what_is_typed_can_be_typed(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            check_typed(page, block)


def test_commands_and_their_options_exist() -> None:
    assert len(COMMANDS) > 10
    for line in sorted(COMMANDS):
        check_durable_command(line)
