import unicodedata
from enum import StrEnum
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable_sa.errors import InvalidName
from durable_sa.names import NameKind, validate_name

kinds = st.sampled_from(get_args(NameKind))
reserved = {"step": "$", "event": "$", "topic": "$", "value": "$", "stream": "$", "header": "durable::"}


def allowed(kind: str, name: str) -> bool:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return False
    if kind == "schedule" and not all(
        character.isascii() and (character.isalnum() or character in "_-") for character in name
    ):
        return False
    is_key = kind in ("idempotency key", "unique key")
    limit = 255 if is_key else 200
    if name.isspace() and not is_key:
        return False
    return 1 <= len(name.encode()) <= limit and not name.startswith(reserved.get(kind, "\0"))


@given(
    kinds,
    st.text()
    | st.text(" \u3000a")
    | st.text("ab_-1", min_size=1)
    | st.text("$a", min_size=1, max_size=2)
    | st.text("ab").map("durable::{}".format)
    | st.text("aé🐍", min_size=40, max_size=300),
)
def test_the_rules(kind: NameKind, name: str) -> None:
    if allowed(kind, name):
        assert validate_name(kind, name) == name
    else:
        with pytest.raises(InvalidName) as caught:
            validate_name(kind, name)
        assert kind in str(caught.value)
        assert caught.value.reason in str(caught.value)
        str(caught.value).encode()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("queue", "", "The queue name '' is not valid: it is empty."),
        ("queue", "  ", "The queue name '  ' is not valid: it consists of blanks"),
        ("event", "\u3000", "it consists of blanks"),
        ("task", "a\x00b", r"The task name 'a\x00b' is not valid: it contains the control character U+0000."),
        ("worker", "\x9f", r"The worker name '\x9f' is not valid: it contains the control character U+009F."),
        ("event", "\ud800", "it contains a lone surrogate, which UTF-8 cannot encode"),
        ("queue", "é" * 101, "it has 202 bytes of UTF-8 and at most 200 are allowed"),
        ("idempotency key", "k" * 256, "The idempotency key 'kkk"),
        ("step", "$now", "names that start with '$' are reserved"),
        ("event", "$now", "names that start with '$' are reserved"),
        ("topic", "$now", "names that start with '$' are reserved"),
        ("value", "$now", "names that start with '$' are reserved"),
        ("stream", "$now", "names that start with '$' are reserved"),
        ("header", "durable::x", "names that start with 'durable::' are reserved"),
        ("schedule", "a b", "only A-Z, a-z, 0-9, '_' and '-' are allowed"),
        ("schedule", "nightly\n", "control character U+000A"),
        ("schedule", "é", "only A-Z"),
        ("task", 5, "The task name of type int is not valid: it must be a str, not int."),
        ("task", b"x", "it must be a str, not bytes"),
        ("task", None, "it must be a str, not NoneType"),
    ],
)
def test_the_message_says_which_kind_and_why(kind: NameKind, name: object, message: str) -> None:
    with pytest.raises(InvalidName) as caught:
        validate_name(kind, name)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_long_name_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidName) as caught:
        validate_name("queue", "x" * 10_000_000)
    assert len(str(caught.value)) < 250
    assert "(10000000 characters)" in str(caught.value)


@pytest.mark.parametrize("kind", ["step", "event", "header"])
def test_the_engines_own_names_may_use_the_reserved_prefixes(kind: NameKind) -> None:
    assert validate_name(kind, reserved[kind] + "x", internal=True) == reserved[kind] + "x"


@pytest.mark.parametrize("kind", ["queue", "task", "worker", "idempotency key"])
def test_other_kinds_know_no_reserved_prefix(kind: NameKind) -> None:
    assert validate_name(kind, "$durable::x") == "$durable::x"


@pytest.mark.parametrize(
    "name", ["'; DROP TABLE tasks; --", "$durable$", "%s %(x)s", ":x", "\u202eabc", "🐍", "../..", "{{x}}"]
)
def test_hostile_names_are_names(name: str) -> None:
    assert validate_name("queue", name) == name


def test_an_enum_member_is_stored_as_its_value() -> None:
    class Queue(StrEnum):
        MAIL = "mail"

    name = validate_name("queue", Queue.MAIL)
    assert name == "mail"
    assert type(name) is str
