"""The order of the packages: each imports only what stands below it, and no files import each other in a circle.

Every import counts, also those inside of functions and those that are only made for type checkers: a reader follows
them all.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "durable_sa"

LAYERS = [
    "cli",
    "dashboard",
    "testing",
    "integrations",
    "durable_sa",
    "client",
    "worker",
    "decorators",
    "hooks",
    "context",
    "schedules",
    "spawns",
    "app",
    "execution",
    "telemetry",
    "tasks",
    "steps",
    "logs",
    "current",
    "database",
    "embedded",
    "migrations",
    "statements",
    "options",
    "results",
    "policies",
    "validation",
    "serialization",
    "concurrency",
    "database_errors",
    "signals",
    "models",
    "names",
    "ids",
    "errors",
]
"""The modules and packages that lie directly in the package, and its own `__init__`, from the top to the bottom."""


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Every module of the package that a module imports."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if (full := f"{base}.{alias.name}") in MODULES:
                    yield full
                elif base in MODULES:
                    yield base


def layer(name: str) -> str:
    """Return the first part of a module's name below the package, or the name of the package itself."""
    return name.split(".")[:2][-1]


def test_every_module_has_its_place() -> None:
    assert {layer(name) for name in MODULES} == set(LAYERS)
    assert len(list(PACKAGE.glob("*.py"))) <= 20


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_from_above(name: str) -> None:
    above = {other for other in imports(name) if LAYERS.index(layer(other)) < LAYERS.index(layer(name))}
    assert not above


@pytest.mark.slow
def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: set(imports(name)) - {name} for name in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_package_of_the_engine_says_so() -> None:
    public = {
        "durable_sa",
        "cli",
        "dashboard",
        "testing",
        "integrations",
        "telemetry",
        "migrations",
        "embedded",
        "client",
        "context",
    }
    for package in PACKAGE.glob("*/__init__.py"):
        if package.parent.name not in public:
            assert (ast.get_docstring(ast.parse(package.read_text())) or "").startswith("Engine only:"), package


def test_the_map_shows_every_package() -> None:
    picture = (ROOT / "docs" / "images" / "packages.svg").read_text()
    assert not [name for name in LAYERS if not re.search(rf"\b{name}\b", picture)]
