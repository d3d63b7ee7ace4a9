import dataclasses
import enum
import inspect
import math
import re
import uuid
from collections import deque
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    RootModel,
    SecretBytes,
    SecretStr,
    computed_field,
    field_serializer,
    model_serializer,
    model_validator,
)
from typing_extensions import TypedDict

from durable_sa.errors import PayloadTooLarge, SerializationError
from durable_sa.results import TaskHandle
from durable_sa.serialization.codec import DEFAULT_MAX_PAYLOAD_BYTES, check_size, codec_for

plain = codec_for(inspect.Parameter.empty)

text = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(text, children, max_size=4),
    max_leaves=20,
)


def exactly(value: Any) -> Any:
    """Tells 1 from True and 1.0, and 0.0 from -0.0, which == does not."""
    match value:
        case dict():
            return {key: exactly(item) for key, item in value.items()}
        case list():
            return [exactly(item) for item in value]
        case _:
            return type(value), repr(value)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass
class Address:
    street: str
    since: date


class Options(TypedDict):
    verbose: bool
    level: int


class Order(BaseModel):
    id: uuid.UUID
    total: Decimal
    placed: datetime
    address: Address
    colours: set[Colour]
    by_day: dict[date, int]
    point: Point
    options: Options | None
    kind: Literal["a", 1]
    extra: Any = None


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


@pytest.mark.slow
@given(json_values)
def test_plain_json_comes_back_exactly(value: Any) -> None:
    encoded, decoded = plain.round_trip(value, "It")
    assert exactly(decoded) == exactly(value)
    assert exactly(plain.decode(encoded, "It")) == exactly(value)
    encoded.encode()


zones: st.SearchStrategy[tzinfo] = st.sampled_from([UTC, ZoneInfo("Asia/Kathmandu"), ZoneInfo("Europe/Belgrade")])
orders = st.builds(
    Order,
    id=st.uuids(),
    total=st.decimals(allow_nan=False, allow_infinity=False),
    placed=st.datetimes(datetime(2000, 1, 1)) | st.datetimes(datetime(2000, 1, 1), timezones=zones),
    address=st.builds(Address, text, st.dates()),
    colours=st.sets(st.sampled_from(Colour)),
    by_day=st.dictionaries(st.dates(), st.integers(), max_size=3),
    point=st.builds(Point, st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    options=st.none() | st.fixed_dictionaries({"verbose": st.booleans(), "level": st.integers()}),
    kind=st.sampled_from(["a", 1]),
    extra=json_values,
)


@pytest.mark.slow
@given(orders)
def test_models_come_back_equal_and_of_the_same_types(order: Order) -> None:
    codec = codec_for(Order)
    encoded, decoded = codec.round_trip(order, "It")
    assert decoded.model_copy(update={"placed": order.placed}) == order
    assert decoded.placed.isoformat() == order.placed.isoformat()
    assert codec.decode(encoded, "It") == decoded
    assert type(decoded.point) is Point
    assert str(decoded.total) == str(order.total)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (None, None),
        (bool, False),
        (int, 2**53 + 1),
        (int, -(2**63) - 1),
        (int, 10**4000),
        (float, -0.0),
        (float, 5e-324),
        (float, 1.7976931348623157e308),
        (str, "NUL \x00, \u202e, \U0001f40d, NaN, Infinity"),
        (bytes, b"\xff\x00"),
        (list[bytes], [b"", b"\xfe"]),
        (Decimal, Decimal("1.00")),
        (Decimal, Decimal("1E+400")),
        (complex, 1 + 2j),
        (datetime, datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=UTC)),
        (datetime, datetime(1, 1, 1)),
        (date, date(9999, 12, 31)),
        (time, time(1, 2, 3, 4)),
        (timedelta, timedelta(microseconds=-1)),
        (timedelta, timedelta.max),
        (uuid.UUID, uuid.UUID(int=2**128 - 1)),
        (Colour, Colour.BLUE),
        (Point, Point(1, 2.5)),
        (Address, Address("x", date(2020, 1, 1))),
        (Options, {"verbose": True, "level": 3}),
        (tuple[int, ...], (1, 2)),
        (set[str], {"a", "b"}),
        (frozenset[int], frozenset({1})),
        (deque[int], deque([1, 2])),
        (dict[int, str], {1: "a"}),
        (dict[uuid.UUID, bool], {uuid.UUID(int=1): True}),
        (int | str, "5"),
        (datetime | str, datetime(2024, 1, 1)),
        (int | float | None, 5.0),
        (list[Any], [1, {"a": None}]),
        (Tree, Tree(value=1, children=[Tree(value=2)])),
        (TaskHandle[int], TaskHandle(uuid.UUID(int=5))),
        (Annotated[int, Field(gt=3), ["unhashable"]], 4),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_typed_values_come_back_equal_and_of_the_same_type(annotation: Any, value: Any) -> None:
    encoded, decoded = codec_for(annotation).round_trip(value, "It")
    assert (decoded, type(decoded)) == (value, type(value))
    assert str(decoded) == str(value) or isinstance(value, set)
    assert codec_for(annotation).decode(encoded, "It") == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2,)), [1, [2]]),
        ({3}, [3]),
        (datetime(2024, 1, 1, tzinfo=UTC), "2024-01-01T00:00:00Z"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.50"), "1.50"),
        (Colour.BLUE, 2),
        (Point(1, 2.0), [1, 2.0]),
        (Address("x", date(2020, 1, 1)), {"street": "x", "since": "2020-01-01"}),
        (Tree(value=1), {"value": 1, "children": []}),
        ([Tree(value=1), (datetime(2024, 1, 1),)], [{"value": 1, "children": []}, ["2024-01-01T00:00:00"]]),
        (RootModel[list[int]]([1]), [1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_without_annotation_a_value_comes_back_as_plain_json_the_first_time_too(value: Any, expected: Any) -> None:
    encoded, decoded = plain.round_trip(value, "It")
    assert exactly(decoded) == exactly(expected)
    assert exactly(plain.decode(encoded, "It")) == exactly(expected)


@pytest.mark.parametrize("annotation", [dict, dict[str, Any], dict[str, list[Any] | int]])
def test_where_an_annotation_says_any_a_value_is_plain_json(annotation: Any) -> None:
    value = {"a": [uuid.UUID(int=1), (date(2024, 1, 1),)], "b": 1}
    assert codec_for(annotation).round_trip(value, "It")[1] == {"a": [str(uuid.UUID(int=1)), ["2024-01-01"]], "b": 1}


class Reading(BaseModel):
    value: float | None = None
    anything: Any = None
    secret: SecretStr | None = None


class Constants(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    value: float


class Text(BaseModel):
    blob: bytes


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (Any, nan, "NaN"),
        (Any, {"a": [1, -inf]}, r"at a\[1\]: NaN and infinities"),
        (Any, Decimal("NaN"), "NaN"),
        (float, nan, "NaN"),
        (float | None, inf, "NaN and infinities"),
        (list[float | None], [1.0, nan], r"at \[1\]: NaN"),
        (set[float | None], {nan}, "NaN"),
        (Decimal, Decimal("-Infinity"), "NaN and infinities"),
        (Reading, Reading(value=nan), "at value: NaN"),
        (Any, Reading(value=nan), "at value: NaN"),
        (Reading, Reading(anything={"x": (nan,)}), r"at anything\.x\[0\]: NaN"),
        (Constants, Constants(value=inf), "NaN and infinities"),
        (Any, [Constants(value=inf)], "NaN and infinities"),
        (SecretStr, SecretStr("hunter2"), "SecretStr would be stored masked"),
        (SecretBytes, SecretBytes(b"hunter2"), "SecretBytes would be stored masked"),
        (Any, {"k": SecretStr("hunter2")}, "at k: a SecretStr would be stored masked"),
        (Reading, Reading(secret=SecretStr("hunter2")), "at secret: a SecretStr would be stored masked"),
        (Any, {Reading(secret=SecretStr("hunter2")).secret}, "a SecretStr would be stored masked"),
        (str, "\ud800", "lone surrogate"),
        (Any, ["ok", {"a": "hunter2\udfff"}], r"at \[1\]\.a: a value of type str contains a lone surrogate"),
        (Any, {"\ud800": 1}, "a key of it, a value of type str, contains a lone surrogate"),
        (Any, {1: "a"}, "a key of type int would come back as a str"),
        (Any, {"a": {None: 1}}, "at a: a key of type NoneType would come back as a str"),
        (dict[str, Any], {"a": {2.5: 1}}, "at a: a key of type float"),
        (Any, b"hunter2", "annotate them as bytes, or make text of them with base64"),
        (Any, [b"\xff"], r"at \[0\]: a value of type bytes is not UTF-8"),
        (Text, Text(blob=b"\xff"), "at blob: a value of type bytes is not UTF-8"),
        (Any, object(), "a value of type object has no JSON form"),
        (Any, {"f": [len]}, r"at f\[0\]: a value of type builtin_function_or_method has no JSON form"),
        (Any, 10**5000, "cannot be"),
        (int, 10**5000, "cannot be"),
        (int, "hunter2", "cannot be read back as int: Input should be a valid integer"),
        (int, "5", "a value of type str would come back as a value of type int"),
        (None, 5, "cannot be read back as None"),
        (str | datetime, datetime(2024, 1, 1), "a value of type datetime would come back as a value of type str"),
        (Literal["a"], "hunter2", "Input should be 'a'"),
        (tuple[int, int], (1, 2, 3), "cannot be read back"),
        (Any, float("-inf"), "NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_would_not_come_back_is_refused_without_naming_the_value(
    annotation: Any, value: Any, message: str
) -> None:
    with pytest.raises(SerializationError, match=message) as caught:
        codec_for(annotation).encode(value, "The result of step 'x'")
    assert str(caught.value).startswith("The result of step 'x' cannot be ")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


class Animal(BaseModel):
    name: str


class Dog(Animal):
    breed: str


def test_a_subclass_is_refused_rather_than_cut_down_to_its_base() -> None:
    with pytest.raises(
        SerializationError, match=r"at \[1\]: a value of type Dog would come back as a value of type Animal"
    ):
        codec_for(list[Animal]).encode([Animal(name="x"), Dog(name="x", breed="y")], "It")
    assert codec_for(list[Dog | Animal]).round_trip([Dog(name="x", breed="y")], "It")[1] == [Dog(name="x", breed="y")]


class Aliased(BaseModel):
    a: int = Field(alias="A")
    b: str = Field("q", validation_alias=AliasChoices("x", "y"), serialization_alias="z")
    cache: str = Field("", exclude=True)

    @computed_field
    def double(self) -> int:
        return 2 * self.a


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    nested: Aliased
    when: datetime


def test_aliases_computed_and_excluded_fields_do_not_hinder() -> None:
    value = Strict(nested=Aliased.model_validate({"A": 1, "x": "b", "cache": "big"}), when=datetime(2024, 1, 1))
    encoded, decoded = codec_for(Strict).round_trip(value, "It")
    assert decoded == value.model_copy(update={"nested": Aliased.model_validate({"A": 1, "x": "b"})})
    assert encoded == '{"nested":{"a":1,"b":"b"},"when":"2024-01-01T00:00:00"}'
    assert codec_for(Aliased).decode('{"A":1,"y":"k"}', "It") == Aliased.model_validate({"A": 1, "y": "k"})


class Drawn(BaseModel):
    name: str
    token: str = Field(default_factory=lambda: uuid.uuid4().hex, exclude=True)


class Cached(BaseModel):
    name: str
    seen: dict[str, int] = Field(default_factory=dict, exclude=True)
    lock: Any = Field(default_factory=object, exclude=True)


def test_a_field_that_would_be_another_one_in_each_run_is_refused() -> None:
    reason = "at {}: a value of type str would come back as a different one, each time: the JSON leaves it out, and its"
    for annotation, value, place in (
        (Drawn, Drawn(name="x"), "token"),
        (list[Drawn | int], [1, Drawn(name="x")], r"\[1\].token"),
        (dict[str, tuple[Drawn, int]], {"a": (Drawn(name="x"), 1)}, r"a\[0\].token"),
    ):
        with pytest.raises(SerializationError, match=reason.format(place)):
            codec_for(annotation).encode(value, "It")
    # What is empty each time, or no data, makes no difference.
    decoded = codec_for(Cached).round_trip(Cached(name="x", seen={"a": 1}), "It")[1]
    assert (decoded.name, decoded.seen) == ("x", {})


class Revealed(BaseModel):
    secret: SecretStr

    @field_serializer("secret", when_used="json")
    def reveal(self, secret: SecretStr) -> str:
        return secret.get_secret_value()


class Strings(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")
    value: float


def test_a_models_own_configuration_can_make_a_value_storable() -> None:
    assert codec_for(Revealed).round_trip(Revealed(secret=SecretStr("s")), "It")[1] == Revealed(secret=SecretStr("s"))
    assert math.isnan(codec_for(Strings).decode('{"value":"NaN"}', "It").value)
    assert codec_for(Strings).round_trip(Strings(value=inf), "It")[1] == Strings(value=inf)


@dataclasses.dataclass(eq=False)
class Incomparable:
    numbers: list[int]
    names: set[str]


class Awkward:
    """Comparing it is an error, as with arrays."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.list_schema(core_schema.int_schema()),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.items),
        )


@given(st.sets(text, max_size=6))
def test_values_that_cannot_be_compared_are_judged_by_what_they_hold(names: set[str]) -> None:
    decoded = codec_for(Incomparable).round_trip(Incomparable([1], names), "It")[1]
    assert (decoded.numbers, decoded.names) == ([1], names)
    assert codec_for(Awkward).round_trip(Awkward([1, 2]), "It")[1].items == [1, 2]


def test_a_serializer_that_loses_something_is_noticed() -> None:
    lossy = Annotated[datetime, PlainSerializer(lambda value: value.date().isoformat())]
    with pytest.raises(SerializationError, match="would come back as a different one"):
        codec_for(lossy).encode(datetime(2024, 1, 1, 12), "It")
    growing = Annotated[Awkward, PlainSerializer(lambda value: [*value.items, 1])]
    with pytest.raises(SerializationError, match="would come back as another value"):
        codec_for(growing).encode(Awkward([1]), "It")


def test_user_serializers_and_validators_that_raise_are_serialization_errors() -> None:
    def fail(_: object) -> Any:
        raise KeyError("hunter2")

    with pytest.raises(SerializationError, match="It cannot be stored: ") as caught:
        codec_for(Annotated[int, PlainSerializer(fail)]).encode(1, "It")
    assert "hunter2" not in str(caught.value)

    from pydantic import AfterValidator

    with pytest.raises(SerializationError, match=r"It cannot be read back as .*: KeyError") as caught:
        codec_for(Annotated[int, AfterValidator(fail)]).decode("1", "It")
    assert "hunter2" not in str(caught.value)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_depth_and_cycles_are_errors_not_crashes() -> None:
    assert plain.round_trip(nested(200), "It")[1] == nested(200)
    for depth in (202, 230, 300, 100_000):
        with pytest.raises(SerializationError, match=r"nested|recursion"):
            plain.encode(nested(depth), "It")
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(SerializationError, match="contains itself"):
        plain.encode(cycle, "It")
    tree = Tree(value=1)
    tree.children.append(tree)
    with pytest.raises(SerializationError, match="contains itself"):
        codec_for(Tree).encode(tree, "It")


@pytest.mark.parametrize(
    "hostile",
    ["", "{", "[" * 100_000, "1" * 5000, "NaN", '"\\ud800"', "{'a':1}", '"\x00"', "[1] [2]", "\ud800"],
    ids=lambda value: value[:10].encode("unicode_escape").decode(),
)
@pytest.mark.parametrize("annotation", [Any, int, list[Any], Order])
def test_hostile_text_is_refused(hostile: str, annotation: Any) -> None:
    with pytest.raises(SerializationError, match="It cannot be read back"):
        codec_for(annotation).decode(hostile, "It")


def test_decoding_names_the_place_and_not_the_value() -> None:
    with pytest.raises(SerializationError) as caught:
        codec_for(dict[str, Tree]).decode('{"a b":{"value":1,"children":[{"value":"hunter2"}]}}', "It")
    assert "at ['a b'].children[0].value: Input should be a valid integer" in str(caught.value)
    assert "hunter2" not in str(caught.value)


class Unknown:
    pass


class Unfinished(BaseModel):
    later: "NotThere"  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("annotation", [Unknown, list[Unknown], Unfinished])
def test_a_type_without_json_form_is_refused_before_there_is_a_value(annotation: Any) -> None:
    with pytest.raises(SerializationError, match=r"The type .*(Unknown|Unfinished).* has no JSON form"):
        codec_for(annotation).encode(1, "It")


@pytest.mark.parametrize("fold", [0, 1])
def test_the_hour_that_occurs_twice_comes_back(fold: int) -> None:
    value = datetime(2000, 10, 29, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Belgrade"))
    for annotation, wrapped in [(datetime, value), (list[datetime], [value]), (Any, value)]:
        assert f"2000-10-29T02:30:00+0{2 - fold}:00" in codec_for(annotation).encode(wrapped, "It")


def test_codecs_are_kept_and_unions_of_another_order_are_others() -> None:
    assert codec_for(Order) is codec_for(Order)
    assert codec_for(int | str) is codec_for(int | str)
    assert codec_for(int | str) is not codec_for(str | int)
    assert repr(codec_for(Order)) == "Codec(Order)"
    assert repr(plain) == "Codec(plain JSON)"


@given(text, st.integers(0, 40))
def test_sizes_are_bytes_of_utf8(value: str, limit: int) -> None:
    size = len(value.encode())
    if size <= limit:
        check_size(value, limit, "It")
    else:
        with pytest.raises(PayloadTooLarge, match=f"It has {size} bytes as JSON and at most {limit} are allowed"):
            check_size(value, limit, "It")


def test_the_default_limit_is_16_mib() -> None:
    check_size("x" * DEFAULT_MAX_PAYLOAD_BYTES, DEFAULT_MAX_PAYLOAD_BYTES, "It")
    with pytest.raises(PayloadTooLarge, match="16777217 bytes as JSON and at most 16777216"):
        check_size("x" * (DEFAULT_MAX_PAYLOAD_BYTES + 1), DEFAULT_MAX_PAYLOAD_BYTES, "It")


# -- what a model has set, zones, and types that cannot be read back


class Patch(BaseModel):
    name: str | None = None
    tags: list[str] = []
    created: datetime = datetime(2020, 1, 1)
    inner: "Patch | None" = None


class Made(BaseModel):
    id: uuid.UUID = Field(default_factory=uuid.uuid4)
    note: str | None = None


class Card(BaseModel):
    kind: Literal["card"] = "card"
    number: int = 1


class Cash(BaseModel):
    kind: Literal["cash"] = "cash"
    number: int = 1


class Order2(BaseModel):
    payment: Card | Cash = Field(discriminator="kind")
    note: str = ""


def test_fields_that_were_not_set_come_back_not_set() -> None:
    for value, dumped in (
        (Patch(), {}),
        (Patch(name=None), {"name": None}),
        (Patch(inner=Patch(tags=[])), {"inner": {"tags": []}}),
        (Patch.model_validate({"name": "x", "inner": {"name": None}}), {"name": "x", "inner": {"name": None}}),
    ):
        decoded = codec_for(Patch).round_trip(value, "It")[1]
        assert decoded == value
        assert decoded.model_dump(exclude_unset=True) == dumped
        [listed] = codec_for(list[Patch]).round_trip([value], "It")[1]
        assert listed.model_dump(exclude_unset=True) == dumped
    # An assignment sets a field; a change of a default in place has to be stored as well.
    patch = Patch()
    patch.name = "y"
    patch.tags.append("z")
    decoded = codec_for(Patch).round_trip(patch, "It")[1]
    assert decoded == patch
    assert decoded.model_dump(exclude_unset=True) == {"name": "y", "tags": ["z"]}


def test_fields_that_would_be_made_anew_are_stored_and_the_others_stay_not_set() -> None:
    codec = codec_for(dict[str, list[Made]])
    value = {"a": [Made(), Made(note=None)]}
    for _ in range(2):
        decoded = codec.round_trip(value, "It")[1]
        assert decoded == value
        assert [made.model_fields_set for made in decoded["a"]] == [{"id"}, {"id", "note"}]
    for payment in (Card(), Cash(number=2)):
        order = codec_for(Order2).round_trip(Order2(payment=payment), "It")[1]
        assert order == Order2(payment=payment)
        assert order.model_fields_set == {"payment"}


def test_models_in_the_place_of_any_keep_all_fields_in_their_json() -> None:
    class Open(BaseModel):
        content: Any
        note: str = ""

    decoded = codec_for(Open).round_trip(Open(content=[Tree(value=1)]), "It")[1]
    assert decoded.content == [{"value": 1, "children": []}]


class Timetable(BaseModel):
    model_config = ConfigDict(strict=True)
    start: AwareDatetime
    stops: dict[datetime, list[datetime]] = {}
    back: "Timetable | None" = None


def test_names_of_zones_come_back() -> None:
    paris = datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Paris"))
    text, decoded = codec_for(datetime).round_trip(paris, "It")
    assert text == '"2024-07-01T12:00:00+02:00[Europe/Paris]"'
    assert decoded.tzinfo is paris.tzinfo
    assert (decoded + timedelta(days=180)).utcoffset() == timedelta(hours=1)
    table = Timetable(start=paris, stops={paris: [paris]}, back=Timetable(start=paris))
    decoded = codec_for(list[Timetable]).round_trip([table], "It")[1][0]
    assert decoded == table
    [(key, [stop])] = decoded.stops.items()
    assert {decoded.start.tzinfo, key.tzinfo, stop.tzinfo, decoded.back.start.tzinfo} == {paris.tzinfo}
    # The second time of an hour, and a time that the clock skips, stay where they are on the clock.
    for local in (
        datetime(2024, 10, 27, 2, 30, fold=1),
        datetime(2024, 3, 31, 2, 30),
        datetime(2024, 3, 31, 2, 30, fold=1),
    ):
        there = local.replace(tzinfo=paris.tzinfo)
        decoded = codec_for(datetime).round_trip(there, "It")[1]
        assert (decoded.replace(tzinfo=None), decoded.utcoffset()) == (local, there.utcoffset())
    # As an earlier version has stored it, and as UTC and offsets are.
    assert codec_for(datetime).decode('"2024-07-01T12:00:00+02:00"', "It") == paris
    for plain_time in ("2024-01-01T00:00:00", "2024-01-01T00:00:00Z", "2024-01-01T00:00:00+05:45"):
        value = datetime.fromisoformat(plain_time)
        assert codec_for(datetime).round_trip(value, "It") == (f'"{plain_time}"', value)
    for hostile in ("Nowhere/Land", "../../etc/passwd", ""):
        with pytest.raises(SerializationError, match="its time zone is not known on this machine"):
            codec_for(datetime).decode(f'"2024-07-01T12:00:00+02:00[{hostile}]"', "It")
    assert codec_for(datetime | str).round_trip(paris, "It")[1] == paris
    assert codec_for(datetime | str).round_trip("later", "It")[1] == "later"


class Level(enum.IntEnum):
    LOW = 1


class Name(enum.StrEnum):
    A = "a"


class Private(BaseModel):
    value: int = 0
    _cache: dict[str, int] = PrivateAttr(default_factory=dict)


class Restored(BaseModel):
    _state: int = PrivateAttr(0)

    @model_serializer
    def store(self) -> dict[str, int]:
        return {"state": self._state}

    @model_validator(mode="wrap")
    @classmethod
    def restore(cls, value: Any, handler: Any) -> Any:
        if isinstance(value, cls):
            return value
        restored = handler({})
        restored._state = value.get("state", 0)
        return restored


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (Private, "'_cache', a private attribute of Private, would not be stored"),
        (dict[str, list[Private | None]], "a private attribute of Private"),
        (Level | int, "in a union with int, a member of Level would come back as its value"),
        (int | Level | None, "member of Level"),
        (float | Level, "in a union with float, a member of Level"),
        (list[Name | str], "in a union with str, a member of Name"),
        (Colour | int, "member of Colour"),
        (Colour | str, "member of Colour"),
    ],
    ids=repr,
)
def test_types_that_cannot_be_read_back_are_refused_before_there_is_a_value(annotation: Any, message: str) -> None:
    with pytest.raises(SerializationError, match=message) as caught:
        codec_for(annotation)
    assert str(caught.value).startswith("The type ")


@pytest.mark.parametrize("annotation", [Level | str, Level | None, Name | int, Level | Name, int | str | None])
def test_unions_whose_members_can_be_told_apart_are_fine(annotation: Any) -> None:
    for value in (Level.LOW, Name.A):
        if type(value) in annotation.__args__:
            assert type(codec_for(annotation).round_trip(value, "It")[1]) is type(value)


def test_private_attributes_that_a_model_stores_itself_come_back() -> None:
    value = Restored()
    value._state = 5
    assert codec_for(Restored).round_trip(value, "It")[1]._state == 5


@dataclasses.dataclass(frozen=True)
class Day:
    day: str | date


class Days(BaseModel):
    days: set[str | date]


class Member(BaseModel, frozen=True):
    name: str
    note: str = Field(default="", exclude=True)


@dataclasses.dataclass
class Loose:
    numbers: Any
    count: int = 0


@pytest.mark.parametrize(
    ("annotation", "value", "place"),
    [
        (int | str, True, ""),
        (int, True, ""),
        (float, False, ""),
        (list[int | str], ["a", 1, True], r"at \[2\]: "),
        (dict[str, int], {"a": True}, "at a: "),
        (set[int | str], {True, 2}, ""),
        (tuple[int | str, ...], (True,), r"at \[0\]: "),
        (Loose, Loose(numbers=[1], count=True), "at count: "),
        (int, Level.LOW, ""),
        (list[str], [Name.A], r"at \[0\]: "),
        (bool | str, 1, ""),
        (date | str, "2024-01-01", ""),
        (list[date | str], ["x", "2024-01-01"], r"at \[1\]: "),
        (set[str | date], {date(2024, 1, 1)}, ""),
        (set[date | str], {"2024-01-01"}, ""),
        (frozenset[str | Decimal], frozenset({Decimal(1)}), ""),
        (set[str | datetime], {datetime(2024, 1, 1)}, ""),
        (set[str | timedelta], {timedelta(1)}, ""),
        (set[tuple[str | date, int]], {(date(2024, 1, 1), 1)}, r"at \[0\]: "),
        (set[Day], {Day(date(2024, 1, 1))}, "at day: "),
        (Days, Days(days={date(2024, 1, 1)}), "at days: "),
        (list[int] | set[int], {3}, ""),
        (list[int] | frozenset[int], frozenset({3}), ""),
        (list[int], {3}, ""),
    ],
    ids=repr,
)
def test_values_that_would_be_taken_for_others_are_refused(annotation: Any, value: Any, place: str) -> None:
    with pytest.raises(
        SerializationError, match=rf"It cannot be stored: {place}a value of type \w+ would come back as"
    ):
        codec_for(annotation).encode(value, "It")


def test_numbers_and_texts_that_mean_the_same_are_not_refused() -> None:
    for annotation, value in ((float, 5), (list[float], [1, 2.5]), (Name, "a"), (Any, [True, Level.LOW]), (bool, True)):
        assert codec_for(annotation).round_trip(value, "It")[1] == value


def test_members_of_sets_may_change_as_other_values_may() -> None:
    members = {Member(name=name, note=name) for name in "abc"}
    assert codec_for(set[Member]).round_trip(members, "It")[1] == {Member(name=name) for name in "abc"}
    with pytest.raises(SerializationError, match="a value of type set would come back with another number of members"):
        codec_for(set[Member]).encode({Member(name="a", note=note) for note in "ab"}, "It")
    assert codec_for(Any).round_trip({date(2024, 1, 1)}, "It")[1] == ["2024-01-01"]
    assert codec_for(dict[str, Any]).round_trip({"a": {3}}, "It")[1] == {"a": [3]}


def test_what_json_does_not_say_of_a_pattern_or_deque_is_refused() -> None:
    assert codec_for(re.Pattern).round_trip(re.compile("(?i)a"), "It")[1].flags & re.IGNORECASE
    assert codec_for(deque[int]).round_trip(deque([1]), "It")[1] == deque([1])
    with pytest.raises(SerializationError, match="the flags of a pattern are not stored, write them into it"):
        codec_for(re.Pattern).encode(re.compile("a", re.IGNORECASE), "It")
    with pytest.raises(SerializationError, match=r"at \[0\]: a deque would come back without its maxlen"):
        codec_for(list[deque[int]]).encode([deque([1], maxlen=3)], "It")
