"""The beginning of a step's arguments, as it is stored, read and shown."""

from typing import Any

import pytest
from pydantic import BaseModel

from durable_sa.client.wording import call_text
from durable_sa.serialization.arguments import KEPT_CHARACTERS, arguments_of, summary
from durable_sa.serialization.canonical import encode_arguments


class Order(BaseModel):
    number: int
    currency: str = "EUR"


def kept(*args: Any, **kwargs: Any) -> str | None:
    return summary(encode_arguments(args, kwargs, "step 'x'"))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((17,), {}, "(17)"),
        (("a", None, True), {"currency": "EUR"}, '("a", null, true, currency="EUR")'),
        ((Order(number=5),), {}, '({"number": 5})'),
        ((), {"note": "naïve 🙂 北"}, '(note="naïve 🙂 北")'),
        (("\x00\x1b[31m",), {}, '("\\u0000\\u001b[31m")'),
    ],
)
def test_arguments_are_shown_as_in_a_call(args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    stored = kept(*args, **kwargs)
    assert stored is not None
    assert stored.isascii()
    assert call_text(arguments_of(stored)) == text


def test_of_a_call_without_arguments_nothing_is_kept() -> None:
    assert kept() is None
    assert arguments_of(None) is None


@pytest.mark.parametrize("long", ["x" * 10_000, "北" * 10_000, '"' * 10_000, {"a" * 300: 1}, list(range(10_000))])
def test_long_arguments_are_cut_and_can_be_read(long: object) -> None:
    stored = kept(17, long, after=1)
    assert stored is not None
    assert len(stored) <= 6 * KEPT_CHARACTERS
    read = arguments_of(stored)
    assert read is not None
    assert read["args"][0] == 17
    assert (read["kwargs"], read["cut"]) == ({}, True)
    assert call_text(read).endswith(", ...)")


def test_arguments_can_be_cut_at_each_character() -> None:
    text = encode_arguments([1.5, "a\\b\n北", {"b": [None, True]}], {"c": {"d": "🙂"}}, "step 'x'")
    for end in range(1, len(text)):
        read = arguments_of(summary(text[:end]))
        assert read is None if end == 1 else read is not None and read["cut"]


@pytest.mark.parametrize("by_hand", ["", "x", "5", "[]", "{}", "[5]", '["x",{}]', "nul", 5, {"args": []}])
def test_what_was_written_by_hand_is_not_shown(by_hand: object) -> None:
    assert arguments_of(by_hand) is None


def test_what_a_redaction_has_made_of_arguments_is_shown() -> None:
    assert call_text("***") == '("***")'
    assert call_text({"args": "***", "kwargs": {}, "cut": False}) == '({"args": "***", "kwargs": {}, "cut": false})'
