"""`durable workers`: the workers that are known, and what they do."""

from __future__ import annotations

from ..client.wording import span
from ..statements import inspection
from .invocation import Invocation, listing
from .output import as_dicts

_COLUMNS = {
    "name": "worker",
    "state": "state",
    "running": "running",
    "queue_names": "queues",
    "started_at": "started",
    "silent": "last heartbeat",
    "worker_id": "id",
}


@listing
async def workers(invocation: Invocation) -> None:
    """List the workers with the numbers of their runs.

    Workers that have ended are not listed. A silent one has missed its lease: other workers take its runs over, and it
    is lost from then on.
    """
    rows = as_dicts(await invocation.durable.database.execute(inspection.WORKERS))
    for row in rows:
        row["state"] = "lost" if row["lost_at"] is not None else "silent" if row.pop("expired") else "live"
        row.pop("expired", None)
        row["silent"] = f"{span(row['silent_seconds'])} ago"
    if invocation.output.as_json:
        for row in rows:
            del row["silent"]
    invocation.output.table(rows, _COLUMNS, empty="No workers. Start one: durable worker MODULE:DURABLE")
