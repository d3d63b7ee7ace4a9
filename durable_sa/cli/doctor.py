"""`durable doctor`: checks for problems and suggests remedies."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

import typer
from sqlalchemy import Executable, text
from sqlalchemy.exc import DBAPIError

from .. import migrations
from ..client.checks import CHECKS, GRACE, LONG_STEP, SHOWN, Fields
from ..client.wording import span
from ..database_errors import sqlstate
from ..errors import SchemaMismatch
from ..statements import diagnosis, inspection
from .arguments import duration
from .invocation import FAILED, Invocation, connected
from .output import as_dicts

_CHECK_SECONDS = 30
_SNAPSHOT_SECONDS = 300.0
_QUERY_CANCELED = "57014"


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
        "grace": GRACE if grace is None else grace.total_seconds(),
        "step_bound": LONG_STEP if long_step is None else long_step.total_seconds(),
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
        rows = await _rows(invocation, check.statement, {**bounds, "wanted": SHOWN})
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
    if len(problems) == SHOWN:
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
