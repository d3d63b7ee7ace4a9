"""The checks of `durable doctor`, as far as they end in time."""

from __future__ import annotations

import time
from typing import Any, Final

from ...client.checks import CHECKS, GRACE, LONG_STEP, SHOWN
from ..view import View

QUICK: Final = 0.05
"""Seconds that a check may take for the page as it is opened."""
ALL_QUICK: Final = 0.12
"""Seconds after which the page is shown, whatever has not been checked by then."""
_MOST_LATE: Final = 5
"""Checks that may be late before the rest is left out."""


async def load(view: View) -> dict[str, Any]:
    """Run the checks.

    Some read all unfinished tasks, or whole tables. The page is opened with those that end soon, and then loaded once
    more with `thorough=1`, where each of them may take the time of a section.
    """
    thorough = view.query.text("thorough") is not None
    view.sections.most_late = _MOST_LATE
    bounds: dict[str, Any] = {"grace": GRACE, "step_bound": LONG_STEP, "wanted": SHOWN}
    end = time.monotonic() + ALL_QUICK
    found: dict[str, dict[str, Any]] = {}
    for check in sorted(CHECKS, key=lambda check: check.reads_much):
        rows = None
        if thorough or time.monotonic() < end:
            within = None if thorough else QUICK
            rows = await view.rows(check.subject, check.statement, within=within, **bounds)
        problems = None if rows is None else [check.problem(row) for row in rows]
        found[check.subject] = {
            "subject": check.subject,
            "status": "late" if problems is None else "problem" if problems else "ok",
            "problems": problems or [],
            "remedy": check.remedy if problems else None,
        }
    checks = [found[check.subject] for check in CHECKS]
    return {
        "checks": checks,
        "ok": all(check["status"] == "ok" for check in checks),
        "complete": thorough or all(check["status"] != "late" for check in checks),
    }
