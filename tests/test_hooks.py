"""What hooks see and may do: each spawn, run and step once, replays never, and nothing where there are none."""

import asyncio
import inspect
import re
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import (
    Durable,
    Hooks,
    InvalidName,
    OutgoingSpawn,
    RetryStrategy,
    Spawn,
    SyncTaskContext,
    TaskContext,
    TaskStatus,
    UserError,
    hooks,
    step,
    task,
)
from durable_sa.execution.hooks import HookChain
from durable_sa.testing import run_until_idle, time_travel

from .support import eventually

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Journal(Hooks):
    """Writes down what it is called for."""

    def __init__(self, name: str = "", into: list[str] | None = None) -> None:
        self.name = name
        self.entries: list[str] = [] if into is None else into

    def on_spawn(self, spawn: OutgoingSpawn) -> None:
        self.entries.append(f"{self.name}spawn {spawn.task_name}")

    @asynccontextmanager
    async def around_task(self, ctx: TaskContext) -> AsyncIterator[None]:
        self.entries.append(f"{self.name}enter {ctx.task_name}")
        try:
            yield
        except BaseException as error:
            self.entries.append(f"{self.name}leave {ctx.task_name}: {type(error).__name__}, {ctx.signal!r}")
            raise
        self.entries.append(f"{self.name}leave {ctx.task_name}")

    @contextmanager
    def around_step(self, ctx: TaskContext, name: str) -> Iterator[None]:
        self.entries.append(f"{self.name}begin {name}")
        try:
            yield
        except BaseException as error:
            self.entries.append(f"{self.name}end {name}: {type(error).__name__}")
            raise
        self.entries.append(f"{self.name}end {name}")


@task
async def leaf(ctx: TaskContext) -> str:
    return str(ctx.headers.get("tenant"))


def client(engine: AsyncEngine, *used: Hooks) -> Durable:
    return Durable(engine, hooks=used, tasks=[leaf], default_retry_strategy=RetryStrategy.fixed(0))


class Tenants(Hooks):
    def on_spawn(self, spawn: OutgoingSpawn) -> None:
        self.seen = spawn
        spawn.headers["tenant"] = tenant.get()


@pytest.mark.slow
async def test_every_way_to_spawn_is_seen(engine: AsyncEngine) -> None:
    journal = Journal()
    async with client(engine, journal) as durable, AsyncSession(engine) as session:

        @durable.task
        async def parent(ctx: TaskContext) -> None:
            await ctx.spawn("child", leaf)
            await ctx.spawn_by_name("child", "leaf")
            await ctx.sleep_for("replayed after this", 0.05)

        await durable.spawn(leaf)
        await durable.spawn_by_name("leaf")
        await durable.spawn_with(session, leaf)
        await durable.spawn_by_name_with(session, "leaf")
        await durable.spawn_many([(leaf, None), (leaf, None), Spawn(leaf)])
        await durable.spawn_many_with(session, [(leaf, None)])
        await session.rollback()
        assert journal.entries == ["spawn leaf"] * 8
        journal.entries.clear()
        await durable.create_schedule("hourly", task=leaf, cron_expression="0 * * * *")
        assert journal.entries == []
        await durable.trigger_schedule("hourly")
        assert journal.entries == ["spawn leaf"]
        async with time_travel(durable) as clock:
            await clock.advance(3600)
            await run_until_idle(durable)
            assert journal.entries.count("spawn leaf") == 2
            journal.entries.clear()
            spawned = await durable.spawn(parent)
            await clock.advance(0)
            await durable_completes(durable, spawned)
        assert journal.entries.count("spawn leaf") == 2
        assert journal.entries.count("enter parent") == 2


async def durable_completes(durable: Durable, spawned: Any) -> Any:
    async with durable.worker():
        return await durable.wait_for_result(spawned, timeout=20)


async def test_headers_may_be_added(engine: AsyncEngine) -> None:
    hook = Tenants()
    async with client(engine, hook) as durable:
        tenant.set("acme")
        options: Any = {"headers": {"kept": 1}, "queue_name": "other", "priority": 3}
        await durable.create_queue("other")
        spawned = await durable.spawn(leaf, **options)
        assert (hook.seen.task_id, hook.seen.task_name, hook.seen.queue_name) == (spawned.task_id, "leaf", "other")
        assert hook.seen.options == options
        assert hook.seen.headers == {"kept": 1, "tenant": "acme"}
        assert options["headers"] == {"kept": 1}
        await run_until_idle(durable, queue_names=["other"])
        result = await durable.get_task_result(spawned)
        assert result is not None
        assert result.output == "acme"


async def test_a_hook_may_refuse_a_spawn_and_keeps_to_the_rules(engine: AsyncEngine) -> None:
    class Refusing(Hooks):
        def on_spawn(self, spawn: OutgoingSpawn) -> None:
            if spawn.options.get("priority"):
                raise PermissionError
            spawn.headers["durable::mine"] = 1

    async with client(engine, Refusing()) as durable:
        with pytest.raises(PermissionError):
            await durable.spawn(leaf, priority=1)
        with pytest.raises(InvalidName, match="reserved"):
            await durable.spawn(leaf)
        assert await durable.count_unclaimed_ready_tasks() == 0


async def test_runs_and_steps_are_wrapped_once_each_first_hook_outermost(engine: AsyncEngine) -> None:
    entries: list[str] = []
    async with client(engine, Journal("a ", entries), Journal("b ", entries)) as durable:

        @durable.task
        async def worked(ctx: TaskContext) -> int:
            return await ctx.step("add", lambda: 1)

        assert (await durable_completes(durable, await durable.spawn(worked))).output == 1
    assert entries == [
        "a spawn worked",
        "b spawn worked",
        "a enter worked",
        "b enter worked",
        "a begin add",
        "b begin add",
        "b end add",
        "a end add",
        "b leave worked",
        "a leave worked",
    ]


async def test_a_suspension_unwinds_and_replays_do_not_count(engine: AsyncEngine) -> None:
    journal = Journal()
    async with client(engine, journal) as durable:

        async def flaky() -> int:
            tries.append(1)
            if len(tries) < 2:
                raise ConnectionError
            return len(tries)

        tries: list[int] = []
        flaky_step = step(max_attempts=2, retry_strategy=RetryStrategy.fixed(0))(flaky)

        @durable.task
        async def worked(ctx: TaskContext) -> int:
            number = await ctx.step("flaky", flaky_step)
            await ctx.sleep_for("nap", 0.05)
            return number

        assert (await durable_completes(durable, await durable.spawn(worked))).output == 2
    assert journal.entries == [
        "spawn worked",
        "enter worked",
        "begin flaky",
        "end flaky: ConnectionError",
        "begin flaky",
        "end flaky",
        "leave worked: CancelledError, Suspended()",
        "enter worked",
        "leave worked",
    ]


async def test_transactions_are_steps(engine: AsyncEngine) -> None:
    journal = Journal()
    async with client(engine, journal) as durable:

        @durable.task
        async def worked(ctx: TaskContext) -> int:
            return await ctx.transaction("count", count)

        async def count(session: AsyncSession) -> int:
            return 1

        await durable_completes(durable, await durable.spawn(worked))
    assert journal.entries[2:4] == ["begin count", "end count"]


async def test_exceptions_pass_through(engine: AsyncEngine) -> None:
    journal = Journal()
    async with client(engine, journal) as durable:

        @durable.task
        async def failing(ctx: TaskContext) -> None:
            raise UserError("no")

        result = await durable_completes(durable, await durable.spawn(failing))
        assert (result.status, result.error.message) == (TaskStatus.FAILED, "no")
    assert journal.entries[-1] == "leave failing: UserError, None"


@pytest.mark.parametrize("place", ["on the way in", "on the way out", "swallowed", "swallowed in a step"])
async def test_what_goes_wrong_in_a_hook_fails_the_task(engine: AsyncEngine, place: str) -> None:
    class Faulty(Hooks):
        @asynccontextmanager
        async def around_task(self, ctx: TaskContext) -> AsyncIterator[None]:
            if place == "on the way in":
                raise ConnectionError(place)
            try:
                yield
            except ConnectionError:
                if place != "swallowed":
                    raise
            if place == "on the way out":
                raise ConnectionError(place)

        @contextmanager
        def around_step(self, ctx: TaskContext, name: str) -> Generator[None]:
            try:
                yield
            except ConnectionError:
                if place != "swallowed in a step":
                    raise

    async with client(engine, Faulty()) as durable:

        @durable.task(max_attempts=1)
        async def worked(ctx: TaskContext) -> None:
            if place.startswith("swallowed"):
                await ctx.step("fail", fail)

        async def fail() -> None:
            raise ConnectionError

        result = await durable_completes(durable, await durable.spawn(worked))
    assert result.status is TaskStatus.FAILED
    expected = "suppressed by a hook" if place.startswith("swallowed") else place
    assert expected in result.error.message


async def test_context_variables_reach_all_of_a_task(engine: AsyncEngine) -> None:
    class Entering(Hooks):
        @asynccontextmanager
        async def around_task(self, ctx: TaskContext) -> AsyncIterator[None]:
            await asyncio.sleep(0)
            tenant.set(str(ctx.headers["tenant"]))
            yield

        @contextmanager
        def around_step(self, ctx: TaskContext, name: str) -> Iterator[None]:
            threads.append(threading.current_thread().name.split(":")[0])
            token = tenant.set(tenant.get() + " in a step")
            yield
            tenant.reset(token)

    threads: list[str] = []
    async with client(engine, Entering()) as durable:

        @durable.task
        async def asynchronous(ctx: TaskContext) -> list[str]:
            async def branch() -> str:
                return tenant.get()

            steps = [await ctx.step("thread", tenant.get), await ctx.step("loop", branch), await branch()]
            return [*steps, *await asyncio.gather(branch(), branch())]

        @durable.task
        def synchronous(ctx: SyncTaskContext) -> list[str]:
            return [tenant.get(), ctx.step("inline", tenant.get), tenant.get()]

        spawned = [await durable.spawn(each, headers={"tenant": "acme"}) for each in (asynchronous, synchronous)]
        outputs = [(await durable_completes(durable, each)).output for each in spawned]
    inside = "acme in a step"
    assert outputs == [[inside, inside, "acme", "acme", "acme"], ["acme", inside, "acme"]]
    assert sorted(threads).count("durable") == 1
    assert tenant.get() == "nobody"


async def test_cancelled_tasks_leave_their_hooks(engine: AsyncEngine) -> None:
    journal = Journal()
    async with client(engine, journal) as durable:
        running = asyncio.Event()

        @durable.task
        async def endless(ctx: TaskContext) -> None:
            running.set()
            await asyncio.Event().wait()

        spawned = await durable.spawn(endless)
        async with durable.worker():
            await running.wait()
            await durable.cancel_task(spawned)
            # A worker that shuts down before it has noticed would release the run instead.
            await eventually(lambda: journal.entries[-1].startswith("leave"))
    assert journal.entries[-1] == "leave endless: CancelledError, TaskCancelled()"


def test_what_is_not_overridden_is_not_called() -> None:
    durable = Durable(hooks=[Tenants(), Hooks()])
    assert [type(hook.__self__) for hook in durable.hooks.on_spawn] == [Tenants]
    assert durable.hooks.around_task == durable.hooks.around_step == ()
    assert Durable().hooks == HookChain()
    with pytest.raises(TypeError, match="derives from Hooks, not object"):
        Durable(hooks=[object()])  # type: ignore[list-item]


async def test_the_example_of_the_documentation_works(engine: AsyncEngine) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(hooks) or "", re.DOTALL)
    names: dict[str, Any] = {"engine": engine}
    exec(code.replace("Durable(", "Durable(engine, "), names)
    durable: Durable = names["durable"]
    variable: ContextVar[str] = names["tenant"]

    async with durable:

        @durable.task
        async def who(ctx: TaskContext) -> str:
            return str(variable.get())

        with pytest.raises(LookupError):
            await durable.spawn(who)
        token = variable.set("acme")
        spawned = await durable.spawn(who)
        variable.reset(token)
        assert (await durable_completes(durable, spawned)).output == "acme"
