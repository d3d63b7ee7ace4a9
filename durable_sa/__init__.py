"""Durable execution for applications that use SQLAlchemy.

The names of `__all__` are public, and so are the submodules `errors`, `models`, `hooks`, `signals`, `logs`,
`telemetry`, `testing`, `testing.plugin`, `integrations`, `migrations`, `embedded` and `cli`. All others belong to the
engine and may change in any release.
"""

from importlib import metadata
from typing import TYPE_CHECKING

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
    ReplayMismatch,
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
from .policies import CancellationPolicy, RetryStrategy
from .results import (
    QueueStatistics,
    Race,
    ScheduleFilter,
    ScheduleInfo,
    SpawnResult,
    StreamItem,
    StreamRestart,
    TaskEnded,
    TaskErrorInfo,
    TaskHandle,
    TaskPollResult,
    TaskStatus,
)
from .schedules.pgcron import setup_pgcron
from .spawns import OutgoingSpawn, Spawn
from .steps import step, transaction
from .tasks import Task
from .worker.worker import Worker

__all__ = [
    "CancellationPolicy",
    "ChildCancelled",
    "ChildFailed",
    "Durable",
    "DurableError",
    "Hooks",
    "IdempotencyConflict",
    "InvalidConfiguration",
    "InvalidCron",
    "InvalidName",
    "InvalidState",
    "InvalidTaskParams",
    "OutgoingSpawn",
    "PayloadTooLarge",
    "QueueNotFound",
    "QueuePolicy",
    "QueueStatistics",
    "Race",
    "ReplayMismatch",
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
    "TaskHandle",
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

if not TYPE_CHECKING:  # a type checker would take every unknown name for an attribute

    def __getattr__(name: str) -> str:
        if name == "__version__":
            # Read on demand, because finding and parsing the metadata of a distribution takes milliseconds.
            return metadata.version(__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})
