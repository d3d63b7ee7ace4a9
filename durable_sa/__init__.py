"""Durable execution for applications that use SQLAlchemy.

The names of `__all__` are public, and so are the submodules `errors`, `models`, `hooks`, `signals`, `logs`,
`telemetry`, `testing`, `testing.plugin`, `integrations`, `migrations`, `embedded` and `cli`. All others belong to the
engine and may change in any release.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Durable, QueuePolicy
    from .context import TaskContext
    from .context.sync import SyncTaskContext
    from .current import current_context, heartbeat
    from .decorators import task
    from .errors import (
        ChildCancelled,
        ChildFailed,
        DurableError,
        IdempotencyConflict,
        InvalidConfiguration,
        InvalidCron,
        InvalidName,
        InvalidState,
        InvalidTaskParams,
        PayloadTooLarge,
        QueueNotFound,
        RateLimited,
        ReplayMismatch,
        Retry,
        ScheduleNotFound,
        SchemaMismatch,
        SerializationError,
        TaskAlreadyRegistered,
        TaskError,
        TaskNotFound,
        TaskNotRegistered,
        TaskTimeout,
        UserError,
    )
    from .hooks import Hooks
    from .models import TaskRow, TaskValueRow
    from .options import SpawnOptions, WorkerOptions
    from .policies import CancellationPolicy, Limit, Rate, RetryStrategy
    from .results import (
        BulkResult,
        HistoryEntry,
        LimitKeyInfo,
        Page,
        QueueStatistics,
        Race,
        ScheduleFilter,
        ScheduleInfo,
        SpawnResult,
        StreamItem,
        StreamRestart,
        TaskEnded,
        TaskErrorInfo,
        TaskFilter,
        TaskHandle,
        TaskInfo,
        TaskPollResult,
        TaskStatus,
    )
    from .schedules.pgcron import setup_pgcron
    from .spawns import OutgoingSpawn, Spawn
    from .steps import step, transaction
    from .tasks import Task
    from .worker.worker import Worker

__all__ = [
    "BulkResult",
    "CancellationPolicy",
    "ChildCancelled",
    "ChildFailed",
    "Durable",
    "DurableError",
    "HistoryEntry",
    "Hooks",
    "IdempotencyConflict",
    "InvalidConfiguration",
    "InvalidCron",
    "InvalidName",
    "InvalidState",
    "InvalidTaskParams",
    "Limit",
    "LimitKeyInfo",
    "OutgoingSpawn",
    "Page",
    "PayloadTooLarge",
    "QueueNotFound",
    "QueuePolicy",
    "QueueStatistics",
    "Race",
    "Rate",
    "RateLimited",
    "ReplayMismatch",
    "Retry",
    "RetryStrategy",
    "ScheduleFilter",
    "ScheduleInfo",
    "ScheduleNotFound",
    "SchemaMismatch",
    "SerializationError",
    "Spawn",
    "SpawnOptions",
    "SpawnResult",
    "StreamItem",
    "StreamRestart",
    "SyncTaskContext",
    "Task",
    "TaskAlreadyRegistered",
    "TaskContext",
    "TaskEnded",
    "TaskError",
    "TaskErrorInfo",
    "TaskFilter",
    "TaskHandle",
    "TaskInfo",
    "TaskNotFound",
    "TaskNotRegistered",
    "TaskPollResult",
    "TaskRow",
    "TaskStatus",
    "TaskTimeout",
    "TaskValueRow",
    "UserError",
    "Worker",
    "WorkerOptions",
    "current_context",
    "heartbeat",
    "setup_pgcron",
    "step",
    "task",
    "transaction",
]

__version__: str
"""The installed version of the package."""

_PLACES = {
    "client": ("Durable", "QueuePolicy"),
    "context": ("TaskContext",),
    "context.sync": ("SyncTaskContext",),
    "current": ("current_context", "heartbeat"),
    "decorators": ("task",),
    "errors": (
        "ChildCancelled",
        "ChildFailed",
        "DurableError",
        "IdempotencyConflict",
        "InvalidConfiguration",
        "InvalidCron",
        "InvalidName",
        "InvalidState",
        "InvalidTaskParams",
        "PayloadTooLarge",
        "QueueNotFound",
        "RateLimited",
        "ReplayMismatch",
        "Retry",
        "ScheduleNotFound",
        "SchemaMismatch",
        "SerializationError",
        "TaskAlreadyRegistered",
        "TaskError",
        "TaskNotFound",
        "TaskNotRegistered",
        "TaskTimeout",
        "UserError",
    ),
    "hooks": ("Hooks",),
    "models": ("TaskRow", "TaskValueRow"),
    "options": ("SpawnOptions", "WorkerOptions"),
    "policies": ("CancellationPolicy", "Limit", "Rate", "RetryStrategy"),
    "results": (
        "BulkResult",
        "HistoryEntry",
        "Page",
        "LimitKeyInfo",
        "QueueStatistics",
        "Race",
        "ScheduleFilter",
        "ScheduleInfo",
        "SpawnResult",
        "StreamItem",
        "StreamRestart",
        "TaskEnded",
        "TaskErrorInfo",
        "TaskFilter",
        "TaskHandle",
        "TaskInfo",
        "TaskPollResult",
        "TaskStatus",
    ),
    "schedules.pgcron": ("setup_pgcron",),
    "spawns": ("OutgoingSpawn", "Spawn"),
    "steps": ("step", "transaction"),
    "tasks": ("Task",),
    "worker.worker": ("Worker",),
}
"""The public names by their modules, which are imported when a name is first used: a web process needs few of them."""

_MODULES = {name: module for module, names in _PLACES.items() for name in names}
_SUBMODULES = frozenset(
    {
        "cli",
        "embedded",
        "errors",
        "hooks",
        "integrations",
        "logs",
        "migrations",
        "models",
        "signals",
        "telemetry",
        "testing",
    }
)

if not TYPE_CHECKING:  # a type checker would take every unknown name for an attribute

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        elif name in _SUBMODULES:
            return importlib.import_module(f".{name}", __name__)
        elif name == "__version__":
            # Read on demand, because finding and parsing the metadata of a distribution takes milliseconds.
            from importlib import metadata

            value = metadata.version(__name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})
