"""A spawn, checked and ready to be inserted."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast, overload

from sqlalchemy import Row
from typing_extensions import Unpack

from .errors import DurableError, IdempotencyConflict, InvalidTaskParams, QueueNotFound, SerializationError
from .ids import new_id, plain
from .names import validate_name
from .options import ResolvedSpawn, SpawnOptions, TaskOptions, encode_headers, resolve_spawn_options
from .results import SpawnResult
from .serialization.canonical import encode_arguments
from .serialization.codec import UNTYPED, Codec, check_size
from .statements.expressions import arrays
from .statements.spawning import ALIKE_COLUMNS, ITEM_COLUMNS, KIND_COLUMNS, SPAWN_COLUMNS
from .tasks import Task

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
        self: Spawn[OutputT], task: Task[ParamsT, OutputT], params: ParamsT, **options: Unpack[SpawnOptions]
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


class Kind(NamedTuple):
    """What many tasks may have in common, in the order of `KIND_COLUMNS`."""

    queue_name: str
    task_name: str
    headers: str | None
    priority: int
    max_attempts: int
    retry_kind: str
    retry_base_delay: float
    retry_factor: float
    retry_max_backoff: float
    retry_jitter: float
    max_pending_seconds: float | None
    max_running_seconds: float | None
    available_at: datetime | None
    delay_seconds: float | None
    parent_task_id: uuid.UUID | None


class Prepared(NamedTuple):
    """One task to insert. Nothing of it has been written yet, and nothing of it can be refused for its form."""

    task_id: uuid.UUID
    run_id: uuid.UUID
    params: str | None
    idempotency_key: str | None
    kind: Kind
    """The rest of what is inserted, which others may have as well: then it is the same object, or an equal one."""
    codec: Codec[Any]
    """Of the params."""
    known: bool
    """Whether the task is registered here."""
    spawning: Spawning | None
    """The span of the call that spawns it."""

    @property
    def task_name(self) -> str:
        """Of the task."""
        return self.kind.task_name

    @property
    def queue_name(self) -> str:
        """Of the queue that it goes to."""
        return self.kind.queue_name

    @property
    def values(self) -> tuple[Any, ...]:
        """What is inserted, in the order of `SPAWN_COLUMNS`."""
        kind = self.kind
        return (self.task_id, self.run_id, *kind[:2], self.params, *kind[2:], self.idempotency_key)


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
    observed: bool = True,
    spawning: Spawning | None = None,
) -> Prepared:
    """Check a spawn and encode it. Without `hooked` that is all that will happen, so hooks do not hear of it.

    With `as_stored` all that the task would have added is in the params and options already: it need not be known.

    Its span begins here, unless it belongs to that of many, `spawning`, or is not to be `observed`; who sends it tells
    what came of it.

    Raises:
        TypeError: no task, or an option there is not.
        TaskNotRegistered: a name nobody knows here, unless `unchecked`.
        InvalidTaskParams: params that do not fit the task, unless `unchecked`, or have no JSON form.
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
    if spawning is None and observed and hooked and (telemetry := client.telemetry) is not None:
        spawning = telemetry.spawn(name, resolved.queue_name)
    if spawning is not None:
        internal_headers = {**(internal_headers or {}), **spawning.headers}
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
        try:
            for hook in hooks:
                hook(outgoing)
            headers = encode_headers(outgoing.headers, outgoing.internal_headers)
        except BaseException as error:
            if spawning is not None:
                spawning.over((), error)
            raise
    if headers is not resolved.headers or parent_task_id is not None:
        kind = kind._replace(headers=None if headers == "{}" else headers, parent_task_id=parent_task_id)
    return Prepared(task_id, run_id, text, resolved.idempotency_key, kind, codec, name in client.tasks, spawning)


def prepare_another(client: App, task: Task[Any, Any], params: Any, like: Prepared) -> Prepared:
    """As `prepare`, of the same task and with the same options, where hooks do not hear of it."""
    text = task.encode_params(params)
    if text is not None:
        check_size(text, client.max_payload_bytes, f"the params of task {task.name!r}")
    return Prepared(new_id(), new_id(), text, *like[3:])


@functools.lru_cache(maxsize=1024)
def _without_options(name: str, task: TaskOptions, defaults: TaskOptions) -> tuple[ResolvedSpawn, Kind]:
    resolved = resolve_spawn_options({}, task, defaults)
    return resolved, _kind(name, resolved)


def _kind(name: str, resolved: ResolvedSpawn) -> Kind:
    strategy, cancellation = resolved.retry_strategy, resolved.cancellation
    return Kind(
        resolved.queue_name,
        name,
        None if resolved.headers == "{}" else resolved.headers,
        resolved.priority,
        resolved.max_attempts,
        strategy.kind,
        strategy.base_delay,
        strategy.factor,
        strategy.max_backoff,
        strategy.jitter,
        # Seconds, once they have been checked.
        cast("float | None", cancellation.max_pending_time),
        cast("float | None", cancellation.max_running_time),
        resolved.available_at,
        resolved.delay,
        None,
    )


def _encode_params(
    name: str, known: Task[Any, Any] | None, params: Any, *, unchecked: bool
) -> tuple[str | None, Codec[Any]]:
    """Params as the task has them, where it is known; as plain JSON where it is not, or they need not fit it."""
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
    """The error with a note that says which of many spawns it is about."""
    error.add_note(f"It is item {position} of those to be spawned (counted from 0); none was spawned.")
    return error


def values(prepared: Prepared) -> dict[str, Any]:
    """What the insert of a task alone binds."""
    return dict(zip(SPAWN_COLUMNS, prepared.values, strict=True))


def columns(prepared: Sequence[Prepared]) -> dict[str, list[Any]]:
    """The arrays of `SPAWN_COLUMNS`, an element of each a task."""
    return arrays(SPAWN_COLUMNS, [item.values for item in prepared])


def grouped(prepared: Sequence[Prepared]) -> dict[str, list[Any]]:
    """The arrays that the insert of many binds: what each has for itself, and each kind once."""
    numbers: dict[Kind, int] = {}
    items: list[tuple[Any, ...]] = []
    last, number = None, 0
    for item in prepared:
        if item.kind is not last:
            last = item.kind
            number = numbers.setdefault(last, len(numbers) + 1)
        items.append((*item[:4], number))
    return {**arrays(ITEM_COLUMNS, items), **arrays(KIND_COLUMNS, list(numbers))}


def alike(prepared: Sequence[Prepared]) -> dict[str, Any]:
    """What the insert of many of one kind binds: arrays of what each has for itself, and the kind."""
    kind = zip(KIND_COLUMNS, prepared[0].kind, strict=True)
    return {**arrays(ALIKE_COLUMNS, [item[:3] for item in prepared]), **dict(kind)}


def wanted(prepared: Iterable[Prepared]) -> dict[str, list[Any]]:
    """What is asked about spawns that an insert has passed over."""
    items = list(prepared)
    return {
        "task_ids": [item.task_id for item in items],
        "queue_names": [item.queue_name for item in items],
        "idempotency_keys": [item.idempotency_key for item in items],
    }


def created(item: Prepared) -> SpawnResult[Any]:
    """The result of a spawn that was inserted."""
    return SpawnResult(plain(item.task_id), plain(item.run_id), 1, True)


def over(prepared: Sequence[Prepared], created: Collection[uuid.UUID], error: BaseException | None = None) -> None:
    """Tell the spans what came of these spawns: which tasks are there now that were not, and what went wrong."""
    spawnings: dict[Spawning, list[tuple[str, str | None]]] = {}
    for item in prepared:
        if item.spawning is not None:
            tasks = spawnings.setdefault(item.spawning, [])
            if item.task_id in created:
                tasks.append((item.queue_name, item.task_name if item.known else None))
    for spawning, tasks in spawnings.items():
        spawning.over(tasks, error)


def explain(item: Prepared, rows: Sequence[Row[Any]]) -> SpawnResult[Any] | DurableError | None:
    """What a spawn that was not inserted has met: the same one, a conflict, no queue; None if it is gone again."""
    found = [row for row in rows if row.wanted_id == item.task_id]
    if found and not found[0].queue_exists:
        return QueueNotFound(item.queue_name)
    for row in found:
        if row.task_id == item.task_id:
            return created(item)
        if row.task_id is not None:
            if row.task_name != item.task_name or not _same_params(item, row.params):
                return IdempotencyConflict(str(item.idempotency_key), item.queue_name, row.task_id)
            return SpawnResult(plain(row.task_id), plain(row.run_id), max(row.attempt, 1), False)
    return None


def conflict(item: Prepared, first: Prepared) -> IdempotencyConflict | None:
    """What is wrong with an item that has the idempotency key of another one before it."""
    if item.task_name == first.task_name and _same_params(item, first.params):
        return None
    return IdempotencyConflict(str(item.idempotency_key), item.queue_name, first.task_id)


def _same_params(item: Prepared, stored: str | None) -> bool:
    """By meaning: entries of an object may come in another order, and so may the members of a set."""
    if stored is None or item.params is None or stored == item.params:
        return stored == item.params
    try:
        return _canonical(item.codec, stored) == _canonical(item.codec, item.params)
    except SerializationError:
        return False


def _canonical(codec: Codec[Any], text: str) -> str:
    return encode_arguments([codec.decode(text, "params")], {}, "params")
