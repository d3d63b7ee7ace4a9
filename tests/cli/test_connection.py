"""Which database a command speaks to: it is named, or the command refuses."""

import sys
from pathlib import Path

import pytest
from sqlalchemy import URL

from durable_sa import Durable
from tests.cli.support import CommandLine, process

COMMANDS = [
    ["queues"],
    ["queues", "create", "q"],
    ["tasks", "list"],
    ["tasks", "spawn", "a"],
    ["tasks", "retry", "--all"],
    ["events", "list"],
    ["events", "emit", "e"],
    ["schedules", "list"],
    ["workers"],
    ["doctor"],
    ["migrate"],
    ["cleanup", "--older-than", "1d"],
    ["roles", "--producer", "web", "--apply"],
]
UNBOUND = [["migrate", "--app", "unbound:durable"], ["worker", "unbound:durable"], ["dashboard", "unbound:durable"]]


@pytest.fixture
def app(tmp_path: Path, database_url: URL, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with applications: one without a database of its own, and one with."""
    url = database_url.render_as_string(hide_password=False)
    task = "@durable.task\nasync def known(ctx: TaskContext, number: int) -> int:\n    return number\n"
    (tmp_path / "unbound.py").write_text("from durable_sa import Durable\ndurable = Durable()\n")
    (tmp_path / "bound.py").write_text(
        f"from durable_sa import Durable, TaskContext\ndurable = Durable({url!r}, schema='mine')\n{task}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())
    monkeypatch.setattr("sys.modules", {k: v for k, v in sys.modules.items() if k not in ("bound", "unbound")})
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_database_a_command_refuses_and_says_what_to_set(
    command: list[str], app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.embedded.server", lambda: pytest.fail("the embedded server is started"))
    result = CommandLine("").run(*command)
    assert (result.code, result.stdout, result.database) == (2, "", "")
    assert result.stderr.startswith("error: database: none is named. Set DURABLE_DATABASE_URL=postgresql://")
    assert "--embedded" in result.stderr
    assert "--app MODULE:DURABLE" in result.stderr


@pytest.mark.parametrize("command", UNBOUND, ids=" ".join)
def test_an_application_without_a_database_is_named(
    command: list[str], app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.embedded.server", lambda: pytest.fail("the embedded server is started"))
    result = CommandLine("").run(*command)
    assert (result.code, result.stdout, result.database) == (2, "", "")
    assert result.stderr.startswith("error: unbound:durable: it names no database. Pass it a URL, or set DURABLE_")
    assert "MODULE:DURABLE" not in result.stderr


def test_a_script_of_grants_needs_no_database() -> None:
    result = CommandLine("").run("roles", "--producer", "web")
    assert (result.code, result.stderr, result.database) == (0, "", "")
    assert "GRANT" in result.stdout


async def test_a_command_says_which_database_it_speaks_to(cli: CommandLine, durable: Durable) -> None:
    name = durable.engine.url.database
    for arguments in (["tasks", "list"], ["tasks", "list", "--json"], ["queues", "pause", "default"]):
        result = await cli(*arguments)
        assert result.database.startswith("database: postgresql://")
        assert f"/{name}" in result.database
        assert name not in result.stdout
    secret = await CommandLine("postgresql://me:hunter2@127.0.0.1:1/app?password=hunter2")("tasks", "list")
    assert secret.database == "database: postgresql://127.0.0.1:1/app"
    assert "hunter2" not in secret.stderr


async def test_the_database_schema_and_tasks_of_an_application(cli: CommandLine, app: Path) -> None:
    nowhere = CommandLine("postgresql://127.0.0.1:1/nowhere")
    migrated = await nowhere("migrate", "--app", "bound:durable", "--json")
    assert migrated.json["schema"] == "mine"
    assert migrated.database.endswith(", schema mine")
    spawned = await nowhere("tasks", "spawn", "known", "--params", "1", "--app", "bound:durable", "--json")
    assert spawned.json["created"] is True
    listed = (await cli("tasks", "list", "--schema", "mine", "--json")).json
    assert [row["task_name"] for row in listed] == ["known"]
    unknown = await nowhere("tasks", "spawn", "unknown", "--app", "bound:durable")
    assert (unknown.code, unknown.stderr) == (
        1,
        "error: The application has no task named 'unknown' (it has: known).\n",
    )
    unfit = await nowhere("tasks", "spawn", "known", "--params", '"x"', "--app", "bound:durable")
    assert unfit.code == 2


async def test_an_application_without_a_database_takes_the_one_that_is_named(
    cli: CommandLine, durable: Durable, app: Path
) -> None:
    assert (await cli("queues", "--app", "unbound:durable", "--json")).json[0]["queue_name"] == "default"
    url = cli.url
    assert (await CommandLine("")("queues", "--app", "unbound:durable", "--url", url, "--json")).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "postgresql://a/b", "--embedded"], "error: --embedded: --url names another database."),
        (["--app", "bound:durable", "--url", "postgresql://a/b"], "error: --url: bound:durable has a database of its"),
        (["--app", "bound:durable", "--schema", "x"], "error: --schema: the tables of bound:durable are in schema"),
        (["--app", "nowhere:durable"], "error: MODULE:DURABLE: the module 'nowhere' was not found."),
    ],
)
def test_options_that_contradict_each_other(app: Path, options: list[str], message: str) -> None:
    result = CommandLine("").run("tasks", "list", *options)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith(message)


@pytest.mark.slow
def test_a_worker_says_it_too_and_takes_the_option(database_url: URL, app: Path) -> None:
    url = database_url.render_as_string(hide_password=False)
    with process("worker", "--app", "unbound:durable", url=url, cwd=app) as worker:
        worker.until_said("has started")
        assert worker.said.startswith("database: postgresql://")
    with process("worker", url=url, cwd=app) as worker:
        assert worker.wait() == 2
