"""What all parts of a client stand on: its settings, its tasks and its database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ..connections import Database
from ..errors import QueueNotFound
from ..hints import Hint, HintSender, channel_name, sender
from ..hooks import HookChain, Hooks
from ..names import validate_name, validate_schema
from ..options import MAX_ATTEMPTS, TaskOptions
from ..policies import DEFAULT_RETRY_STRATEGY, CancellationPolicy, RetryStrategy, integer
from ..providers import automatic
from ..sessions import Script
from ..statements import queues
from .registry import Registry
from .transactions import perform_alone

if TYPE_CHECKING:
    from ..telemetry import Telemetry
    from ..worker import Worker

T = TypeVar("T")


class ClientBase(Registry):
    """A client before there is anything that it can do."""

    def __init__(
        self,
        bind: AsyncEngine | async_sessionmaker[Any] | URL | str | None,
        *,
        queue_name: str,
        schema: str,
        default_max_attempts: int,
        default_retry_strategy: RetryStrategy | None,
        default_cancellation: CancellationPolicy | None,
        max_payload_bytes: int,
        hooks: Iterable[Hooks],
        telemetry: Telemetry | Literal[False] | None,
    ) -> None:
        super().__init__()
        self.queue_name = validate_name("queue", queue_name)
        """The queue of spawns and workers that name none."""
        self.schema = validate_schema(schema)
        self.max_payload_bytes = integer(max_payload_bytes, "max_payload_bytes", minimum=1, maximum=2**30)
        self.default_retry_strategy = default_retry_strategy or DEFAULT_RETRY_STRATEGY
        self.defaults = TaskOptions(
            integer(default_max_attempts, "default_max_attempts", minimum=1, maximum=MAX_ATTEMPTS),
            self.default_retry_strategy,
            default_cancellation,
            self.queue_name,
        )
        self.hooks = HookChain(hooks)
        self._telemetry: Telemetry | Literal[False] | None = telemetry
        self._bind = bind
        self._database: Database | None = None
        self._workers: set[Worker] = set()
        self._hint_sender: HintSender | None = None

    @property
    def database(self) -> Database:
        """The engine as durable uses it, resolved on first use."""
        if self._database is None:
            self._database = Database(self._bind, self.schema)
        return self._database

    @property
    def engine(self) -> AsyncEngine:
        """The engine in use. Resolves `bind`."""
        return self.database.engine

    @property
    def telemetry(self) -> Telemetry | None:
        """Where spans and metrics go; None as long as that is nowhere."""
        if self._telemetry is None:
            self._telemetry = automatic()
        return None if self._telemetry is False else self._telemetry

    async def require_queue(self, name: str) -> None:
        """Raise `QueueNotFound` unless there is a queue of that name."""
        if not await self.database.execute(queues.KNOWN_QUEUES, {"queue_names": [name]}):
            raise QueueNotFound(name)

    def _queue(self, name: str | None) -> str:
        return self.queue_name if name is None else validate_name("queue", name)

    def _sender(self) -> HintSender:
        """The sender on the running event loop. The client keeps it, as it knows when the last hint went."""
        kept, engine = self._hint_sender, self.database.engine
        if kept is None or kept.pool is not engine.sync_engine.pool or kept.loop is not asyncio.get_running_loop():
            kept = self._hint_sender = sender(engine, channel_name(self.schema))
        return kept

    async def _perform(self, script: Callable[[Hint], Script[T]]) -> T:
        return await perform_alone(self.database, script)
