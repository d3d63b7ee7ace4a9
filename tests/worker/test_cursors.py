"""When a worker makes full scans."""

import pytest

from durable_sa.worker.cursors import FULL_SCAN_INTERVAL, FULL_SCAN_PAUSE_RATIO, ClaimCursors


@pytest.mark.parametrize(("took", "interval"), [(0.0, FULL_SCAN_INTERVAL), (2.0, 2.0 * FULL_SCAN_PAUSE_RATIO)])
def test_a_full_scan_is_due_after_a_while_and_hints_delay_it_only_so_long(
    monkeypatch: pytest.MonkeyPatch, took: float, interval: float
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    cursors = ClaimCursors(["default"])
    assert cursors.full_scan_overdue
    cursors.full_scan_made(took)
    now += interval - 0.01
    assert not cursors.full_scan_due
    now += 0.02
    assert cursors.full_scan_due
    assert not cursors.full_scan_overdue
    now += FULL_SCAN_INTERVAL
    assert cursors.full_scan_overdue
    cursors.full_scan_made(took)
    cursors.require_full_scan()
    assert cursors.full_scan_due
    assert cursors.full_scan_overdue
