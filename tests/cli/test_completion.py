"""The shell completes names of queues, tasks and schedules, and never shows an error for it."""

import pytest

from durable_sa import Durable, TaskContext, task
from tests.cli.support import CommandLine


@task
async def report(ctx: TaskContext) -> None: ...


async def complete(cli: CommandLine, line: str) -> list[str]:
    words = line.split(" ")
    result = await cli.with_environment(
        _DURABLE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
    )
    assert result.stderr == ""
    return result.stdout.split()


async def test_names_are_completed_from_the_database(cli: CommandLine, durable: Durable) -> None:
    await durable.create_queue("mail")
    await durable.create_queue("misc")
    await durable.spawn_by_name("send-mail", unchecked=True)
    await durable.spawn_by_name("send-post", unchecked=True)
    durable.register(report)
    await durable.create_schedule("nightly", task=report, cron_expression="0 3 1 1 *")
    assert await complete(cli, "durable tasks list --queue m") == ["mail", "misc"]
    assert await complete(cli, "durable queues pause ma") == ["mail"]
    assert await complete(cli, "durable tasks list --name send") == ["send-mail", "send-post"]
    assert await complete(cli, "durable tasks spawn send-p") == ["send-post"]
    assert await complete(cli, "durable schedules pause ") == ["nightly"]


@pytest.mark.parametrize("url", ["", "postgresql://127.0.0.1:1/nothing"])
async def test_without_a_database_there_are_no_names(url: str) -> None:
    assert await complete(CommandLine(url), "durable tasks list --queue m") == []
