"""`durable tasks`: list, show, spawn, cancel, retry."""

import json
import uuid
from pathlib import Path

import pytest
from sqlalchemy import text

from durable_sa import Durable, TaskContext, TaskStatus, UserError, task
from tests.cli.support import CommandLine

SECRET = "the-secret-of-the-params"


@task
async def child(ctx: TaskContext, number: int) -> int:
    return number


@task("parent", max_attempts=1)
async def parent(ctx: TaskContext, params: dict[str, str]) -> str:
    async def work() -> str:
        return SECRET

    await ctx.step("work", work)
    handle = await ctx.spawn("helper", child, 1)
    await ctx.join(handle)
    raise UserError({"message": "not today", "code": SECRET})


async def failed_parent(durable: Durable) -> uuid.UUID:
    durable.register(parent)
    durable.register(child)
    async with durable.worker(concurrency=4):
        spawned = await durable.spawn(parent, {"password": SECRET}, headers={"tenant": SECRET})
        result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status is TaskStatus.FAILED
    return spawned.task_id


async def spawn_names(durable: Durable, *names: str) -> list[uuid.UUID]:
    return [(await durable.spawn_by_name(name, unchecked=True)).task_id for name in names]


async def listed(cli: CommandLine, *options: object) -> list[str]:
    return [row["task_id"] for row in (await cli("tasks", "list", "--json", *options)).json]


@pytest.mark.slow
async def test_the_list_is_filtered_by_all_that_is_given(cli: CommandLine, durable: Durable) -> None:
    await durable.create_queue("other")
    first, second, third = map(str, await spawn_names(durable, "a", "b", "a"))
    elsewhere = str((await durable.spawn_by_name("a", unchecked=True, queue_name="other")).task_id)
    await durable.cancel_task(uuid.UUID(third))
    assert await listed(cli) == [elsewhere, third, second, first]
    assert await listed(cli, "--limit", 2) == [elsewhere, third]
    assert await listed(cli, "--queue", "default") == [third, second, first]
    assert await listed(cli, "--name", "a", "--queue", "default") == [third, first]
    assert await listed(cli, "--state", "pending") == [elsewhere, second, first]
    assert await listed(cli, "--state", "cancelled") == [third]
    assert await listed(cli, "--state", "cancelled", "--state", "pending", "--name", "b") == [second]
    assert await listed(cli, "--state", "failed") == []
    assert await listed(cli, "--since", "1h") == [elsewhere, third, second, first]
    assert await listed(cli, "--since", "0s") == []
    assert await listed(cli, "--since", "2020-01-01T00:00Z", "--name", "b") == [second]
    assert await listed(cli, "--since", "2200-01-01T00:00Z") == []


async def test_the_list_for_people_has_whole_ids(cli: CommandLine, durable: Durable) -> None:
    (task_id,) = await spawn_names(durable, "[red]a[/red]")
    result = await cli("tasks", "list")
    assert str(task_id) in result.stdout
    assert "[red]a[/red]" in result.stdout
    assert "No matching tasks." in (await cli("tasks", "list", "--state", "failed")).stdout


@pytest.mark.slow
async def test_a_task_is_shown_with_its_history(cli: CommandLine, durable: Durable) -> None:
    task_id = await failed_parent(durable)
    result = await cli("tasks", "show", task_id)
    assert result.code == 0
    for part in (
        "failed",
        "UserError (its message is data: --payloads)",
        "spawned",
        "attempt 1 starts",
        "step 'work'",
        "child 'helper'",
        "join",
        "attempt 1 failed",
    ):
        assert part in result.stdout
    data = (await cli("tasks", "show", task_id, "--json")).json
    assert [(entry["kind"], entry["name"], entry["status"]) for entry in data["history"]] == [
        ("attempt", "", "failed"),
        ("step", "work", "completed"),
        ("child", "helper", "completed"),
        ("join", "", "completed"),
    ]
    assert data["task"]["state"] == "failed"
    error = {"name": "UserError", "message": "(its message is data)", "raw": None, "step": None}
    assert data["task"]["error"] == data["history"][0]["detail"]["error"] == error
    assert data["history"][2]["detail"]["task_name"] == "child"
    assert data["history"][1]["duration"] >= 0


@pytest.mark.slow
async def test_payloads_are_shown_only_when_asked_for(cli: CommandLine, durable: Durable) -> None:
    task_id = await failed_parent(durable)
    for arguments in (["tasks", "list"], ["tasks", "show", task_id]):
        for as_json in ([], ["--json"]):
            result = await cli(*arguments, *as_json)
            assert result.code == 0
            assert SECRET not in result.stdout + result.stderr
    assert SECRET in (await cli("tasks", "show", task_id, "--payloads")).stdout
    data = (await cli("tasks", "show", task_id, "--payloads", "--json")).json
    assert data["task"]["params"] == {"password": SECRET}
    assert data["task"]["headers"] == {"tenant": SECRET}
    assert data["task"]["error"]["raw"] == {"message": "not today", "code": SECRET}
    assert data["history"][1]["detail"]["value"] == SECRET


@pytest.mark.slow
async def test_what_a_sleeping_task_waits_for_is_shown(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def waiter(ctx: TaskContext) -> None:
        await ctx.await_event("the-event", timeout=3600)

    async with durable.worker():
        task_id = (await durable.spawn(waiter)).task_id
        waits: list[dict[str, str]] = []
        while not waits:
            data = (await cli("tasks", "show", task_id, "--json")).json
            waits = [entry for entry in data["history"] if entry["kind"] == "event"]
        text = (await cli("tasks", "show", task_id)).stdout
    assert [(wait["name"], wait["status"]) for wait in waits] == [("the-event", "waiting")]
    assert data["task"]["waits_for"] == "event 'the-event'"
    assert "waits for" in text
    assert "the-event" in text


async def test_text_cannot_drive_the_terminal(cli: CommandLine, durable: Durable) -> None:
    @durable.task(max_attempts=1)
    async def evil(ctx: TaskContext) -> None:
        raise ValueError("\x1b[2Jgone")

    async with durable.worker():
        spawned = await durable.spawn(evil)
        await durable.wait_for_result(spawned, timeout=10)
    result = await cli("tasks", "show", spawned.task_id)
    assert "\\x1b[2Jgone" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.slow
async def test_an_unknown_task_is_not_found(cli: CommandLine) -> None:
    unknown = uuid.uuid4()
    for command in ("show", "cancel", "retry"):
        result = await cli("tasks", command, unknown)
        assert (result.code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: There is no task {unknown}.")
        result = await cli("tasks", command, "no-uuid")
        assert (result.code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: There is no task with the id or key 'no-uuid'.")


@pytest.mark.slow
async def test_a_task_is_spawned_by_name_with_options(cli: CommandLine, durable: Durable, tmp_path: Path) -> None:
    @durable.task
    async def double(ctx: TaskContext, number: int) -> int:
        return number * 2

    first = (await cli("tasks", "spawn", "double", "--params", "21", "--key", "k", "--json")).json
    again = (await cli("tasks", "spawn", "double", "--params", "21", "--key", "k", "--json")).json
    assert (first["created"], again["created"]) == (True, False)
    assert first["task_id"] == again["task_id"]
    conflict = await cli("tasks", "spawn", "double", "--params", "22", "--key", "k")
    assert conflict.code == 1
    async with durable.worker():
        assert (await durable.wait_for_result(uuid.UUID(first["task_id"]), timeout=10)).output == 42
    file = tmp_path / "params.json"
    file.write_text('{"a": [1]}')
    options = ["--delay", "1h", "--priority", "-3", "--max-attempts", "2", "--header", "tenant=a=b"]
    for params, stdin in ((f"@{file}", ""), ("@-", '{"a": [1]}')):
        spawned = (await cli("tasks", "spawn", "later", "--params", params, *options, "--json", stdin=stdin)).json
        data = (await cli("tasks", "show", spawned["task_id"], "--payloads", "--json")).json["task"]
        assert data["params"] == {"a": [1]}
        assert data["headers"] == {"tenant": "a=b"}
        assert (data["priority"], data["max_attempts"]) == (-3, 2)
        assert data["available_at"] > data["created_at"]


@pytest.mark.parametrize(
    "options",
    [
        ["--params", f"{{{SECRET}"],
        ["--params", "@/no/such/file"],
        ["--params", f'{{"a": [{{"{SECRET}": 1, "b": 2, "{SECRET}": 3}}]}}'],
        ["--header", f"a={SECRET}", "--header", "a=b"],
        ["--header", SECRET],
        ["--delay", "soon"],
        ["--max-attempts", "0"],
        ["--priority", "99999"],
    ],
)
async def test_what_is_written_wrong_is_a_usage_error(cli: CommandLine, options: list[str]) -> None:
    result = await cli("tasks", "spawn", "x", *options)
    assert (result.code, result.stdout) == (2, "")
    assert SECRET not in result.stderr
    assert "Traceback" not in result.stderr
    assert (await cli("tasks", "list", "--json")).json == []


async def test_tasks_are_cancelled(cli: CommandLine, durable: Durable) -> None:
    first, second = await spawn_names(durable, "a", "b")
    rows = (await cli("tasks", "cancel", first, second, "--json")).json
    assert rows == [{"task_id": str(first), "state": "cancelled"}, {"task_id": str(second), "state": "cancelled"}]
    assert "cancelled" in (await cli("tasks", "cancel", first)).stdout


async def test_a_task_is_retried(cli: CommandLine, durable: Durable) -> None:
    (task_id,) = await spawn_names(durable, "a")
    unfinished = await cli("tasks", "retry", task_id)
    assert (unfinished.code, unfinished.stdout) == (1, "")
    assert "pending" in unfinished.stderr
    await durable.cancel_task(task_id)
    assert (await cli("tasks", "retry", task_id, "--max-attempts", "7", "--json")).json == [
        {"task_id": str(task_id), "state": "pending"}
    ]
    assert (await cli("tasks", "list", "--json")).json[0]["max_attempts"] == 7


async def test_one_that_is_refused_keeps_none_of_the_others(cli: CommandLine, durable: Durable) -> None:
    first, second = await spawn_names(durable, "a", "b")
    unknown = uuid.uuid4()
    result = await cli("tasks", "cancel", first, unknown, second, "--json")
    assert result.code == 1
    assert [row["task_id"] for row in json.loads(result.stdout)] == [str(first), str(second)]
    assert result.stderr.startswith(f"error: There is no task {unknown}.")
    (third,) = await spawn_names(durable, "c")
    result = await cli("tasks", "retry", third, first, unknown, second)
    assert result.code == 1
    assert [str(task_id) in result.stdout for task_id in (first, second, third)] == [True, True, False]
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["error:", "error:"]


@pytest.mark.slow
async def test_bulk_retry_takes_failed_tasks_that_match(
    cli: CommandLine, durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    @durable.task("a", max_attempts=1)
    async def a(ctx: TaskContext, fine: bool) -> None:
        if not fine:
            raise ValueError

    @durable.task("b", max_attempts=1)
    async def b(ctx: TaskContext) -> None:
        raise ValueError

    # Several pages.
    monkeypatch.setattr("durable_sa.client.bulk.PAGE", 3)
    monkeypatch.setattr("durable_sa.client.bulk.BATCH", 2)
    bad = [await durable.spawn(a, False) for _ in range(7)]
    good, other = await durable.spawn(a, True), await durable.spawn(b)
    async with durable.worker(concurrency=10):
        for spawned in (*bad, good, other):
            await durable.wait_for_result(spawned, timeout=10)
    cancelled = (await durable.spawn(a, True)).task_id
    await durable.cancel_task(cancelled)
    result = (await cli("tasks", "retry", "--all", "--name", "a", "--json")).json
    counts = {"retried": 7, "passed_over": 0, "matched": 7, "dry_run": False}
    assert result == {**counts, "task_ids": [str(spawned.task_id) for spawned in bad]}
    states = {row["task_id"]: row["state"] for row in (await cli("tasks", "list", "--json")).json}
    assert [states[str(spawned.task_id)] for spawned in bad] == ["pending"] * 7
    assert (states[str(good.task_id)], states[str(other.task_id)], states[str(cancelled)]) == (
        "completed",
        "failed",
        "cancelled",
    )
    printed = (await cli("tasks", "retry", "--all", "--state", "cancelled")).stdout
    assert printed == f"{cancelled}\nTasks retried: 1.\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--name", "a"], ["--all", str(uuid.uuid4())], ["--all", "--state", "completed"], ["--name", "a", "x"]],
)
async def test_bulk_retry_is_never_a_slip(cli: CommandLine, durable: Durable, arguments: list[str]) -> None:
    assert (await cli("tasks", "retry", *arguments)).code == 2


async def test_bulk_cancel_takes_unfinished_tasks_that_match(cli: CommandLine, durable: Durable) -> None:
    await spawn_names(durable, "a", "a", "b")
    async with durable.engine.begin() as connection:
        await connection.execute(
            text("UPDATE durable.tasks SET available_at = NULL, state = 'sleeping' WHERE task_name = 'b'")
        )
    result = (await cli("tasks", "cancel", "--all", "--name", "a", "--json")).json
    assert (result["cancelled"], result["passed_over"], len(result["task_ids"])) == (2, 0, 2)
    states = sorted((row["task_name"], row["state"]) for row in (await cli("tasks", "list", "--json")).json)
    assert states == [("a", "cancelled"), ("a", "cancelled"), ("b", "sleeping")]
    assert "\nTasks cancelled: 1.\n" in (await cli("tasks", "cancel", "--all", "--state", "sleeping")).stdout
    assert (await cli("tasks", "cancel", "--all", "--queue", "default")).stdout == "Tasks cancelled: 0.\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--all"], ["--name", "a"], ["--all", "-n", "a", str(uuid.uuid4())], ["--all", "--state", "failed"]],
)
async def test_bulk_cancel_is_never_a_slip(cli: CommandLine, durable: Durable, arguments: list[str]) -> None:
    assert (await cli("tasks", "cancel", *arguments)).code == 2


async def test_json_is_all_that_is_printed(cli: CommandLine, durable: Durable) -> None:
    (task_id,) = await spawn_names(durable, "a")
    for arguments in (["tasks", "list"], ["tasks", "show", task_id], ["tasks", "cancel", task_id], ["queues"]):
        result = await cli(*arguments, "--json")
        assert json.loads(result.stdout) is not None
        assert result.stderr == ""
