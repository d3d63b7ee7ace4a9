"""The fixtures of the worker's tests that read the tables."""

from ..worker.conftest import observer, sql

__all__ = ["observer", "sql"]
