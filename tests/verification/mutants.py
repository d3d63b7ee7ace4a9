"""Weakened engines, each of which the tests must catch: ``python -m tests.verification.mutants [NAME ...]``.

A mutant is a change of the package's source that takes one guarantee away. It is made in a copy in a directory of its
own, together with the tests, of which those that are to notice run there. A mutant that survives all of its tests is a
guarantee that nothing checks; the exit code is 1 then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from durable_sa.testing.database import database_server

ROOT = Path(__file__).parents[2]
RACES = "tests/verification/test_interleavings.py::"
PROCESSES = "tests/cli/test_processes.py::"
LIMITS = "tests/worker/test_queue_limits.py::"
SUSPECTS = "tests/worker/test_limited_suspects.py::"
MACHINE = "tests/verification/test_state_machine.py"
MESSAGES = "tests/verification/test_messages.py"
STREAMS = "tests/context/test_streams.py"


@dataclass(frozen=True)
class Mutant:
    """What is taken away, where, and who must notice: any of the tests will do."""

    name: str
    file: str
    patches: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Change the copy of the package in `root`.

        Raises:
            LookupError: a text to be replaced is not there, or not once.
        """
        path = root / "durable_sa" / self.file
        source = path.read_text()
        for old, new in self.patches:
            if (found := source.count(old)) != 1:
                raise LookupError(f"{self.name}: in {self.file} this is there {found} times instead of once:\n{old}")
            source = source.replace(old, new)
        path.write_text(source)


MUTANTS = (
    Mutant(
        "outcomes without a fence",
        "statements/fencing.py",
        (
            (
                "(TaskRow.task_id == source.c.task_ids) & (TaskRow.fence == source.c.fences)",
                "TaskRow.task_id == source.c.task_ids",
            ),
        ),
        (f"{RACES}test_takeover_and_what_a_run_writes", MACHINE),
    ),
    Mutant(
        "checkpoints without a fence",
        "statements/checkpoints.py",
        ((").where(is_in(c.task_ids, locked)),", "),"),),
        (f"{RACES}test_takeover_and_what_a_run_writes", "tests/worker/test_fences.py"),
    ),
    Mutant(
        "a reply that is taken to be about all writes",
        "execution/writer.py",
        (("if kind in COUNTED and rows[0].written == len(writes):", "if kind in COUNTED:"),),
        (f"{RACES}test_takeover_and_what_a_run_writes", "tests/worker/test_fences.py"),
    ),
    Mutant(
        "a fence that a suspension leaves as it is",
        "statements/suspending.py",
        (
            (
                "            lease_losses=constant(0),\n            fence=TaskRow.fence + constant(1),\n",
                "            lease_losses=constant(0),\n",
            ),
        ),
        ("tests/worker/test_fences.py", MACHINE),
    ),
    Mutant(
        "children whose parent is not looked at",
        "statements/checkpoints.py",
        (("        .where(is_in(_child.c.parent_task_id, _locked))\n", ""),),
        (f"{RACES}test_cancel_and_spawn_of_a_child", "tests/worker/test_fences.py"),
    ),
    Mutant(
        "an idempotency key that takes any task for the first",
        "spawns.py",
        (("if row.task_name != item.task_name or not _same_params(item, row.params):", "if False:"),),
        ("tests/client/test_idempotency.py::test_another_name_or_other_params_are_a_conflict",),
    ),
    Mutant(
        "a spawn that does not ask why its insert was passed over",
        "client/inserting.py",
        (
            (
                "            outcome = resolve_missing(item, rows)\n            if isinstance(outcome, SpawnResult)",
                "            outcome = spawn_result(item)\n            if isinstance(outcome, SpawnResult)",
            ),
        ),
        (f"{RACES}test_two_spawns_with_one_key", MACHINE),
    ),
    Mutant(
        "a lease whose end is not looked at again under the lock",
        "statements/claiming.py",
        (
            (
                "    .order_by(WorkerRow.worker_id)\n    .with_for_update(skip_locked=True),\n",
                "    .order_by(WorkerRow.worker_id),\n",
            ),
            (
                (
                    ".where(WorkerRow.worker_id == _silent.c.worker_id, WorkerRow.lost_at.is_(None), "
                    "WorkerRow.expires_at < clock())"
                ),
                ".where(WorkerRow.worker_id == _silent.c.worker_id)",
            ),
        ),
        (
            f"{RACES}test_heartbeat_and_takeover",
            "tests/worker/test_leases.py::test_a_heartbeat_that_was_committed_first_wins_against_the_sweep",
        ),
    ),
    Mutant(
        "a heartbeat that does not extend the lease",
        "statements/claiming.py",
        (
            (
                ".values(heartbeat_at=clock(), expires_at=clock() + WorkerRow.claim_timeout)",
                ".values(heartbeat_at=clock())",
            ),
        ),
        (MACHINE,),
    ),
    Mutant(
        "a worker that claims after it was taken over",
        "statements/claiming.py",
        (("WorkerRow.worker_id == _worker_id, WorkerRow.lost_at.is_(None)),", "WorkerRow.worker_id == _worker_id),"),),
        ("tests/worker/test_claims.py::test_a_worker_that_was_declared_lost_claims_nothing_more", MACHINE),
    ),
    Mutant(
        "a claim that waits for locked rows",
        "statements/claiming.py",
        (
            (
                '.with_for_update(skip_locked=True, key_share=True)\n        .lateral("next_in_lane")',
                '.with_for_update(key_share=True)\n        .lateral("next_in_lane")',
            ),
        ),
        ("tests/worker/test_claims.py::test_claims_pass_over_locked_rows_without_waiting",),
    ),
    Mutant(
        "a claim of what is claimed",
        "statements/claiming.py",
        (
            (
                "            TaskRow.claimed_by.is_(None),\n            TaskRow.task_name == func.any",
                "            TaskRow.task_name == func.any",
            ),
        ),
        (f"{RACES}test_claim_and_claim", MACHINE),
    ),
    Mutant(
        "suspects that are claimed like others",
        "statements/claiming.py",
        (("CLAIM = _claim(~_is_suspect, _wanted)", "CLAIM = _claim(true(), _wanted)"),),
        ("tests/worker/test_suspects.py", MACHINE),
    ),
    Mutant(
        "claims beside a suspect",
        "worker/slots.py",
        (("if (self.alone and self.taken) or (", "if ("),),
        ("tests/worker/test_suspects.py",),
    ),
    Mutant(
        "an attempt whose time begins anew with each run",
        "execution/timeouts.py",
        (("self._used = float(entry.value or 0)", "self._used = 0.0"),),
        ("tests/worker/test_attempt_timeout.py",),
    ),
    Mutant(
        "messages that stay when they are received",
        "statements/messages.py",
        (
            ("delete(Message).where(same, Message.idempotency_key.is_(None))", "delete(Message).where(same, false())"),
            ("    exists,\n    func,", "    exists,\n    false,\n    func,"),
        ),
        ("tests/context/test_messages.py", MESSAGES),
    ),
    Mutant(
        "messages received without a fence",
        "statements/messages.py",
        (
            (
                "        is_in(_calls.c.task_ids, _locked),\n        ~exists()",
                "        or_(is_in(_calls.c.task_ids, _locked), true()),\n        ~exists()",
            ),
        ),
        ("tests/context/test_messages.py::test_a_statement_that_is_repeated_receives_nothing_more",),
    ),
    Mutant(
        "messages received past one that is locked",
        "statements/messages.py",
        (
            (
                '        .limit(literal_column("1"))\n        .correlate(wanted)',
                '        .limit(literal_column("1"))\n        .with_for_update(skip_locked=True)\n        .correlate(wanted)',
            ),
        ),
        ("tests/context/test_messages.py::test_a_locked_message_is_not_passed_over", MESSAGES),
    ),
    Mutant(
        "messages that the sender sends anew without a reply",
        "client/messages.py",
        (("            if repeated:\n", "            if False:\n"),),
        ("tests/context/test_messages.py::test_a_send_without_a_reply_is_not_sent_twice", MESSAGES),
    ),
    Mutant(
        "messages that nobody looks for",
        "worker/wakeups.py",
        (('rows = await self._connection.execute(messages.DELIVER, {"task_ids": task_ids})', "rows = list[object]()"),),
        ("tests/context/test_messages.py", MESSAGES),
    ),
    Mutant(
        "messages that come while a task suspends",
        "worker/wakeups.py",
        (("self._agenda.deliver_messages(row.task_id for row in rows)", "self._agenda.deliver_messages(())"),),
        ("tests/context/test_messages.py::test_a_message_that_comes_while_a_task_suspends_is_received",),
    ),
    Mutant(
        "a conversation that takes no note of messages",
        "execution/run.py",
        (("        self.conversation.arrive()\n", ""),),
        ("tests/context/test_messages.py::test_a_reply_that_comes_at_once_is_received_without_a_suspension",),
    ),
    Mutant(
        "deliveries that lock tasks without a message",
        "statements/messages.py",
        (
            (
                "return locked_waiters(exists().where(Wait.task_id == TaskRow.task_id, Wait.kind == constant(kind), message))",
                "return locked_waiters()",
            ),
        ),
        ("tests/context/test_messages.py::test_a_delivery_without_a_message_locks_nothing",),
    ),
    Mutant(
        "races whose losers go on waiting",
        "statements/messages.py",
        (
            (
                "delete(Wait).where(Wait.task_id == _over.c.task_id, Wait.key == _over.c.key)",
                "delete(Wait).where(false())",
            ),
            ("    exists,\n    func,", "    exists,\n    false,\n    func,"),
        ),
        ("tests/context/test_races.py",),
    ),
    Mutant(
        "tasks given up with their workers that nothing follows",
        "statements/outcomes.py",
        (
            (
                '            state=case((given_up, constant("failed")), else_=constant("pending")),\n            outcome=case((given_up, constant("failed")), else_=null()),\n            finished_at',
                '            state=case((given_up, constant("failed")), else_=constant("pending")),\n            outcome=case((given_up, constant("failed")), else_=null()),\n            follow_ups=null(),\n            finished_at',
            ),
        ),
        ("tests/context/test_follow_ups.py",),
    ),
    Mutant(
        "streams written without their lock",
        "statements/streams.py",
        (("    .with_for_update(of=Stream, skip_locked=True, key_share=True),\n", ""),),
        (f"{STREAMS}::test_what_a_lost_run_still_has_in_flight_is_found_or_refused",),
    ),
    Mutant(
        "lines that are written once more when their reply was lost",
        "statements/log_lines.py",
        (("        where=Stream.block_id.is_distinct_from(_opening.excluded.block_id),\n", ""),),
        ("tests/context/test_kept_lines.py::test_a_row_is_written_once_and_under_the_fence_alone",),
    ),
    Mutant(
        "items of an earlier try that stay",
        "statements/streams.py",
        (("StreamItems.try_id != _block.c.try_ids", "StreamItems.try_id == StreamItems.step_key"),),
        (STREAMS,),
    ),
    Mutant(
        "readers who are not told of a restart",
        "statements/streams.py",
        (('restarts_after=func.array_append(_kept("after"), _lows.c.low)', 'restarts_after=_kept("after")'),),
        (STREAMS,),
    ),
    Mutant(
        "positions that are used twice",
        "statements/streams.py",
        (("else_=Stream.reserved)", "else_=Stream.last_position)"),),
        (STREAMS,),
    ),
    Mutant(
        "hints before the commit",
        "database/notifier.py",
        (("    if transaction is None or is_autocommit(connection):\n", "    if True:\n"),),
        ("tests/database/test_notifier.py::test_no_hint_comes_before_what_it_is_about",),
    ),
    Mutant(
        "a suspension that does not look whether it need wait",
        "worker/dispatcher.py",
        (("agenda.resolve_waits(waiting)", "pass"),),
        (f"{RACES}test_emit_and_await",),
    ),
    Mutant(
        "a child's end that tells nobody",
        "worker/dispatcher.py",
        (("                    agenda.wake_parents(children)\n", "                    pass\n"),),
        (f"{RACES}test_join_and_finish",),
    ),
    Mutant(
        "a parent that is not told because its row was locked",
        "worker/wakeups.py",
        (("            self._agenda.defer_ended(task_ids, LOCKED_RETRY_DELAY)\n", "            pass\n"),),
        (f"{RACES}test_join_and_finish",),
    ),
    Mutant(
        "an event that counts as delivered while somebody waits",
        "statements/waits.py",
        (
            (
                (
                    "        ~exists().where(Wait.queue_name == Event.queue_name, Wait.event_name == Event.name),\n"
                    "    )\n    .values(delivered_at=clock())"
                ),
                "    )\n    .values(delivered_at=clock())",
            ),
        ),
        (f"{RACES}test_emit_and_await",),
    ),
    Mutant(
        "a wake-up that believes its snapshot about who sleeps",
        "statements/waits.py",
        (
            (
                ".where(TaskRow.task_id == woken_ids.c.task_id)\n        .values(",
                '.where(TaskRow.task_id == woken_ids.c.task_id, TaskRow.state == constant("sleeping"))\n        .values(',
            ),
        ),
        (f"{RACES}test_suspend_and_delivery_to_a_run_that_goes_on",),
    ),
    Mutant(
        "a search that cancels the children of what has completed",
        "statements/cancelling.py",
        (
            (
                '_UNSUCCESSFUL = (constant("failed"), constant("cancelled"))',
                '_UNSUCCESSFUL = (constant("failed"), constant("cancelled"), constant("completed"))',
            ),
        ),
        (f"{MACHINE}::test_children_of_what_has_completed_go_on_whatever_is_searched_for",),
    ),
    Mutant(
        "a failure that leaves the children to a search",
        "worker/dispatcher.py",
        (("                    agenda.cascade(row.task_id for row in failed)\n", ""),),
        (f"{RACES}test_fail_and_claim_of_a_child",),
    ),
    Mutant(
        "a child that ends after the time of its join",
        "statements/waits.py",
        (
            (
                "_child.c.finished_at.is_not(None) & (or_(_in_time, _child.c.finished_at <= Wait.due_at))",
                "_child.c.finished_at.is_not(None)",
            ),
        ),
        (f"{MACHINE}::test_what_comes_in_time_counts_whenever_somebody_looks_and_nothing_else",),
    ),
    Mutant(
        "runs of a claim that was answered after the lease",
        "worker/claims.py",
        (
            (
                (
                    "if worker_id != self._registration.worker_id or not self._registration.lease.valid:\n"
                    "            # The lease"
                ),
                "if False:\n            # The lease",
            ),
        ),
        ("tests/worker/test_leases.py::test_a_claim_whose_reply_comes_after_the_lease_starts_nothing",),
    ),
    Mutant(
        "a timeout that is not remembered",
        "statements/waits.py",
        (
            (
                "(removed.c.created_at)),\n            ),\n        )\n        .on_conflict_do_nothing()\n    )",
                (
                    '(removed.c.created_at)),\n            ).where(removed.c.status != constant("timeout")),\n        )\n'
                    "        .on_conflict_do_nothing()\n    )"
                ),
            ),
        ),
        (MACHINE, "tests/context/test_events.py::test_timeout_is_remembered_and_a_late_event_does_not_change_it"),
    ),
    Mutant(
        "a cancel that leaves running tasks alone",
        "statements/cancelling.py",
        (
            (
                ".where(TaskRow.finished_at.is_(None), *conditions)",
                '.where(TaskRow.finished_at.is_(None), TaskRow.state != "running", *conditions)',
            ),
        ),
        (f"{RACES}test_cancel_and_what_a_run_writes", MACHINE),
    ),
    Mutant(
        "a cancel that overlooks waits which are just stored",
        "client/tasks.py",
        (('        yield waits.DELETE_WAITS, {"task_ids": begun}\n', "        pass\n"),),
        (f"{RACES}test_cancel_and_what_a_run_writes",),
    ),
    Mutant(
        "a cascade below what was put back",
        "statements/cancelling.py",
        (
            ("        _parent.outcome.in_(_UNSUCCESSFUL),\n", ""),
            ("func.any(_targets), is_ended, ", "func.any(_targets), "),
        ),
        (f"{RACES}test_retry_and_the_cascade_of_its_end",),
    ),
    Mutant(
        "retention of what is waited for and of what has ancestors",
        "statements/queues.py",
        (
            ("        TaskRow.task_id.not_in(_needed),\n", ""),
            ("        ~exists().where(Wait.child_task_id == TaskRow.task_id),\n", ""),
        ),
        (f"{RACES}test_join_and_retention", "tests/client/test_cleanup.py::test_what_a_task_waits_for_stays"),
    ),
    Mutant(
        "retention of events that are waited for",
        "statements/queues.py",
        (("        _waiter.is_(None),\n", ""),),
        ("tests/client/test_cleanup.py::test_an_event_stays_while_somebody_waits_for_it", MACHINE),
    ),
    Mutant(
        "a sleep that begins anew in each attempt",
        "context/sleeps.py",
        (
            (
                (
                    "            due_at, delay = codec_for(datetime)"
                    '.decode(entry.value or NULL, "a wake time"), None\n'
                    "        await run.enter()\n        if delay == 0"
                ),
                "            pass\n        await run.enter()\n        if delay == 0",
            ),
        ),
        ("tests/context/test_sleep.py::test_wake_time_is_fixed_the_first_time_and_retries_do_not_move_it",),
    ),
    Mutant(
        "a wake time by the clock of the worker's machine",
        "execution/waits.py",
        (
            (
                (
                    "        return WaitSpec(self.key, self.kind, self.name, self.event_name, self.child_task_id, "
                    "self.due_at, delay)"
                ),
                (
                    "        from datetime import UTC, timedelta\n\n"
                    "        due_at = self.due_at if delay is None else datetime.now(UTC) + timedelta(seconds=delay)\n"
                    "        return WaitSpec(self.key, self.kind, self.name, self.event_name, self.child_task_id, "
                    "due_at, None)"
                ),
            ),
        ),
        ("tests/testing/test_time.py::test_a_machine_whose_clock_is_a_week_behind_makes_no_difference",),
    ),
    Mutant(
        "a transaction step whose checkpoint is a transaction of its own",
        "execution/transactions.py",
        (
            (
                (
                    "                written = await database.execute_on(\n"
                    "                    connection,\n"
                    "                    checkpoints.RECORD_IN_TRANSACTION,"
                ),
                "                written = await _apart(\n                    database,",
            ),
            (
                "class Interrupted(Exception)",
                (
                    "async def _apart(database: Database, parameters: dict[str, Any]) -> Any:\n"
                    "    async with database.transaction() as connection:\n"
                    "        written = await connection.execute(checkpoints.RECORD_IN_TRANSACTION, parameters)\n"
                    "        return written.all()\n\n\n"
                    "class Interrupted(Exception)"
                ),
            ),
        ),
        ("tests/context/test_transaction.py",),
    ),
    Mutant(
        "retries without end",
        "statements/outcomes.py",
        ((" & (_failures + constant(1) < TaskRow.max_attempts)", ""),),
        (MACHINE, "tests/context/test_retries.py::test_max_attempts_counts_the_executions"),
    ),
    Mutant(
        "a lost worker as a failure of the task",
        "statements/outcomes.py",
        (
            (
                "            run_id=case((given_up, TaskRow.run_id), else_=locked.c.next_run_ids),\n",
                (
                    "            run_id=case((given_up, TaskRow.run_id), else_=locked.c.next_run_ids),\n"
                    "            failures=TaskRow.failures + constant(1),\n"
                ),
            ),
        ),
        (MACHINE,),
    ),
    Mutant(
        "code that goes on after its suspension",
        "execution/run.py",
        (
            (
                "        if self.signal is None and not self.over and self.host.leased:\n            return\n",
                "        return\n",
            ),
        ),
        ("tests/context/test_suspension.py",),
    ),
    Mutant(
        "a dead process whose lease runs on",
        "worker/succession.py",
        (
            (
                'await self._connection.execute(claiming.END_LEASE, {"beating_id": worker_id})',
                "pass",
            ),
        ),
        (f"{PROCESSES}test_a_killed_process_is_restarted_and_its_runs_go_on_at_once",),
    ),
    Mutant(
        "runs beside a hard timeout that are lost instead of given back",
        "worker/succession.py",
        (('if lost["overdue"] is not None:', "if False:"),),
        (f"{PROCESSES}test_a_hard_timeout_ends_the_process_and_gives_the_others_back[blocks]",),
    ),
    Mutant(
        "a hard timeout that only its own process enforces",
        "cli/watcher.py",
        (("self._kill_in(run.timeout + ACTING_GRACE, child, run)", "pass"),),
        (f"{PROCESSES}test_a_hard_timeout_ends_the_process_and_gives_the_others_back[holds_the_lock]",),
    ),
    Mutant(
        "processes that outlive their watcher",
        "worker/supervision.py",
        (('            os.dup2(nowhere, descriptor)\n        self.on_ending("release")', "            return"),),
        (f"{PROCESSES}test_the_processes_of_a_killed_watcher_give_their_runs_back_and_end",),
    ),
    Mutant(
        "claims beyond --max-tasks-per-process",
        "worker/claims.py",
        (("return self._lifetime.most(wanted)", "return wanted"),),
        (f"{PROCESSES}test_a_process_ends_after_its_number_of_runs",),
    ),
    Mutant(
        "abandoned threads without a bound",
        "worker/abandoned.py",
        (("if count > self._limit:", "if False:"),),
        ("tests/worker/test_abandoned.py::test_a_worker_with_more_of_them_than_slots_gives_its_runs_back_and_ends",),
    ),
    Mutant(
        "a key that is parked although a drain came in between",
        "statements/limits.py",
        (("      WHEN NOT s.fresh AND (s.is_drained OR s.is_full) THEN {now}\n", ""),),
        (f"{LIMITS}test_a_task_that_appears_while_a_claim_looks_is_not_stranded",),
    ),
    Mutant(
        "a slot that is given back outside of the fence",
        "statements/outcomes.py",
        (
            (
                "give_back(completed, returned=completed.c.slot.is_not(None))",
                'give_back(select(TaskRow.queue_name, TaskRow.limit_key).join(done, TaskRow.task_id == done.c.task_ids).subquery("unfenced"), returned=true())',
            ),
        ),
        (f"{LIMITS}test_every_way_out_gives_the_slot_back",),
    ),
    Mutant(
        "slots that are counted in the snapshot",
        "statements/limits.py",
        (
            (
                "SELECT k.limit_key, k.version, k.running, k.tat,",
                "SELECT k.limit_key, k.version, (SELECT s.running FROM {limit_keys} s WHERE s.queue_name = k.queue_name AND s.limit_key = k.limit_key) AS running, k.tat,",
            ),
        ),
        (f"{LIMITS}test_a_claim_counts_what_was_claimed_after_its_snapshot",),
    ),
    Mutant(
        "a version of the snapshot that is read from the locked row",
        "statements/limits.py",
        (("k.ctid AS seen_at OFFSET 0)", "k.ctid AS seen_at)"),),
        (f"{LIMITS}test_a_claim_counts_what_was_claimed_after_its_snapshot",),
    ),
    Mutant(
        "a key that is not charged because it was changed after the snapshot",
        "statements/limits.py",
        (("WHERE EXISTS (SELECT FROM due WHERE seen_at <> locked_at) AND", "WHERE false AND"),),
        (f"{LIMITS}test_a_claim_counts_what_was_claimed_after_its_snapshot",),
    ),
    Mutant(
        "suspects for which no slot is kept",
        "statements/limits.py",
        (('"keeps": "true"', '"keeps": "false"'),),
        (f"{SUSPECTS}test_a_slot_is_kept_for_a_suspect_whose_limit_is_always_used_up[of_the_key]",),
    ),
    Mutant(
        "keys that are locked in any order",
        "statements/limits.py",
        (("  ORDER BY n.queue_name, n.limit_key\n", "  ORDER BY random()\n"),),
        (f"{LIMITS}test_drains_at_the_same_time_do_not_deadlock",),
    ),
)


def copy_to(directory: Path) -> None:
    """The package and its tests."""
    for name in ("durable_sa", "tests", "examples"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", directory)


def caught(mutant: Mutant, server: str) -> str | None:
    """The test that noticed, or None."""
    with tempfile.TemporaryDirectory(prefix="durable-mutant-") as name:
        directory = Path(name)
        copy_to(directory)
        mutant.apply(directory)
        for test in mutant.tests:
            # Isolated from the directory that this is started in; the copy comes before what is installed.
            try:
                finished = subprocess.run(
                    [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test],
                    cwd=directory,
                    env={
                        **os.environ,
                        "PYTHONPATH": name,
                        "DURABLE_TEST_DATABASE_URL": server,
                        "DURABLE_MACHINE_SHRINK": "0",
                    },
                    capture_output=True,
                    text=True,
                    timeout=120,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"{test} (by not ending)"
            if finished.returncode == 1:
                return test
            if finished.returncode != 0:
                raise RuntimeError(f"{mutant.name}: {test} could not be run:\n{finished.stdout}\n{finished.stderr}")
    return None


def main(names: list[str]) -> int:
    wanted = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    survived = 0
    with database_server() as server:
        for mutant in wanted:
            began = time.monotonic()
            test = caught(mutant, server.url.render_as_string(hide_password=False))
            survived += test is None
            print(f"{mutant.name:62} {time.monotonic() - began:5.1f} s  {test or 'SURVIVED'}", flush=True)  # noqa: T201
    print(f"{len(wanted) - survived} of {len(wanted)} were caught")  # noqa: T201
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
