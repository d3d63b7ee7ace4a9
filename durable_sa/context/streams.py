"""Streams: items that a task writes for readers outside."""

from __future__ import annotations

import hashlib
import uuid
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ..database.scripts import perform
from ..errors import InvalidState
from ..execution.streaming import Block, Source, ended
from ..ids import new_id
from ..names import validate_name
from ..serialization.codec import UNTYPED, Codec, check_size, codec_for
from ..signals import ControlFlow
from .base import Call, ContextBase, enclosing_step

T = TypeVar("T")


class TaskStream(Generic[T]):
    """A block in which a task writes a stream, made by `ctx.stream`."""

    def __init__(self, context: ContextBase, name: str, codec: Codec[T], *, keep_open: bool) -> None:
        self._context = context
        self.name = name
        self.codec = codec
        self.keep_open = keep_open
        self._block: Block | None = None
        self._key: uuid.UUID | None = None
        """The key of the checkpoint of a block in the task's body; None in a step."""
        self._skipping = False
        """True in the replay of a block that was left."""
        self._over = False

    async def __aenter__(self) -> Self:
        context = self._context
        run = context._run
        call = context._call("stream", self.name)
        step = enclosing_step(run.branch().path)
        if step is None and await context._recall(call) is not None:
            self._skipping = True
            return self
        await run.enter()
        if self.name in run.open_streams:
            raise InvalidState(f"Stream {self.name!r}", "open in another block of this task", "Leave that first.")
        run.open_streams.add(self.name)
        try:
            self._block = block = run.stream_block(self.name, _source(run, call, step))
            self._key = call.key if step is None else None
            with run.branches.busy():
                await perform(context._app.database, block.opening)
        except ControlFlow as signal:
            run.open_streams.discard(self.name)
            run.take_away(signal)
            raise
        except BaseException:
            run.open_streams.discard(self.name)
            raise
        return self

    async def write(self, item: T) -> None:
        """Write an item, which readers get within about a tenth of a second. Waits only if many are not written yet.

        Raises:
            InvalidState: the block is not entered, or was left.
            SerializationError, PayloadTooLarge: an item that cannot be stored.
        """
        if self._skipping and not self._over:
            return
        if self._block is None or self._over:
            raise (
                ended(self.name)
                if self._over
                else InvalidState(
                    f"Stream {self.name!r}", "not open", "Enter it: `async with ctx.stream(...) as stream:`."
                )
            )
        run = self._context._run
        what = f"an item of stream {self.name!r}"
        text = self.codec.encode(item, what)
        check_size(text, run.host.max_payload_bytes, what)
        await run.enter()
        with run.branches.busy():
            await self._block.write(text)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        block = self._block
        if block is None:
            return
        run = self._context._run
        run.open_streams.discard(self.name)
        if run.signal is not None or (error is not None and not isinstance(error, Exception)):
            # It was cut off; the next try supersedes what it has written.
            block.abandon()
            return
        with run.branches.busy():
            await block.flush()
            if error is None:
                closing = block.closing(ends=not self.keep_open, key=self._key)
                await perform(self._context._app.database, closing)


def _source(run: Any, call: Call, step: uuid.UUID | None) -> Source:
    if step is None or step not in run.steps:
        return Source(call.key if step is None else step, new_id())
    identity = f"{run.claimed.fence}:{run.steps[step][1]!r}".encode()
    return Source(step, uuid.UUID(bytes=hashlib.blake2b(identity, digest_size=16).digest()))


class Streams(ContextBase):
    """The part of a context that writes streams."""

    __slots__ = ()

    def stream(self, name: str, type: Any = None, *, keep_open: bool = False) -> TaskStream[Any]:  # noqa: A002
        """Return a block in which the task writes items for readers outside, such as the tokens of an answer.

        ```python
        async with ctx.stream("answer") as stream:
            await stream.write("Hello")
        ```

        Items are gathered for about 50 ms or 32 KiB. Leaving the block ends the stream, unless it is `keep_open`, which
        a later block, of another step too, goes on with. In a step, the items of a try that failed or was cut off are
        superseded by those of the next; a block in the task's body counts as a step of its own. A crash of the server
        may lose the last items of a block that was not left.

        Raises:
            InvalidName: a name that breaks the rules.
            InvalidState: on entering: the stream has ended, or another block of the task has it open.
        """
        validate_name("stream", name)
        return TaskStream(self, name, UNTYPED if type is None else codec_for(type), keep_open=keep_open)
