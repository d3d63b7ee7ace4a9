import copy
import inspect
import pickle
import uuid
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from durable_sa import errors, signals
from durable_sa.errors import (
    ChildCancelled,
    ChildFailed,
    DurableError,
    IdempotencyConflict,
    InvalidConfiguration,
    InvalidCron,
    InvalidName,
    InvalidState,
    InvalidTaskParams,
    PayloadTooLarge,
    QueueNotFound,
    RateLimited,
    ReplayMismatch,
    Retry,
    ScheduleNotFound,
    SchemaMismatch,
    SerializationError,
    TaskAlreadyRegistered,
    TaskError,
    TaskNotFound,
    TaskNotRegistered,
    TaskTimeout,
    UserError,
)

task_id = uuid.UUID(int=7)

EXAMPLES: list[tuple[DurableError, type[Exception], str]] = [
    (
        TaskNotRegistered("a", ["c", "b"]),
        LookupError,
        "No task named 'a' is registered (registered: 'b', 'c'). ...",
    ),
    (
        TaskAlreadyRegistered("a"),
        ValueError,
        "A task named 'a' is already registered. Rename one of them: `@task('another-name')`.",
    ),
    (
        QueueNotFound("q"),
        LookupError,
        "There is no queue named 'q'. Create it first: `await durable.create_queue('q')`.",
    ),
    (
        TaskNotFound(task_id),
        LookupError,
        f"There is no task {task_id}. Its spawn was not committed, or it was cleaned up.",
    ),
    (
        TaskNotFound(task_id, "it is no child"),
        LookupError,
        f"Task {task_id} was not found here: it is no child.",
    ),
    (
        ScheduleNotFound("s"),
        LookupError,
        "There is no schedule named 's'. `await durable.list_schedules(ScheduleFilter())` lists those of all queues.",
    ),
    (
        ScheduleNotFound("s", "default", ["east", "west"]),
        LookupError,
        "There is no schedule named 's' in queue 'default'. Queues that have one: 'east', 'west'. ...",
    ),
    (
        InvalidCron("* * *", "it has 3 fields"),
        ValueError,
        "The cron expression '* * *' is not valid: it has 3 fields. Write five fields, ...",
    ),
    (
        InvalidConfiguration("claim_timeout", "0.5 is below 1", "Give more."),
        ValueError,
        "claim_timeout: 0.5 is below 1. Give more.",
    ),
    (InvalidConfiguration("claim_timeout", "0.5 is below 1"), ValueError, "claim_timeout: 0.5 is below 1."),
    (InvalidState("task 7", "running", "Cancel it."), RuntimeError, "Task 7 is running. Cancel it."),
    (InvalidState("task 7", "running"), RuntimeError, "Task 7 is running."),
    (RateLimited(30), TaskError, "Closed for 30 seconds"),
    (
        ReplayMismatch("charge"),
        TaskError,
        "Step 'charge' is recorded with other arguments than the code passes now, and would run anew. ...",
    ),
    (
        IdempotencyConflict("k", "q", task_id),
        ValueError,
        f"The idempotency key 'k' belongs to task {task_id} in queue 'q', whose name or params differ. ...",
    ),
    (
        SchemaMismatch("durable_0001", "durable_0002", "Run `durable migrate`."),
        RuntimeError,
        "In this database durable's tables are at revision durable_0001, and revision durable_0002 is needed. ...",
    ),
    (
        SchemaMismatch(None, "durable_0002", "Run `durable migrate`."),
        RuntimeError,
        "In this database durable's tables are not installed, and revision durable_0002 is needed. Run ...",
    ),
    (UserError("not found"), TaskError, "not found"),
    (Retry(timedelta(seconds=30)), TaskError, "The task asked to be retried after 30 s"),
    (Retry(timedelta(seconds=30)), TaskError, "The task asked to be retried after 30 s"),
    (UserError({"message": "Not found", "code": 404}), TaskError, "Not found"),
    (TaskTimeout("step 'x'", 2.5), TimeoutError, "Step 'x' took longer than 2.5 s"),
    (
        ChildFailed(task_id, "ValueError", "no", raw={"a": 1}),
        TaskError,
        f"Child task {task_id} failed: ValueError: no",
    ),
    (ChildCancelled(task_id), TaskError, f"Child task {task_id} was cancelled"),
    (InvalidName("step", "$x", "it is reserved"), ValueError, "The step name '$x' is not valid: it is reserved."),
    (
        InvalidTaskParams("t", ["at a: wrong", "at b: missing"]),
        ValueError,
        "The params do not fit task 't': at a: wrong; at b: missing.",
    ),
    (SerializationError("the result of step 'x'", "is no data"), ValueError, "The result of step 'x' is no data."),
    (
        PayloadTooLarge("the result", 11, 10),
        ValueError,
        "The result has 11 bytes as JSON and at most 10 are allowed. Store the data elsewhere ...",
    ),
]


@pytest.mark.parametrize(("error", "host", "message"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_an_error_composes_its_message(error: DurableError, host: type[Exception], message: str) -> None:
    assert str(error) == message or (message.endswith("...") and str(error).startswith(message[:-3]))
    assert isinstance(error, host)
    assert repr(error) == f"{type(error).__name__}({str(error)!r})"


@pytest.mark.parametrize("error", [error for error, _, _ in EXAMPLES], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_errors_can_be_copied_and_pickled(error: DurableError, duplicate: Any) -> None:
    error.add_note("a note")
    again = duplicate(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_every_error_has_an_example_and_stands_in_the_drawn_tree() -> None:
    classes = {value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, DurableError)}
    assert {type(error) for error, _, _ in EXAMPLES} == classes - {DurableError, TaskError}
    drawing = inspect.getdoc(errors)
    assert drawing is not None
    assert all(cls.__name__ in drawing for cls in classes)


def test_signals_pass_handlers_of_exceptions() -> None:
    for signal in (signals.Suspended, signals.TaskCancelled, signals.LeaseLost):
        assert issubclass(signal, signals.ControlFlow)
        assert not issubclass(signal, Exception)


def test_a_timeout_is_no_os_error_with_a_number() -> None:
    with pytest.raises(TimeoutError) as caught:
        raise TaskTimeout("event 'x'", 1)
    assert caught.value.errno is None
    assert isinstance(caught.value, TaskTimeout)
    assert (caught.value.what, caught.value.timeout) == ("event 'x'", 1)


class Problem(BaseModel):
    message: str
    code: int = 404
    token: SecretStr = SecretStr("hunter2")


@pytest.mark.parametrize(
    ("data", "message", "raw"),
    [
        ("x", "x", "x"),
        ({"message": "x"}, "x", {"message": "x"}),
        ({"message": 5}, '{"message":5}', {"message": 5}),
        (Problem(message="x"), "x", {"message": "x", "code": 404, "token": "**********"}),
        ([1, (2,)], "[1,[2]]", [1, [2]]),
        (None, "null", None),
        (float("nan"), '"NaN"', "NaN"),
        (object(), '"<object>"', "<object>"),
        ({"a": [len, "\ud800"]}, None, {"a": ["<builtin_function_or_method>", "\\ud800"]}),
        (b"\xff", '"_w=="', "_w=="),
        ("NUL \x00", "NUL \x00", "NUL \x00"),
        (["x" * 5000], '["' + "x" * 998 + "...", ["x" * 5000]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_user_error_keeps_any_data(data: object, message: str | None, raw: object) -> None:
    error = UserError(data)
    assert error.data is data
    assert error.raw == raw
    assert message is None or error.message == str(error) == message


def test_long_and_hostile_names_are_shortened_and_escaped() -> None:
    message = str(QueueNotFound("x\u202e\x00\ud800" * 1_000_000))
    assert len(message) < 1500
    assert message.isprintable()
    message.encode()
    many = str(TaskNotRegistered("x", [f"task-{number:02}" for number in range(30)]))
    assert "'task-09' and 20 more" in many
    assert "task-10" not in many
    assert "registered: none" in str(TaskNotRegistered("x"))
