"""All errors that the package raises.

DurableError
├── TaskNotRegistered (LookupError)
├── TaskAlreadyRegistered (ValueError)
├── QueueNotFound (LookupError)
├── TaskNotFound (LookupError)
├── ScheduleNotFound (LookupError)
├── InvalidCron (ValueError)
├── InvalidConfiguration (ValueError)
├── InvalidState (RuntimeError)
├── IdempotencyConflict (ValueError)
├── SchemaMismatch (RuntimeError)
└── TaskError                         raised in task code
    ├── UserError                         ┐
    ├── Retry                             │ raised by the task's own code
    ├── RateLimited                       ┘
    ├── TaskTimeout (TimeoutError)
    ├── ReplayMismatch
    ├── ChildFailed
    ├── ChildCancelled
    ├── InvalidName (ValueError)          ┐
    ├── InvalidTaskParams (ValueError)    │ the client raises
    ├── SerializationError (ValueError)   │ these four as well
    └── PayloadTooLarge (ValueError)      ┘

Suspension, cancellation and a lost lease are not errors: see `durable_sa.signals`.
"""
# ruff: noqa: N818 - names such as QueueNotFound need no suffix; names that are vague without `Error` have it

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final, cast
from uuid import UUID

from pydantic_core import from_json, to_json

_SHOWN_CHARACTERS: Final = 80
_SHOWN_NAMES: Final = 10
_MESSAGE_CHARACTERS: Final = 1000
_LONGEST_DELAY: Final = 36525 * 86400.0


def _shown(value: object) -> str:
    """Format a name or setting for a message: escaped and shortened."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    if len(value) > _SHOWN_CHARACTERS:
        return f"{value[:_SHOWN_CHARACTERS]!r}... ({len(value)} characters)"
    return repr(str.__str__(value))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(data: object) -> Any:
    """Convert any data to plain JSON types, because creating an error must not fail."""
    try:
        encoded = to_json(
            data, inf_nan_mode="strings", bytes_mode="base64", fallback=lambda value: f"<{type(value).__name__}>"
        )
        return from_json(encoded)
    except Exception:  # noqa: BLE001 - serializers are user code; lone surrogates, cycles and deep nesting fail as well
        if isinstance(data, str):
            return data.encode(errors="backslashreplace").decode()
        if isinstance(data, dict):
            return {str(_plain(key)): _plain(value) for key, value in cast(dict[object, object], data).items()}
        if isinstance(data, list):
            return [_plain(value) for value in cast(list[object], data)]
        return f"<{type(data).__name__}>"


class DurableError(Exception):
    """Base class of all errors of this package.

    An error is created from its data, which it keeps as attributes, and composes its message from them. Errors can be
    pickled and copied.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class TaskNotRegistered(DurableError, LookupError):
    """Raised when no registered task has the requested name."""

    def __init__(self, name: str, registered: Iterable[str] = ()) -> None:
        self.name = name
        self.registered = tuple(sorted(registered))
        super().__init__(name, self.registered)

    def __str__(self) -> str:
        names = ", ".join(_shown(name) for name in self.registered[:_SHOWN_NAMES]) or "none"
        if len(self.registered) > _SHOWN_NAMES:
            names += f" and {len(self.registered) - _SHOWN_NAMES} more"
        return (
            f"No task named {_shown(self.name)} is registered (registered: {names}). "
            "Register it with `durable.register(task)`, or spawn it with `unchecked=True` if only the workers know it."
        )


class TaskAlreadyRegistered(DurableError, ValueError):
    """Raised when a second task is registered under the same name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __str__(self) -> str:
        return f"A task named {_shown(self.name)} is already registered. Rename one of them: `@task('another-name')`."


class QueueNotFound(DurableError, LookupError):
    """Raised when a queue does not exist."""

    final = False
    """True if a context has raised it: the task is not retried then, because it would meet the same again."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __str__(self) -> str:
        name = _shown(self.name)
        return f"There is no queue named {name}. Create it first: `await durable.create_queue({name})`."


class TaskNotFound(DurableError, LookupError):
    """Raised when no task has the id, or the joined task is not a child.

    `reason` is given if it is another than a spawn that was not committed, or a task that was cleaned up.
    """

    final = False
    """True if a context has raised it: the task is not retried then, because it would meet the same again."""

    def __init__(self, task_id: UUID, reason: str | None = None) -> None:
        self.task_id = task_id
        self.reason = reason
        super().__init__(task_id, reason)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"Task {self.task_id} was not found here: {self.reason}."
        return f"There is no task {self.task_id}. Its spawn was not committed, or it was cleaned up."


class ScheduleNotFound(DurableError, LookupError):
    """Raised when a queue has no schedule of that name; `elsewhere` lists the queues that have one."""

    def __init__(self, name: str, queue_name: str | None = None, elsewhere: Sequence[str] = ()) -> None:
        self.name = name
        self.queue_name = queue_name
        self.elsewhere = tuple(elsewhere)
        super().__init__(name, queue_name, self.elsewhere)

    def __str__(self) -> str:
        queue = "" if self.queue_name is None else f" in queue {_shown(self.queue_name)}"
        if self.elsewhere:
            others = ", ".join(_shown(name) for name in self.elsewhere[:5])
            remedy = f"Queues that have one: {others}. Name the queue with queue_name=."
        else:
            remedy = "`await durable.list_schedules(ScheduleFilter())` lists those of all queues."
        return f"There is no schedule named {_shown(self.name)}{queue}. {remedy}"


class InvalidCron(DurableError, ValueError):
    """Raised when a cron expression is invalid or never matches."""

    def __init__(self, expression: object, reason: str) -> None:
        self.expression = expression
        self.reason = reason
        super().__init__(expression, reason)

    def __str__(self) -> str:
        return (
            f"The cron expression {_shown(self.expression)} is not valid: {self.reason}. "
            "Write five fields, minute, hour, day of month, month and day of week, such as '*/5 * * * *'."
        )


class InvalidConfiguration(DurableError, ValueError):
    """Raised when a setting or an option has an invalid value. `remedy`, if there is one, says what to do instead."""

    def __init__(self, setting: str, problem: str, remedy: str | None = None) -> None:
        self.setting = setting
        self.problem = problem
        self.remedy = remedy
        super().__init__(setting, problem, remedy)

    def __str__(self) -> str:
        message = f"{self.setting}: {self.problem}."
        return f"{message} {self.remedy}" if self.remedy else message


class InvalidState(DurableError, RuntimeError):
    """Raised when a call is not possible in the present state of its object."""

    def __init__(self, what: str, state: str, remedy: str | None = None) -> None:
        self.what = what
        self.state = state
        self.remedy = remedy
        super().__init__(what, state, remedy)

    def __str__(self) -> str:
        message = _sentence(f"{self.what} is {self.state}.")
        return f"{message} {self.remedy}" if self.remedy else message


class IdempotencyConflict(DurableError, ValueError):
    """Raised when an idempotency key was already used in the queue, for another task name or other params.

    Also when an unfinished task of another name has a unique key, and when any task has the key of a child.
    """

    def __init__(
        self, key: str, queue_name: str, task_id: UUID, *, unique: bool = False, by_child: bool = False
    ) -> None:
        self.key = key
        self.queue_name = queue_name
        self.task_id = task_id
        self.unique = unique
        """True if it is a unique key."""
        self.by_child = by_child
        """True if a task was to spawn a child with the key."""
        super().__init__(key, queue_name, task_id)

    def __str__(self) -> str:
        kind, task = ("unique", "the unfinished task") if self.unique else ("idempotency", "task")
        owner = f"The {kind} key {_shown(self.key)} belongs to {task} {self.task_id} in queue {_shown(self.queue_name)}"
        if self.by_child:
            return (
                f"{owner}, and a child cannot be a task that exists already. "
                "Use another key, or spawn with the client in a step instead."
            )
        if self.unique:
            return f"{owner}, whose name differs. Use another key for different work."
        return (
            f"{owner}, whose name or params differ. "
            "Use another key for different work, or spawn with the name and params of that task."
        )


class SchemaMismatch(DurableError, RuntimeError):
    """Raised when the tables in the database are not at the revision that this version of the package needs."""

    def __init__(self, installed: str | None, required: str, remedy: str) -> None:
        self.installed = installed
        self.required = required
        self.remedy = remedy
        super().__init__(installed, required, remedy)

    def __str__(self) -> str:
        found = (
            "durable's tables are not installed"
            if self.installed is None
            else f"durable's tables are at revision {self.installed}"
        )
        return f"In this database {found}, and revision {self.required} is needed. {self.remedy}"


class TaskError(DurableError):
    """Base class of the errors raised in task code."""


class UserError(TaskError):
    """Raise this in a task or step to fail the task with data of your own, without a retry.

    `data` is a string, anything that encodes to JSON, or a pydantic model; `TaskPollResult.error.raw` has it as plain
    JSON. The message is the string itself, or the `message` entry of the data, or the data as JSON. Data of more than
    1 MiB of JSON is not stored.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        super().__init__(data)

    @property
    def message(self) -> str:
        """The message, as described above; at most 1000 characters if it is the data as JSON."""
        if isinstance(self.data, str):
            return self.data
        plain = _plain(self.data)
        if isinstance(plain, dict) and isinstance(message := cast(dict[str, object], plain).get("message"), str):
            return message
        text = to_json(plain).decode()
        return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]}..."

    @property
    def raw(self) -> Any:
        """The data as plain JSON. A value without a JSON form is replaced by the name of its type."""
        return _plain(self.data)

    def __str__(self) -> str:
        return self.message


class Retry(TaskError):
    """Raise this in a task or step to have the task retried `after` so many seconds, or a `timedelta`.

    It is a failure like any other, and counts towards `max_attempts`. The delay takes the place of the retry
    strategy's. The task is retried whatever its `retry_on` and `no_retry_on`, with `RetryStrategy.none()` as well. A
    step that raises it is not tried once more by itself.

    Raises:
        InvalidConfiguration: `after` is not between 0 and 100 years.
    """

    def __init__(self, after: float | timedelta) -> None:
        given: object = after.total_seconds() if isinstance(after, timedelta) else after
        if isinstance(given, bool) or not isinstance(given, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidConfiguration(
                "after", f"a duration is a number of seconds or a timedelta, not {type(given).__name__}"
            )
        if not 0 <= given <= _LONGEST_DELAY:
            raise InvalidConfiguration("after (seconds)", f"{given} is not between 0 and {_LONGEST_DELAY:g}")
        self.after = float(given)
        """Seconds."""
        super().__init__(self.after)

    def __str__(self) -> str:
        return f"The task asked to be retried after {self.after:g} s"


class TaskTimeout(TaskError, TimeoutError):
    """Raised when an event, a child, a step or an attempt of a task took longer than its `timeout`, in seconds."""

    def __init__(self, what: str, timeout: float) -> None:
        self.what = what
        self.timeout = timeout
        super().__init__()
        self.args = (what, timeout)  # not as arguments, because an OSError takes the first of two as its errno

    def __str__(self) -> str:
        return _sentence(f"{self.what} took longer than {self.timeout:g} s")


class RateLimited(TaskError):
    """Raise it in a task or step whose call was refused for a time, as an API does that answers 429.

    The task's limit key is closed for `retry_after` seconds, and then the task is attempted anew. No failure is
    counted. Without a limit key this task alone is put off.
    """

    def __init__(self, retry_after: float | timedelta) -> None:
        if isinstance(retry_after, timedelta):
            retry_after = retry_after.total_seconds()
        if isinstance(retry_after, bool) or not isinstance(retry_after, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidConfiguration("retry_after", f"it must be a number, not {type(retry_after).__name__}")
        if not 0 < retry_after <= _LONGEST_DELAY:
            raise InvalidConfiguration("retry_after", f"{retry_after!r:.40} is not above 0 and at most 100 years")
        self.retry_after = float(retry_after)
        """Seconds."""
        super().__init__(self.retry_after)

    @staticmethod
    def delay_of(error: BaseException) -> float:
        """Return the seconds of an error of this class, 1 if a subclass has lost them."""
        delay = getattr(error, "retry_after", None)
        return float(delay) if type(delay) is float and 0 < delay <= _LONGEST_DELAY else 1.0

    def __str__(self) -> str:
        return f"Closed for {self.retry_after:g} seconds"


class ReplayMismatch(TaskError):
    """Raised when a recorded step is met with other arguments, and the task or client has `replay="strict"`.

    Nothing has run then. The task fails without a retry; `retry_task` goes on from its records once the code passes
    the recorded arguments again.
    """

    def __init__(self, step: str) -> None:
        self.step = step
        super().__init__(step)

    def __str__(self) -> str:
        return (
            f"Step {_shown(self.step)} is recorded with other arguments than the code passes now, and would run anew. "
            "Arguments must be the same in each run: take times and random values from ctx.now() and ctx.rand(). "
            "Mend the code, then call `await durable.retry_task(task_id)`. A step that is another one needs a new name."
        )


class ChildFailed(TaskError):
    """Raised by `join` when the child failed. `name`, `message` and `raw` are those of the child's error."""

    def __init__(self, task_id: UUID, name: str, message: str, raw: Any = None) -> None:
        self.task_id = task_id
        self.name = name
        self.message = message
        self.raw = raw
        super().__init__(task_id, name, message, raw)

    def __str__(self) -> str:
        return f"Child task {self.task_id} failed: {self.name}: {self.message}"


class ChildCancelled(TaskError):
    """Raised by `join` when the child was cancelled."""

    def __init__(self, task_id: UUID) -> None:
        self.task_id = task_id
        super().__init__(task_id)

    def __str__(self) -> str:
        return f"Child task {self.task_id} was cancelled"


class InvalidName(TaskError, ValueError):
    """Raised when a name (queue, task, step, event, schedule, worker, header) or idempotency key breaks the rules."""

    def __init__(self, kind: str, value: object, reason: str) -> None:
        self.kind = kind
        self.value = value
        self.reason = reason
        super().__init__(kind, value, reason)

    def __str__(self) -> str:
        label = self.kind if self.kind.endswith(" key") else f"{self.kind} name"
        return f"The {label} {_shown(self.value)} is not valid: {self.reason}."


class InvalidTaskParams(TaskError, ValueError):
    """Raised when params do not fit the task.

    `problems` say where and why: with the text of the application's own validator if that has refused them, and
    without the values.
    """

    def __init__(self, task_name: str, problems: Sequence[str]) -> None:
        self.task_name = task_name
        self.problems = tuple(problems)
        super().__init__(task_name, self.problems)

    def __str__(self) -> str:
        return f"The params do not fit task {_shown(self.task_name)}: {'; '.join(self.problems)}."


class SerializationError(TaskError, ValueError):
    """Raised when a value cannot be stored and read back unchanged.

    `what` names it, `reason` says where and why, without the value.
    """

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason
        super().__init__(what, reason)

    def __str__(self) -> str:
        return _sentence(f"{self.what} {self.reason}.")


class PayloadTooLarge(TaskError, ValueError):
    """Raised when an encoded value is longer than the limit. `size` and `limit` are bytes of UTF-8."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.what = what
        self.size = size
        self.limit = limit
        super().__init__(what, size, limit)

    def __str__(self) -> str:
        return _sentence(
            f"{self.what} has {self.size} bytes as JSON and at most {self.limit} are allowed. "
            "Store the data elsewhere and pass a reference, or raise the limit with `Durable(max_payload_bytes=...)`."
        )
