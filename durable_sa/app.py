"""What all parts of a client stand on: its settings, its tasks and its database."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from .database.connections import Database
from .database.notifier import (
    Hint,
    HintSender,
    channel_name,
    sender,
)
from .database.scripts import perform_alone
from .database.sessions import Script
from .errors import QueueNotFound, TaskNotRegistered
from .execution.hooks import HookChain
from .names import validate_name, validate_schema
from .options import MAX_ATTEMPTS, TaskOptions
from .policies import DEFAULT_RETRY_STRATEGY, CancellationPolicy, RetryStrategy
from .statements import queues
from .tasks import Task
from .validation import integer

if TYPE_CHECKING:
    from .telemetry import Telemetry
    from .worker.worker import Worker

T = TypeVar("T")

_GETTERS = {"opentelemetry.trace": "get_tracer_provider", "opentelemetry.metrics": "get_meter_provider"}


class App:
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
        hooks: HookChain,
        telemetry: Telemetry | Literal[False] | None,
    ) -> None:
        self.tasks: dict[str, Task[Any, Any]] = {}
        """The registered tasks by name."""
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
        self.hooks = hooks
        self._telemetry: Telemetry | Literal[False] | None = telemetry
        self._bind = bind
        self._database: Database | None = None
        self._workers: set[Worker] = set()
        self._hint_sender: HintSender | None = None

    def registered(self, name: str) -> Task[Any, Any]:
        """Return the task of that name.

        Raises:
            TaskNotRegistered: no task has that name.
        """
        try:
            return self.tasks[name]
        except KeyError:
            raise TaskNotRegistered(name, self.tasks) from None

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
            self._telemetry = _global_telemetry()
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


def _global_telemetry() -> Telemetry | None:
    """Return telemetry on the global providers once the application has set up either, else None.

    OpenTelemetry is not imported for that: an application that uses it has imported it.
    """
    if "opentelemetry" not in sys.modules or not any(_is_set_up(module, getter) for module, getter in _GETTERS.items()):
        return None
    from .telemetry import shared

    return shared()


def _is_set_up(module: str, getter: str) -> bool:
    api = sys.modules.get(module)
    # The API's own default provider, which does nothing, is defined in the API module itself.
    return api is not None and not type(getattr(api, getter)()).__module__.startswith(module)
