"""Tables at the widths of terminals and in pipes: nothing is lost, ids are whole, names are not cut to letters."""

import re
import uuid
from collections.abc import AsyncGenerator

import pytest
from rich.cells import cell_len
from sqlalchemy import text

from durable_sa import Durable, RetryStrategy, TaskContext
from durable_sa.cli.tables import render, wrap
from tests.cli.support import CommandLine

WIDTHS = [80, 100, 120, 200]
NAME = "send-the-order-confirmation"
QUEUE = "mail-to-customers"


@pytest.fixture
async def filled(durable: Durable) -> AsyncGenerator[uuid.UUID]:
    """A database in which every list has an entry with long names."""
    await durable.create_queue(QUEUE)

    @durable.task(NAME, max_attempts=2, retry_strategy=RetryStrategy.none(), queue_name=QUEUE)
    async def failing(ctx: TaskContext) -> None:
        raise ConnectionRefusedError("the server for mail is away and will be for as long as nobody starts it")

    await durable.create_schedule("nightly-order-confirmations", task=failing, cron_expression="15 3 1 1 *")
    await durable.emit_event("order-4711-was-paid-by-the-customer", queue_name=QUEUE)
    async with durable.worker(queue_names=[QUEUE], worker_id="worker-of-the-mail-queue:17"):
        spawned = await durable.spawn(failing)
        await durable.wait_for_result(spawned, timeout=10)
        yield spawned.task_id


def commands(task_id: uuid.UUID) -> dict[str, list[str]]:
    """Each command that prints a table, with what must be whole in it."""
    return {
        "tasks list": [str(task_id), NAME, QUEUE, "failed", "1", "ConnectionRefusedError"],
        f"tasks show {task_id}": [str(task_id), NAME, QUEUE, "failed", "ConnectionRefusedError:"],
        "queues": [QUEUE, "open"],
        "workers": ["worker-of-the-mail-queue:17", QUEUE, "live"],
        "schedules list": ["nightly-order-confirmations", NAME, QUEUE, "15 3 1 1 *", "UTC", "open"],
        "events list": ["order-4711-was-paid-by-the-customer", QUEUE],
        "doctor": ["worker-of-the-mail-queue:17", "ok", "schema"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
async def test_a_terminal_shows_everything_within_its_width(cli: CommandLine, filled: uuid.UUID, width: int) -> None:
    for command, wanted in commands(filled).items():
        result = await cli.at(width, *command.split())
        lines = re.sub(r"\x1b\[\d+m", "", result.stdout).splitlines()
        # A traceback is as its application has it.
        if "traceback of the last failure" in lines:
            lines = lines[: lines.index("traceback of the last failure")]
        assert max(map(cell_len, lines)) <= width, (command, lines)
        for part in wanted:
            assert any(part in line for line in lines), (command, part, lines)


@pytest.mark.slow
async def test_a_pipe_gets_lines_with_tabs(cli: CommandLine, filled: uuid.UUID) -> None:
    for command, wanted in commands(filled).items():
        lines = (await cli(*command.split())).stdout.splitlines()
        cells = [cell for line in lines for cell in line.split("\t")]
        assert not any("\x1b" in line or line != line.rstrip(" ") for line in lines)
        for part in wanted:
            assert any(part in cell for cell in cells), (command, part)
    rows = [line.split("\t") for line in (await cli("tasks", "list")).stdout.splitlines()]
    assert [len(row) for row in rows] == [8, 8]
    assert rows[0] == ["task", "name", "queue", "state", "attempt", "spawned", "finished", "error"]
    assert rows[1][:5] == [str(filled), NAME, QUEUE, "failed", "1"]


async def test_what_has_lines_is_one_row_in_a_pipe(cli: CommandLine, durable: Durable) -> None:
    task_id = (await durable.spawn_by_name("a", unchecked=True)).task_id
    async with durable.engine.begin() as connection:
        await connection.execute(text('UPDATE durable.tasks SET error = \'{"name": "E", "message": "a\\nb\\tc"}\''))
    assert "error\tE: a\\nb\\tc\n" in (await cli("tasks", "show", task_id)).stdout


def lines_of(rows: list[list[str]], width: int) -> list[str]:
    headings = [f"h{number}" for number in range(len(rows[0]))]
    return [line.plain for line in render(headings, rows, width, {}, unbroken={0})]


def test_columns_that_do_not_fit_continue_below() -> None:
    rows = [["a" * 20, "b" * 10, "c" * 10], ["d" * 20, "e", ""]]
    assert lines_of(rows, 60)[2] == f"{'a' * 20}  {'b' * 10}  {'c' * 10}"
    assert lines_of(rows, 34) == [
        f"{'h0':<20}  h1",
        "    h2",
        "-" * 32,
        f"{'a' * 20}  {'b' * 10}",
        f"    {'c' * 10}",
        f"{'d' * 20}  e",
    ]


def test_text_is_wrapped_at_words_and_long_words_at_punctuation() -> None:
    assert list(wrap("one two three", 8)) == ["one two", "three"]
    assert list(wrap("x order-confirmation y", 10)) == ["x", "order-", "confirmati", "on y"]
    assert list(wrap("wörd 日本語", 6)) == ["wörd", "日本語"]
    assert list(wrap("日本語", 4)) == ["日本", "語"]
    assert list(wrap("a\n\nb", 5)) == ["a", "", "b"]
    task_id = str(uuid.uuid4())
    assert list(wrap(f"waits for task {task_id}", 36)) == ["waits for task", task_id]
