"""A process loads only the modules that it uses; the others are loaded on their first use."""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

import durable_sa
from durable_sa import testing
from durable_sa.concurrency.deferred import defer

LOADED = """
import sys
from types import ModuleType
print(*sorted(name for name, module in sys.modules.items() if type(module) is ModuleType))
"""


def loaded(source: str, **environment: str) -> set[str]:
    """The modules that a process has executed at the end of some code."""
    command = [sys.executable, "-c", textwrap.dedent(source) + LOADED]
    root = str(Path(__file__).parent.parent)
    variables = {**os.environ, "PYTHONPATH": root, **environment}
    done = subprocess.run(command, env=variables, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def below(modules: set[str], *packages: str) -> set[str]:
    return {name for name in modules if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def test_the_package_itself_loads_nothing() -> None:
    modules = loaded("import durable_sa")
    assert below(modules, "durable_sa") == {"durable_sa"}
    assert not below(modules, "sqlalchemy", "pydantic", "asyncpg")


SPAWNING = """
    import os

    from pydantic import BaseModel
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    from durable_sa import Durable, RetryStrategy, SyncTaskContext, TaskContext

    durable = Durable(default_retry_strategy=RetryStrategy.fixed(1))

    class Order(BaseModel):
        number: int

    @durable.task(max_attempts=3)
    def ship(ctx: SyncTaskContext, order: Order) -> str:
        return f"shipped {order.number}"

    @durable.task
    async def pack(ctx: TaskContext) -> None: ...

    engine = create_engine(os.environ["APPLICATION_URL"])
    with Session(engine) as session, session.begin():
        assert durable.spawn_with(session, ship, Order(number=7)).created
        assert len(durable.spawn_many_with(session, [(ship, Order(number=8)), (pack, None)])) == 2
    engine.dispose()
"""


@pytest.mark.slow
def test_a_process_that_only_spawns_loads_neither_a_worker_nor_another_driver(database_url: URL) -> None:
    url = database_url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    modules = loaded(SPAWNING, APPLICATION_URL=url)
    unused = ["worker", "telemetry", "migrations", "embedded", "testing", "cli", "dashboard"]
    unused += ["execution.writer", "execution.reader", "execution.transactions", "execution.session_transactions"]
    unused += ["database.channel", "database.deletion", "schedules.cron"]
    others = ["asyncpg", "alembic", "opentelemetry", "typer", "cronsim"]
    assert not below(modules, *others, *(f"durable_sa.{name}" for name in unused))
    assert below(modules, "durable_sa.statements") == {
        "durable_sa.statements",
        "durable_sa.statements.expressions",
        "durable_sa.statements.notifying",
        "durable_sa.statements.spawning",
    }
    assert below(modules, "durable_sa.schedules") == {"durable_sa.schedules"}


def test_the_plugin_costs_a_run_without_its_fixtures_nothing() -> None:
    before = loaded("import pytest")
    with_plugin = loaded("import pytest; import durable_sa.testing.plugin")
    assert with_plugin - before == {"durable_sa", "durable_sa.testing", "durable_sa.testing.plugin"}


@pytest.mark.parametrize("package", [durable_sa, testing])
def test_each_public_name_is_found_where_it_is_said_to_be(package: object) -> None:
    names = set(package.__all__)
    assert set(package._MODULES) == names
    # Once imported, a submodule is an attribute of its package, and would be found in place of the name.
    assert not names & {path.stem for path in Path(package.__path__[0]).glob("*")}
    assert [name for name in names if not hasattr(package, name)] == []
    assert {name for name in dir(package) if not name.startswith("__")} == names
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.slow
def test_public_modules_are_attributes_of_the_package() -> None:
    modules = loaded("import durable_sa; durable_sa.errors.TaskTimeout; durable_sa.models.TaskRow")
    assert {"durable_sa.errors", "durable_sa.models"} <= modules
    assert isinstance(durable_sa.__version__, str)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "deferring_package"
    directory.mkdir()
    (directory / "__init__.py").write_text("")
    (directory / "fragile.py").write_text("RUNS = []\nif FAILS:\n    raise ValueError('once')\n")
    (directory / "slow.py").write_text("import time\nFIRST = 1\ntime.sleep(0.1)\nLAST = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(directory.name)
    defer(directory.name, [str(directory)])
    yield directory
    for name in [name for name in sys.modules if name.split(".")[0] == directory.name]:
        del sys.modules[name]


def test_threads_that_use_a_module_at_the_same_time_all_find_it_complete(package: Path) -> None:
    slow = importlib.import_module(f"{package.name}.slow")
    assert "FIRST" not in vars(slow)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(slow.LAST)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 8
    assert "LAST" in dir(slow)
    with pytest.raises(AttributeError, match="nothing"):
        _ = slow.nothing


def test_a_module_that_fails_is_executed_anew(package: Path) -> None:
    fragile = importlib.import_module(f"{package.name}.fragile")
    for _ in range(2):
        with pytest.raises(NameError, match="FAILS"):
            _ = fragile.RUNS_NOT
    fragile.FAILS = False
    assert fragile.RUNS == []
