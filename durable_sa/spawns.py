"""A spawn, checked and ready to be inserted."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar, cast, overload

from pydantic import ValidationError
from sqlalchemy import Row
from typing_extensions import Unpack

from .errors import DurableError, IdempotencyConflict, InvalidTaskParams, QueueNotFound, SerializationError
from .ids import new_id, plain
from .names import validate_name
from .options import LimitOptions, ResolvedSpawn, SpawnOptions, TaskOptions, encode_headers, resolve_spawn_options
from .results import SpawnResult
from .serialization.canonical import encode_arguments
from .serialization.codec import UNTYPED, Codec, check_size
from .tasks import FollowUp, OfTask, Task

if TYPE_CHECKING:
    from .app import App
    from .telemetry.operations import Spawning

ErrorT = TypeVar("ErrorT", bound=Exception)
ParamsT = TypeVar("ParamsT")
OutputT = TypeVar("OutputT")
OutputT_co = TypeVar("OutputT_co", covariant=True)


@dataclass(frozen=True, init=False)
class Spawn(Generic[OutputT_co]):
    """One item of `spawn_many`: a task, its params, and options of its own."""

    task: Task[Any, OutputT_co]
    params: Any
    options: SpawnOptions

    @overload
    def __init__(
        self: Spawn[OutputT], task: Task[None, OutputT], params: None = None, **options: Unpack[SpawnOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: Spawn[OutputT],
        task: Task[ParamsT, OutputT],
        params: ParamsT | OfTask[ParamsT],
        **options: Unpack[SpawnOptions],
    ) -> None: ...
    def __init__(self, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]) -> None:
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "options", options)

    def __repr__(self) -> str:
        return f"Spawn({self.task!r})"


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


NO_LIMITS = LimitOptions()


class Kind(NamedTuple):
    """The values that many tasks may have in common, in the order of `KIND_COLUMNS`."""

    queue_name: str
    task_name: str
    headers: str | None
    priority: int
    max_attempts: int
    max_lost_workers: int | None
    retry_kind: Literal["none", "fixed", "exponential"]
    retry_base_delay: float
    retry_factor: float
    retry_max_backoff: float
    retry_jitter: float
    max_pending_seconds: float | None
    max_running_seconds: float | None
    available_at: datetime | None
    delay_seconds: float | None
    parent_task_id: uuid.UUID | None
    follow_ups: str | None = None


class Prepared(NamedTuple):
    """A task to insert: checked and encoded, and not written yet."""

    task_id: uuid.UUID
    run_id: uuid.UUID
    params: str | None
    idempotency_key: str | None
    kind: Kind
    """The other values, in the same object or an equal one for tasks that have them in common."""
    codec: Codec[Any]
    """The codec of the params."""
    limits: LimitOptions | None = None
    """The options of limits, None if it has none."""

    @property
    def task_name(self) -> str:
        return self.kind.task_name

    @property
    def queue_name(self) -> str:
        return self.kind.queue_name

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to insert, in the order of `SPAWN_COLUMNS`."""
        kind = self.kind
        return (self.task_id, self.run_id, *kind[:2], self.params, *kind[2:], self.idempotency_key)

    @property
    def all_values(self) -> tuple[Any, ...]:
        """The values to insert, in the order of `LIMITED_SPAWN_COLUMNS`."""
        return (*self.values, *(self.limits or NO_LIMITS)[:3])


class SpawnCall:
    """A call that spawns, as the context manager of its span; without telemetry it does nothing.

    The span begins when the first task is prepared, so that its context is among the task's headers.
    """

    def __init__(self, client: App) -> None:
        self._client = client
        self._span: Spawning | None = None

    def begin(self, task_name: str | None = None, queue_name: str | None = None) -> Mapping[str, Any]:
        """Begin the span of one task or, without a name, of many, unless it has begun; return headers that carry it."""
        if self._span is None:
            if (telemetry := self._client.telemetry) is None:
                return {}
            self._span = telemetry.spawn(task_name, queue_name)
        return self._span.headers

    @property
    def observed(self) -> bool:
        """True if there is a span."""
        return self._span is not None

    def created(self, item: Prepared) -> None:
        """Count a task that was created."""
        if self._span is not None:
            known = item.task_name in self._client.tasks
            self._span.created(item.queue_name, item.task_name if known else None)

    def end(self, error: BaseException | None = None) -> None:
        """End the span."""
        if self._span is not None:
            self._span.end(error)

    def drop(self) -> None:
        """Leave the span out: nothing has happened."""
        self._span = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)


def prepare(
    client: App,
    task: Task[Any, Any] | str,
    params: Any,
    options: SpawnOptions,
    *,
    task_id: uuid.UUID | None = None,
    parent_task_id: uuid.UUID | None = None,
    unchecked: bool = False,
    internal_headers: Mapping[str, Any] | None = None,
    hooked: bool = True,
    as_stored: bool = False,
    call: SpawnCall | None = None,
) -> Prepared:
    """Check a spawn and encode it.

    Hooks are called unless `hooked` is False: the task is not going to be inserted. With `as_stored` the params and
    options are complete, and the task need not be registered. The headers carry the span of the `call`.

    Raises:
        TypeError: it is not a task, or there is no such option.
        TaskNotRegistered: no task of that name is registered, unless `unchecked`.
        InvalidTaskParams: params that do not fit the task, unless `unchecked`.
        InvalidTaskParams, SerializationError: params that have no JSON form.
        PayloadTooLarge: params beyond the limit.
        InvalidConfiguration, InvalidName, SerializationError: an option that breaks a rule.
    """
    if isinstance(task, str):
        name = validate_name("task", task)
        known = None if as_stored else client.tasks.get(name) if unchecked else client.registered(name)
    elif isinstance(task, Task):  # pyright: ignore[reportUnnecessaryIsInstance]
        name, known = task.name, task
    else:
        raise TypeError(f"a spawn takes a task, made by @task, not {type(task).__name__}")
    text, codec = _encode_params(name, known, params, unchecked=unchecked)
    defaults = TaskOptions() if known is None else known.options
    if text is not None:
        check_size(text, client.max_payload_bytes, f"the params of task {name!r}")
    if options or internal_headers:
        resolved = resolve_spawn_options(options, defaults, client.defaults, internal_headers=internal_headers)
        kind = _kind(name, resolved)
    else:
        resolved, kind = _without_options(name, defaults, client.defaults)
    task_id, run_id = task_id or new_id(), new_id()
    headers = resolved.headers
    if call is not None and (carrying := call.begin(name, resolved.queue_name)):
        internal_headers = {**(internal_headers or {}), **carrying}
        headers = encode_headers(options.get("headers"), internal_headers)
    if hooked and (hooks := client.hooks.on_spawn):
        outgoing = OutgoingSpawn(
            task_id,
            name,
            resolved.queue_name,
            options,
            parent_task_id,
            dict(options.get("headers") or {}),
            dict(internal_headers or {}),
        )
        for hook in hooks:
            hook(outgoing)
        headers = encode_headers(outgoing.headers, outgoing.internal_headers)
    if headers is not resolved.headers or parent_task_id is not None:
        kind = kind._replace(headers=None if headers == "{}" else headers, parent_task_id=parent_task_id)
    declaring = client.tasks.get(name) if known is None else known
    on_failure = client.on_failure if declaring is None else declaring.on_failure or client.on_failure
    on_cancel = client.on_cancel if declaring is None else declaring.on_cancel or client.on_cancel
    if on_failure is not None or on_cancel is not None:
        kind = kind._replace(follow_ups=_follow_ups(client, on_failure, on_cancel))
    limits = resolved.limits
    if limits is None and resolved.queue_name in client.limited_queues:
        limits = NO_LIMITS
    if known is not None and known.limit_key is not None and (limits is None or limits.limit_key is None):
        limits = _with_key(known, params, limits, unchecked=unchecked)
    return Prepared(task_id, run_id, text, resolved.idempotency_key, kind, codec, limits)


def _with_key(
    task: Task[Any, Any], params: Any, limits: LimitOptions | None, *, unchecked: bool = False
) -> LimitOptions | None:
    """Return the options with the key that the task makes of its params; params that do not fit have none."""
    try:
        key = task.limit_key_of(params)
    except ValidationError:
        if not unchecked:
            raise
        return limits
    return limits if key is None else (limits or NO_LIMITS)._replace(limit_key=key)


def prepare_another(client: App, task: Task[Any, Any], params: Any, like: Prepared) -> Prepared:
    """Prepare another spawn of the same task with the same options. Hooks are not called."""
    text = task.encode_params(params)
    if text is not None:
        check_size(text, client.max_payload_bytes, f"the params of task {task.name!r}")
    limits = like.limits
    if task.limit_key is not None:
        limits = _with_key(task, params, None if limits is None else limits._replace(limit_key=None))
    return Prepared(new_id(), new_id(), text, like.idempotency_key, like.kind, like.codec, limits)


@functools.lru_cache(maxsize=1024)
def _without_options(name: str, task: TaskOptions, defaults: TaskOptions) -> tuple[ResolvedSpawn, Kind]:
    resolved = resolve_spawn_options({}, task, defaults)
    return resolved, _kind(name, resolved)


def _follow_ups(
    client: App, on_failure: FollowUp | None, on_cancel: FollowUp | None, seen: frozenset[str] = frozenset()
) -> str | None:
    """Encode follow-ups as they are stored with a task; `seen` are the names of those that this one follows."""
    stored: list[str] = []
    for outcome, declared in (("failed", on_failure), ("cancelled", on_cancel)):
        follow_up = client.tasks.get(declared, declared) if isinstance(declared, str) else declared
        name = follow_up if follow_up is None or isinstance(follow_up, str) else follow_up.name
        # A follow-up has those of its own task, but not once more one that it follows itself, which would not end.
        if follow_up is None or name is None or name in seen:
            continue
        further = None
        if isinstance(follow_up, Task) and (follow_up.on_failure or follow_up.on_cancel):
            further = _follow_ups(client, follow_up.on_failure, follow_up.on_cancel, seen | {name})
        text = _stored_follow_up(follow_up, client.defaults, client.max_payload_bytes)
        stored.append(f'"{outcome}":{text[:-1]},"follow_ups":{further or "null"}}}')
    return f"{{{','.join(stored)}}}" if stored else None


@functools.lru_cache(maxsize=1024)
def _stored_follow_up(follow_up: FollowUp, defaults: TaskOptions, max_payload_bytes: int) -> str:
    name, options = (follow_up, TaskOptions()) if isinstance(follow_up, str) else (follow_up.name, follow_up.options)
    kind = _kind(name, resolve_spawn_options({}, options, defaults))
    stored: dict[str, Any] = {
        field: getattr(kind, field)
        for field in Kind._fields
        if field not in ("headers", "available_at", "delay_seconds", "parent_task_id", "follow_ups")
    }
    # Without a queue of its own, it goes to that of the task it follows.
    stored |= {"queue_name": options.queue_name, "max_payload_bytes": max_payload_bytes}
    if isinstance(follow_up, Task) and isinstance(follow_up.limit_key, str):
        # A function cannot be called by the statement that inserts the follow-up.
        stored["limit_key"] = follow_up.limit_key
    return UNTYPED.encode(stored, "a follow-up")


def _kind(name: str, resolved: ResolvedSpawn) -> Kind:
    strategy, cancellation = resolved.retry_strategy, resolved.cancellation
    return Kind(
        resolved.queue_name,
        name,
        None if resolved.headers == "{}" else resolved.headers,
        resolved.priority,
        resolved.max_attempts,
        resolved.max_lost_workers,
        strategy.kind,
        strategy.base_delay,
        strategy.factor,
        strategy.max_backoff,
        strategy.jitter,
        # Checked policies hold seconds.
        cast("float | None", cancellation.max_pending_time),
        cast("float | None", cancellation.max_running_time),
        resolved.available_at,
        resolved.delay,
        None,
    )


def _encode_params(
    name: str, known: Task[Any, Any] | None, params: Any, *, unchecked: bool
) -> tuple[str | None, Codec[Any]]:
    """Encode params as the task does if it is known; as plain JSON if it is not, or if they need not fit it."""
    if known is not None:
        try:
            return known.encode_params(params), known.params_codec if known.takes_params else UNTYPED
        except InvalidTaskParams:
            if not unchecked:
                raise
    try:
        return None if params is None else UNTYPED.encode(params, f"the params of task {name!r}"), UNTYPED
    except SerializationError as error:
        raise InvalidTaskParams(name, [str(error).removesuffix(".")]) from error


def at_position(error: ErrorT, position: int) -> ErrorT:
    """Add a note to an error that says which of many spawns it is about, and return it."""
    error.add_note(f"It is item {position} of those to be spawned (counted from 0); none was spawned.")
    return error


def lookup_params(prepared: Iterable[Prepared]) -> dict[str, list[Any]]:
    """Return the parameters of the query why spawns are missing from an insert."""
    items = list(prepared)
    return {
        "task_ids": [item.task_id for item in items],
        "queue_names": [item.queue_name for item in items],
        "idempotency_keys": [item.idempotency_key for item in items],
        "unique_keys": [(item.limits or NO_LIMITS).unique_key for item in items],
    }


def spawn_result(item: Prepared) -> SpawnResult[Any]:
    """Return the result of a spawn that was inserted."""
    return SpawnResult(plain(item.task_id), plain(item.run_id), 1, True)


def resolve_missing(item: Prepared, rows: Sequence[Row[Any]]) -> SpawnResult[Any] | DurableError | None:
    """Return the outcome of a spawn that is missing from an insert, from the rows of the query for the reasons.

    It may be this spawn, inserted before, an earlier one, a conflict with that, or no queue; None if there is no
    reason any more.
    """
    found = [row for row in rows if row.wanted_id == item.task_id]
    if found and not found[0].queue_exists:
        return QueueNotFound(item.queue_name)
    unique = None if item.limits is None else item.limits.unique_key
    for row in found:
        if row.task_id == item.task_id:
            return spawn_result(item)
        if row.task_id is not None and unique is not None:
            if row.task_name != item.task_name:
                return IdempotencyConflict(unique, item.queue_name, row.task_id, unique=True)
            return SpawnResult(plain(row.task_id), plain(row.run_id), max(row.attempt, 1), False)
        if row.task_id is not None:
            if row.task_name != item.task_name or not _same_params(item, row.params):
                return IdempotencyConflict(str(item.idempotency_key), item.queue_name, row.task_id)
            return SpawnResult(plain(row.task_id), plain(row.run_id), max(row.attempt, 1), False)
    return None


def conflict(item: Prepared, first: Prepared) -> IdempotencyConflict | None:
    """Return the error of an item that has the idempotency key of an earlier one, if they differ."""
    if item.task_name == first.task_name and _same_params(item, first.params):
        return None
    return IdempotencyConflict(str(item.idempotency_key), item.queue_name, first.task_id)


def _same_params(item: Prepared, stored: str | None) -> bool:
    """Compare params by meaning: entries of an object, or members of a set, may be in another order."""
    if stored is None or item.params is None or stored == item.params:
        return stored == item.params
    try:
        return _canonical(item.codec, stored) == _canonical(item.codec, item.params)
    except SerializationError:
        return False


def _canonical(codec: Codec[Any], text: str) -> str:
    return encode_arguments([codec.decode(text, "params")], {}, "params")
