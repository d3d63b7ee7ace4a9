"""`durable doctor`: checks for problems and suggests remedies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import typer
from sqlalchemy import Executable, text
from sqlalchemy.exc import DBAPIError

from .. import migrations
from ..database_errors import sqlstate
from ..errors import SchemaMismatch
from ..statements import diagnosis, inspection, limit_diagnosis
from .arguments import duration
from .invocation import FAILED, Invocation, connected
from .output import as_dicts, span

_GRACE_SECONDS = 60.0
_STEP_SECONDS = 3600.0
_SHOWN = 20
_CHECK_SECONDS = 30
_SNAPSHOT_SECONDS = 300.0
_QUERY_CANCELED = "57014"

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """A check: each row that the statement returns is a problem."""

    subject: str
    statement: Executable
    problem: Callable[[Fields], str]
    remedy: str


CHECKS = (
    Check(
        "due tasks",
        diagnosis.UNCLAIMED,
        lambda row: (
            f"{row['count']} of {row['task_name']!r} in queue {row['queue_name']!r} are due and unclaimed, "
            f"the oldest for {span(row['oldest_seconds'])}; "
            + ("workers serve the queue" if row["served"] else "no worker serves the queue")
        ),
        "Start a worker that serves the queue and knows the task, or more: durable worker MODULE:DURABLE --queue QUEUE",
    ),
    Check(
        "waits",
        diagnosis.STUCK_WAITS,
        lambda row: f"task {row['task_id']} waits for {row['kind']} {row['awaited']!r}, but {row['reason']}",
        "Workers repair such waits within a minute. Check that one is running: durable workers",
    ),
    Check(
        "sleepers",
        diagnosis.SLEEPLESS,
        lambda row: f"task {row['task_id']} ({row['task_name']}) sleeps and waits for nothing",
        "This is a bug: please report it. To wake the task: durable tasks cancel TASK; durable tasks retry TASK",
    ),
    Check(
        "events",
        diagnosis.UNDELIVERED,
        lambda row: (
            f"event {row['name']!r} in queue {row['queue_name']!r} has not been delivered for {span(row['seconds'])}"
        ),
        "Workers of any queue deliver events. Check that one is running: durable workers",
    ),
    Check(
        "time limits",
        diagnosis.OVERDUE,
        lambda row: f"task {row['task_id']} ({row['task_name']}) is past its limit by {span(row['seconds'])}",
        "Workers of any queue cancel such tasks. Check that one is running: durable workers",
    ),
    Check(
        "leases",
        diagnosis.EXPIRED_LEASES,
        lambda row: (
            f"{row['runs']} runs are held by worker {row['worker_name'] or row['worker_id']}, "
            + ("which is unknown" if row["worker_name"] is None else f"whose lease ended {span(row['seconds'])} ago")
        ),
        "Workers of any queue take such runs over. Check that one is running: durable workers",
    ),
    Check(
        "steps",
        diagnosis.LONG_STEPS,
        lambda row: (
            f"task {row['task_id']} ({row['task_name']}) has been in step {row['step']!r} for {span(row['seconds'])}, "
            f"in worker {row['worker_name']}"
        ),
        "Look at what the step waits for; a step may have a timeout. --long-step raises the bound.",
    ),
    Check(
        "states",
        diagnosis.INCONSISTENT,
        lambda row: f"task {row['task_id']} ({row['task_name']}) is {row['state']}, which contradicts its lease",
        "Unless rows were changed by hand, this is a bug: please report it.",
    ),
    Check(
        "schedules",
        diagnosis.OVERDUE_TICKS,
        lambda row: f"schedule {row['name']!r} of queue {row['queue_name']!r} has been due for {span(row['seconds'])}",
        "Workers of any queue fire schedules. Check that one is running: durable workers",
    ),
    Check(
        "limit counts",
        limit_diagnosis.MISCOUNTED,
        lambda row: (
            f"{_key(row)} of queue {row['queue_name']!r} counts {row['counted']} slots, "
            f"and its tasks hold {row['held']}"
        ),
        "Unless rows were changed by hand, this is a bug: please report it. To count anew: durable doctor --repair",
    ),
    Check(
        "queue counts",
        limit_diagnosis.MISCOUNTED_TOTALS,
        lambda row: f"queue {row['queue_name']!r} counts {row['counted']} slots, and its tasks hold {row['held']}",
        "Unless rows were changed by hand, this is a bug: please report it. To count anew: durable doctor --repair",
    ),
    Check(
        "limit keys",
        limit_diagnosis.PARKED,
        lambda row: (
            f"{_key(row)} of queue {row['queue_name']!r} has room, and tasks that are due, "
            f"the oldest for {span(row['oldest_seconds'])}, but no claim looks at it"
        ),
        "This is a bug: please report it. To have claims look at the key: durable doctor --repair",
    ),
    Check(
        "kept slots",
        limit_diagnosis.SELF_JOINS,
        lambda row: (
            f"task {row['task_id']} ({row['task_name']}) keeps a slot of {_key(row)} in queue {row['queue_name']!r} "
            f"while it waits for its child {row['child_id']}, which waits for one"
        ),
        'Give children another key or queue, or the limit hold="run". To go on: durable limits set with more slots.',
    ),
    Check(
        "limits",
        limit_diagnosis.UNLIMITED_WORKERS,
        lambda row: (
            f"worker {row['worker_name']} is of a version that knows no limits, and serves queue {row['queue_name']!r}"
        ),
        "Deploy this version to all workers.",
    ),
    Check(
        "orphans",
        diagnosis.ORPHANS,
        lambda row: f"{row['what']}: {row['id']}",
        "Unless rows were deleted by hand, this is a bug: please report it.",
    ),
)


def _key(row: Fields) -> str:
    return f"key {row['limit_key']!r}" if row["limit_key"] else "the part without keys"


@connected
async def doctor(
    invocation: Invocation,
    grace: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help="Minimum age of a problem; 1m by default."),
    ] = None,
    long_step: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help="How long a run may be in one step; 1h by default."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First count the slots of limit keys anew, where they are wrong.")
    ] = False,
) -> None:
    """Check for problems: stuck waits, orphans, unclaimed work, expired leases, wrong counts, old snapshots.

    The exit code is 1 if any is found. Nothing is locked or changed without --repair. Each check may take up to 30
    seconds.
    """
    bounds = {
        "grace": _GRACE_SECONDS if grace is None else grace.total_seconds(),
        "step_bound": _STEP_SECONDS if long_step is None else long_step.total_seconds(),
    }
    async with invocation.durable.engine.connect() as connection:
        revision = await connection.run_sync(migrations.current, invocation.durable.schema)
    try:
        await invocation.durable.check_schema()
    except SchemaMismatch as error:
        report: dict[str, Any] = {"revision": revision, "findings": [_finding("schema", [str(error)], None)]}
    else:
        if repair:
            recounted = await invocation.durable.recount_limit_keys(bounds["grace"])
            if not invocation.output.as_json:
                invocation.output.say(f"Limit keys counted anew: {recounted}.")
        report = {"revision": revision, **await _examine(invocation, bounds)}
    report["ok"] = not report["findings"]
    if invocation.output.as_json:
        invocation.output.json(report)
    else:
        _print(invocation, report)
    if not report["ok"]:
        raise typer.Exit(FAILED)


async def _examine(invocation: Invocation, bounds: Mapping[str, float]) -> dict[str, Any]:
    findings: list[dict[str, Any]] = []
    for check in CHECKS:
        rows = await _rows(invocation, check.statement, {**bounds, "wanted": _SHOWN})
        if rows is None:
            findings.append(_finding(check.subject, [f"could not be checked within {_CHECK_SECONDS} s"], None))
        elif rows:
            findings.append(_finding(check.subject, [check.problem(row) for row in rows], check.remedy))
    workers = await _rows(invocation, inspection.WORKERS, {})
    snapshots = await _rows(invocation, diagnosis.OLDEST_SNAPSHOT, {})
    snapshot = snapshots[0] if snapshots else None
    if snapshot is not None and snapshot["seconds"] > _SNAPSHOT_SECONDS:
        remedy = "It keeps vacuum from removing dead rows, which makes claims slower. End that transaction."
        findings.append(_finding("snapshots", [_snapshot(snapshot)], remedy))
    return {"findings": findings, "workers": workers or [], "oldest_snapshot": snapshot}


async def _rows(
    invocation: Invocation, statement: Executable, parameters: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """Return the rows that a statement finds, or None if it takes too long."""
    try:
        async with invocation.durable.database.transaction() as connection:
            await connection.execute(text(f"SET LOCAL statement_timeout = '{_CHECK_SECONDS}s'"))
            result = await connection.execute(statement, parameters)
            return as_dicts(result)
    except DBAPIError as error:
        if sqlstate(error) != _QUERY_CANCELED:
            raise
        return None


def _finding(subject: str, problems: list[str], remedy: str | None) -> dict[str, Any]:
    if len(problems) == _SHOWN:
        problems.append("possibly more")
    return {"subject": subject, "problems": problems, "remedy": remedy}


def _snapshot(row: Fields) -> str:
    holder = f"process {row['pid']}" if row["pid"] is not None else "no connected process"
    return (
        f"the oldest is {span(row['seconds'])} old: {holder}, application {row['application_name']!r}, "
        f"role {row['role']!r}, {row['state']}"
    )


def _print(invocation: Invocation, report: Fields) -> None:
    found = {finding["subject"]: finding for finding in report["findings"]}
    live = [row["name"] for row in report.get("workers", ()) if row["lost_at"] is None]
    snapshot = report.get("oldest_snapshot")
    facts = {
        "schema": f"revision {report['revision']}",
        "workers": ", ".join(live) or "none",
        "snapshots": "none" if snapshot is None else _snapshot(snapshot),
    }
    subjects = ["schema", "workers", *(check.subject for check in CHECKS), "snapshots"]
    rows: list[dict[str, str]] = []
    # Without the tables nothing else was examined.
    for subject in ["schema"] if "schema" in found else subjects:
        finding = found.get(subject, {"problems": [], "remedy": None})
        problems = [{"result": "FAIL", "check": subject, "found": problem} for problem in finding["problems"]]
        rows += problems or [{"result": "ok", "check": subject, "found": facts.get(subject, "")}]
        if finding["remedy"]:
            rows.append({"result": "", "check": "", "found": finding["remedy"]})
    invocation.output.print_table(rows, {"result": "", "check": "", "found": ""}, headed=False)
