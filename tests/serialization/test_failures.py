import asyncio
import functools
import json
import traceback
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from durable_sa.errors import (
    ChildCancelled,
    ChildFailed,
    DurableError,
    IdempotencyConflict,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    InvalidTaskParams,
    PayloadTooLarge,
    ReplayMismatch,
    SerializationError,
    TaskNotFound,
    TaskTimeout,
    UserError,
)
from durable_sa.serialization.codec import codec_for
from durable_sa.serialization.failures import (
    MAX_MESSAGE_BYTES,
    MAX_RAW_BYTES,
    MAX_TRACEBACK_BYTES,
    describe,
    encode_error,
    is_retryable,
)

task_id = uuid.UUID(int=1)


class PaymentError(Exception):
    pass


def caught(function: Any) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("it did not raise")


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (UserError("x"), False),
        (ChildFailed(task_id, "ValueError", "x"), False),
        (ChildCancelled(task_id), False),
        (SerializationError("it", "is no data"), False),
        (InvalidName("step", "", "it is empty"), False),
        (InvalidTaskParams("t", []), False),
        (InvalidConfiguration("delay", "-1 is negative"), False),
        (InvalidState("it", "over"), False),
        (PayloadTooLarge("it", 2, 1), False),
        (IdempotencyConflict("key", "queue", task_id), False),
        (ReplayMismatch("charge"), False),
        (TaskTimeout("it", 1), True),
        (TimeoutError(), True),
        (ValueError(), True),
        (TaskNotFound(task_id), True),
        (DurableError(), True),
        (SystemExit(1), True),
        (KeyboardInterrupt(), True),
        (asyncio.CancelledError(), True),
        (ExceptionGroup("several", [ValueError(), TaskTimeout("it", 1)]), True),
        (ExceptionGroup("several", [ValueError(), ExceptionGroup("more", [UserError("x")])]), False),
        (BaseExceptionGroup("several", [SystemExit(), ChildCancelled(task_id)]), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_fail_the_same_way_again_is_not_retried(error: BaseException, retried: bool) -> None:
    assert is_retryable(error) is retried


def test_a_tasks_own_list_comes_on_top() -> None:
    listed = (PaymentError, OSError)
    assert is_retryable(ValueError(), listed)
    assert not is_retryable(PaymentError(), listed)
    assert not is_retryable(FileNotFoundError(), listed)
    assert not is_retryable(TaskTimeout("it", 1), listed)
    assert not is_retryable(ExceptionGroup("several", [PaymentError()]), listed)
    assert not is_retryable(UserError("x"), listed)


def test_name_message_and_the_frames_of_all_causes_are_recorded() -> None:
    def inner() -> None:
        raise KeyError("inner")

    def outer() -> None:
        try:
            inner()
        except KeyError as error:
            raise PaymentError("no \x00 funds") from error

    failure = describe(caught(outer))
    assert failure["name"] == "PaymentError"
    assert failure["message"] == "no \\x00 funds"
    assert failure["raw"] is None
    assert "in inner" in failure["traceback"]
    assert "in outer" in failure["traceback"]
    assert "KeyError: 'inner'" in failure["traceback"]
    assert "direct cause" in failure["traceback"]


def test_frames_of_this_package_are_left_out() -> None:
    error = caught(lambda: codec_for(Any).encode(float("nan"), "it"))
    assert any("durable_sa/serialization/codec.py" in line for line in traceback.format_exception(error))
    failure = describe(error)
    assert "codec.py" not in failure["traceback"]
    assert "test_failures.py" in failure["traceback"]
    assert "SerializationError: It cannot be stored" in failure["traceback"]


def test_members_of_groups_are_recorded() -> None:
    def fail() -> None:
        raise BaseExceptionGroup("several", [caught(lambda: codec_for(int).decode("{", "it")), UserError({"code": 5})])

    failure = describe(caught(fail))
    assert failure["name"] == "ExceptionGroup"
    assert failure["raw"] == {"code": 5}
    assert "UserError" in failure["traceback"]
    assert "codec.py" not in failure["traceback"]


def test_data_comes_back_as_raw() -> None:
    assert describe(UserError({"message": "no", "code": 404}))["raw"] == {"message": "no", "code": 404}
    assert describe(UserError({"message": "no", "code": 404}))["message"] == "no"
    assert describe(ChildFailed(task_id, "UserError", "no", {"code": 404}))["raw"] == {"code": 404}
    assert describe(ChildFailed(task_id, "UserError", "no", object()))["raw"] is None
    assert describe(ValueError({"code": 404}))["raw"] is None


def test_too_much_data_is_dropped_and_said() -> None:
    failure = describe(UserError({"message": "no", "blob": "x" * MAX_RAW_BYTES}))
    assert failure["raw"] is None
    assert failure["message"] == "no (its data is longer than 1048576 bytes as JSON and is not kept)"


@pytest.mark.slow
@given(st.text(), st.integers(0, 3))
def test_whatever_the_text_it_is_stored_within_its_limits(text: str, size: int) -> None:
    encoded = encode_error(ValueError(text * 20_000 * size + text))
    failure = from_json(encoded)
    assert set(failure) == {"name", "message", "traceback", "raw", "step", "arguments"}
    assert "\x00" not in failure["message"] + failure["traceback"]
    assert len(failure["message"].encode()) <= MAX_MESSAGE_BYTES
    assert len(failure["traceback"].encode()) <= MAX_TRACEBACK_BYTES
    assert json.loads(encoded) == failure


def test_of_a_long_text_head_and_tail_are_kept() -> None:
    message = describe(ValueError("head " + "x" * 10_000_000 + " tail"))["message"]
    assert message.startswith("head xxx")
    assert message.endswith("xxx tail")
    assert "bytes left out" in message


def test_deep_recursion_and_long_chains_are_recorded() -> None:
    def recurse() -> None:
        recurse()

    failure = describe(caught(recurse))
    assert failure["name"] == "RecursionError"
    assert "in recurse" in failure["traceback"]

    error: Exception = ValueError("first")
    for number in range(3000):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    failure = describe(error)
    assert len(failure["traceback"].encode()) <= MAX_TRACEBACK_BYTES
    assert "ValueError: 2999" in failure["traceback"]


def test_a_chain_that_contains_itself_comes_to_an_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert "ValueError: one" in describe(one)["traceback"]


class RudeError(Exception):
    def __str__(self) -> str:
        raise SystemExit("hunter2")

    __repr__ = __str__


class RuderError(UserError):
    @property
    def raw(self) -> Any:
        raise RuntimeError("hunter2")

    def __str__(self) -> Any:
        return 5  # noqa: PLE0307


@pytest.mark.parametrize(
    "make", [RudeError, functools.partial(RuderError, 1), functools.partial(ValueError, RudeError())]
)
def test_exceptions_that_cannot_be_shown_are_recorded(make: Any) -> None:
    def fail() -> None:
        raise make()

    failure = from_json(encode_error(caught(fail)))
    assert failure["name"] == getattr(make, "func", make).__name__
    assert "hunter2" not in failure["message"] + failure["traceback"]


def test_secrets_of_local_variables_are_not_recorded() -> None:
    def fail() -> None:
        password = "hunter" + "2"
        raise ValueError(len(password))

    assert "hunter2" not in encode_error(caught(fail))
