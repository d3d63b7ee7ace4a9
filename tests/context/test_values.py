"""Values of params and steps as a task sees them, and types that are refused before anything runs."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import BaseModel, PrivateAttr

from durable_sa import Durable, SerializationError, TaskContext, step, task
from tests.context.support import Crash, Runner


class Patch(BaseModel):
    name: str | None = None
    at: datetime | None = None
    city: str | None = None


class Private(BaseModel):
    _token: str = PrivateAttr("")


class Level(enum.IntEnum):
    LOW = 1


async def test_fields_that_were_set_and_zones_pass_params_steps_and_children(run: Runner):
    zone = ZoneInfo("Europe/Paris")

    async def change(patch: Patch) -> Patch:
        return patch

    @task("child")
    async def child(ctx: TaskContext, params: Patch) -> Patch:
        return params

    @task("work")
    async def work(ctx: TaskContext, params: Patch) -> list[Any]:
        changed = await ctx.step("change", change, params)
        joined = await ctx.join(await ctx.spawn("child", child, changed))
        if ctx.attempt == 1:
            raise Crash
        assert {patch.at.tzinfo for patch in (params, changed, joined) if patch.at is not None} == {zone}
        return [sorted(patch.model_dump(exclude_unset=True)) for patch in (params, changed, joined)]

    run.durable.register(child)
    patch = Patch(name=None, at=datetime(2024, 7, 1, 12, tzinfo=zone))
    assert await run(work, patch) == [["at", "name"]] * 3


def test_types_that_cannot_be_read_back_are_refused_at_registration():
    async def takes(ctx: TaskContext, params: Private) -> None: ...

    async def returns(ctx: TaskContext) -> dict[str, Level | int]:
        return {}

    async def unknown(ctx: TaskContext, params: DefinedLater) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for function, message in ((takes, "'_token', a private attribute of Private"), (returns, "a member of Level")):
        durable: Durable[Any] = Durable()
        with pytest.raises(SerializationError, match=message):
            durable.task(function)
        with pytest.raises(SerializationError, match=message):
            Durable(tasks=[task(function)])
        assert durable.tasks == {}
    Durable(tasks=[task(unknown)])
    with pytest.raises(SerializationError, match="'_token', a private attribute"):

        @step
        def make() -> Private:
            return Private()
