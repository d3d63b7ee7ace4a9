"""Tools for tests of applications: databases, time travel, workers that stop when idle, contexts without a database."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assertions import assert_spawned, spawned
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
    from .inline import run_spawned
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
    "assert_spawned",
    "database_server",
    "run_spawned",
    "run_until_idle",
    "spawned",
    "task_context",
    "time_travel",
]

_MODULES = {
    "Clock": "time",
    "ContextOptions": "contexts",
    "MemoryContext": "contexts",
    "MemorySyncContext": "contexts",
    "Recorded": "contexts",
    "SentMessage": "contexts",
    "Slept": "contexts",
    "SpawnedChild": "contexts",
    "TestServer": "database",
    "assert_spawned": "assertions",
    "database_server": "database",
    "run_spawned": "inline",
    "run_until_idle": "idle",
    "spawned": "assertions",
    "task_context": "contexts",
    "time_travel": "time",
}
"""The modules of the names, which are imported when a name is first used: every run of pytest loads the plugin."""

if not TYPE_CHECKING:  # a type checker would take every unknown name for an attribute

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
