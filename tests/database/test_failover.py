"""Where connections lead: to the primary of before, or to the next, and to nothing that a failover has left behind."""

import pytest

from durable_sa.database.failover import Timeline


def test_later_timelines_and_other_clusters_are_followed() -> None:
    timeline = Timeline()
    for cluster, number in ((1, 3), (1, 3), (1, 4), (2, 1), (2, 2)):
        timeline.follow(cluster, number)


@pytest.mark.parametrize("number", [None, 1, 2])
def test_what_is_behind_is_refused_and_said_once(number: int | None, caplog: pytest.LogCaptureFixture) -> None:
    timeline = Timeline()
    timeline.follow(1, 3)
    for _ in range(2):
        with pytest.raises(ConnectionError, match="leads to a"):
            timeline.follow(1, number)
    assert len(caplog.records) == 1
    timeline.follow(1, 3)
    with pytest.raises(ConnectionError):
        timeline.follow(1, number)
    assert len(caplog.records) == 2


def test_a_client_of_a_standby_may_read_from_it() -> None:
    timeline = Timeline()
    timeline.follow(1, None)
    timeline.follow(1, 3)
