"""The application as all parts of the engine see it: its settings, its tasks and its database."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from .database.connections import Database
from .database.notifier import HintSender, sender
from .errors import QueueNotFound, TaskAlreadyRegistered, TaskNotRegistered
from .execution.hooks import HookChain
from .names import validate_name, validate_schema
from .options import MAX_ATTEMPTS, TaskOptions
from .policies import DEFAULT_RETRY_STRATEGY, CancellationPolicy, RetryStrategy
from .statements import queues
from .tasks import Task
from .validation import integer

if TYPE_CHECKING:
    from .telemetry import Telemetry

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")

_GETTERS = {"opentelemetry.trace": "get_tracer_provider", "opentelemetry.metrics": "get_meter_provider"}


class App:
    """The settings, tasks and database of a client."""

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
        """The default queue of spawns and workers."""
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
        self._hint_sender: HintSender | None = None
        """The sender that was used last, kept because it knows when that was."""

    @property
    def database(self) -> Database:
        """The database, resolved from `bind` on first use."""
        if self._database is None:
            self._database = Database(self._bind, self.schema)
        return self._database

    @property
    def engine(self) -> AsyncEngine:
        """The engine in use. Resolves `bind`."""
        return self.database.engine

    @property
    def telemetry(self) -> Telemetry | None:
        """The telemetry that records spans and metrics, if any."""
        if self._telemetry is None:
            self._telemetry = _global_telemetry()
        return None if self._telemetry is False else self._telemetry

    async def require_queue(self, name: str) -> None:
        """Raise `QueueNotFound` unless a queue of that name exists."""
        if not await self.database.execute(queues.KNOWN_QUEUES, {"queue_names": [name]}):
            raise QueueNotFound(name)

    def _queue(self, name: str | None) -> str:
        return self.queue_name if name is None else validate_name("queue", name)

    def _sender(self) -> HintSender:
        self._hint_sender = sender(self.database)
        return self._hint_sender

    def register(self, task: Task[ParamsT, T]) -> Task[ParamsT, T]:
        """Register a task, and return it: workers claim it from now on, and it may be spawned by name.

        Raises:
            TaskAlreadyRegistered: another task has that name.
        """
        if not isinstance(task, Task):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"register() takes a task, made by @task, not {type(task).__name__}")
        if self.tasks.setdefault(task.name, task) is not task:
            raise TaskAlreadyRegistered(task.name)
        return task

    def registered(self, name: str) -> Task[Any, Any]:
        """Return the task of that name.

        Raises:
            TaskNotRegistered: no task of that name is registered.
        """
        try:
            return self.tasks[name]
        except KeyError:
            raise TaskNotRegistered(name, self.tasks) from None


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
