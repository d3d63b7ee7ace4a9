"""Schedules, with their times in words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ...errors import DurableError
from ...schedules.cron import next_tick
from ...statements import overview as statements
from ..view import View
from ..words import cron_in_words


async def load(view: View) -> dict[str, Any]:
    """Load the schedules."""
    rows = await view.rows("schedules", statements.SCHEDULES)
    return {"schedules": None if rows is None else upcoming(rows, by_time=False)}


def upcoming(rows: list[dict[str, Any]], *, by_time: bool = True) -> list[dict[str, Any]]:
    """Return schedules with their times in words, the next tick first."""
    for row in rows:
        row["in_words"] = cron_in_words(row["cron_expression"])
        if row["paused_at"] is not None:
            row["next_tick_at"] = None
        elif row["backend"] == "pg_cron":
            # The extension does not store the next tick.
            row["next_tick_at"] = _next(row["cron_expression"], row["timezone"])
    if not by_time:
        return rows
    return sorted(rows, key=lambda row: (row["next_tick_at"] is None, row["next_tick_at"] or datetime.now(UTC)))


def _next(expression: str, timezone: str) -> datetime | None:
    try:
        return next_tick(expression, timezone, datetime.now(UTC))
    except DurableError:
        # It was written by hand.
        return None
