"""Every command says what it does, how it is written, and with an example."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from durable_sa.cli.app import app
from tests.cli.support import CommandLine


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))
    else:
        yield path, command


ALL = dict(commands(get_command(app)))
WITHOUT_JSON = {("dashboard",), ("demo",), ("worker",), ("roles",), ("embedded", "psql")}
WITHOUT_DATABASE = {("demo",), *(path for path in ALL if path[0] == "embedded")}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_a_command_explains_itself(path: tuple[str, ...]) -> None:
    command = ALL[path]
    assert command.help
    assert command.epilog is not None
    assert "Example" in command.epilog
    assert f"durable {' '.join(path)}" in command.epilog
    if path not in WITHOUT_JSON:
        assert any("--json" in parameter.opts for parameter in command.params), "results come as JSON, too"
    if path not in WITHOUT_DATABASE:
        assert any("--app" in parameter.opts for parameter in command.params)
        assert any("--embedded" in parameter.opts for parameter in command.params)
    if path[-1] in ("list", "queues", "workers"):
        assert any("--watch" in parameter.opts for parameter in command.params)
    for parameter in command.params:
        if parameter.param_type_name == "option" and "--help" not in parameter.opts:
            assert parameter.help, parameter.name


def test_the_shell_can_complete(cli: CommandLine) -> None:
    result = cli.run("--help")
    assert result.code == 0
    assert "--install-completion" in result.stdout
