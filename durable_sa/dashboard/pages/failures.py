"""The latest failures, grouped by task and class of the error, and by the line of the application that raised it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from ...client.history import WITHOUT_MESSAGE, StoredError, stored_error
from ...results import TaskFilter
from ...serialization.stored_redaction import message_of
from ...statements import overview as statements
from ..forms import moment, query
from ..view import View

_FRAME: Final = re.compile(r'^\s*File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>[^\n]+)$', re.MULTILINE)
_LIBRARY: Final = re.compile(r"[/\\](?:site-packages|dist-packages|lib[/\\]python3[^/\\]*|durable_sa)[/\\]|^<")
_MESSAGE: Final = 240
GROUPS: Final = 100
"""Groups that are shown, the largest; the rest is counted."""
WINDOW: Final = "24h"
UNKNOWN: Final = "?"
"""In place of the name of an error that is too long to be read."""


async def load(view: View) -> dict[str, Any]:
    """Group the latest failures since `ended_after`, by default a day ago."""
    since_text = view.query.text("ended_after") or WINDOW
    since = moment(since_text, "ended_after") or datetime.now(UTC) - timedelta(days=1)
    chosen = TaskFilter(
        state="failed",
        ended_after=since,
        task_name=view.query.text("task_name"),
        queue_name=view.query.text("queue_name"),
        error_name=view.query.text("error_name"),
    )
    # The statement is one of the user's queues already, and a filter alone is looked up by the index of each queue.
    where = chosen if view.access.where is None else view.access.tasks(chosen)
    payloads = view.access.payloads
    rows = await view.rows("failures", statements.latest_failures(where, since), shared=False)

    def message(row: dict[str, Any], error: StoredError | None) -> str:
        return _message(view, row, error) if payloads else _without_values(error)

    groups = None if rows is None else grouped(rows, message)
    others = [group["count"] for group in (groups or [])[GROUPS:]]
    return {
        "groups": groups and groups[:GROUPS],
        "others": {"groups": len(others), "failures": sum(others)},
        "capped": rows is not None and len(rows) >= statements.FAILURES,
        "most": statements.FAILURES,
        "ended_after": since_text,
        "since": since.isoformat(),
        "task_name": chosen.task_name,
        "queue_name": chosen.queue_name,
    }


def grouped(
    rows: list[dict[str, Any]], message: Callable[[dict[str, Any], StoredError | None], str]
) -> list[dict[str, Any]]:
    """Return groups of failures, the largest first. `rows` begin with the latest."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    frames: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        error = stored_error(row["error"], payloads=True)
        name = (row["error_name"] or UNKNOWN) if error is None else error.info.name
        key = (row["task_name"], name)
        if key not in groups:
            groups[key] = {
                "task_name": row["task_name"],
                "error_name": name,
                "message": message(row, error),
                "count": 0,
                "latest": {"task_id": row["task_id"], "finished_at": row["finished_at"]},
                # No filter finds errors whose name could not be read.
                "query": None
                if name == UNKNOWN
                else query([("task_name", row["task_name"]), ("error_name", name), ("state", "failed")]),
            }
            frames[key] = Counter()
        groups[key]["count"] += 1
        groups[key]["first_at"] = row["finished_at"]
        frames[key][frame_of(None if error is None else error.traceback) or "unknown place"] += 1
    for key, group in groups.items():
        group["places"] = [{"place": place, "count": count} for place, count in frames[key].most_common(5)]
    return sorted(groups.values(), key=lambda group: -group["count"])


def _message(view: View, row: dict[str, Any], error: StoredError | None) -> str:
    if error is None:
        return ""
    return _shortened(str(view.values(row["task_name"]).prepare("error", error.info.message, "message")))


def _without_values(error: StoredError | None) -> str:
    if error is None:
        return ""
    info = error.info
    shown = message_of(info.name, info.message, has_data=info.raw is not None)
    return WITHOUT_MESSAGE if shown is None else _shortened(shown)


def _shortened(message: str) -> str:
    return message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}..."


def frame_of(traceback: str | None) -> str | None:
    """Return the innermost frame of a traceback that is the application's, else the innermost one."""
    frames = list(_FRAME.finditer(traceback or ""))
    if not frames:
        return None
    chosen = next((frame for frame in reversed(frames) if not _LIBRARY.search(frame["file"])), frames[-1])
    return f"{_short(chosen['file'])}:{chosen['line']} in {chosen['function']}"


def _short(file: str) -> str:
    return "/".join(re.split(r"[/\\]", file)[-2:])
