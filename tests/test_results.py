import uuid
from datetime import UTC, datetime

import pytest

from durable_sa.results import ScheduleInfo, SpawnResult, TaskErrorInfo, TaskHandle, TaskPollResult, TaskStatus
from durable_sa.serialization.codec import codec_for

task_id = uuid.UUID(int=7)


def test_statuses_are_strings() -> None:
    assert [str(status) for status in TaskStatus] == [
        "pending",
        "running",
        "sleeping",
        "completed",
        "failed",
        "cancelled",
    ]
    assert [status.value for status in TaskStatus if status.finished] == ["completed", "failed", "cancelled"]


@pytest.mark.parametrize("annotation", [TaskHandle, TaskHandle[int], list[TaskHandle[str]]])
def test_a_handle_can_be_stored(annotation: object) -> None:
    handle: object = TaskHandle(task_id)
    value = [handle] if annotation == list[TaskHandle[str]] else handle
    encoded, decoded = codec_for(annotation).round_trip(value, "It")
    assert decoded == value
    assert str(task_id) in encoded


def test_values_stay_out_of_reprs() -> None:
    error = TaskErrorInfo("ValueError", "no", raw={"card": "secret-value"})
    result = TaskPollResult[object](task_id, TaskStatus.COMPLETED, output="secret-value", error=error)
    now = datetime.now(UTC)
    schedule = ScheduleInfo(
        name="nightly",
        task_name="clean",
        cron_expression="0 0 * * *",
        timezone="UTC",
        params={"k": "secret-value"},
        spawn_options={"headers": "secret-value"},
        metadata={},
        backend="worker",
        pgcron_job_name=None,
        created_at=now,
        updated_at=now,
    )
    assert "secret-value" not in repr(result) + repr(schedule)
    assert "ValueError" in repr(result)


def test_results_are_values() -> None:
    assert SpawnResult(task_id, task_id, 1, True) == SpawnResult(task_id, task_id, 1, True)
    assert len({TaskHandle(task_id), TaskHandle(task_id)}) == 1
