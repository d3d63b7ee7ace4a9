"""Durable execution for applications that use SQLAlchemy."""

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
from .models import TaskRow
from .options import SpawnOptions, WorkerOptions
from .policies import CancellationPolicy, RetryStrategy
from .results import (
    QueueStatistics,
    ScheduleFilter,
    ScheduleInfo,
    SpawnResult,
    TaskErrorInfo,
    TaskHandle,
    TaskPollResult,
    TaskStatus,
)
from .schedules.pgcron import setup_pgcron
from .spawns import OutgoingSpawn, Spawn
from .steps import step
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
    "RetryStrategy",
    "ScheduleFilter",
    "ScheduleInfo",
    "ScheduleNotFound",
    "SchemaMismatch",
    "SerializationError",
    "Spawn",
    "SpawnOptions",
    "SpawnResult",
    "SyncTaskContext",
    "Task",
    "TaskAlreadyRegistered",
    "TaskContext",
    "TaskError",
    "TaskErrorInfo",
    "TaskHandle",
    "TaskNotFound",
    "TaskNotRegistered",
    "TaskPollResult",
    "TaskRow",
    "TaskStatus",
    "TaskTimeout",
    "UserError",
    "Worker",
    "WorkerOptions",
    "current_context",
    "heartbeat",
    "setup_pgcron",
    "step",
    "task",
]
