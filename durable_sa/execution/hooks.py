"""The hooks of a client as the engine calls them. `durable_sa.hooks` has the class that applications derive from."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    contextmanager,
    nullcontext,
)
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ..errors import InvalidState
from ..ids import plain
from ..results import TaskEnded, TaskErrorInfo, TaskStatus
from ..serialization.codec import UNTYPED
from ..serialization.failures import stored_failure

logger = logging.getLogger("durable_sa")

T = TypeVar("T")

OnSpawn: TypeAlias = Callable[[Any], None]
AroundTask: TypeAlias = Callable[[Any], AbstractAsyncContextManager[object]]
OnAdminAction: TypeAlias = Callable[[str, str, Sequence[uuid.UUID]], None]
OnFailed: TypeAlias = Callable[[TaskEnded], None]
AroundStep: TypeAlias = Callable[[Any, str], AbstractContextManager[object]]


class HookChain(NamedTuple):
    """For each kind of hook the methods to call, the outermost first. What no hook overrides is an empty tuple."""

    on_spawn: tuple[OnSpawn, ...] = ()
    around_task: tuple[AroundTask, ...] = ()
    around_step: tuple[AroundStep, ...] = ()
    on_admin_action: tuple[OnAdminAction, ...] = ()
    on_failed: tuple[OnFailed, ...] = ()


def task_failed(
    hooks: Iterable[OnFailed], task_id: uuid.UUID, task_name: str, queue_name: str, params: str | None, error: str
) -> None:
    """Call the hooks of a final failure, whose params and error are JSON texts, and log the errors of the hooks."""
    for hook in hooks:
        try:
            hook(
                TaskEnded(
                    plain(task_id),
                    task_name,
                    queue_name,
                    None if params is None else UNTYPED.decode(params, f"the params of task {task_id}"),
                    TaskStatus.FAILED,
                    TaskErrorInfo(*stored_failure(error, f"the error of task {task_id}")),
                )
            )
        except Exception as raised:
            logger.error("the hook on_failed has failed for task %s", task_id, exc_info=raised)


async def around_task(
    hooks: Iterable[AroundTask], context: Any, task_name: str, start: Callable[[], Awaitable[T]]
) -> T:
    """Execute a task within the hooks.

    Raises:
        InvalidState: a hook suppresses an exception of the task.
    """
    async with AsyncExitStack() as stack:
        for hook in hooks:
            await stack.enter_async_context(hook(context))
        return await start()
    raise InvalidState(f"An exception of task {task_name!r}", "suppressed by a hook", "Let it pass.")


def around_step(
    hooks: tuple[AroundStep, ...], context: Any, name: str, span: AbstractContextManager[object] | None = None
) -> AbstractContextManager[object]:
    """Return a context manager to execute a step in: its span, if there is one, and the hooks inside of that."""
    around = _NOTHING if span is None else span
    return _around_step(hooks, context, name, around) if hooks else around


_NOTHING = nullcontext()


@contextmanager
def _around_step(
    hooks: tuple[AroundStep, ...], context: Any, name: str, span: AbstractContextManager[object]
) -> Generator[None]:
    with span, ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook(context, name))
        yield
        return
    raise InvalidState(f"An exception of step {name!r}", "suppressed by a hook", "Let it pass.")
