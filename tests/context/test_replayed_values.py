"""What a step gave comes back from the database as it was: equal, and of the same types."""

import dataclasses
import enum
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from durable_sa import TaskContext, task
from tests.context.support import Crash, Runner


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Size(enum.IntEnum):
    SMALL = 1


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass
class Line:
    ends: tuple[Point, Point]
    drawn: datetime | None = None


class Order(TypedDict):
    id: uuid.UUID
    lines: list[Line]


class Item(BaseModel):
    name: str
    price: Decimal
    tags: set[str] = Field(default_factory=set)


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    good: bool = True


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in content and in type, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one.hex() == other.hex()
    if dataclasses.is_dataclass(one) or isinstance(one, BaseModel):
        return one == other and same(vars(one), vars(other))
    return bool(one == other)


VALUES: list[tuple[Any, Any]] = [
    (int, 2**53 + 1),
    (int, -(2**70)),
    (float, -0.0),
    (float, 5e-324),
    (float, 0.1 + 0.2),
    (float, 3),
    (bool, True),
    (str, "NUL \x00, quotes ' \" \\, \u2028 and 🙂"),
    (bytes, b"\x00\xff not text"),
    (None, None),
    (Decimal, Decimal("1.10")),
    (Decimal, Decimal("1E+30")),
    (uuid.UUID, uuid.UUID(int=7)),
    (datetime, datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)),
    (datetime, datetime(2026, 3, 29, 1, 30, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
    (datetime, datetime(2026, 3, 29, 1, 30)),
    (date, date(1, 1, 1)),
    (time, time(23, 59, 59, 999999)),
    (timedelta, timedelta(days=-1, microseconds=1)),
    (Colour, Colour.BLUE),
    (Size, Size.SMALL),
    (Point, Point(1, 2.0)),
    (tuple[int, ...], (1, 2)),
    (list[tuple[str, int]], [("a", 1)]),
    (set[int], {3, 1, 2}),
    (frozenset[str], frozenset({"b", "a"})),
    (dict[int, str], {1: "a", -1: "b"}),
    (dict[str, list[Decimal]], {"z": [Decimal(1)], "a": []}),
    (dict[Colour, Point], {Colour.RED: Point(0, 0.5)}),
    (Line, Line((Point(0, 0.0), Point(1, 1.0)), datetime(2026, 1, 1, tzinfo=UTC))),
    (Order, {"id": uuid.UUID(int=1), "lines": [Line((Point(0, 0.0), Point(1, 1.0)))]}),
    (Item, Item(name="tea", price=Decimal("2.50"), tags={"hot"})),
    (list[Item], [Item(name="tea", price=Decimal("2.50"))]),
    (int | str, "7"),
    (int | str, 7),
    (int | float | None, None),
    (Cat | Dog, Dog(good=False)),
    (Literal["a", "b"], "b"),
    (Any, {"plain": [1, 2.5, None, True, {"deep": "x"}]}),
    (object, [1, [2, [3]]]),
]


async def test_typed_values_come_back_as_they_were(run: Runner):
    seen: dict[int, list[Any]] = {1: [], 2: []}

    def maker(annotation: Any, value: Any) -> Any:
        async def make():
            return value

        make.__annotations__["return"] = annotation
        return make

    @task
    async def work(ctx: TaskContext) -> None:
        for position, (annotation, value) in enumerate(VALUES):
            seen[ctx.attempt].append(await ctx.step(f"make-{position}", maker(annotation, value)))
        if ctx.attempt == 1:
            raise Crash

    await run(work)
    for (annotation, value), first, second in zip(VALUES, seen[1], seen[2], strict=True):
        assert same(first, second), f"{first!r} was replayed as {second!r}"
        assert first == value, annotation
        if not (annotation is float and type(value) is int):
            assert same(first, value), f"{value!r} was given and {first!r} was seen"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ((1, 2), [1, 2]),
        ([(1,), {"a": (2,)}], [[1], {"a": [2]}]),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00Z"),
        (Item(name="tea", price=Decimal("2.50")), {"name": "tea", "price": "2.50", "tags": []}),
        (Decimal("1.50"), "1.50"),
        (Colour.RED, "red"),
        (2**70, 2**70),
    ],
    ids=repr,
)
async def test_values_without_an_annotation_are_plain_json_the_first_time_too(run: Runner, given: Any, plain: Any):
    seen: list[Any] = []

    async def make():
        return given

    @task
    async def work(ctx: TaskContext) -> None:
        seen.append(await ctx.step("make", make))
        if ctx.attempt == 1:
            raise Crash

    await run(work)
    assert same(seen, [plain, plain])


async def test_annotations_may_name_types_that_are_local(run: Runner):
    class Local(BaseModel):
        value: int

    seen: list[Any] = []

    async def make(value: int) -> "Local":
        return Local(value=value)

    @task
    async def work(ctx: TaskContext, params: "Local") -> "Local":
        seen.append(await ctx.step("make", make, params.value + 1))
        if ctx.attempt == 1:
            raise Crash
        return seen[0]

    assert await run(work, Local(value=1)) == Local(value=2)
    assert seen == [Local(value=2)] * 2


async def test_result_that_does_not_fit_its_annotation_fails_the_task_at_once(run: Runner):
    async def make() -> int:
        return "not a number, secret"

    @task
    async def work(ctx: TaskContext) -> int:
        return await ctx.step("make", make)

    error = await run.failure(work)
    assert error.name == "SerializationError"
    assert "'make'" in error.message
    assert "secret" not in error.message


async def test_params_headers_and_output_are_typed_in_every_attempt(run: Runner):
    seen: list[Any] = []

    @task
    async def work(ctx: TaskContext, params: Line) -> Order:
        seen.append((params, dict(ctx.headers)))
        if ctx.attempt == 1:
            raise Crash
        return {"id": uuid.UUID(int=1), "lines": [params]}

    line = Line((Point(0, 0.0), Point(1, 1.0)), datetime(2026, 1, 1, tzinfo=UTC))
    output = await run(work, line, headers={"tenant": "a", "depth": [1, {"x": None}]})
    assert [headers for _, headers in seen] == [{"tenant": "a", "depth": [1, {"x": None}]}] * 2
    assert same([params for params, _ in seen], [line] * 2)
    assert same(output, {"id": uuid.UUID(int=1), "lines": [line]})
