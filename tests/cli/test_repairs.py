"""`durable tasks retry` and `cancel`: by filters, by keys, and on trial."""

import uuid
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy import text

from durable_sa import Durable, RetryStrategy, TaskContext, TaskStatus
from durable_sa.cli.connection import Source
from tests.cli.support import CommandLine


@pytest.fixture
async def failed(durable: Durable) -> AsyncGenerator[dict[str, uuid.UUID]]:
    """Failed tasks by their keys, in two queues, of two names and with two errors."""
    await durable.create_queue("mail")

    async def fail(ctx: TaskContext, error: str) -> None:
        raise ValueError if error == "value" else ConnectionError

    for name in ("send", "pack"):
        durable.task(name, max_attempts=1, retry_strategy=RetryStrategy.none())(fail)
    spawned = {}
    async with durable.worker(queue_names=["default", "mail"], concurrency=10):
        for key, name, error, queue in (
            ("one", "send", "value", "default"),
            ("two", "send", "connection", "default"),
            ("three", "pack", "value", "mail"),
        ):
            spawned[key] = (await durable.spawn_by_name(name, error, queue_name=queue, idempotency_key=key)).task_id
        for task_id in spawned.values():
            await durable.wait_for_result(task_id, timeout=10)
    async with durable.engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE durable.tasks SET created_at = created_at - interval '2 days', "
                "finished_at = CASE WHEN idempotency_key = 'two' THEN finished_at - interval '1 day' "
                "ELSE finished_at END"
            )
        )
    yield spawned


async def states(durable: Durable, failed: dict[str, uuid.UUID]) -> dict[str, TaskStatus]:
    results = {key: await durable.get_task_result(task_id) for key, task_id in failed.items()}
    return {key: result.status for key, result in results.items() if result is not None}


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ([], {"one", "two", "three"}),
        (["--error", "ValueError"], {"one", "three"}),
        (["--name", "send"], {"one", "two"}),
        (["--queue", "mail"], {"three"}),
        (["--key", "two"], {"two"}),
        (["--since", "12h"], {"one", "three"}),
        (["--until", "12h"], {"two"}),
        (["--error", "ValueError", "--name", "send"], {"one"}),
    ],
    ids=["none", "error", "name", "queue", "key", "since", "until", "several"],
)
async def test_filters_and_a_trial_that_changes_nothing(
    cli: CommandLine, durable: Durable, failed: dict[str, uuid.UUID], options: list[str], keys: set[str]
) -> None:
    wanted = sorted(str(failed[key]) for key in keys)
    trial = await cli("tasks", "retry", "--all", "--dry-run", *options)
    assert sorted(trial.stdout.splitlines()[:-1]) == wanted
    assert trial.stdout.splitlines()[-1] == f"Tasks that would be retried: {len(keys)}."
    as_json = (await cli("tasks", "retry", "--all", "--dry-run", *options, "--json")).json
    assert sorted(as_json.pop("task_ids")) == wanted
    assert as_json == {"retried": 0, "passed_over": 0, "matched": len(keys), "dry_run": True}
    assert set((await states(durable, failed)).values()) == {TaskStatus.FAILED}
    done = await cli("tasks", "retry", "--all", *options)
    assert sorted(done.stdout.splitlines()[:-1]) == wanted
    found = await states(durable, failed)
    assert {key for key, state in found.items() if state is TaskStatus.PENDING} == keys


async def test_the_list_takes_the_same_filters(cli: CommandLine, failed: dict[str, uuid.UUID]) -> None:
    for options, keys in ((["--error", "ConnectionError"], {"two"}), (["--key", "three"], {"three"})):
        rows = (await cli("tasks", "list", *options, "--json")).json
        assert {row["key"] for row in rows} == keys
    # All were spawned two days ago.
    assert len((await cli("tasks", "list", "--state", "failed", "--since", "12h", "--json")).json) == 2
    assert len((await cli("tasks", "list", "--since", "12h", "--json")).json) == 2


async def test_cancel_on_trial(cli: CommandLine, durable: Durable, failed: dict[str, uuid.UUID]) -> None:
    await durable.retry_task(failed["one"])
    trial = await cli("tasks", "cancel", "--all", "--name", "send", "--dry-run")
    assert trial.stdout == f"{failed['one']}\nTasks that would be cancelled: 1.\n"
    each = await cli("tasks", "cancel", "one", "--dry-run")
    assert (each.code, each.stdout) == (0, f"task\tstate\n{failed['one']}\tpending\n")
    refused = await cli("tasks", "cancel", "two", "--dry-run")
    assert (refused.code, refused.stdout) == (1, "")
    assert "is failed. It would not be cancelled." in refused.stderr
    assert (await states(durable, failed))["one"] is TaskStatus.PENDING


@pytest.mark.slow
async def test_a_key_names_a_task_as_its_id_does(
    cli: CommandLine, durable: Durable, failed: dict[str, uuid.UUID]
) -> None:
    assert (await cli("tasks", "show", "one", "--json")).json["task"]["task_id"] == str(failed["one"])
    assert (await cli("tasks", "retry", "one", "two", "--json")).json == [
        {"task_id": str(failed["one"]), "state": "pending"},
        {"task_id": str(failed["two"]), "state": "pending"},
    ]
    assert (await cli("tasks", "cancel", "one", "--json")).json == [
        {"task_id": str(failed["one"]), "state": "cancelled"}
    ]
    twin = (await durable.spawn_by_name("other", unchecked=True, queue_name="mail", idempotency_key="one")).task_id
    ambiguous = await cli("tasks", "show", "one")
    assert (ambiguous.code, ambiguous.stdout) == (1, "")
    assert ambiguous.stderr.startswith("error: Several tasks have the key 'one': ")
    assert f"{twin} in queue 'mail'" in ambiguous.stderr
    assert (await cli("tasks", "show", "one", "-q", "mail", "--json")).json["task"]["task_id"] == str(twin)
    assert (await cli("tasks", "cancel", "one", "-q", "mail", "--json")).json[0]["task_id"] == str(twin)


@pytest.mark.parametrize("command", [["list"], ["retry", "--all"], ["cancel", "--all"]], ids=" ".join)
async def test_unknown_queues_and_names_are_errors(
    cli: CommandLine, failed: dict[str, uuid.UUID], command: list[str]
) -> None:
    queue = await cli("tasks", *command, "--queue", "nope")
    assert (queue.code, queue.stdout) == (1, "")
    assert queue.stderr == (
        "error: There is no queue named 'nope'. List them: durable queues. Create it: durable queues create nope\n"
    )
    name = await cli("tasks", *command, "--name", "sent")
    assert (name.code, name.stdout) == (1, "")
    assert name.stderr == "error: There is no task named 'sent'. There are send.\n"
    # A name that exists without a task that matches is not an error.
    assert (await cli("tasks", *command, "--name", "send", "--key", "none")).code == 0


@pytest.mark.parametrize("order", ["newest", "oldest"])
async def test_the_list_pages_and_says_when_there_is_more(cli: CommandLine, durable: Durable, order: str) -> None:
    spawned = [str((await durable.spawn_by_name("a b", unchecked=True)).task_id) for _ in range(5)]
    found: list[str] = []
    command = f"durable tasks list --name 'a b' --sort {order} --limit 2"
    for _ in range(3):
        result = await cli.typed(command)
        found += [line.split("\t")[0] for line in result.stdout.splitlines()[1:]]
        if not result.stderr:
            break
        assert result.stderr.startswith("There are more. Next page: durable tasks list ")
        command = result.stderr.partition("Next page: ")[2].strip()
    assert found == spawned[:: -1 if order == "newest" else 1]
    assert len((await cli("tasks", "list", "--limit", 2, "--json")).json) == 2


async def test_the_next_page_has_the_options_of_this_one(cli: CommandLine, durable: Durable) -> None:
    for _ in range(3):
        await durable.spawn_by_name("a", unchecked=True)
    options = ("--url", cli.url, "--schema", "durable", "--json")
    result = await cli("tasks", "list", "--limit", 2, "--since", "3600.5", *options)
    after = result.json[-1]["task_id"]
    command = f"durable tasks list --url URL --schema durable --json --since 3600.5s --limit 2 --after {after}"
    assert result.stderr == f"There are more. Next page: {command}\n"
    rest = await cli.typed(command.replace(" --url URL", ""))
    assert len(rest.json) == 1
    app = Source(app="app.tasks:durable", embedded=True).options()
    assert app == "--embedded --app app.tasks:durable"


async def test_the_list_by_running_time(cli: CommandLine, durable: Durable) -> None:
    spawned = [str((await durable.spawn_by_name("any", unchecked=True)).task_id) for _ in range(4)]
    async with durable.engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE durable.tasks SET state = 'running', started_at = clock_timestamp() - interval '10 min' "
                "WHERE task_id <> CAST(:pending AS uuid)"
            ),
            {"pending": spawned[3]},
        )
    first = await cli("tasks", "list", "--sort", "running", "--limit", 2)
    assert first.stdout.splitlines()[1].endswith("\t10 min")
    second = await cli.typed(first.stderr.partition("Next page: ")[2].strip())
    lines = [*first.stdout.splitlines()[1:], *second.stdout.splitlines()[1:]]
    assert sorted(line.split("\t")[0] for line in lines) == sorted(spawned[:3])


async def test_ended_tasks_are_deleted(cli: CommandLine, durable: Durable, failed: dict[str, uuid.UUID]) -> None:
    assert (await cli("tasks", "delete", "--all")).code == 2
    assert (await cli("tasks", "delete", "--all", "--state", "pending")).code == 2
    trial = await cli("tasks", "delete", "--all", "--name", "send", "--dry-run", "--json")
    assert trial.json["matched"] == 2
    await durable.retry_task(failed["one"])
    refused = await cli("tasks", "delete", "one", "two")
    assert (refused.code, refused.stdout) == (1, f"task\tstate\n{failed['two']}\tdeleted\n")
    assert refused.stderr == f"error: Task {failed['one']} is pending. It was not deleted.\n"
    done = await cli("tasks", "delete", "--all", "--ended-after", "30d")
    assert done.stdout == f"{failed['three']}\nTasks deleted: 1.\n"
    assert [row["key"] for row in (await cli("tasks", "list", "--json")).json] == ["one"]


async def test_filters_by_the_fields_of_a_filter(
    cli: CommandLine, durable: Durable, failed: dict[str, uuid.UUID]
) -> None:
    for options, keys in (
        (["--ended-after", "12h"], {"one", "three"}),
        (["--ended-before", "12h"], {"two"}),
        (["--spawned-before", "1d"], {"one", "two", "three"}),
        (["--spawned-after", "1d"], set()),
        (["--parent", "one"], set()),
    ):
        rows = (await cli("tasks", "list", "--json", *options)).json
        assert {row["key"] for row in rows} == keys
