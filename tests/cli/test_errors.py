"""How errors reach the shell: one message, no traceback, no password, an exit code."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import URL

from durable_sa import Durable
from durable_sa.cli.connection import place
from tests.cli.support import CommandLine, process

PASSWORD = "hunter2-the-password"
COMMANDS = [
    ["queues"],
    ["queues", "list"],
    ["tasks", "list"],
    ["tasks", "spawn", "a"],
    ["events", "emit", "e"],
    ["schedules", "list"],
    ["doctor"],
    ["migrate"],
    ["cleanup", "--older-than", "1d"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_database_that_does_not_answer(command: list[str]) -> None:
    cli = CommandLine(f"postgresql://me:{PASSWORD}@127.0.0.1:1/app?password={PASSWORD}")
    for as_json in ([], ["--json"]):
        result = cli.run(*command, *as_json)
        assert (result.code, result.stdout) == (1, "")
        assert "127.0.0.1:1/app" in result.stderr
        assert PASSWORD not in result.stderr
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "url", [f"mysql://me:{PASSWORD}@host/app", f"no url {PASSWORD}", f"postgresql+psycopg2://me:{PASSWORD}@host/app"]
)
def test_a_url_that_cannot_work_is_a_usage_error(url: str) -> None:
    result = CommandLine(url).run("queues")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: bind: ")
    assert PASSWORD not in result.stderr


def test_a_password_that_is_refused_is_not_repeated(database_url: URL) -> None:
    url = database_url.set(database=f"{database_url.database}_not_there", password=PASSWORD)
    result = CommandLine(url).run("tasks", "list")
    assert (result.code, result.stdout) == (1, "")
    assert PASSWORD not in result.stderr
    assert "_not_there" in result.stderr


@pytest.mark.slow
def test_the_password_is_not_in_help_texts() -> None:
    cli = CommandLine(f"postgresql://me:{PASSWORD}@127.0.0.1:1/app")
    for command in (*COMMANDS, ["worker"], ["demo"], []):
        result = cli.run(*command, "--help")
        assert result.code == 0
        assert PASSWORD not in result.stdout


@pytest.mark.parametrize(
    "command",
    [["queues", "create"], ["tasks", "spawn"], ["tasks", "list"], ["tasks", "retry"], ["events", "emit"], ["doctor"]],
    ids=" ".join,
)
def test_help_texts_have_examples(command: list[str]) -> None:
    cli = CommandLine("unused")
    group = cli.run(command[0], "--help").stdout
    assert "Example" in cli.run(*command, "--help").stdout + group


def test_where_a_database_is_without_what_is_secret() -> None:
    url = f"postgresql://me:{PASSWORD}@db.example:5433/app?sslpassword={PASSWORD}"
    assert place(url) == "postgresql://db.example:5433/app"
    assert place("postgresql:///app?host=/run/postgresql") == "postgresql:///app (in /run/postgresql)"
    assert place(f"no url {PASSWORD}") == "the given URL"


@pytest.mark.slow
def test_a_worker_does_not_print_the_password_either(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("from durable_sa import Durable\ndurable = Durable()\n")
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:1/app"
    with process("worker", "app:durable", url=url, cwd=tmp_path) as worker:
        assert worker.wait() == 1
        assert "127.0.0.1:1/app" in worker.said
        assert PASSWORD not in worker.said
        assert "Traceback" not in worker.said


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.slow
async def test_a_reader_that_has_had_enough_is_no_error_of_the_database(
    durable: Durable, database_url: URL, as_json: list[str]
) -> None:
    await durable.spawn_by_name("a", unchecked=True)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "durable_sa.cli", "tasks", "list", *as_json]
    environment = {**os.environ, "DURABLE_DATABASE_URL": database_url.render_as_string(hide_password=False)}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=write_end, stderr=asyncio.subprocess.PIPE, env=environment
    )
    os.close(write_end)
    _, stderr = await process.communicate()
    assert stderr.startswith(b"database: ")
    assert len(stderr.splitlines()) == 1
    assert process.returncode == 1


@pytest.mark.slow
def test_without_the_extra_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['typer'] = None; from durable_sa.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: The command line is not installed. Install it with: pip install 'durable_sa[cli]'\n"


@pytest.mark.parametrize(
    "command",
    [
        ["tasks", "list", "--since", "300000w"],
        ["tasks", "list", "--since", "0001-01-01T00:00+05:00"],
        ["doctor", "--grace", "99999999w"],
        ["tasks", "list", "--name", "a\udcff"],
        ["tasks", "show", "a\udcff"],
        ["queues", "create", "a\udcff"],
        ["workers", "--app", ".x:y"],
        *(["tasks", "retry", "--all", "--max-attempts", number] for number in ("-5", "0", "99999999999")),
        ["tasks", "retry", "--all", "--dry-run", "--max-attempts", "-5"],
    ],
    ids=ascii,
)
async def test_values_that_nothing_can_have(cli: CommandLine, durable: Durable, command: list[str]) -> None:
    result = await cli(*command)
    assert (result.code, result.stdout) == (2, "")
    assert ascii(command[-1])[1:-1] in re.sub(r"[\s│]", "", result.stderr)


@pytest.mark.slow
async def test_outputs_that_take_no_text(durable: Durable, database_url: URL) -> None:
    environment = {
        **os.environ,
        "DURABLE_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "PYTHONIOENCODING": "latin-1",
    }
    for command, redirection, stdout in (
        ("events emit e→3 1", "", b"e\\u21923"),
        ("queues", ">&-", b""),
        ("queues --json", ">&-", b""),
    ):
        process = await asyncio.create_subprocess_shell(
            f"{sys.executable} -m durable_sa.cli {command} {redirection}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        out, stderr = await process.communicate()
        assert (process.returncode, len(stderr.splitlines())) == (0, 1), stderr
        assert stdout in out


@pytest.mark.slow
async def test_rows_are_written_at_once(durable: Durable, database_url: URL) -> None:
    for options in ([], ["--json"]):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "durable_sa.cli", "queues", "--watch", *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "DURABLE_DATABASE_URL": database_url.render_as_string(hide_password=False)},
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 20)
        # Ctrl-C ends it, whatever it does at that moment.
        process.send_signal(signal.SIGINT)
        _, stderr = await process.communicate()
        assert (process.returncode, len(stderr.splitlines())) == (0, 1), stderr


def test_without_arguments_it_shows_the_commands() -> None:
    result = CommandLine("unused").run()
    assert result.code == 2
    assert "doctor" in result.stdout + result.stderr
