"""The checks of `durable doctor`, as far as they end in time."""

from __future__ import annotations

from typing import Any, Final

from ...client.checks import CHECKS, GRACE, LONG_STEP, SHOWN
from ..view import View

_MOST_LATE: Final = 5
"""Checks that may be late before the rest is left out."""


async def load(view: View) -> dict[str, Any]:
    """Run the checks, each within the time limit of a section."""
    view.sections.most_late = _MOST_LATE
    bounds: dict[str, Any] = {"grace": GRACE, "step_bound": LONG_STEP, "wanted": SHOWN}
    checks: list[dict[str, Any]] = []
    for check in CHECKS:
        rows = await view.rows(check.subject, check.statement, **bounds)
        problems = None if rows is None else [check.problem(row) for row in rows]
        status = "late" if problems is None else "problem" if problems else "ok"
        checks.append(
            {
                "subject": check.subject,
                "status": status,
                "problems": problems or [],
                "remedy": check.remedy if problems else None,
            }
        )
    return {"checks": checks, "ok": all(check["status"] == "ok" for check in checks)}
