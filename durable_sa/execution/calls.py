"""The durable calls of a task."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from ..serialization.arguments import summary


class Call(NamedTuple):
    """One durable call of a task, identified by a key that is the same in every replay."""

    kind: str
    name: str
    key: uuid.UUID
    arguments: str = ""
    """As far as they are part of the key; those of a step or transaction as canonical JSON."""

    @property
    def summary(self) -> str | None:
        """The beginning of a step's or transaction's arguments, which is kept for operators."""
        return summary(self.arguments)
