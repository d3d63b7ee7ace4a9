"""The data of the running task, which a context has whether it is awaited or blocks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, cast

from typing_extensions import TypeVar as DefaultTypeVar

from ..serialization.codec import UNTYPED

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun

StateT = DefaultTypeVar("StateT", default=Any)


class TaskData(Generic[StateT]):
    """The properties of the running task. The classes that derive from it set the two attributes."""

    __slots__ = ()

    _claimed: ClaimedRun
    _state: StateT

    @property
    def task_id(self) -> uuid.UUID:
        """The task's id, the same in all attempts."""
        return self._claimed.task_id

    @property
    def run_id(self) -> uuid.UUID:
        """The id of this attempt; it outlives suspensions."""
        return self._claimed.run_id

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1. Failures and lost workers increase it, suspensions do not."""
        return self._claimed.attempt

    @property
    def task_name(self) -> str:
        """The name under which the task was spawned."""
        return self._claimed.task_name

    @property
    def queue_name(self) -> str:
        """The queue the task was spawned into."""
        return self._claimed.queue_name

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers passed to the spawn, as plain JSON."""
        text = self._claimed.headers
        return {} if text is None else cast("Mapping[str, Any]", UNTYPED.decode(text, "the task's headers"))

    @property
    def state(self) -> StateT:
        """The object that the worker's `lifespan` yielded, else the client's `state`."""
        return self._state
