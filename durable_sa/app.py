"""The application as all parts of the engine see it: its settings, its tasks and its database."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakValueDictionary

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, scoped_session

from .concurrency.loops import PerLoop
from .concurrency.threads import in_event_loop
from .database.connections import Database
from .database.engines import Bind
from .database.notifier import HintSender, sender
from .database.synchronous import (
    SyncBind,
    SyncDatabase,
    check_sync_bind,
    is_asynchronous_only,
    refuse_asynchronous,
    resolve_sync_bind,
    session_scoped,
)
from .errors import QueueNotFound, TaskAlreadyRegistered, TaskNotRegistered
from .execution.hooks import HookChain
from .names import validate_name, validate_schema
from .options import MAX_ATTEMPTS, Replay, TaskOptions, check_replay
from .policies import DEFAULT_RETRY_STRATEGY, CancellationPolicy, RetryStrategy
from .serialization.annotations import plain_function
from .statements import queues
from .tasks import FollowUp, Task, check_follow_up
from .validation import integer

if TYPE_CHECKING:
    from .telemetry import Telemetry

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")

_GETTERS = {"opentelemetry.trace": "get_tracer_provider", "opentelemetry.metrics": "get_meter_provider"}


_numbers = itertools.count()
clients: WeakValueDictionary[int, App] = WeakValueDictionary()
"""The clients of the process, in the order in which they were made."""


class App:
    """The settings, tasks and database of a client."""

    def __init__(
        self,
        bind: Bind | None,
        *,
        queue_name: str,
        schema: str,
        default_max_attempts: int,
        default_retry_strategy: RetryStrategy | None,
        default_cancellation: CancellationPolicy | None,
        max_payload_bytes: int,
        hooks: HookChain,
        telemetry: Telemetry | Literal[False] | None,
        replay: Replay,
        max_lost_workers: int,
        sync_bind: SyncBind | None = None,
        scopes: Sequence[scoped_session[Any]] = (),
        on_failure: FollowUp | None = None,
        on_cancel: FollowUp | None = None,
        keep_logs: int | None = None,
    ) -> None:
        clients[next(_numbers)] = self
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
            max_lost_workers,
        )
        self.replay = check_replay(replay)
        """The rule for a recorded step that is met with other arguments, unless the task has one."""
        self.on_failure = check_follow_up(on_failure, "on_failure")
        """The task that is spawned if one fails that has no other follow-up."""
        self.on_cancel = check_follow_up(on_cancel, "on_cancel")
        self.keep_logs = None if keep_logs is None else integer(keep_logs, "keep_logs", minimum=0, maximum=1000)
        """The level from which on lines of `ctx.logger` are kept in the task's stream `$log`; None keeps none."""
        self.limited_queues: set[str] = set()
        """Queues that are known to have limits, so that spawns into them need not find out."""
        self.hooks = hooks
        self.closers: list[Callable[[], Awaitable[None]]] = []
        """Functions that close what was opened for this client by others, when it closes."""
        self._telemetry: Telemetry | Literal[False] | None = telemetry
        self._bind = bind
        if sync_bind is not None:
            check_sync_bind(sync_bind)
        elif scopes and bind is not None and is_asynchronous_only(bind):
            refuse_asynchronous("bind", "asyncpg has no synchronous form")
        self._sync_bind = sync_bind
        self._scopes = scopes
        """Scoped sessions that are the session of a transaction while its function runs."""
        self._sync_database: tuple[int, SyncDatabase | None] | None = None
        """The synchronous sessions, once resolved, with the id of the process."""
        self._sync_lock = threading.Lock()
        self._database: Database | None = None
        """The database on an engine that is the application's, or that was made while no event loop ran."""
        self._databases = PerLoop(self._make_database, Database.abandon)
        self._hint_sender: HintSender | None = None
        """The sender that was used last, kept because it knows when that was."""

    @property
    def database(self) -> Database:
        """The database, resolved from `bind` on first use. Of a URL, each event loop has an engine of its own."""
        database = self._database
        if database is not None and not database.owned:
            return database
        if in_event_loop():
            return self._databases.get()
        if database is None:
            database = self._database = Database(self._bind, self.schema)
        return database

    def _make_database(self) -> Database:
        database, self._database = self._database or Database(self._bind, self.schema), None
        if not database.owned:
            self._database = database
        return database

    @property
    def sync_database(self) -> SyncDatabase | None:
        """The synchronous sessions, resolved from `sync_bind` and `bind` on first use; None with asyncpg alone."""
        process = os.getpid()
        if self._sync_database is None or self._sync_database[0] != process:
            # A process that was forked has no use for connections of the one before.
            with self._sync_lock:
                if self._sync_database is None or self._sync_database[0] != process:
                    found = resolve_sync_bind(self._bind, self._sync_bind, self.schema, self._scopes)
                    self._sync_database = process, found
        return self._sync_database[1]

    @contextmanager
    def scoped(self, session: Session, *, hold: bool = True) -> Generator[None]:
        """Make a session that of the scoped sessions of hooks and `sync_bind`, in the scope of the caller.

        With `hold` it is theirs in the scopes that the code inside enters, too.
        """
        given = self._sync_bind if self._sync_bind is not None else self._bind
        scopes = {*self._scopes, *([given] if isinstance(given, scoped_session) else [])}
        with ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(session_scoped(scope, session, hold=hold))
            yield

    def check_scopes(self) -> None:
        """Check that scoped sessions can be the session of a transaction.

        Raises:
            InvalidConfiguration: the driver is asyncpg, and no `sync_bind` was given.
        """
        if self._scopes:
            self.require_sync_database()

    def require_sync_database(self) -> SyncDatabase:
        """Return the synchronous sessions.

        Raises:
            InvalidConfiguration: there are none, as with asyncpg, and no `sync_bind` was given.
        """
        return self.sync_database or refuse_asynchronous(
            "bind",
            "asyncpg has no synchronous form, nor has an engine with listeners or a creator of its own",
        )

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

        A task of the same function, defined once more by a reloaded module or a notebook cell, replaces the former one.

        Raises:
            TaskAlreadyRegistered: a task of another function has that name.
            SerializationError: values of its params or output could not be read back as they were, by their types.
        """
        if not isinstance(task, Task):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"register() takes a task, made by @task, not {type(task).__name__}")
        task.check_types()
        known = self.tasks.setdefault(task.name, task)
        if known is not task:
            if not _is_redefined(known.function, task.function):
                raise TaskAlreadyRegistered(task.name)
            self.tasks[task.name] = task
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


def _is_redefined(former: Callable[..., Any], latter: Callable[..., Any]) -> bool:
    """Return whether two functions have the same place in the same module."""
    module, name = _place(former)
    # A function that another one defines is not defined once more by a reload, but by another call.
    return (module, name) == _place(latter) and name is not None and "<locals>" not in name


def _place(function: Callable[..., Any]) -> tuple[str | None, str | None]:
    function = plain_function(function)
    return getattr(function, "__module__", None), getattr(function, "__qualname__", None)


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
