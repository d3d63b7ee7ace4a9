"""Reading the streams of tasks."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncGenerator
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, overload

from sqlalchemy.exc import SQLAlchemyError

from ..database.batches import Batch, with_connection
from ..database.connections import HeldConnection
from ..database_errors import is_transient
from ..errors import SerializationError, TaskNotFound
from ..names import validate_name
from ..results import AnyTaskId, StreamItem, StreamRestart, id_of
from ..serialization.codec import UNTYPED, Codec, codec_for
from ..statements import streams
from ..validation import integer
from .values import PublishedValues

T = TypeVar("T")

POLL_INTERVAL = 0.03
"""Seconds between looks while items come."""
IDLE_INTERVAL = 0.15
"""Seconds between looks at a stream without new items."""
IDLE_LOOKS = 100
"""Looks without new items after which they are made less often."""


class _Page(NamedTuple):
    over: bool
    restart: int | None
    rows: list[tuple[int, str]]
    full: bool
    """True if there may be more rows."""


class StreamReading(PublishedValues):
    """The part of a client that reads streams."""

    @overload
    def read_stream(
        self, task: AnyTaskId, name: str, *, after: int = 0, type: type[T], follow: bool = True
    ) -> AsyncGenerator[StreamItem[T] | StreamRestart]: ...
    @overload
    def read_stream(
        self, task: AnyTaskId, name: str, *, after: int = 0, type: Any = None, follow: bool = True
    ) -> AsyncGenerator[StreamItem[Any] | StreamRestart]: ...
    def read_stream(
        self,
        task: AnyTaskId,
        name: str,
        *,
        after: int = 0,
        type: Any = None,  # noqa: A002
        follow: bool = True,
    ) -> AsyncGenerator[StreamItem[Any] | StreamRestart]:
        """Yield the items of a stream behind a position, then those that come, until the stream or its task ends.

        If the step that wrote items runs once more, they are superseded: a :class:`durable_sa.StreamRestart` names the
        last position that still counts, and the new items follow, at later positions. Readers hold no connection, and
        those of one client share their queries. Items are decoded as a `type`, without one as plain JSON. Without
        `follow` it ends with the items that were written so far.

        Raises:
            InvalidConfiguration: `after` is negative.
            TaskNotFound: there is no such task, or it was deleted.
            SerializationError: an item is not of that type.
        """
        task_id = id_of(task)
        validate_name("stream", name, internal=True)
        position = integer(after, "after", minimum=0, maximum=2**63 - 1)
        codec: Codec[list[Any]] = UNTYPED if type is None else codec_for(list[type])
        return self._read_stream(task_id, name, position, codec, follow=follow)

    async def _read_stream(
        self, task_id: uuid.UUID, name: str, position: int, codec: Codec[list[Any]], *, follow: bool
    ) -> AsyncGenerator[StreamItem[Any] | StreamRestart]:
        what = f"items of stream {name!r} of task {task_id}"
        idle, read = 0, False
        while True:
            try:
                page, read = await self._streams((task_id, name, position)), True
            except (SQLAlchemyError, OSError) as error:
                # Once the database has answered, it may go away and come back.
                if not read or not is_transient(error):
                    raise
                await self._next_look(IDLE_INTERVAL)
                continue
            if page is None:
                raise TaskNotFound(task_id)
            if page.restart is not None:
                position, idle = page.restart, 0
                yield StreamRestart(position)
                continue
            for last, text in page.rows:
                items = codec.decode(text, what)
                if not isinstance(items, list):  # pyright: ignore[reportUnnecessaryIsInstance] - changed by hand
                    raise SerializationError(what, "are no JSON array")
                for number, item in enumerate(items, last - len(items) + 1):
                    if number > position:
                        position = number
                        yield StreamItem(number, item)
            if page.full:
                continue
            if page.over or not follow:
                return
            idle = 0 if page.rows else idle + 1
            await self._next_look(POLL_INTERVAL if idle < IDLE_LOOKS else IDLE_INTERVAL)

    async def _next_look(self, interval: float) -> None:
        """Wait for the next of the times at which all readers of an event loop look, to look together."""
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(interval - now % interval)

    @functools.cached_property
    def _streams(self) -> Batch[tuple[uuid.UUID, str, int], _Page | None]:
        return Batch(with_connection(lambda: self.database, _read))


async def _read(held: HeldConnection, items: list[tuple[uuid.UUID, str, int]]) -> list[_Page | None]:
    distinct = list(dict.fromkeys(items))
    parameters = {
        "task_ids": [task_id for task_id, _, _ in distinct],
        "names": [name for _, name, _ in distinct],
        "afters": [after for _, _, after in distinct],
    }
    pages: dict[tuple[uuid.UUID, str, int], _Page] = {}
    for key, found in groupby(
        await held.execute(streams.READ_STREAMS, parameters), attrgetter("task_id", "name", "after")
    ):
        group = list(found)
        lines = [(row.position, row.texts) for row in group if row.position is not None]
        last = group[-1]
        full = len(lines) >= streams.PAGE or (last.through or 0) >= streams.PAGE_BYTES
        pages[key] = _Page(last.over, last.restart, lines, full)
    return [pages.get(item) for item in items]
