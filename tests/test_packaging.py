"""What is shipped: the wheel, the sdist and the names that can be imported from `durable_sa`."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest

import durable_sa

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return directory


def sources() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "durable_sa").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        description = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = message_from_string(archive.read(description).decode())
        scripts = archive.read(description.replace("METADATA", "entry_points.txt")).decode()
    assert names == sources()
    assert {"durable_sa/py.typed", "durable_sa/cli/__init__.py"} <= names
    assert any(name.startswith("durable_sa/migrations/versions/durable_0001_") for name in names)
    assert headers["License-Expression"] == "Apache-2.0"
    assert set(headers.get_all("Provides-Extra", [])) == {
        "embedded",
        "psycopg",
        "telemetry",
        "pydantic-ai",
        "cli",
        "dashboard",
    }
    assert "durable = durable_sa.cli:main" in scripts


def test_the_sdist_can_be_built_and_tested(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert sources() <= names
    assert {"LICENSE", "Makefile", "pyproject.toml", "tests/conftest.py", "uv.lock"} <= names
    assert not [name for name in names if name.startswith((".venv", "dist"))]


def test_alembic_is_left_as_it_is() -> None:
    """With an entry point in `alembic.plugins`, 1.18.0 to 1.20.0 could not be imported; 1.18.0 to 1.18.2 fail anyway."""
    distribution = metadata.distribution("durable_sa")
    assert {entry_point.group for entry_point in distribution.entry_points} == {"console_scripts", "pytest11"}
    (alembic,) = [line for line in distribution.requires or () if line.startswith("alembic")]
    assert all(f"!={version}" in alembic for version in ("1.18.0", "1.18.1", "1.18.2"))


def test_the_entry_points_can_be_loaded() -> None:
    for entry_point in metadata.distribution("durable_sa").entry_points:
        assert entry_point.load() is not None


@pytest.mark.slow
def test_who_only_spawns_does_not_wait_for_alembic() -> None:
    program = "import sys, durable_sa; print(sorted({'alembic', 'mako'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_all_is_what_is_imported() -> None:
    (directory,) = durable_sa.__path__
    tree = ast.parse((Path(directory) / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    exported = [name for name in durable_sa.__all__ if not name.startswith("_")]
    assert len(exported) == len(set(exported))
    assert set(exported) == {name for name in imported if not name.startswith("_")}


def test_only_public_names_are_listed() -> None:
    listed = set(dir(durable_sa))
    assert {name for name in listed if not name.startswith("__")} == set(durable_sa.__all__)
    assert {"__version__", "__doc__", "__all__"} <= listed
    public = re.findall(r"`([a-z.]+)`", (durable_sa.__doc__ or "").split("submodules")[1])
    assert all(importlib.import_module(f"durable_sa.{name}") for name in public)
    assert len(public) == 13


def test_the_version_is_that_of_the_distribution() -> None:
    assert durable_sa.__version__ == metadata.version("durable_sa")
    with pytest.raises(AttributeError, match="'durable_sa' has no attribute 'versoin'"):
        _ = durable_sa.versoin  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", durable_sa.__all__)
def test_what_is_exported_is_documented(name: str) -> None:
    exported = getattr(durable_sa, name)
    if inspect.isclass(exported) or inspect.isfunction(exported):
        assert exported.__doc__
