"""Objects of mapped classes, and values that come back as text: messages that say what to pass or annotate instead."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from durable_sa import InvalidConfiguration, InvalidTaskParams, SerializationError, TaskContext, task
from durable_sa.steps import result_codec
from durable_sa.testing import task_context
from durable_sa.validation import seconds, timestamp


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Parcel(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    order: Order


async def unannotated(ctx: TaskContext, order): ...
async def number(ctx: TaskContext, order: int) -> None: ...
async def parcel(ctx: TaskContext, parcel: Parcel) -> None: ...


@pytest.mark.parametrize(
    ("function", "params", "error", "message"),
    [
        (unannotated, Order(id=7), SerializationError, "a value of type Order belongs to a session, pass its primary"),
        (unannotated, {"all": [Order(id=7)]}, SerializationError, r"at all\[0\]: a value of type Order belongs to"),
        (number, Order(id=7), InvalidTaskParams, "an object of type Order belongs to a session, pass its primary key"),
        (parcel, Parcel(order=Order(id=7)), SerializationError, "at order: a value of type Order belongs to a session"),
    ],
)
def test_an_object_of_the_orm_as_params(
    function: Callable[..., Any], params: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        task(function).encode_params(params)


@pytest.mark.parametrize("annotation", [Order, list[Order], dict[str, Order | None]])
def test_a_mapped_class_as_annotation_is_refused_where_the_task_is_registered(annotation: Any) -> None:
    async def ship(ctx: TaskContext, order: annotation) -> None: ...

    with pytest.raises(SerializationError, match=r"Order is a mapped class; its objects .* pass the primary key"):
        task(ship).check_types()


async def test_an_object_of_the_orm_in_a_step() -> None:
    ctx = task_context()

    async def load() -> Any:
        return Order(id=7)

    async def ship(order: Any) -> None: ...

    with pytest.raises(SerializationError, match="The result of step 'load'.* belongs to a session, pass its primary"):
        await ctx.step("load", load)
    with pytest.raises(SerializationError, match="Order belongs to a session, pass its primary key"):
        await ctx.step("ship", ship, Order(id=7))


async def test_a_time_without_an_annotation_is_logged_once_and_refused_where_a_time_is_needed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ctx = task_context()

    def due():
        return datetime(2030, 1, 1, tzinfo=UTC)

    def due_annotated() -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC)

    caplog.set_level(logging.WARNING, "durable_sa")
    for _ in range(2):
        found = await ctx.step("due without annotation", due)
    assert found == "2030-01-01T00:00:00Z"
    assert [record.getMessage() for record in caplog.records] == [
        "the result of step 'due without annotation' is a datetime and comes back as text: annotate it as datetime"
    ]
    with pytest.raises(InvalidConfiguration, match=r"a datetime, not str\. .*annotate the function, `-> datetime`"):
        await ctx.sleep_until("until due", found)
    await ctx.sleep_until("until due", await ctx.step("due", due_annotated))
    assert len(caplog.records) == 1


def test_durations_and_times_as_text_name_the_annotation() -> None:
    with pytest.raises(InvalidConfiguration, match="`-> timedelta`"):
        seconds("PT3S", "duration")
    with pytest.raises(InvalidConfiguration, match="not int.$"):
        timestamp(3, "when")


def test_what_is_annotated_as_anything_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    def anything() -> Any: ...
    def nothing(): ...

    result_codec(anything).encode(Decimal(1), "a price of any kind")
    result_codec(nothing).encode("text", "a text")
    assert caplog.records == []
    result_codec(nothing).encode(timedelta(1), "a day")
    assert len(caplog.records) == 1
