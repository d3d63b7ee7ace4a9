"""Each page of the documentation is run from its top to its bottom, and its commands and links exist."""

import re
from pathlib import Path

import pytest
from sqlalchemy import URL

from durable_sa.testing.database import TestServer

from .snippets import DOCS, ROOT, WIDTH, blocks, check_durable_command, check_typed, durable_commands, run_page

README = ROOT / "README.md"
EVERY_PAGE = [README, *sorted(DOCS.rglob("*.md"))]
PAGES = [path for path in EVERY_PAGE[1:] if path.parent.name != "reference" and any(blocks(path))]
COMMANDS = {line for page in PAGES for line in durable_commands(list(blocks(page)))}


@pytest.mark.timeout(400)  # a page may start twenty processes, one after the other
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


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_code_is_narrow_enough_to_be_read_without_scrolling(page: Path) -> None:
    lines = [line for block in blocks(page) for line in block.text.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []


PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)|<img[^>]* alt=\"([^\"]*)\"[^>]* src=\"([^\"]+)\"")


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_pictures_exist_and_have_a_description(page: Path) -> None:
    for found in PICTURE.finditer(page.read_text()):
        assert found[1] or found[3], found[0]
        assert (page.parent / (found[2] or found[4])).is_file(), found[0]
