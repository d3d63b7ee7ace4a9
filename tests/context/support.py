"""How the tests of what happens inside tasks run them and look at what is stored."""

import uuid
from typing import Any, Generic, TypeVar

import pytest
from sqlalchemy import NullPool, create_engine, select, text

from durable_sa import Durable, SpawnResult, Task, TaskPollResult, TaskRow, TaskStatus
from durable_sa.models import Checkpoint, Run, Wait
from tests.support import eventually

T = TypeVar("T")


class Crash(Exception):
    """Ends an attempt as a crash would, where it does not matter that it counts as a failure."""


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the engine, but for those about attempts that a test lets fail."""
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if " and is retried: " not in line]


class Runner:
    """Spawns tasks of a test and waits for what comes of them."""

    def __init__(self, durable: Durable) -> None:
        self.durable = durable

    async def __call__(self, task: Task[Any, T], params: Any = None, **options: Any) -> T:
        """The output of the task, which must complete."""
        result = await self.result(task, params, **options)
        assert result.status is TaskStatus.COMPLETED, result.error
        return result.output

    async def failure(self, task: Task[Any, Any], params: Any = None, **options: Any) -> Any:
        """The error of the task, which must fail."""
        result = await self.result(task, params, **options)
        assert result.status is TaskStatus.FAILED
        assert result.error is not None
        return result.error

    async def result(self, task: Task[Any, T], params: Any = None, **options: Any) -> TaskPollResult[T]:
        return await self.wait(await self.spawn(task, params, **options))

    async def spawn(self, task: Task[Any, T], params: Any = None, **options: Any) -> SpawnResult[T]:
        """Spawns the task, which is registered if need be."""
        if task.name not in self.durable.tasks:
            self.durable.register(task)
        return await self.durable.spawn(task, params, **options)

    async def wait(self, spawned: Any) -> TaskPollResult[Any]:
        return await self.durable.wait_for_result(spawned, timeout=30)


class Rows(Generic[T]):
    """What is stored of a task."""

    def __init__(self, durable: Durable, task: Any) -> None:
        self.durable = durable
        self.task_id: uuid.UUID = getattr(task, "task_id", task)

    async def _all(self, statement: Any) -> list[Any]:
        async with self.durable.engine.connect() as connection:
            return list((await connection.execute(statement)).all())

    async def task(self) -> Any:
        return (await self._all(select(TaskRow.__table__).where(TaskRow.task_id == self.task_id)))[0]

    async def runs(self) -> list[Any]:
        return await self._all(select(Run.__table__).where(Run.task_id == self.task_id).order_by(Run.attempt))

    async def checkpoints(self, *names: str) -> list[Any]:
        statement = select(Checkpoint.__table__).where(Checkpoint.task_id == self.task_id)
        if names:
            statement = statement.where(Checkpoint.name.in_(names))
        return await self._all(statement.order_by(Checkpoint.created_at))

    async def waits(self) -> list[Any]:
        return await self._all(select(Wait.__table__).where(Wait.task_id == self.task_id))

    async def children(self) -> list[Any]:
        return await self._all(select(TaskRow.__table__).where(TaskRow.parent_task_id == self.task_id))

    async def until(self, state: str, *, within: float = 15.0) -> Any:
        """The task's row once it is in that state."""

        async def row() -> Any:
            found = await self.task()
            return found if found.state == state else None

        return await eventually(row, within=within)

    async def take_over(self) -> None:
        """Put the task back, as after its worker has fallen silent.

        The loop is blocked meanwhile, because the worker may claim the task at once and cancel a caller inside of it.
        """
        statement = text(
            "UPDATE durable.tasks SET state = 'pending', claimed_by = NULL, available_at = clock_timestamp(),"
            " run_id = gen_random_uuid(), fence = fence + 1 WHERE task_id = :task_id AND state = 'running'"
        )
        engine = create_engine(self.durable.engine.url.set(drivername="postgresql+psycopg2"), poolclass=NullPool)
        with engine.begin() as connection:
            result = connection.execute(statement, {"task_id": self.task_id})
        assert result.rowcount == 1


class Tally(list[Any]):
    """What has run, in its order; filled from any thread."""

    def add(self, entry: object) -> None:
        self.append(entry)
