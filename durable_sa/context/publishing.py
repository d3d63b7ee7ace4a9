"""Values that a task publishes, for others to see how far it is."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from ..execution.calls import Call
from ..ids import new_id
from ..names import validate_name
from ..serialization.codec import UNTYPED, check_size
from .base import ContextBase


class Publishing(ContextBase):
    """The part of a context that publishes values."""

    __slots__ = ()

    def publish(self, name: str, value: Any) -> Coroutine[object, None, None]:
        """Publish a value of the task, which replaces the one of that name; clients read it with `get_value`.

        It is written in the background: at once, or with others a quarter of a second after the last write, and always
        before the task suspends or ends. Nothing is recorded, and a replay publishes nothing, except for the last value
        if the worker of the run before was lost. May be called in steps.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or value that cannot be stored.
        """
        validate_name("value", name)
        what = f"value {name!r}"
        text = UNTYPED.encode(value, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        call = Call("publish", name, new_id())
        return self._begun(call, self._publish(call, text))

    async def _publish(self, call: Call, text: str) -> None:
        self._run.unawaited.pop(call.key, None)
        await self._run.enter()
        self._run.publish(call.name, text)
