"""The fixtures of the client's tests: an application's tables, its executors, and a listener for hints."""

from ..client.conftest import application, gate, hints, orders

__all__ = ["application", "gate", "hints", "orders"]
