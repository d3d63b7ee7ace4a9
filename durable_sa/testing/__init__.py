"""Tools for tests of applications: databases, time travel, workers that stop when idle, contexts without a database."""

from .contexts import (
    ContextOptions,
    MemoryContext,
    MemorySyncContext,
    Recorded,
    SentMessage,
    Slept,
    SpawnedChild,
    task_context,
)
from .database import TestServer, database_server
from .idle import run_until_idle
from .time import Clock, time_travel

__all__ = [
    "Clock",
    "ContextOptions",
    "MemoryContext",
    "MemorySyncContext",
    "Recorded",
    "SentMessage",
    "Slept",
    "SpawnedChild",
    "TestServer",
    "database_server",
    "run_until_idle",
    "task_context",
    "time_travel",
]
