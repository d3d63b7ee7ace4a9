"""The site builds without a warning, and its reference has everything that is public."""

import inspect
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import durable_sa
from durable_sa import errors, migrations, testing

from .snippets import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocstrings_handlers.python")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def inventory(site: Path) -> set[str]:
    """The names that the reference documents."""
    content = (site / "objects.inv").read_bytes()
    entries = zlib.decompress(content.split(b"\n", 4)[4]).decode()
    return {line.split()[0] for line in entries.splitlines()}


INTERNAL = {"task_changed", "forget_worker", "require_queue", "begin_step", "end_step", "try_again"}
"""Methods that other modules of the package call."""


def methods(public: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(public, inspect.isroutine) if not name.startswith("_")}


def test_the_reference_has_every_public_name(site: Path) -> None:
    documented = inventory(site)
    public = {f"durable_sa.{name}" for name in durable_sa.__all__}
    public |= {f"durable_sa.testing.{name}" for name in testing.__all__}
    public |= {f"durable_sa.migrations.{name}" for name in migrations.__all__}
    public |= {f"durable_sa.Durable.{name}" for name in methods(durable_sa.Durable) - INTERNAL}
    public |= {f"durable_sa.TaskContext.{name}" for name in methods(durable_sa.TaskContext) - INTERNAL}
    assert public - documented == set()


def test_it_has_each_error_and_each_command(site: Path) -> None:
    table = (site / "reference/errors/index.html").read_text()
    public = {error.__name__ for error in vars(errors).values() if inspect.isclass(error)} & set(durable_sa.__all__)
    assert len(public) > 15
    assert [name for name in public if f">{name}<" not in table] == []
    assert "durable schedules trigger" in (site / "reference/cli/index.html").read_text()


def test_docstrings_have_become_markdown(site: Path) -> None:
    for page in (site / "reference").rglob("index.html"):
        assert re.findall(r"``|:(?:meth|class|func):", page.read_text()) == [], page
