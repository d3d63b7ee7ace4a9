"""What an application does around all spawns, runs and steps of a client, said in one place.

```python
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from durable_sa import Durable, Hooks, OutgoingSpawn, TaskContext

tenant: ContextVar[str] = ContextVar("tenant")


class Tenants(Hooks):
    def on_spawn(self, spawn: OutgoingSpawn) -> None:
        spawn.headers.setdefault("tenant", tenant.get())

    @asynccontextmanager
    async def around_task(self, ctx: TaskContext) -> AsyncIterator[None]:
        token = tenant.set(ctx.headers["tenant"])
        try:
            yield
        finally:
            tenant.reset(token)


durable = Durable(hooks=[Tenants()])
```
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .execution.hooks import HookChain, OnSpawn
from .options import SpawnOptions, encode_headers

if TYPE_CHECKING:
    from .context import TaskContext


@dataclass(slots=True)
class OutgoingSpawn:
    """A spawn that was found to be in order, before it is sent."""

    task_id: uuid.UUID
    """Of the task to be. Another task has the idempotency key, if it was there before."""
    task_name: str
    queue_name: str
    options: SpawnOptions
    """As the caller gave them. To change them has no effect."""
    parent_task_id: uuid.UUID | None
    """The task that spawns a child; None for spawns from the outside and by schedules."""
    headers: dict[str, Any]
    """To be changed at will, within the rules for headers."""
    internal_headers: dict[str, Any] = field(repr=False)
    """Those whose keys begin with `durable::`."""


class Hooks:
    """To be subclassed, and given to :class:`durable_sa.Durable` as `hooks`. What is not overridden costs nothing.

    Of several hooks the first one is around the others. None of the methods is called for what is only replayed.
    """

    def on_spawn(self, spawn: OutgoingSpawn) -> None:
        """Called for each spawn, on whatever thread it is made: of clients, `spawn_many`, children, ticks of schedules.

        An exception refuses the spawn and reaches the caller. For the tick of a schedule it is called by each worker
        that tries to fire it; one of them succeeds, and an exception leaves the tick to the others.

        For schedules of the `pg_cron` backend, whose tasks the database makes by itself, it is not called.
        """

    def around_task(self, ctx: TaskContext[Any]) -> AbstractAsyncContextManager[object]:
        """Entered around the execution of each run, on the event loop, also for `def` tasks.

        Context variables that it sets are set in the task, its branches, steps and threads. An exception of its own
        fails the run as one of the task would. Those of the task pass through it, and it must let them.

        A suspension (a sleep, a wait) unwinds it: it sees `asyncio.CancelledError`, with `ctx.signal` set, and is
        entered again when the task goes on, maybe elsewhere and much later. The same holds for cancelled and lost
        runs. What it awaits on its way out is cancelled again every 0.1 seconds, and left behind after 5.
        """
        return nullcontext()

    def around_step(self, ctx: TaskContext[Any], name: str) -> AbstractContextManager[object]:
        """Entered around each try of a step, and around each transaction; synchronous, so that it can be anywhere.

        It is on the event loop for `async def` tasks and for transactions, and in the task's thread for the steps of
        `def` tasks. Exceptions pass through it as through `around_task`.
        """
        return nullcontext()


def chain(hooks: Iterable[Hooks]) -> HookChain:
    """Return the methods that `hooks` override, of each kind in the order in which the engine calls them.

    Raises:
        TypeError: an object whose class does not derive from `Hooks`.
    """
    hooks = tuple(hooks)
    for hook in hooks:
        if not isinstance(hook, Hooks):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"hooks are objects whose class derives from Hooks, not {type(hook).__name__}")

    def overriding(method: str) -> tuple[Any, ...]:
        base = getattr(Hooks, method)
        return tuple(getattr(hook, method) for hook in hooks if getattr(type(hook), method) is not base)

    return HookChain(*map(overriding, HookChain._fields))


def outgoing_headers(hooks: Iterable[OnSpawn], spawn: OutgoingSpawn) -> str:
    """Return the headers of a spawn, encoded, after the hooks have changed it."""
    for hook in hooks:
        hook(spawn)
    return encode_headers(spawn.headers, spawn.internal_headers)
