"""Streams: items that a task writes for readers outside."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast, overload

from ..errors import InvalidState
from ..execution.calls import Call
from ..execution.journal import Entry
from ..execution.run import Run
from ..execution.streaming import Block, ended
from ..execution.writes import BlockValues, Kind
from ..ids import new_id
from ..names import validate_name
from ..serialization.codec import UNTYPED, Codec, check_size, codec_for
from ..signals import LeaseLost
from .base import ContextBase, enclosing_step, stream_mark

T = TypeVar("T")


class TaskStream(Generic[T]):
    """A block in which a task writes a stream, made by `ctx.stream`."""

    def __init__(
        self,
        run: Run,
        name: str,
        codec: Codec[T],
        *,
        keep_open: bool,
        begin: Callable[[], Call],
        recall: Callable[[Call], Awaitable[Entry | None]],
        overtaken: Callable[[uuid.UUID], Awaitable[bool]],
        note_failure: Callable[[uuid.UUID, BaseException], Awaitable[None]],
    ) -> None:
        self._run = run
        self._begin = begin
        """Draws the key of the block."""
        self._recall = recall
        self._overtaken = overtaken
        self._note_failure = note_failure
        self.name = name
        self.codec = codec
        self.keep_open = keep_open
        self._entered = self._left = False
        self._block: Block | None = None
        """None before the block is entered, and in the replay of one that was left or overtaken."""
        self._key: uuid.UUID | None = None
        """The key of the checkpoint of a block in the task's body; None in a step."""

    async def __aenter__(self) -> Self:
        run = self._run
        if self._entered:
            raise InvalidState(f"The block of stream {self.name!r}", "entered before", "Make one with `ctx.stream`.")
        call = self._begin()
        step = enclosing_step(run.branch().path)
        recorded = step is None and await self._recall(call) is not None
        self._entered = True
        if recorded or await self._overtaken(step or call.key):
            return self
        await run.enter()
        self._open_in(run.open_streams)
        try:
            values = BlockValues(self.name, *_source(run, call.key, step))
            with run.branches.busy():
                self._block = run.open_streams[self.name] = await _open(run, values)
        except BaseException:
            del run.open_streams[self.name]
            raise
        self._key = call.key if step is None else None
        return self

    def _open_in(self, streams: dict[str, Any]) -> None:
        if self.name in streams:
            raise InvalidState(f"Stream {self.name!r}", "open in another block of this task", "Leave that first.")
        streams[self.name] = None

    async def write(self, item: T) -> None:
        """Write an item, which readers get within about a tenth of a second. Waits only if many are not written yet.

        Raises:
            InvalidState: the block is not entered, or was left.
            SerializationError, PayloadTooLarge: an item that cannot be stored.
        """
        self._check_open()
        block, run = self._block, self._run
        if block is None:
            return
        await run.enter()
        what = f"an item of stream {self.name!r}"
        text = self.codec.encode(item, what)
        check_size(text, run.host.max_payload_bytes, what)
        if block.full:
            with run.branches.busy():
                while block.full:
                    await block.next_written()
        block.add(text)

    def _check_open(self) -> None:
        if self._left:
            raise ended(self.name)
        if not self._entered:
            raise InvalidState(
                f"Stream {self.name!r}", "not open", "Enter it: `async with ctx.stream(...) as stream:`."
            )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        block, run = self._block, self._run
        if block is None:
            return
        try:
            if run.signal is not None or (error is not None and not isinstance(error, Exception)):
                # It was cut off; the next try supersedes what it has written.
                block.abandon()
            else:
                with run.branches.busy():
                    await block.flush()
                    if error is None:
                        values = block.closing(ends=not self.keep_open, key=self._key)
                        await run.write(Kind.CLOSING, self._key or new_id(), values)
            block.note_position(run.stream_positions)
            if error is not None and self._key is not None:
                await self._note_failure(self._key, error)
        except LeaseLost:
            block.abandon()
            run.take_away(LeaseLost())
            raise
        finally:
            del run.open_streams[self.name]


async def _open(run: Run, values: BlockValues) -> Block:
    """Open a block, and supersede what earlier tries of its step have written.

    Raises:
        InvalidState: the stream has ended.
    """
    block_id = new_id()
    opened = cast(Any, await run.write(Kind.OPENING, block_id, values))
    if opened.last_position is None:
        raise ended(values.name)
    block = run.stream_block(block_id, values, opened.last_position)
    if (values.name, values.try_id) not in run.streamed:
        # Nothing can have been written before if no positions were given.
        if opened.last_position > 0:
            await run.write(Kind.SUPERSESSION, block_id, values)
        run.streamed.add((values.name, values.try_id))
    block.note_position(run.stream_positions)
    return block


def _source(run: Run, block_key: uuid.UUID, step: uuid.UUID | None) -> tuple[uuid.UUID, uuid.UUID]:
    """Return the key of the step that writes, and an id of its try. A block in the task's body is a step of its own."""
    if step is None or step not in run.steps:
        return step or block_key, new_id()
    identity = f"{run.claimed.fence}:{run.steps[step][1]!r}".encode()
    return step, uuid.UUID(bytes=hashlib.blake2b(identity, digest_size=16).digest())


class Streams(ContextBase):
    """The part of a context that writes streams."""

    __slots__ = ()

    @overload
    def stream(self, name: str, type: type[T], *, keep_open: bool = False) -> TaskStream[T]: ...
    @overload
    def stream(self, name: str, type: Any = None, *, keep_open: bool = False) -> TaskStream[Any]: ...
    def stream(self, name: str, type: Any = None, *, keep_open: bool = False) -> TaskStream[Any]:  # noqa: A002
        """Return a block in which the task writes items for readers outside, such as the tokens of an answer.

        ```python
        async with ctx.stream("answer") as stream:
            await stream.write("Hello")
        ```

        Items are gathered for about 50 ms or 32 KiB. Leaving the block ends the stream, unless it is `keep_open`, which
        a later block, of another step too, goes on with. In a step, the items of a try that failed or was cut off are
        superseded by those of the next; a block in the task's body counts as a step of its own. If the task catches the
        error of a step or block and goes on with the stream in another one, the items stay, and replays write nothing
        there. A crash of the server may lose the last items of a block that was not left.

        Raises:
            InvalidName: a name that breaks the rules.
            InvalidState: on entering: the stream has ended, or another block of the task has it open.
        """
        validate_name("stream", name)
        return TaskStream(
            self._run,
            name,
            UNTYPED if type is None else codec_for(type),
            keep_open=keep_open,
            begin=lambda: self._call("stream", name),
            recall=self._recall,
            overtaken=lambda key: self._overtaken(key, name),
            note_failure=self._note_streams,
        )

    async def _overtaken(self, key: uuid.UUID, name: str) -> bool:
        """Return whether a step, or block, has failed before, and the task has gone on with the stream in another one.

        What it writes in a replay would come behind the items of that other one, or behind the end.
        """
        run = self._run
        entry = await self._recall(stream_mark(key))
        if entry is None:
            return False
        position = cast("dict[str, int]", UNTYPED.decode(entry.value or "{}", f"the end of stream {name!r}")).get(name)
        if position is None:
            return False
        with run.branches.busy():
            return await run.host.reader.overtaken(run.claimed.task_id, name, key, position)
