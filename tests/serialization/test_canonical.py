import dataclasses
import enum
import functools
import subprocess
import sys
import uuid
from collections import OrderedDict, deque
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, SecretStr
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from durable_sa.errors import SerializationError
from durable_sa.serialization.canonical import encode_arguments


class Colour(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Address:
    street: str
    tags: set[str]


class Order(BaseModel):
    id: uuid.UUID
    tags: set[str] = set()
    prices: dict[uuid.UUID, Decimal] = {}
    cache: Any = Field(default=None, exclude=True)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)


def encoded(*args: object, **kwargs: object) -> str:
    return encode_arguments(args, kwargs, "Step 'x'")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    match value:
        case dict():
            return {key: reordered(item) for key, item in reversed(value.items())}
        case list():
            return [reordered(item) for item in value]
        case _:
            return value


@pytest.mark.slow
@given(json_values)
def test_the_order_of_entries_does_not_matter(value: Any) -> None:
    assert encoded(value, a=value, b=1) == encoded(reordered(value), b=1, a=reordered(value))


@pytest.mark.slow
@given(json_values, json_values)
def test_different_arguments_have_different_texts(one: Any, other: Any) -> None:
    assert (encoded(one) == encoded(other)) == (repr(reordered(one)) == repr(reordered(other)) or same(one, other))


def same(one: Any, other: Any) -> bool:
    """Equal, without taking 1 for True or 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1, [True, None]), "[1,[true,null]]"),
        ({"b": 1, "a": 2.0}, '{"a":2.0,"b":1}'),
        ({3, 1, 2}, '["1","2","3"]'),
        ({2: "b", 1: "a"}, '{"1":"a","2":"b"}'),
        ({1: "a", "1": "b"}, r'{"\"1\"":"b","1":"a"}'),
        ({Colour.RED: {uuid.UUID(int=1): 1}}, r'{"\"red\"":{"\"00000000-0000-0000-0000-000000000001\"":1}}'),
        ({(1, 2): 3}, '{"[1,2]":3}'),
        (Colour.RED, '"red"'),
        (Point(1, 2), "[1,2]"),
        (Address("x", {"b", "a"}), r'{"street":"x","tags":["\"a\"","\"b\""]}'),
        (RootModel[list[int]]([1]), '{"root":[1]}'),
        (datetime(2024, 1, 1, tzinfo=UTC), '"2024-01-01T00:00:00Z"'),
        (Decimal("1.50"), '"1.50"'),
        (b"\xff", '"_w=="'),
        (PurePosixPath("/x"), '"/x"'),
        (MappingProxyType({"a": 1}), '{"a":1}'),
        (OrderedDict(a=1), '{"a":1}'),
        (deque([1]), "[1]"),
        (range(3), "[0,1,2]"),
        ("NUL \x00 é", r'"NUL \u0000 é"'),
        (2**70, str(2**70)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_forms_of_values(value: object, text: str) -> None:
    assert encoded(value) == f"[[{text}],{{}}]"
    assert encoded([value]) != encoded(value)
    assert text in encoded(k=[value])


def test_a_model_stands_for_its_fields() -> None:
    key = uuid.UUID(int=1)
    order = Order(id=key, tags={"b", "a"}, prices={key: Decimal(1)}, cache=object())
    again = Order(id=key, tags={"a", "b"}, prices={key: Decimal(1)})
    assert encoded(order) == encoded(again)
    assert encoded(order) != encoded(again.model_copy(update={"tags": {"a"}}))


@dataclasses.dataclass
class Parcel:
    weight: int
    fragile: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)


class Shipment(BaseModel):
    id: int
    parcel: Parcel | None = None
    urgent: bool = False
    weight: int = 1
    labels: list[int] = [1]
    token: str = Field(default_factory=lambda: uuid.uuid4().hex)
    broken: int = Field(default_factory=lambda: 1 // 0)


def test_models_and_dataclasses_stand_for_what_differs_from_their_defaults() -> None:
    def shipment(**fields: Any) -> Shipment:
        return Shipment(id=1, token="t", broken=1, **fields)

    assert encoded(shipment()) == '[[{"broken":1,"id":1,"token":"t"}],{}]'
    assert encoded(shipment(urgent=False, labels=[1], parcel=None)) == encoded(shipment())
    # `==` takes these for the default.
    assert '"weight":true' in encoded(shipment().model_copy(update={"weight": True}))
    assert '"labels":[true]' in encoded(shipment().model_copy(update={"labels": [True]}))
    assert '"parcel":{"weight":2}' in encoded(shipment(parcel=Parcel(2)))
    assert encoded(Parcel(2, notes=["x"])) == '[[{"notes":["x"],"weight":2}],{}]'
    assert encoded(Parcel(2, fragile=0)) == '[[{"fragile":0,"weight":2}],{}]'  # type: ignore[arg-type]


def test_positions_and_keywords_are_told_apart() -> None:
    assert len({encoded(1, 2), encoded([1, 2]), encoded(1, b=2), encoded(2, 1), encoded(), encoded(None)}) == 6


@pytest.mark.slow
def test_the_text_is_the_same_in_another_process() -> None:
    program = (
        "from durable_sa.serialization.canonical import encode_arguments\n"
        "print(encode_arguments([{'x', 'y', 'z', 'abc'}, frozenset('hello')], {'b': {'q', 'r'}, 'a': 1}, 'it'))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


cycle: list[Any] = []
cycle.append(cycle)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (len, "a builtin_function_or_method is no data"),
        (lambda: None, "a function is no data"),
        (functools.partial(int), "a partial is no data"),
        (object(), "a object is no data"),
        (int, "a type is no data"),
        (Order, "a ModelMetaclass is no data"),
        (ValueError("hunter2"), "a ValueError is no data"),
        (User(id=1), "a User belongs to a session, pass its primary key"),
        (iter([1]), "an iterator can be read only once"),
        ((n for n in [1]), "an iterator can be read only once"),
        (SecretStr("hunter2"), "a SecretStr, pass a reference"),
        (float("nan"), "not JSON compliant"),
        ("hunter2\ud800", "lone surrogate"),
        ({object(): "hunter2"}, "a object is no data"),
        (cycle, "Circular reference"),
        (10**5000, "4300 digits"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_data_is_refused_by_name(value: object, message: str) -> None:
    for args, kwargs, label in [
        ((1, value), {}, "argument 2"),
        ((), {"a": 1, "db": [{"x": value}]}, "argument 'db' (of type list)"),
    ]:
        with pytest.raises(SerializationError) as caught:
            encode_arguments(args, kwargs, "step 'x'")
        assert f"Step 'x' cannot encode its {label}" in str(caught.value)
        assert message in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_nesting_too_deep_is_an_error() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(SerializationError, match="RecursionError"):
        encoded(value)


class Hostile:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("hunter2")


def test_hostile_attributes_are_survived() -> None:
    with pytest.raises(SerializationError, match="argument 1") as caught:
        encoded(Hostile())
    assert "hunter2" not in str(caught.value)
