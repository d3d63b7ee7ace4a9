"""Code around all spawns, runs and steps of a client.

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
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import scoped_session

from .execution.hooks import HookChain
from .results import TaskEnded
from .spawns import OutgoingSpawn

if TYPE_CHECKING:
    from .context import TaskContext

__all__ = ["Hooks", "OutgoingSpawn"]


class Hooks:
    """Base class of hooks, instances of which are passed to :class:`durable_sa.Durable` as `hooks`.

    A method that is not overridden costs nothing. Of several hooks the first is the outermost. No method is called for
    what is only replayed.
    """

    session_scope: scoped_session[Any] | None = None
    """A scoped session that inside of `ctx.transaction` is the session of the transaction."""

    def on_spawn(self, spawn: OutgoingSpawn) -> None:
        """Change or refuse a spawn: a client's, one of `spawn_many`, a child's or a schedule's.

        It is called on the thread of the spawn, whichever that is. An exception refuses the spawn and reaches the
        caller. For the tick of a schedule it is called by each worker that tries to fire it; one of them succeeds, and
        an exception leaves the tick to the others. For schedules of the `pg_cron` backend it is not called, because
        the database itself inserts their tasks.
        """

    def around_task(self, ctx: TaskContext[Any]) -> AbstractAsyncContextManager[object]:
        """Return a context manager that is entered around each run, on the event loop, for `def` tasks as well.

        Context variables that it sets are set in the task, its branches, steps and threads. An exception of the hook
        fails the run as one of the task would. Exceptions of the task pass through the hook, which must let them.

        A suspension (a sleep, a wait) unwinds the hook: it sees `asyncio.CancelledError`, with `ctx.signal` set, and is
        entered again when the task continues, maybe in another process and much later. The same holds for cancelled
        and lost runs. What the hook awaits on its way out is cancelled every 0.1 seconds, and abandoned after 5.
        """
        return nullcontext()

    def around_step(self, ctx: TaskContext[Any], name: str) -> AbstractContextManager[object]:
        """Return a context manager that is entered around each try of a step, and around each transaction.

        It is synchronous because it is entered on the event loop for `async def` tasks, but in the task's thread for
        `def` tasks: there it is entered for each try of a transaction, unless that runs on the event loop. Exceptions
        pass through it as through `around_task`.
        """
        return nullcontext()

    def on_admin_action(self, user: str, action: str, task_ids: Sequence[uuid.UUID]) -> None:
        """Note an action that a user has done in the dashboard, for an audit log.

        `user` is the one of the :class:`durable_sa.dashboard.Access`, `action` one of its actions, and `task_ids` are
        the tasks that were changed or spawned: none for a queue, an event or a schedule. It is called after the
        action, on the event loop, and must not block it; its exceptions are logged and change nothing.
        """

    def on_failed(self, ended: TaskEnded) -> None:
        """Take note of the final failure of a task, in the worker that has stored it, on the event loop.

        It is called after the commit, so a crash in between loses the call; `on_failure=` of a task does not. An
        exception is logged. The failure itself is logged in any case, at ERROR with its traceback.
        """


def scopes(hooks: Iterable[Hooks]) -> tuple[scoped_session[Any], ...]:
    """Return the scoped sessions of hooks, the first one first."""
    found = (getattr(hook, "session_scope", None) for hook in hooks)
    return tuple(scope for scope in found if scope is not None)


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
