"""What must hold whatever has happened, as functions that look for its violations.

They go through the history of every row, so that a wrong that was put right later is found as well.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from .audit import BALANCE
from .evidence import Change, Evidence, Row
from .lags import lags

Invariant = Callable[[Evidence], Iterator[str]]

INVARIANTS: list[Invariant] = []

_SPAWNING = ("spawn", "order", "keyed", "spawn_many")
_WRITTEN_BY_RUNS = ("step", "transaction", "spawn", "emit", "value", "sleep")
_FORGETFUL = ("poisoned", "grown")
"""Tasks whose code, in a later attempt or an earlier version, does not ask for all that it has asked for before."""
_PATIENCE = 5.5
"""Seconds that due work may wait although there is a slot for it: those from one poll to the next, and a claim's."""
_NO_FAILURES = ("LeaseLost", "Released")
_FAILURES = {
    "flaky": {"Planned"},
    "doomed": {"UserError"},
    "spool": {"OSError"},
    "poisoned": {"RecursionError", "MemoryError", "SystemExit"},
}


def invariant(function: Invariant) -> Invariant:
    INVARIANTS.append(function)
    return function


def violations(evidence: Evidence, *, most: int = 20) -> dict[str, list[str]]:
    """What each invariant that does not hold has found, not more than so many cases of it."""
    found: dict[str, list[str]] = {}
    for check in INVARIANTS:
        cases = [case for case, _ in zip(check(evidence), range(most), strict=False)]
        if cases:
            found[check.__name__] = cases
    return found


def _time(value: str) -> datetime:
    return datetime.fromisoformat(value)


def _op(row: Row) -> str | None:
    return row["params"]["op"] if row["params"] else None


def _name(row: Row) -> str:
    return f"{row['task_name']} {row['task_id']} ({_op(row)})"


def _claimed(change: Change) -> bool:
    return bool(
        change.relation == "tasks"
        and change.was
        and change.became
        and change.became["claimed_by"]
        and change.was["claimed_by"] is None
    )


@invariant
def every_acknowledged_spawn_has_one_task(e: Evidence) -> Iterator[str]:
    """What a caller was told exists, once; what was refused does not; what got no reply is there once or not at all."""
    asked: dict[str, set[str]] = defaultdict(set)
    ids: dict[str, set[str]] = defaultdict(set)
    for entry in e.noted("invoke", "ok", "fail", "unknown"):
        if entry.get("kind") in _SPAWNING:
            count = 5 if entry["kind"] == "spawn_many" else None
            for index, op in enumerate([entry["op"]] if count is None else [f"{entry['op']}.{n}" for n in range(5)]):
                asked[op].add(entry["what"])
                if entry["what"] == "ok":
                    ids[op].add(entry["result"] if count is None else entry["result"][index])
    inserted: dict[str, list[str]] = defaultdict(list)
    for row in e.inserted("tasks"):
        if row["parent_task_id"] is None and row["task_name"] != "tick":
            inserted[str(_op(row))].append(row["task_id"])
    for op in inserted.keys() - asked.keys():
        yield f"nobody asked for {op}"
    for op, outcomes in asked.items():
        found = inserted.get(op, [])
        if "ok" in outcomes and ids[op] != set(found):
            yield f"{op} was acknowledged as {ids[op]}, and there is {found}"
        if len(found) > 1:
            yield f"{op} is there {len(found)} times"
        if outcomes == {"invoke", "fail"} and found:
            yield f"{op} was refused, and is there"
    for entry in e.noted("invoke"):
        if entry["kind"] == "spawn_many":
            there = sum(f"{entry['op']}.{number}" in inserted for number in range(5))
            if there not in (0, 5):
                yield f"of {entry['op']}, spawned together, {there} of 5 are there"
    for entry in e.noted("violation"):
        yield entry["text"]


@invariant
def orders_and_their_tasks_stand_or_fall_together(e: Evidence) -> Iterator[str]:
    """A row of the application is committed if and only if the task that was spawned with it is."""
    ops = {entry["op"] for entry in e.noted("invoke") if entry["kind"] == "order"}
    tasks = {str(_op(row)): row["task_id"] for row in e.inserted("tasks") if _op(row) in ops}
    orders = {row["op"]: row["task_id"] for row in e.tables["orders"]}
    if len(orders) != len(e.tables["orders"]):
        yield "an order is there twice"
    for op in tasks.keys() ^ orders.keys():
        yield f"{op}: order {orders.get(op)}, task {tasks.get(op)}"
    yield from (f"{op} names another task" for op in tasks.keys() & orders.keys() if tasks[op] != orders[op])


@invariant
def attempts_are_numbered_without_gaps(e: Evidence) -> Iterator[str]:
    """The ended attempts of a task are 1 to n, each once, and n is what the task says when it has ended."""
    runs: dict[str, list[int]] = defaultdict(list)
    for row in e.inserted("runs"):
        runs[row["task_id"]].append(row["attempt"])
    for task_id, task in e.tasks.items():
        attempts = runs[task_id]
        if attempts != list(range(1, len(attempts) + 1)):
            yield f"{_name(task)} has the attempts {attempts}"
        elif task["outcome"] and len(attempts) != task["attempt"]:
            yield f"{_name(task)} has ended in attempt {task['attempt']}, of {attempts}"
    for change in e.by_relation["runs"]:
        if change.was and change.became:
            yield f"an ended attempt was changed: {change.became['task_id']} {change.became['attempt']}"


@invariant
def fences_only_rise(e: Evidence) -> Iterator[str]:
    """The fence of a task never goes back, is another for each claim, and no claim replaces one that is not over."""
    for changes in e.by_task.values():
        for change in changes:
            if change.relation != "tasks" or not change.was or not change.became:
                continue
            before, after = change.was, change.became
            if after["fence"] < before["fence"]:
                yield f"{_name(after)}: {before['fence']} to {after['fence']}"
            if after["claimed_by"] != before["claimed_by"] and not before["outcome"]:
                if after["fence"] == before["fence"]:
                    yield f"{_name(after)} changed hands under fence {after['fence']}"
                if after["claimed_by"] and before["claimed_by"]:
                    yield f"{_name(after)} was claimed while {before['claimed_by']} had it"


@invariant
def only_the_holder_of_a_run_writes_for_it(e: Evidence) -> Iterator[str]:
    """Checkpoints and outcomes come from the connections of the worker that has the claim at that moment."""
    names = {worker_id: row["name"] for worker_id, row in e.workers.items()}
    lost = {
        change.became["worker_id"]: change.seq
        for change in e.by_relation["workers"]
        if change.became and change.became["lost_at"]
    }
    gone = {change.row["worker_id"]: change.seq for change in e.by_relation["workers"] if change.became is None}
    for changes in e.by_task.values():
        for change in changes:
            if change.relation == "checkpoints":
                row = change.became
                if change.was is None and row and row["kind"] in _WRITTEN_BY_RUNS:
                    owner = names.get(str(_holder_before(changes, change)))
                    if change.application != owner:
                        yield f"{row['kind']} {row['name']!r} of {row['task_id']} by {change.application}, not {owner}"
                continue
            if not change.was or not change.became or change.was["state"] != "running":
                continue
            before, after = change.was, change.became
            holder = names.get(before["claimed_by"])
            taken = after["lease_losses"] > before["lease_losses"]
            if taken:
                at = min(lost.get(before["claimed_by"], 2**62), gone.get(before["claimed_by"], 2**62))
                if at > change.seq:
                    yield f"{_name(after)} was taken from {holder}, which was not lost"
            elif after["state"] not in ("cancelled", "running") and change.application != holder:
                yield f"{_name(after)} became {after['state']} by {change.application}, not {holder}"


def _holder_before(changes: list[Change], change: Change) -> str | None:
    """Who had the claim when the transaction of this change began to write."""
    holder: str | None = None
    for earlier in changes:
        if earlier.relation != "tasks":
            continue
        if earlier.xid == change.xid:
            return earlier.was["claimed_by"] if earlier.was else None
        if earlier.seq > change.seq:
            break
        holder = earlier.became["claimed_by"] if earlier.became else None
    return holder


@invariant
def a_checkpoint_is_written_once_and_never_changes(e: Evidence) -> Iterator[str]:
    """What is stored under a key stays, unless the task is deleted or a bad join is forgotten by a retry."""
    there: set[tuple[str, str]] = set()
    for change in e.by_relation["checkpoints"]:
        key = change.row["task_id"], change.row["key"]
        if change.was and change.became:
            yield f"{change.row['kind']} {change.row['name']!r} of {key[0]} was changed"
        elif change.became:
            if key in there:
                yield f"{change.row['kind']} {change.row['name']!r} of {key[0]} was written twice"
            there.add(key)
        else:
            there.discard(key)
            if key[0] not in e.deleted and change.row["kind"] != "join":
                yield f"{change.row['kind']} {change.row['name']!r} of {key[0]} was deleted"


@invariant
def transactions_happen_exactly_once(e: Evidence) -> Iterator[str]:
    """For each checkpoint of a transaction its writes are there once, and none are without a checkpoint."""
    done: Counter[tuple[str, str]] = Counter((row["task_id"], row["what"]) for row in e.tables["effects"])
    done += Counter((row["task_id"], "move") for row in e.tables["transfers"])
    recorded = {(row["task_id"], row["name"]) for row in e.inserted("checkpoints") if row["kind"] == "transaction"}
    for key in done.keys() | recorded:
        if done[key] != 1 or key not in recorded:
            yield f"{key[1]!r} of {key[0]}: {done[key]} times, recorded: {key in recorded}"


@invariant
def steps_run_once_an_attempt_and_never_after_their_checkpoint(e: Evidence) -> Iterator[str]:
    """A step is executed at least once for its checkpoint, and by no attempt that was claimed after that was written."""
    recorded = {
        (change.row["task_id"], change.row["name"]): change.seq
        for change in e.by_relation["checkpoints"]
        if change.was is None and change.row["kind"] == "step"
    }
    executed: Counter[tuple[str, str, int]] = Counter()
    for entry in e.noted("step"):
        executed[entry["task"], entry["step"], entry["attempt"]] += 1
    done = {key[:2] for key in executed}
    yield from (
        f"{name!r} of {task_id} was never executed" for task_id, name in recorded.keys() - done if name != "poison"
    )
    for (task_id, name, attempt), times in executed.items():
        if times > 1:
            yield f"{name!r} of {task_id} was executed {times} times in attempt {attempt}"
        claimed = e.claims(task_id).get(attempt)
        if claimed is None:
            yield f"attempt {attempt} of {task_id} was never claimed, and executed {name!r}"
        elif recorded.get((task_id, name), 2**62) < claimed:
            yield f"attempt {attempt} of {task_id} executed {name!r}, which was recorded before"


@invariant
def every_run_sees_the_same(e: Evidence) -> Iterator[str]:
    """What a call has given a task once it gives in each later run."""
    seen: dict[tuple[str, str], Any] = {}
    for entry in e.noted("seen"):
        key = entry["task"], entry["step"]
        if seen.setdefault(key, entry["value"]) != entry["value"]:
            yield f"{key[1]!r} of {key[0]} was {seen[key]}, then {entry['value']}"


@invariant
def replays_extend_what_is_recorded(e: Evidence) -> Iterator[str]:
    """In each branch all executions of a task make the same calls in the same order, as far as they come; and one that
    ends by itself, for now or for good, has asked for everything that was recorded when it began.

    But for one that comes to a sleep whose time lies ahead once more, as the server's clock was put back."""
    recorded: dict[str, dict[str, int]] = defaultdict(dict)
    for change in e.by_relation["checkpoints"]:
        if change.was is None:
            recorded[change.row["task_id"]].setdefault(change.row["key"], change.seq)
    for task_id, executions in e.executions().items():
        if (task := e.tasks.get(task_id)) is None:
            continue
        longest: dict[str, list[str]] = {}
        for fence, calls in executions.items():
            branches: dict[str, list[str]] = defaultdict(list)
            for call in calls:
                branches[call["branch"]].append(f"{call['call']} {call['key']}")
            for branch, made in branches.items():
                known = longest.setdefault(branch, made)
                shared = min(len(known), len(made))
                if known[:shared] != made[:shared]:
                    yield f"{_name(task)} under fence {fence} asked for {made}, and before for {known}"
                longest[branch] = max(known, made, key=len)
        if task["task_name"] in _FORGETFUL:
            continue
        for fence, (claimed, ended) in _orderly(e.by_task[task_id]).items():
            calls = executions.get(fence, [])
            if ended == "sleeping" and calls and calls[-1]["call"].startswith("sleep "):
                continue
            asked = {call["key"] for call in calls}
            for key, seq in recorded[task_id].items():
                if seq < claimed and key not in asked:
                    yield f"{_name(task)} {ended} under fence {fence} without having asked for {key}"


def _orderly(changes: list[Change]) -> dict[int, tuple[int, str]]:
    """By its fence, where in the history each execution began that has suspended or completed, and which of them."""
    claimed: dict[int, int] = {}
    found: dict[int, tuple[int, str]] = {}
    for change in changes:
        if change.relation != "tasks" or not change.became:
            continue
        if change.became["state"] == "running":
            claimed.setdefault(change.became["fence"], change.seq)
        elif change.was and change.was["state"] == "running" and change.became["state"] in ("sleeping", "completed"):
            fence = change.was["fence"]
            found[fence] = claimed[fence], change.became["state"]
    return found


@invariant
def due_work_is_claimed_while_there_are_slots(e: Evidence) -> Iterator[str]:
    """Since the round was steady, nothing that was due has waited for long while a worker had a free slot for it."""
    for lag in lags(e):
        if lag.seconds > _PATIENCE:
            yield f"{_name(lag.task)} of {lag.task['queue_name']} waited for {lag.seconds:.1f} s"


@invariant
def waits_end_with_what_was_first(e: Evidence) -> Iterator[str]:
    """A wait for an event ends with the payload of the event, or with a timeout if none was committed in time."""
    events = {(c.row["queue_name"], c.row["name"]): c for c in e.by_relation["events"] if c.was is None}
    due = {(row["task_id"], row["key"]): row["due_at"] for row in e.inserted("waits")}
    for change in e.by_relation["checkpoints"]:
        row = change.became
        if change.was or not row or row["kind"] != "event":
            continue
        task = e.tasks.get(row["task_id"])
        event = task and events.get((task["queue_name"], row["name"]))
        limit = due.get((row["task_id"], row["key"]))
        if row["status"] == "completed":
            if event is None:
                yield f"{row['task_id']} got event {row['name']!r}, which was not emitted"
            elif event.row["payload"] != row["value"]:
                yield f"{row['task_id']} got {row['value']} for event {row['name']!r}"
            continue
        came = event.committed_at if event and not e.clock_moved else None
        if came and limit and came + timedelta(seconds=e.slack) < _time(limit):
            yield f"{row['task_id']} timed out at {limit}, event {row['name']!r} came at {came}"


@invariant
def no_wait_is_left(e: Evidence) -> Iterator[str]:
    """When all has settled, nobody waits, and no event is undelivered."""
    if e.settled:
        yield from (f"{row['task_id']} waits for {row['name']!r}" for row in e.tables["waits"])
        yield from (f"{_name(row)} is {row['state']}" for row in e.tables["tasks"] if not row["outcome"])
        yield from (f"event {row['name']!r} is undelivered" for row in e.tables["events"] if not row["delivered_at"])


@invariant
def each_spawn_in_a_task_has_one_child(e: Evidence) -> Iterator[str]:
    """Children and the checkpoints that name them are the same set, and a child has the parent that spawned it."""
    named = {row["child_task_id"]: row["task_id"] for row in e.inserted("checkpoints") if row["kind"] == "spawn"}
    children = {row["task_id"]: row["parent_task_id"] for row in e.inserted("tasks") if row["parent_task_id"]}
    for task_id in named.keys() ^ children.keys():
        yield f"child {task_id}: checkpoint of {named.get(task_id)}, task of {children.get(task_id)}"
    yield from (
        f"child {child} of {parent}" for child, parent in named.items() if children.get(child, parent) != parent
    )


@invariant
def joins_give_what_the_child_came_to(e: Evidence) -> Iterator[str]:
    """A join that completed has the output of its child."""
    outputs = {
        change.row["task_id"]: change.row["output"]
        for change in e.by_relation["tasks"]
        if change.became and change.became["outcome"] == "completed"
    }
    for row in e.inserted("checkpoints"):
        if row["kind"] == "join" and row["status"] == "completed":
            child = row["child_task_id"]
            if child not in outputs:
                yield f"{row['task_id']} joined {child}, which has not completed"
            elif outputs[child] != row["value"]:
                yield f"{row['task_id']} got {row['value']} from {child}, which gave {outputs[child]}"


@invariant
def no_descendant_outlives_a_failure(e: Evidence) -> Iterator[str]:
    """The child of a task that fails at once sleeps for a minute: if it completes, nobody has cancelled it."""
    for task in e.tasks.values():
        parent = e.tasks.get(task["parent_task_id"])
        if task["task_name"] == "nap" and parent and parent["outcome"] and task["outcome"] not in ("cancelled", None):
            yield f"{_name(task)} has {task['outcome']}"


@invariant
def states_agree_with_claims(e: Evidence) -> Iterator[str]:
    """At each moment a task is running if and only if somebody has it, and ended if and only if it has an outcome."""
    for change in e.by_relation["tasks"]:
        row = change.became
        if not row:
            continue
        if row["outcome"] is None and (row["state"] == "running") != (row["claimed_by"] is not None):
            yield f"{_name(row)} was {row['state']}, claimed by {row['claimed_by']}"
        if (row["outcome"] is not None) != (row["finished_at"] is not None) or row["outcome"] not in (
            None,
            row["state"],
        ):
            yield f"{_name(row)} was {row['state']}, outcome {row['outcome']}, finished {row['finished_at']}"


@invariant
def what_has_ended_stays_so(e: Evidence) -> Iterator[str]:
    """An ended task changes only if it is deleted or, not having completed, is put back by a retry."""
    retried = {entry["task"] for entry in e.noted("invoke") if entry["kind"] == "retry"}
    families = {task_id: _root(e, task_id) for task_id in e.tasks}
    for change in e.by_relation["tasks"]:
        if not change.was or not change.became or not change.was["outcome"]:
            continue
        again = change.became["state"] == "pending" and families[change.row["task_id"]] in retried
        if change.was["outcome"] == "completed" or not again:
            yield f"{_name(change.became)}, {change.was['outcome']}, became {change.became['state']}"


def _root(e: Evidence, task_id: str) -> str:
    while (task := e.tasks.get(task_id)) and task["parent_task_id"]:
        task_id = task["parent_task_id"]
    return task_id


@invariant
def nothing_starts_before_its_time(e: Evidence) -> Iterator[str]:
    """No task is claimed before it is available, nor goes on before the time that it sleeps until."""
    for change in e.by_relation["tasks"]:
        if not _claimed(change) or not change.was or e.clock_moved:
            continue
        available_at = change.was["available_at"]
        if available_at is None or _time(available_at) > change.at:
            yield f"{_name(change.row)}, available at {available_at}, was claimed at {change.at}"


@invariant
def each_tick_has_one_task(e: Evidence) -> Iterator[str]:
    """A schedule of every second has spawned one task for each second from its first to its last."""
    keys = Counter(row["idempotency_key"] for row in e.inserted("tasks") if row["task_name"] == "tick")
    ticks = sorted(_time(str(key).split(":", 3)[3]) for key in keys)
    yield from (f"{key} was fired {times} times" for key, times in keys.items() if times > 1)
    yield from (
        f"between {before} and {after} is a gap"
        for before, after in zip(ticks, ticks[1:], strict=False)
        if after - before != timedelta(seconds=1) and not e.clock_moved
    )


@invariant
def no_money_is_made_or_lost(e: Evidence) -> Iterator[str]:
    """The balances are what the transfers make of them."""
    balances = {row["account"]: BALANCE for row in e.tables["accounts"]}
    for row in e.tables["transfers"]:
        balances[row["source"]] -= row["amount"]
        balances[row["target"]] += row["amount"]
    for row in e.tables["accounts"]:
        if row["balance"] != balances[row["account"]]:
            yield f"account {row['account']} has {row['balance']}, not {balances[row['account']]}"


def _expected(task: Row) -> Callable[[Any], bool] | None:
    """What the output of a completed task must look like."""
    params = task["params"] or {}
    number = params.get("number", 0)
    doubled = number * 2 + 1
    match task["task_name"]:
        case "leaf" | "flaky" | "nap" | "poisoned" | "former" | "latter":
            return lambda output: output == doubled
        case "tour":
            return lambda output: (
                len(output) == 9 and [output[0], *output[2:7]] == [3, 5, number, doubled, "timeout", 7]
            )
        case "grown":
            return lambda output: output in ([doubled, doubled + 2], [doubled, doubled + 2, doubled + 4])
        case "plain":
            return lambda output: output == [doubled, doubled, doubled + 2]
        case "transfer" | "spool":
            return lambda output: output == number
        case "family":
            return lambda output: output == sum(2 * each + 1 for each in range(number))
        case "waiter":
            return lambda output: output in (None, number)
        case _:
            return None


@invariant
def outputs_are_what_they_should_be(e: Evidence) -> Iterator[str]:
    """A completed task has the output that its params make it have, and that is what callers were told."""
    for task in e.tasks.values():
        expected = _expected(task)
        if task["outcome"] == "completed" and expected and not expected(task["output"]):
            yield f"{_name(task)} gave {task['output']}"
    for entry in e.noted("outcome"):
        ends = [
            change.became
            for change in e.by_task[entry["task"]]
            if change.relation == "tasks" and change.became and change.became["outcome"]
        ]
        if not any(end["outcome"] == entry["status"] and end["output"] == entry["output"] for end in ends):
            yield f"{entry['op']} was said to be {entry['status']}: {entry['output']}"


@invariant
def workers_claim_from_their_queues(e: Evidence) -> Iterator[str]:
    """No worker has claimed a task of a queue that it does not serve."""
    for change in e.by_relation["tasks"]:
        if _claimed(change) and change.became:
            worker = e.workers.get(change.became["claimed_by"])
            if worker is None or change.became["queue_name"] not in worker["queue_names"]:
                yield f"{_name(change.became)} of {change.became['queue_name']} was claimed by {worker}"


@invariant
def tasks_are_left_to_those_who_know_them(e: Evidence) -> Iterator[str]:
    """No worker has claimed a task whose name it has not registered."""
    for change in e.by_relation["tasks"]:
        if _claimed(change) and change.became:
            worker = e.workers.get(change.became["claimed_by"])
            if worker and change.became["task_name"] not in e.knows.get(worker["name"], ()):
                yield f"{_name(change.became)} was claimed by {worker['name']}, which does not know it"


@invariant
def only_what_is_over_is_deleted(e: Evidence) -> Iterator[str]:
    """Tasks are deleted when they have ended, not before their parent and waiters have, and leave nothing behind."""
    ended: set[str] = set()
    for change in e.by_relation["tasks"]:
        row = change.row
        if change.became is None:
            parent = row["parent_task_id"]
            if not row["outcome"]:
                yield f"{_name(row)} was deleted while it was {row['state']}"
            if parent and parent not in ended:
                yield f"{_name(row)} was deleted before its parent had ended"
        elif row["outcome"]:
            ended.add(row["task_id"])
        else:
            ended.discard(row["task_id"])
    left = {row["task_id"] for row in e.tables["tasks"]}
    for name in ("checkpoints", "runs", "waits"):
        yield from (f"{name} of {row['task_id']} are left" for row in e.tables[name] if row["task_id"] not in left)


@invariant
def only_failures_of_the_code_count(e: Evidence) -> Iterator[str]:
    """A task has failed as often as its code has raised what it is meant to raise, whatever happened around it."""
    raised = {(entry["task"], entry["attempt"]) for entry in e.noted("raised")}
    counted: Counter[str] = Counter()
    for row in e.inserted("runs"):
        if row["state"] != "failed" or row["error"]["name"] in _NO_FAILURES:
            continue
        counted[row["task_id"]] += 1
        task, name = e.tasks[row["task_id"]], row["error"]["name"]
        if name not in _FAILURES.get(task["task_name"], ()):
            yield f"{_name(task)} failed in attempt {row['attempt']}: {name}: {row['error'].get('message')}"
        elif name in ("Planned", "UserError", "OSError") and (row["task_id"], row["attempt"]) not in raised:
            yield f"{_name(task)} did not raise in attempt {row['attempt']}"
    retried = {change.row["task_id"] for change in e.by_relation["tasks"] if change.was and change.was["outcome"]}
    for task_id, task in e.tasks.items():
        if task_id not in retried and task["failures"] != counted[task_id]:
            yield f"{_name(task)} counts {task['failures']} failures, of {counted[task_id]}"
        if task["outcome"] == "failed" and task["task_name"] not in _FAILURES:
            yield f"{_name(task)} has failed: {task['error']}"


@invariant
def no_secret_is_said(e: Evidence) -> Iterator[str]:
    """Neither params nor the password of the database are in any log."""
    for name, log in e.logs.items():
        yield from (f"{name} has a secret" for secret in e.secrets if secret in log)


_EXPECTED = (
    # What a worker says that ends its process for having been taken over.
    "another worker has taken over the runs of this one",
    # What asyncpg leaves behind where a connection is lost while it is being opened.
    "unexpected connection_lost() call",
)
_COMPLAINT = re.compile(
    r"^.*(?: ERROR | CRITICAL |Traceback|ResourceWarning|RuntimeWarning|never retrieved|never awaited).*$", re.MULTILINE
)
_PLANNED = re.compile(
    r"^20\d\d-\S+ \S+ \w+ durable_sa task \S+ "
    r"(?:\(poisoned\) failed|\(\w+\) failed[^\n]*: (?:UserError: p|P)lanned).*?(?=^20\d\d-|\Z)",
    re.MULTILINE | re.DOTALL,
)
"""The record, with its traceback, of a failure that the workload plans."""


@invariant
def nobody_complains(e: Evidence) -> Iterator[str]:
    """No process has logged an error or warned of something left open: faults are warnings, and expected."""
    for name, whole in e.logs.items():
        log = _PLANNED.sub("", whole)
        for found in _COMPLAINT.finditer(log):
            if "\nKeyboardInterrupt\n" in log[found.end() :].split("\n20")[0] + "\n":
                # SIGINT came before the worker had started, and handled it.
                continue
            after = " | ".join(log[found.end() :].split("\n")[1:25])
            if any(expected in f"{found.group()} {after[:100]}" for expected in _EXPECTED):
                continue
            # The record's first line has the message, which a round may excuse.
            record = log[: found.end()].rpartition("\n20")[2].split("\n")[0]
            yield f"{name}: 20{record} | {found.group()} | {after[-600:]}"
