"""For the tests of applications: a database, a clock that can be set, workers that end, and tasks as plain functions."""

from .database import TestServer, database_server
from .idle import run_until_idle
from .time import Clock, time_travel

__all__ = ["Clock", "TestServer", "database_server", "run_until_idle", "time_travel"]
