"""Generated pages are current: the reference, which has everything that is public, and the SQL of the hot path."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import durable_sa
from durable_sa import errors, migrations, testing

from .snippets import DOCS, ROOT

REFERENCE = DOCS / "reference"
INTERNAL = {"around_step", "log_line", "task_changed", "require_queue", "step_by", "transaction_by"}
INTERNAL |= {"check_scopes", "require_sync_database", "scoped"}
"""Methods that other modules of the package call."""


def documented() -> set[str]:
    """The names in the headings of the reference, such as `Durable.spawn`."""
    pages = "".join(page.read_text() for page in REFERENCE.glob("*.md"))
    return set(re.findall(r"^#+ (?:class )?`([\w.]+)`$", pages, re.MULTILINE))


def methods(public: type) -> set[str]:
    names = {name for name, _ in inspect.getmembers(public, inspect.isroutine) if not name.startswith("_")}
    return {f"{public.__name__}.{name}" for name in names - INTERNAL}


def test_it_is_current() -> None:
    pytest.importorskip("griffe")
    command = [sys.executable, "docs/reference/generated.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`make reference` writes it"


def test_the_page_of_statements_is_current() -> None:
    spec = importlib.util.spec_from_file_location("hot_statements", DOCS / "hot_statements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "`make reference` writes it"


def test_it_has_every_public_name() -> None:
    public = {*durable_sa.__all__, *testing.__all__, *migrations.__all__}
    public |= methods(durable_sa.Durable) | methods(durable_sa.TaskContext) | methods(durable_sa.SyncTaskContext)
    # It is the decorator `durable_sa.transaction`, which has an entry.
    public -= {"Durable.transaction"}
    assert public - documented() == set()


def test_it_has_each_error_and_each_command() -> None:
    table = (REFERENCE / "errors.md").read_text()
    public = {error.__name__ for error in vars(errors).values() if inspect.isclass(error)} & set(durable_sa.__all__)
    assert len(public) > 15
    assert [name for name in public if f"[`{name}`]" not in table] == []
    assert "## durable schedules trigger\n" in (REFERENCE / "cli.md").read_text()


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=lambda page: page.stem)
def test_docstrings_have_become_markdown(page: Path) -> None:
    assert re.findall(r"(?<!`)``(?!`)|:(?:meth|class|func|data):", page.read_text()) == []
