"""Errors as they are logged: without what libraries quote of values."""

import traceback

import pytest
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError, StatementError

from durable_sa.errors import ChildFailed, UserError
from durable_sa.ids import new_id
from durable_sa.serialization.redaction import NOT_SHOWN, loggable, message, payload_redactor, redact

SECRET = "correct-horse"


class Order(BaseModel):
    amount: int


def report(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def refused() -> IntegrityError:
    said = Exception(f"duplicate key\nDETAIL:  Key (email)=({SECRET}) already exists.\nwith more of it: {SECRET}")
    return IntegrityError("INSERT INTO people VALUES (%s)", {"email": SECRET, "other": "]\n"}, said)


def invalid() -> Exception:
    with pytest.raises(ValueError, match="validation error") as caught:
        Order.model_validate({"amount": f"{SECRET}, input_type"})
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        refused(),
        StatementError("wrong", "SELECT :a", {"a": SECRET}, ValueError("no")),
        invalid(),
        ChildFailed(new_id(), "IntegrityError", str(refused())),
        RuntimeError(f"cannot reach https://user:{SECRET}@host/path"),
        Exception(f'invalid input syntax for type integer: "{SECRET}"'),
        Exception(f"invalid input for query argument $1: '{SECRET}' ('str' object cannot be interpreted)"),
        UserError({"card": SECRET}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_quoted_values_are_cut_out_of_messages_causes_and_members(error: Exception) -> None:
    outer = RuntimeError("outer")
    outer.__cause__ = error
    noted = ValueError("noted")
    noted.add_note(str(error) if not isinstance(error, UserError) else "")
    for each in (error, outer, ExceptionGroup("several", [KeyError("one"), error]), noted):
        shown = report(loggable(each))
        assert SECRET not in shown
        assert type(each).__name__ in shown
    assert "outer" in report(loggable(outer))
    assert "one" in report(loggable(ExceptionGroup("several", [KeyError("one"), error])))


def test_an_error_without_values_is_logged_as_it_is() -> None:
    try:
        try:
            raise KeyError("first")
        finally:
            int("many")
    except ValueError as error:
        assert loggable(error) is error


def test_texts_of_payloads_are_cut_out_and_short_ones_and_keys_are_not() -> None:
    redacted = payload_redactor(f'{{"card":["{SECRET}"],"country":"EU","name":"corr"}}', None)
    assert redacted(f"the card {SECRET} of the EU is corrupt") == "the card ... of the EU is ...upt"
    assert payload_redactor('"' + "x" * 1_000_000 + '"')("anything") == NOT_SHOWN
    assert payload_redactor()("anything") == redact("anything") == "anything"


def test_an_exception_whose_text_cannot_be_had_is_logged_all_the_same() -> None:
    class Wrong(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    assert "str() raised KeyboardInterrupt" in message(Wrong())
    assert "Wrong" in report(loggable(Wrong()))
    around = ValueError("around")
    around.__context__ = around.__cause__ = Wrong()
    around.__cause__.__context__ = around
    assert "around" in report(loggable(around))
    assert message(UserError("out of stock")) == message(UserError({"message": "out of stock"})) == "out of stock"


def test_hostile_exceptions_are_logged_as_what_they_are_and_lone_surrogates_escaped() -> None:
    class Hostile(Exception):
        def __getattribute__(self, name: str) -> object:
            raise RuntimeError(name)

    class Disguised(Exception):
        @property
        def __class__(self) -> type:
            raise RuntimeError

    for kind in (Hostile, Disguised):
        assert kind.__name__ in report(loggable(kind("text")))
        assert message(kind("text")) == "text"
    report(loggable(ValueError("\ud800"))).encode()
    assert message(ValueError("\ud800")) == "\\ud800"
