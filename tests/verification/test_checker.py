"""The checker finds what it is there to find: each invariant, in a history that is forged to break it."""

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from durable_sa.policies import SUSPECT_AFTER

from .evidence import Change, Evidence
from .invariants import INVARIANTS, violations
from .lags import histogram
from .nursery import Nursery
from .rounds import Plan, Verdict, fight

DEPLOYMENT = "worker replaced by another version"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Of some seconds in which nothing went wrong, and the workers' code was replaced by another version."""

    async def observe() -> Verdict:
        async with Nursery() as nursery:
            plan = Plan((DEPLOYMENT,), "quiet", 0.5, workers=4, rate=30.0, operations=80)
            return await fight(plan, tmp_path_factory.mktemp("quiet"), nursery, [])

    verdict = asyncio.run(observe())
    assert verdict.violations == {}
    # All four by the end, while others were at work, and everything that only the second version knows has ended.
    assert verdict.counts[DEPLOYMENT] > 0
    assert sum("latter" in names for names in verdict.evidence.knows.values()) >= 4
    assert any(task["task_name"] == "latter" for task in verdict.evidence.tasks.values())
    return verdict.evidence


FORGERIES: dict[str, Callable[[Evidence], Evidence]] = {}


def forging(function: Callable[[Evidence], Evidence]) -> Callable[[Evidence], Evidence]:
    FORGERIES[function.__name__] = function
    return function


def find(evidence: Evidence, relation: str, wanted: Callable[[Change], Any]) -> int:
    """The position of the first change like that; a history without one proves nothing."""
    return next(
        index for index, change in enumerate(evidence.changes) if change.relation == relation and wanted(change)
    )


def with_row(evidence: Evidence, index: int, **values: Any) -> Evidence:
    changes = list(evidence.changes)
    change = changes[index]
    changes[index] = change._replace(became={**(change.became or {}), **values})
    return replace(evidence, changes=changes)


def without(evidence: Evidence, unwanted: Callable[[Change], Any]) -> Evidence:
    return replace(evidence, changes=[change for change in evidence.changes if not unwanted(change)])


def with_change(evidence: Evidence, index: int, **values: Any) -> Evidence:
    changes = list(evidence.changes)
    changes[index] = changes[index]._replace(**values)
    return replace(evidence, changes=changes)


def with_table(evidence: Evidence, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> Evidence:
    tables = copy.deepcopy(evidence.tables)
    change(tables[name])
    return replace(evidence, tables=tables)


def in_the_second_execution(evidence: Evidence, change: Callable[[list[Any]], list[Any]]) -> Evidence:
    """With other calls of a task that was executed twice, and made two calls the second time."""
    task_id, fence = next(
        (task_id, list(executions)[1])
        for task_id, executions in evidence.executions().items()
        if evidence.tasks[task_id]["task_name"] == "tour"
        and len(executions) > 1
        and all(len(calls) > 2 for calls in executions.values())
    )
    mine = [entry for entry in evidence.noted("called") if (entry["task"], entry["fence"]) == (task_id, fence)]
    others = [entry for entry in evidence.ledger if entry not in mine]
    return replace(evidence, ledger=[*others, *change(mine)])


def first_claimed(change: Change) -> bool:
    return bool(change.was and change.was["attempt"] == 0 and change.became and change.became["claimed_by"])


def ended(change: Change) -> bool:
    return bool(change.became and change.became["outcome"] == "completed")


def inserted(kind: str) -> Callable[[Change], bool]:
    return lambda change: bool(change.was is None and change.became and change.became["kind"] == kind)


@forging
def every_acknowledged_spawn_has_one_task(e: Evidence) -> Evidence:
    lost = e.changes[find(e, "tasks", lambda change: change.row["task_name"] == "tour")].row["task_id"]
    return without(e, lambda change: change.relation == "tasks" and change.row["task_id"] == lost)


@forging
def orders_and_their_tasks_stand_or_fall_together(e: Evidence) -> Evidence:
    return with_table(e, "orders", lambda rows: rows.pop())


@forging
def attempts_are_numbered_without_gaps(e: Evidence) -> Evidence:
    return with_row(e, find(e, "runs", lambda _: True), attempt=2)


@forging
def fences_only_rise(e: Evidence) -> Evidence:
    return with_row(e, find(e, "tasks", ended), fence=0)


@forging
def only_the_holder_of_a_run_writes_for_it(e: Evidence) -> Evidence:
    return with_change(e, find(e, "checkpoints", inserted("step")), application="zombie")


@forging
def a_checkpoint_is_written_once_and_never_changes(e: Evidence) -> Evidence:
    change = e.changes[find(e, "checkpoints", inserted("value"))]
    return replace(e, changes=[*e.changes, change._replace(was=change.became)])


@forging
def transactions_happen_exactly_once(e: Evidence) -> Evidence:
    return with_table(e, "effects", lambda rows: rows.append(dict(rows[0])))


@forging
def steps_run_once_an_attempt_and_never_after_their_checkpoint(e: Evidence) -> Evidence:
    return replace(e, ledger=[*e.ledger, next(iter(e.noted("step")))])


@forging
def every_run_sees_the_same(e: Evidence) -> Evidence:
    return replace(e, ledger=[*e.ledger, {**next(iter(e.noted("seen"))), "value": "something else"}])


@forging
def replays_extend_what_is_recorded(e: Evidence) -> Evidence:
    return in_the_second_execution(e, lambda calls: [calls[1], calls[0], *calls[2:]])


@forging
def due_work_is_claimed_while_there_are_slots(e: Evidence) -> Evidence:
    """A task was claimed a minute after it was spawned, with a worker there for as long."""
    index = find(e, "tasks", first_claimed)
    changes = list(e.changes)
    earlier = next(
        each
        for each in range(index - 1, -1, -1)
        if changes[each].relation == "tasks" and changes[each].row["task_id"] == changes[index].row["task_id"]
    )
    early = changes[earlier].at - timedelta(seconds=60)
    changes[earlier] = changes[earlier]._replace(
        at=early, committed_at=early, became={**changes[earlier].row, "available_at": early.isoformat()}
    )
    worker = find(e, "workers", lambda change: change.was is None)
    changes[worker] = changes[worker]._replace(at=early)
    return replace(e, changes=changes, steady_since=early)


@forging
def waits_end_with_what_was_first(e: Evidence) -> Evidence:
    return with_row(
        e, find(e, "events", lambda change: change.row["name"].startswith("toured")), payload="something else"
    )


@forging
def no_wait_is_left(e: Evidence) -> Evidence:
    waiting = {"task_id": next(iter(e.tasks)), "name": "never"}
    return with_table(e, "waits", lambda rows: rows.append(waiting))


@forging
def each_spawn_in_a_task_has_one_child(e: Evidence) -> Evidence:
    return without(e, lambda change: change.relation == "checkpoints" and change.row["kind"] == "spawn")


@forging
def joins_give_what_the_child_came_to(e: Evidence) -> Evidence:
    return with_row(e, find(e, "checkpoints", inserted("join")), value="something else")


@forging
def no_descendant_outlives_a_failure(e: Evidence) -> Evidence:
    index = find(
        e,
        "tasks",
        lambda change: change.row["task_name"] == "nap" and change.row["parent_task_id"] and change.row["outcome"],
    )
    return with_row(e, index, outcome="completed", state="completed")


@forging
def states_agree_with_claims(e: Evidence) -> Evidence:
    return with_row(e, find(e, "tasks", lambda change: change.row["state"] == "running"), claimed_by=None)


@forging
def what_has_ended_stays_so(e: Evidence) -> Evidence:
    change = e.changes[find(e, "tasks", ended)]
    return replace(e, changes=[*e.changes, change._replace(was=change.became)])


@forging
def nothing_starts_before_its_time(e: Evidence) -> Evidence:
    index = find(
        e, "tasks", lambda change: change.was and change.was["state"] == "pending" and change.became["claimed_by"]
    )
    was = {**(e.changes[index].was or {}), "available_at": "2999-01-01T00:00:00+00:00"}
    return with_change(e, index, was=was)


@forging
def each_tick_has_one_task(e: Evidence) -> Evidence:
    ticks = sorted(row["idempotency_key"] for row in e.inserted("tasks") if row["task_name"] == "tick")
    assert len(ticks) > 2
    return without(e, lambda change: change.row.get("idempotency_key") == ticks[1])


@forging
def no_money_is_made_or_lost(e: Evidence) -> Evidence:
    return with_table(e, "accounts", lambda rows: rows[0].update(balance=rows[0]["balance"] + 1))


@forging
def outputs_are_what_they_should_be(e: Evidence) -> Evidence:
    index = find(e, "tasks", lambda change: ended(change) and change.row["task_name"] == "transfer")
    return with_row(e, index, output="something else")


@forging
def workers_claim_from_their_queues(e: Evidence) -> Evidence:
    return with_row(e, find(e, "workers", lambda change: change.became), queue_names=["nowhere"])


@forging
def tasks_are_left_to_those_who_know_them(e: Evidence) -> Evidence:
    worker_id = next(worker_id for worker_id, row in e.workers.items() if "latter" not in e.knows[row["name"]])
    index = find(
        e, "tasks", lambda change: change.row["task_name"] == "latter" and change.became and change.became["claimed_by"]
    )
    return with_row(e, index, claimed_by=worker_id)


@forging
def only_what_is_over_is_deleted(e: Evidence) -> Evidence:
    change = e.changes[find(e, "tasks", lambda change: change.row["outcome"] is None)]
    return replace(e, changes=[*e.changes, change._replace(was=change.became, became=None)])


@forging
def only_failures_of_the_code_count(e: Evidence) -> Evidence:
    index = find(e, "tasks", lambda change: ended(change) and change.row["task_name"] == "tour")
    return with_row(e, index, failures=1)


@forging
def no_secret_is_said(e: Evidence) -> Evidence:
    return replace(e, logs={"w0.log": f"params: {e.secrets[0]}"})


@forging
def nobody_complains(e: Evidence) -> Evidence:
    return replace(e, logs={"w0.log": "2026-01-01 00:00:00,000 ERROR durable_sa claim failed\n"})


@pytest.mark.parametrize("name", [check.__name__ for check in INVARIANTS])
def test_a_forged_history_is_told(history: Evidence, name: str) -> None:
    assert name in violations(FORGERIES[name](history))


def test_a_replay_that_passes_over_what_is_recorded_is_told(history: Evidence) -> None:
    forged = in_the_second_execution(history, lambda calls: calls[:1])
    assert "replays_extend_what_is_recorded" in violations(forged)


def test_what_waits_because_all_slots_are_taken_does_not_count(history: Evidence) -> None:
    forged = FORGERIES["due_work_is_claimed_while_there_are_slots"](history)
    assert "due_work_is_claimed_while_there_are_slots" not in violations(replace(forged, slots=0))


@pytest.mark.parametrize("losses", [0, SUSPECT_AFTER])
def test_what_waits_because_a_suspect_runs_alone_does_not_count(history: Evidence, losses: int) -> None:
    """One run leaves the worker free slots, unless it is that of a suspect."""
    forged = FORGERIES["due_work_is_claimed_while_there_are_slots"](history)
    index = find(forged, "tasks", first_claimed)
    claim = forged.changes[index]
    assert claim.became
    assert forged.steady_since
    worker = forged.changes[find(forged, "workers", lambda change: change.was is None)].row["worker_id"]
    running = {**claim.became, "task_id": "another", "claimed_by": worker, "lease_losses": losses}
    ready = {**running, "state": "ready", "claimed_by": None}
    began = claim._replace(at=forged.steady_since, committed_at=forged.steady_since, was=ready, became=running)
    ended = claim._replace(was=running, became={**ready, "state": "completed", "outcome": "completed"})
    changes = [*forged.changes[:index], began, ended, *forged.changes[index:]]
    found = violations(replace(forged, changes=changes))
    assert ("due_work_is_claimed_while_there_are_slots" in found) == (losses == 0)


def test_how_long_due_work_waits_is_known(history: Evidence) -> None:
    waited = histogram(history)
    assert waited["count"] > len(history.tasks) / 2
    assert 0 <= waited["p50"] <= waited["p99"] <= waited["most"]
    # As long as hints come, most of it waits for no poll.
    assert waited["p50"] < 1
