"""What is prepared of a spawn is what the insert binds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from durable_sa import Durable, RetryStrategy, TaskContext, task
from durable_sa.client.inserting import spawn_params
from durable_sa.ids import new_id
from durable_sa.options import SpawnOptions
from durable_sa.policies import CancellationPolicy
from durable_sa.spawns import Kind, prepare
from durable_sa.statements.spawning import ITEM_COLUMNS, KIND_COLUMNS, SPAWN_COLUMNS


@task
async def work(ctx: TaskContext, params: int) -> None: ...


CLIENT: Durable[Any] = Durable("postgresql+asyncpg://nobody@nowhere/nothing", tasks=[work], telemetry=False)
OPTIONS: SpawnOptions = {
    "queue_name": "some",
    "headers": {"a": 1},
    "priority": 3,
    "max_attempts": 4,
    "max_lost_workers": 6,
    "retry_strategy": RetryStrategy.exponential(5, 6, 7, 0.5),
    "cancellation": CancellationPolicy(8, 9),
    "available_at": datetime(2030, 1, 1, tzinfo=UTC),
    "idempotency_key": "key",
}


def test_values_are_in_the_order_of_the_columns() -> None:
    assert Kind._fields == tuple(KIND_COLUMNS)
    parent = new_id()
    prepared = prepare(CLIENT, work, 1, OPTIONS, parent_task_id=parent)
    assert dict(zip(SPAWN_COLUMNS, prepared.values, strict=True)) == {
        "task_id": prepared.task_id,
        "run_id": prepared.run_id,
        "queue_name": "some",
        "task_name": "work",
        "params": "1",
        "headers": '{"a":1}',
        "priority": 3,
        "max_attempts": 4,
        "max_lost_workers": 6,
        "retry_kind": "exponential",
        "retry_base_delay": 5.0,
        "retry_factor": 6.0,
        "retry_max_backoff": 7.0,
        "retry_jitter": 0.5,
        "max_pending_seconds": 8.0,
        "max_running_seconds": 9.0,
        "available_at": OPTIONS["available_at"],
        "delay_seconds": None,
        "parent_task_id": parent,
        "follow_ups": None,
        "idempotency_key": "key",
    }


def test_what_tasks_have_in_common_is_sent_once() -> None:
    options: list[Any] = [{}, {"priority": 1}, {}, {"priority": 1}, {"queue_name": "other"}]
    prepared = [prepare(CLIENT, work, number, each) for number, each in enumerate(options)]
    arrays = spawn_params(prepared)
    assert {name: len(arrays[name]) for name in ITEM_COLUMNS} == dict.fromkeys(ITEM_COLUMNS, 5)
    assert {name: len(arrays[name]) for name in KIND_COLUMNS} == dict.fromkeys(KIND_COLUMNS, 3)
    assert arrays["kind"] == [1, 2, 1, 2, 3]
    assert (arrays["priority"], arrays["queue_name"]) == ([0, 1, 0], ["default", "default", "other"])
