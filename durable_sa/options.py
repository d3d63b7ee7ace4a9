"""The options of spawns, tasks and workers. Options of a spawn override those of its task, and these the client's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar, cast, get_args

from sqlalchemy import URL

from .errors import InvalidConfiguration, SerializationError
from .names import validate_name
from .policies import MAX_LOST_WORKERS, CancellationPolicy, RetryStrategy
from .serialization.codec import UNTYPED, check_size
from .validation import Duration, instance, integer, seconds, timestamp

OnConflict: TypeAlias = Literal["return", "replace", "cancel"]
"""The rule for a spawn whose `unique` key an unfinished task has."""
Replay: TypeAlias = Literal["warn", "strict"]
"""The rule for a recorded step that is met with other arguments: run it anew with a warning, or fail the task."""

MAX_ATTEMPTS: Final = 2**31 - 1
MAX_HEADERS_BYTES: Final = 16 * 1024
DEFAULT_CONCURRENCY: Final = 10
"""Runs in progress at once in a worker that sets no other number."""


class SpawnOptions(TypedDict, total=False):
    """Keywords of a spawn. One that is absent or None comes from the task, then from the client."""

    max_attempts: int | None
    """How often the task's own code may fail, 1 to 2147483647. Lost workers and deploys do not count."""
    retry_strategy: RetryStrategy | None
    """The delays between attempts."""
    max_lost_workers: int | None
    """How many workers in a row may be lost while they run the task alone, 1 to 1000000."""
    headers: Mapping[str, Any] | None
    """JSON values that travel with the task, at most 16 KiB encoded. Keys that start with `durable::` are
    reserved."""
    cancellation: CancellationPolicy | None
    """The times after which the task is cancelled."""
    queue_name: str | None
    """The queue, which must exist. A subtask without one goes to the queue of its parent."""
    idempotency_key: str | None
    """A second spawn with the same key in a queue returns the task of the first, until that is deleted. At most 255
    bytes of UTF-8."""
    available_at: datetime | None
    """The time, with a time zone, before which no worker claims the task. Excludes `delay`."""
    delay: Duration | None
    """The time from the spawn to `available_at`, in seconds or as a `timedelta`, by the database's clock."""
    priority: int | None
    """-32768 to 32767, the smallest is claimed first. 0 if absent."""
    limit_key: str | None
    """The key under whose limits the task runs, 1 to 200 bytes of UTF-8. That of the task's `limit_key` if absent."""
    weight: int | None
    """The starts that the task takes from a rate, 0 to 1000. 1 if absent."""
    unique: str | None
    """A key that one unfinished task of the queue has at most, up to 255 bytes of UTF-8. Excludes `idempotency_key`."""
    on_conflict: OnConflict | None
    """The consequence if an unfinished task has the `unique` key. "return", if absent: return that task. "replace":
    give it the new params and time, if it has not started. "cancel": cancel it, and spawn a new one."""
    max_delay: Duration | None
    """With `on_conflict="replace"`: the time from the first spawn on, in seconds or as a `timedelta`, past which no
    `delay` puts the task off, nor the time of a replacement."""


class WorkerOptions(TypedDict, total=False):
    """Keywords of a worker."""

    queue_names: Sequence[str] | None
    """The queues to serve, in the order of claiming. The client's queue if absent."""
    concurrency: int
    """The number of runs in progress at once. 10 if absent."""
    batch_size: int | None
    """The maximum number of tasks per claim. The number of free slots if absent."""
    claim_timeout: Duration
    """The time without a heartbeat after which other workers take the runs over, at least 1 second. 120 seconds if
    absent."""
    poll_interval: Duration
    """Seconds between polls of the queues while LISTEN does not work. 0.25 if absent."""
    worker_id: str | None
    """A label. `host:pid` if absent."""
    fatal_on_lease_timeout: bool
    """End the process, with exit code 1, if other workers have taken this worker's runs over, or if its lease has ended
    and code of a run does not stop. False if absent."""
    shutdown_timeout: Duration
    """Seconds that runs have at shutdown to end by themselves. 30 if absent."""
    listen: bool
    """Use LISTEN for wake-up hints. True if absent."""
    queue_concurrency: Mapping[str, int]
    """The number of runs in progress at once in this worker, by queue. Up to `concurrency` for those that it leaves
    out."""
    health_port: int | None
    """The port, on all interfaces, of `GET /live` and `GET /ready` for probes. None is opened if absent."""
    listen_url: URL | str | None
    """The database URL for LISTEN, if not that of the client's engine: a pooler in transaction mode must be bypassed,
    because no notification passes through it."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of spawns that a task, or a client for all tasks, sets. None leaves one to the next level.

    Raises:
        InvalidConfiguration, InvalidName: for a value that cannot work.
    """

    max_attempts: int | None = None
    retry_strategy: RetryStrategy | None = None
    cancellation: CancellationPolicy | None = None
    queue_name: str | None = None
    max_lost_workers: int | None = None

    def __post_init__(self) -> None:
        if self.max_attempts is not None:
            integer(self.max_attempts, "max_attempts", minimum=1, maximum=MAX_ATTEMPTS)
        if self.retry_strategy is not None:
            instance(self.retry_strategy, RetryStrategy, "retry_strategy")
        if self.cancellation is not None:
            instance(self.cancellation, CancellationPolicy, "cancellation")
        if self.queue_name is not None:
            validate_name("queue", self.queue_name)
        if self.max_lost_workers is not None:
            integer(self.max_lost_workers, "max_lost_workers", minimum=1, maximum=1_000_000)


class LimitOptions(NamedTuple):
    """The options of a spawn that need the statements of limits."""

    limit_key: str | None = None
    weight: int | None = None
    unique_key: str | None = None
    on_conflict: OnConflict = "return"
    max_delay: float | None = None
    """Seconds."""


@dataclass(frozen=True, slots=True)
class ResolvedSpawn:
    """The options of one spawn, checked and complete."""

    max_attempts: int
    retry_strategy: RetryStrategy
    cancellation: CancellationPolicy
    queue_name: str
    headers: str
    """JSON text of an object."""
    idempotency_key: str | None
    available_at: datetime | None
    """In UTC."""
    delay: float | None
    """Seconds."""
    priority: int
    max_lost_workers: int | None = None
    """None is the default, 5."""
    limits: LimitOptions | None = None
    """None if no option of limits is given."""


def resolve_spawn_options(
    spawn: SpawnOptions,
    task: TaskOptions,
    defaults: TaskOptions,
    *,
    internal_headers: Mapping[str, Any] | None = None,
) -> ResolvedSpawn:
    """Return the options of one spawn: those of `spawn`, else of `task`, else of `defaults`, which must be complete.

    `internal_headers` are the engine's, whose keys may be reserved ones.

    Raises:
        TypeError: an unknown option.
        InvalidConfiguration, InvalidName, SerializationError, PayloadTooLarge: for a value that cannot work.
    """
    if unknown := spawn.keys() - SpawnOptions.__annotations__.keys():
        known = ", ".join(sorted(SpawnOptions.__annotations__))
        raise TypeError(f"spawn() got an unexpected keyword argument {min(unknown)!r}; its options are {known}")
    own = TaskOptions(
        spawn.get("max_attempts"),
        spawn.get("retry_strategy"),
        spawn.get("cancellation"),
        spawn.get("queue_name"),
        spawn.get("max_lost_workers"),
    )
    max_lost_workers = own.max_lost_workers or task.max_lost_workers or defaults.max_lost_workers
    available_at, delay = spawn.get("available_at"), spawn.get("delay")
    if available_at is not None and delay is not None:
        raise InvalidConfiguration("available_at and delay", "both are given", "Give one of them.")
    delay = None if delay is None else seconds(delay, "delay")
    limits = _limit_options(spawn) if spawn.keys() & _LIMIT_OPTIONS else None
    if delay is not None and limits is not None and limits.max_delay is not None:
        delay = min(delay, limits.max_delay)
    key, priority = spawn.get("idempotency_key"), spawn.get("priority")
    return ResolvedSpawn(
        max_attempts=_first("max_attempts", own.max_attempts, task.max_attempts, defaults.max_attempts),
        retry_strategy=_first("retry_strategy", own.retry_strategy, task.retry_strategy, defaults.retry_strategy),
        cancellation=own.cancellation or task.cancellation or defaults.cancellation or CancellationPolicy(),
        queue_name=_first("queue_name", own.queue_name, task.queue_name, defaults.queue_name),
        headers=encode_headers(spawn.get("headers"), internal_headers),
        idempotency_key=None if key is None else validate_name("idempotency key", key),
        available_at=None if available_at is None else timestamp(available_at, "available_at"),
        delay=delay,
        priority=0 if priority is None else integer(priority, "priority", minimum=-(2**15), maximum=2**15 - 1),
        max_lost_workers=None if max_lost_workers == MAX_LOST_WORKERS else max_lost_workers,
        limits=limits,
    )


_LIMIT_OPTIONS: Final = frozenset({"limit_key", "weight", "unique", "on_conflict", "max_delay"})


def _limit_options(spawn: SpawnOptions) -> LimitOptions | None:
    key, weight, unique = spawn.get("limit_key"), spawn.get("weight"), spawn.get("unique")
    on_conflict, max_delay = spawn.get("on_conflict"), spawn.get("max_delay")
    if unique is None:
        for name, value in (("on_conflict", on_conflict), ("max_delay", max_delay)):
            if value is not None:
                raise InvalidConfiguration(name, "it is given without unique", "Give the unique key, too.")
    elif (key_of_spawn := spawn.get("idempotency_key")) is not None and not key_of_spawn.startswith("durable::"):
        # A tick of a schedule has the engine's own key.
        raise InvalidConfiguration("unique and idempotency_key", "both are given", "Give one of them.")
    if on_conflict is not None and on_conflict not in get_args(OnConflict):
        raise InvalidConfiguration("on_conflict", f"{on_conflict!r:.40} is none of {', '.join(get_args(OnConflict))}")
    if max_delay is not None and on_conflict != "replace":
        raise InvalidConfiguration("max_delay", "only on_conflict='replace' delays a task", "Leave it out.")
    options = LimitOptions(
        None if key is None else check_limit_key(key),
        None if weight is None else integer(weight, "weight", minimum=0, maximum=1000),
        None if unique is None else validate_name("unique key", unique),
        on_conflict or "return",
        None if max_delay is None else seconds(max_delay, "max_delay"),
    )
    return None if options == LimitOptions() else options


def check_limit_key(key: object) -> str:
    """Return a limit key.

    Raises:
        InvalidConfiguration: it is no text.
        InvalidName: it breaks the rules for names.
    """
    if not isinstance(key, str):
        raise InvalidConfiguration("limit_key", f"it must be a str or None, not {type(key).__name__}")
    return validate_name("limit key", key)


def check_replay(replay: Replay) -> Replay:
    """Return `replay`.

    Raises:
        InvalidConfiguration: it is neither "warn" nor "strict".
    """
    if replay not in get_args(Replay):
        raise InvalidConfiguration("replay", f"{replay!r} is neither 'warn' nor 'strict'")
    return replay


def encode_headers(headers: Mapping[str, Any] | None, internal: Mapping[str, Any] | None = None) -> str:
    """Return headers, and `internal` ones, whose keys may be reserved, as the JSON text of an object.

    Raises:
        InvalidConfiguration: if they are no mapping.
        InvalidName: for a key that breaks the rules.
        SerializationError: for a value that has no JSON form, or holds NUL, which a `jsonb` column cannot.
        PayloadTooLarge: beyond 16 KiB encoded, without the internal ones.
    """
    if not headers and not internal:
        return "{}"
    instance(headers or {}, Mapping, "headers")
    combined = {validate_name("header", key): value for key, value in (headers or {}).items()}
    combined.update({validate_name("header", key, internal=True): value for key, value in (internal or {}).items()})
    text = UNTYPED.encode(combined, "The headers")
    refuse_nul(text, "The headers")
    if len(text) * 4 > MAX_HEADERS_BYTES:
        # Only the application's headers count, because those that the engine adds must not refuse a spawn.
        check_size(UNTYPED.encode(dict(headers or {}), "The headers"), MAX_HEADERS_BYTES, "The headers")
    return text


def refuse_nul(text: str, what: str) -> str:
    """Return JSON text for a `jsonb` column, which cannot hold NUL.

    Raises:
        SerializationError: the text contains NUL.
    """
    if "\\u0000" in text and _contains_nul(UNTYPED.decode(text, what)):
        raise SerializationError(what, "cannot be stored: the character U+0000 is in it")
    return text


def _contains_nul(value: object) -> bool:
    if isinstance(value, dict):
        return any(_contains_nul(part) for entry in cast(dict[str, object], value).items() for part in entry)
    if isinstance(value, list):
        return any(map(_contains_nul, cast(list[object], value)))
    return isinstance(value, str) and "\x00" in value


_Value = TypeVar("_Value")


def _first(what: str, *values: _Value | None) -> _Value:
    for value in values:
        if value is not None:
            return value
    raise InvalidConfiguration(what, "neither the spawn, nor the task, nor the client says what it is")
