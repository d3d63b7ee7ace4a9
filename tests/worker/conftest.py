"""Workers, in this process and in others, and what they have done."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa.models import WorkerRow

from ..support import eventually
from .processes import WorkerProcess

Rows = Callable[..., Awaitable[list[Any]]]


class Ledger:
    """What tasks in other processes have written down, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, what: str | None = None, **details: Any) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        wanted = details if what is None else {"what": what, **details}
        return [entry for entry in entries if wanted.items() <= entry.items()]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


@pytest.fixture
async def observer(database_url: URL) -> AsyncGenerator[AsyncEngine]:
    """Connections that are nobody else's, each for one use."""
    engine = create_async_engine(database_url, poolclass=NullPool)
    yield engine
    await engine.dispose()


@pytest.fixture
def sql(observer: AsyncEngine) -> Rows:
    """Run a statement in a transaction of its own, and give its rows."""

    async def run(statement: Any, **parameters: Any) -> list[Any]:
        async with observer.begin() as connection:
            result = await connection.execute(text(statement) if isinstance(statement, str) else statement, parameters)
            return list(result.all()) if result.returns_rows else []

    return run


Start = Callable[..., Awaitable[WorkerProcess]]


@pytest.fixture
def start_process(database_url: URL, ledger: Ledger, sql: Rows) -> Generator[Start]:
    """Start a worker process and wait until it has registered."""
    processes: list[WorkerProcess] = []

    async def start(name: str, *, wait: bool = True, url: URL | None = None, **options: Any) -> WorkerProcess:
        process = WorkerProcess(url or database_url, ledger.path, name, **options)
        processes.append(process)

        async def registered() -> Any:
            assert process.process.poll() is None, process.log.read_text()
            return await sql(select(WorkerRow.worker_id).where(WorkerRow.name == name))

        if wait:
            await eventually(registered)
        return process

    yield start
    for process in processes:
        process.end()
