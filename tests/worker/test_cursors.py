"""When a worker looks below the floors of its lanes."""

import pytest

from durable_sa.worker.cursors import SEARCH_INTERVAL, SEARCH_SHARE, ClaimCursors


@pytest.mark.parametrize(("took", "interval"), [(0.0, SEARCH_INTERVAL), (2.0, 2.0 * SEARCH_SHARE)])
def test_a_search_is_due_after_a_while_and_hints_put_it_off_only_so_long(
    monkeypatch: pytest.MonkeyPatch, took: float, interval: float
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lanes = ClaimCursors(["default"])
    assert lanes.search_overdue
    lanes.searched(took)
    now += interval - 0.01
    assert not lanes.search_due
    now += 0.02
    assert lanes.search_due
    assert not lanes.search_overdue
    now += SEARCH_INTERVAL
    assert lanes.search_overdue
    lanes.searched(took)
    lanes.search_soon()
    assert lanes.search_due
    assert lanes.search_overdue
