"""Tools for tests of applications: databases, time travel, workers that stop when idle, contexts without a database."""

from .assertions import assert_spawned, spawned
from .contexts import ContextOptions, MemoryContext, MemorySyncContext, Recorded, Slept, SpawnedChild, task_context
from .database import TestServer, database_server
from .idle import run_until_idle
from .inline import run_spawned
from .time import Clock, time_travel

__all__ = [
    "Clock",
    "ContextOptions",
    "MemoryContext",
    "MemorySyncContext",
    "Recorded",
    "Slept",
    "SpawnedChild",
    "TestServer",
    "assert_spawned",
    "database_server",
    "run_spawned",
    "run_until_idle",
    "spawned",
    "task_context",
    "time_travel",
]
