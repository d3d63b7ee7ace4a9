"""Subtasks: spawning and joining them."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from typing_extensions import Unpack

from ..errors import (
    ChildCancelled,
    ChildFailed,
    IdempotencyConflict,
    InvalidConfiguration,
    QueueNotFound,
    TaskNotFound,
    TaskTimeout,
)
from ..execution.calls import Call
from ..execution.waits import Stored
from ..execution.writes import CheckpointValues, ChildValues, Kind
from ..ids import child_id, digest
from ..results import SpawnResult, TaskHandle
from ..serialization.codec import UNTYPED
from ..serialization.failures import stored_failure
from ..spawns import Prepared, SpawnCall, lookup_params, prepare
from ..statements import spawning as spawn_statements
from ..validation import Duration, seconds
from .base import NULL, ContextBase

if TYPE_CHECKING:
    from ..options import SpawnOptions
    from ..tasks import OfTask, Task

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


class Children(ContextBase):
    """The part of a context that deals with subtasks."""

    __slots__ = ()

    @overload
    async def spawn(
        self, name: str, task: Task[None, T], params: None = None, /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...
    @overload
    async def spawn(
        self, name: str, task: Task[ParamsT, T], params: ParamsT | OfTask[ParamsT], /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...

    def spawn(self, name: str, task: Task[Any, Any], params: Any = None, /, **options: Unpack[SpawnOptions]) -> Any:
        """Spawn a subtask once: the child and the record of the call commit together.

        The child goes to this task's queue unless `queue_name` is set. If this task fails or is cancelled, the child is
        cancelled; if it completes, the child continues. A replay with other params returns the first child.

        Raises:
            InvalidTaskParams, SerializationError, PayloadTooLarge: params that do not fit or cannot be stored.
            InvalidConfiguration, InvalidName: an option is out of range.
            IdempotencyConflict: the idempotency key, or the unique key, belongs to a task that is not this child; this
                task is then not retried.
            QueueNotFound: there is no such queue; this task is then not retried.
        """
        call = self._call("spawn", name)
        return self._begun(call, self._spawn(call, task, params, options, unchecked=False))

    def spawn_by_name(
        self, name: str, task_name: str, params: Any = None, /, **options: Unpack[SpawnOptions]
    ) -> Coroutine[object, None, TaskHandle[Any]]:
        """Spawn a subtask by the name of its task, which need not be registered in this process.

        See :meth:`spawn`. Params are checked if the task is registered here, else they are sent as plain JSON.
        """
        unchecked = task_name not in self._app.tasks
        call = self._call("spawn", name)
        return self._begun(call, self._spawn(call, task_name, params, options, unchecked=unchecked))

    async def _spawn(
        self, call: Call, task: Task[Any, Any] | str, params: Any, options: SpawnOptions, *, unchecked: bool
    ) -> TaskHandle[Any]:
        run = self._run
        if options.get("queue_name") is None:
            options["queue_name"] = run.claimed.queue_name
        if (rule := options.get("on_conflict")) in ("replace", "cancel"):
            raise InvalidConfiguration("on_conflict", f"a child cannot {rule} another task", "Leave it out.")
        child = child_id(run.claimed.task_id, call.key)
        entry = await self._recall(call)
        with SpawnCall(self._app) as spawning:
            prepared = prepare(
                self._app,
                task,
                params,
                options,
                task_id=child,
                parent_task_id=run.claimed.task_id,
                unchecked=unchecked,
                hooked=entry is None,
                call=spawning if entry is None else None,
            )
            fingerprint = f'"{digest(prepared.params)}"'
            if entry is None:
                checkpoint = CheckpointValues("spawn", call.name, "completed", fingerprint, child)
                values = ChildValues(checkpoint, prepared.all_values)
                with run.branches.busy():
                    while (
                        stored := await run.write(Kind.CHILD, call.key, values, size=len(prepared.params or ""))
                    ) is not None and stored.status == "refused":
                        await self._explain_refusal(prepared)
                if stored is None:
                    spawning.created(prepared)
        if entry is not None and entry.value is not None and entry.value != fingerprint:
            run.warn("subtask %r was spawned with other params than it is now; the first one counts", call.name)
        run.children[child] = self._app.tasks.get(prepared.task_name)
        return TaskHandle(child)

    async def _explain_refusal(self, prepared: Prepared) -> None:
        """Raise the reason why a child was not inserted, unless there is none any more."""
        rows = await self._app.database.execute(spawn_statements.EXPLAIN_SPAWN, lookup_params([prepared]))
        if not rows[0].queue_exists:
            error = QueueNotFound(prepared.queue_name)
            error.final = True
            raise error
        unique = None if prepared.limits is None else prepared.limits.unique_key
        key = prepared.idempotency_key if unique is None else unique
        if rows[0].task_id is not None:
            holder = rows[0].task_id
            raise IdempotencyConflict(str(key), prepared.queue_name, holder, unique=unique is not None, by_child=True)

    def join(self, handle: TaskHandle[T], *, timeout: Duration | None = None) -> Coroutine[object, None, T]:
        """Return the result of a child; suspends until the child has ended.

        Raises:
            ChildFailed, ChildCancelled: the child ended that way.
            TaskTimeout: the child had not ended after `timeout` seconds. Recorded, so a replay raises it too; only if
                it fails the attempt does the next one wait anew.
            TaskNotFound: the handle is not that of a child of this task, which is then not retried.
        """
        if not isinstance(handle, TaskHandle | SpawnResult):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"join takes the TaskHandle of `await ctx.spawn(...)`, not {type(handle).__name__}")
        limit = None if timeout is None else seconds(timeout, "timeout")
        call = self._call("join", "$join", str(handle.task_id))
        return self._begun(call, self._join(call, handle, limit))

    async def _join(self, call: Call, handle: TaskHandle[T], timeout: float | None) -> T:
        run = self._run
        child = handle.task_id
        known: Task[Any, T] | None = run.children.get(child)
        stored = await self._recorded(call)
        if stored is None:
            await run.enter()
            with self._observed("join", child=child):
                with run.branches.busy():
                    ended = await run.host.reader.task(child)
                if ended is None or ended.parent_task_id != run.claimed.task_id:
                    error = TaskNotFound(child, "it is not a child of the task that joins it")
                    error.final = True
                    raise error
                known = known or self._app.tasks.get(ended.task_name)
                if ended.outcome is not None:
                    value = ended.output if ended.outcome == "completed" else ended.error
                    stored = await self._settle(call, Stored(ended.outcome, value, child))
                else:
                    stored = await self._park(call, child_task_id=child, timeout=timeout)
        elif known is None:
            with run.branches.busy():
                ended = await run.host.reader.task(child)
            known = self._app.tasks.get(ended.task_name) if ended is not None else None
        if stored.status == "completed":
            codec = known.output_codec if known is not None else UNTYPED
            return cast(T, codec.decode(stored.value or NULL, f"the output of task {child}"))
        if stored.status == "timeout":
            raise run.timed_out(call.key, TaskTimeout(f"joining task {child}", timeout or 0.0))
        if stored.status == "cancelled":
            raise ChildCancelled(child)
        failure = stored_failure(stored.value or "{}", f"the error of task {child}")
        raise ChildFailed(child, failure.name, failure.message, raw=failure.raw)
