"""The site builds without a warning, and readers fetch nothing from other servers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .snippets import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_it_has_the_reference(site: Path) -> None:
    assert 'id="durablespawn_with"' in (site / "reference/client/index.html").read_text()


def test_pages_fetch_nothing_from_other_servers(site: Path) -> None:
    fetched = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link rel=\"?stylesheet[^>]* href=\"?(?:https?:)?//"
    )
    assert [page for page in site.rglob("*.html") if fetched.search(page.read_text())] == []
    for picture in site.rglob("*.svg"):
        assert re.findall(r"(?:href|src)=\"https?://|url\(https?://|@import", picture.read_text()) == [], picture
