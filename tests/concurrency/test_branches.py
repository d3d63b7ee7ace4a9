"""The branches of a run: their paths, when they only wait, and how they end. On every event loop that is installed."""

import asyncio
import contextlib
import contextvars
import gc
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import threading
import types
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest

from durable_sa.concurrency import blocking, branches, suspension
from durable_sa.concurrency.branches import current_branch, detached
from durable_sa.concurrency.task_factory import BranchExit, install, uninstall
from durable_sa.concurrency.tree import BranchTree
from durable_sa.errors import InvalidState

Path = tuple[int | str, ...]
AnyTask = asyncio.Task[Any]

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
if sys.version_info >= (3, 12):

    def eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    LOOPS["eager"] = eager_loop
if importlib.util.find_spec("uvloop"):
    LOOPS["uvloop"] = importlib.import_module("uvloop").new_event_loop


def on_every_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs `test` with the task factory installed, and fails it for anything that the event loop logs."""

    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], **fixtures: object) -> None:
        complaints: list[dict[str, Any]] = []
        before = sys.getrecursionlimit(), len(branches.branch_of)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            loop = runner.get_loop()
            loop.set_exception_handler(lambda _, complaint: complaints.append(complaint))
            install(loop)
            runner.run(asyncio.wait_for(test(**fixtures), 30))
            uninstall(loop)
        gc.collect()
        assert complaints == []
        assert (sys.getrecursionlimit(), len(branches.branch_of)) == before

    parameters = inspect.signature(test).parameters.values()
    loop_factory = inspect.Parameter("loop_factory", inspect.Parameter.KEYWORD_ONLY)
    vars(run)["__signature__"] = inspect.Signature(
        [loop_factory, *(p.replace(kind=p.KEYWORD_ONLY) for p in parameters)]
    )
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return pytest.mark.parametrize("loop_factory", [pytest.param(make, id=name) for name, make in LOOPS.items()])(run)


class Run:
    """A run of `body`, and whether it has become quiescent."""

    def __init__(self, body: "Callable[[Run], Coroutine[Any, Any, object]]", *, grace: float = 60) -> None:
        self.calls = 0
        self.quiescent = asyncio.Event()
        self.waits: list[asyncio.Future[Any]] = []
        self.branches = BranchTree(on_quiescent=self._on_quiescent, grace=grace)
        self.root = self.branches.start(body(self))

    def _on_quiescent(self) -> None:
        self.calls += 1
        self.quiescent.set()

    def wait(self) -> Coroutine[Any, Any, Any]:
        """A durable wait."""
        self.waits.append(asyncio.get_running_loop().create_future())
        return self.branches.wait(self.waits[-1])

    async def is_quiescent(self, within: float = 10) -> bool:
        try:
            async with asyncio.timeout(within):
                await self.quiescent.wait()
        except TimeoutError:
            return False
        return True

    async def end(self) -> None:
        assert await self.branches.unwind() == []
        assert self.branches.tasks == set()


async def turns(count: int) -> None:
    """Lets the event loop turn `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await turns(1)


def unawaited(coro: Coroutine[Any, Any, Any]) -> None:
    """Creates a task that nobody looks at."""
    task = asyncio.create_task(coro)
    del task


async def path() -> Path:
    await asyncio.sleep(0)
    return current_branch().path


async def result_of(body: Callable[[Run], Coroutine[Any, Any, Any]]) -> Any:
    run = Run(body)
    try:
        return await run.root
    finally:
        await run.end()


# Paths


@on_every_loop
async def test_a_path_is_the_order_of_creation_in_every_way_to_create_tasks() -> None:
    async def nested() -> list[Path]:
        return [current_branch().path, *await asyncio.gather(path(), path())]

    async def body(run: Run) -> list[Any]:
        seen: list[Any] = [current_branch().path]
        seen += await asyncio.gather(path(), nested())
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(path()) for _ in range(2)]
        seen += [task.result() for task in tasks]
        seen.append(await asyncio.create_task(path(), name="named"))
        seen.append(await asyncio.ensure_future(path()))
        seen.append(await asyncio.shield(path()))
        seen += [task.result() for task in (await asyncio.wait([asyncio.create_task(path())]))[0]]
        seen.append(await asyncio.get_running_loop().create_task(path()))
        seen.append(current_branch().path)
        return seen

    assert await result_of(body) == [
        *[(), (0,), [(1,), (1, 0), (1, 1)], (2,), (3,), (4,), (5,), (6,), (7,), (8,), ()],
    ]


@on_every_loop
async def test_a_path_does_not_depend_on_what_finishes_first() -> None:
    async def late(turn: int) -> list[Path]:
        await turns(turn)
        return [current_branch().path, await asyncio.create_task(path())]

    async def body(order: list[int]) -> list[list[Path]]:
        return await asyncio.gather(*(late(turn) for turn in order))

    expected = [[(0,), (0, 0)], [(1,), (1, 0)], [(2,), (2, 0)]]
    assert await result_of(lambda run: body([0, 4, 8])) == expected
    assert await result_of(lambda run: body([8, 4, 0])) == expected


@on_every_loop
async def test_a_task_belongs_to_the_run_whatever_context_it_is_given() -> None:
    async def in_thread() -> Path:
        return await asyncio.to_thread(lambda: current_branch().path)

    async def body(run: Run) -> list[Path]:
        shared = contextvars.copy_context()
        tasks = [
            asyncio.create_task(path(), context=contextvars.Context()),
            *(asyncio.create_task(path(), context=shared) for _ in range(3)),
            asyncio.create_task(in_thread(), context=contextvars.Context()),
        ]
        return [current_branch().path, *await asyncio.gather(*tasks), current_branch().path]

    assert await result_of(body) == [(), (0,), (1,), (2,), (3,), (4,), ()]


async def test_a_task_created_in_the_very_context_of_its_creator_has_a_branch_of_its_own() -> None:
    loop = asyncio.get_running_loop()
    install(loop)
    context = contextvars.copy_context()

    async def body() -> list[Path]:
        tasks = [asyncio.create_task(path(), context=context) for _ in range(2)]
        return [current_branch().path, *await asyncio.gather(*tasks), current_branch().path]

    run = BranchTree(on_quiescent=lambda: None)
    assert await run.start(body(), context=context) == [(), (0,), (1,), ()]
    await run.unwind()
    uninstall(loop)


@on_every_loop
async def test_wait_for_makes_no_branch_on_any_python() -> None:
    async def inner() -> list[Any]:
        branch = current_branch()
        return [branch.path, branch.occurrence("a"), await asyncio.create_task(path())]

    async def body(run: Run) -> list[Any]:
        first = await asyncio.wait_for(inner(), 10)
        occurrence = current_branch().occurrence("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(path(), 0)
        return [first, occurrence, await asyncio.wait_for(inner(), 10), await asyncio.create_task(path())]

    assert await result_of(body) == [[(), 0, (0,)], 1, [(), 2, (1,)], (2,)]


@on_every_loop
async def test_occurrences_count_by_identity_and_branch() -> None:
    async def child() -> int:
        return current_branch().occurrence("a")

    async def body(run: Run) -> list[int]:
        branch = current_branch()
        mine = [branch.occurrence("a"), branch.occurrence("a"), branch.occurrence(("a", 1)), branch.occurrence("a")]
        return [*mine, *await asyncio.gather(child(), child())]

    assert await result_of(body) == [0, 1, 0, 2, 0, 0]


@on_every_loop
async def test_tasks_created_by_callbacks_do_not_shift_the_numbers_of_others() -> None:
    async def body(run: Run) -> list[Path]:
        loop = asyncio.get_running_loop()
        created: list[AnyTask] = []
        for _ in range(2):
            loop.call_soon(lambda: created.append(asyncio.ensure_future(path())))
        await turns(2)
        return [await asyncio.create_task(path()), *[await task for task in created]]

    assert await result_of(body) == [(0,), ("callback-0",), ("callback-1",)]


@on_every_loop
async def test_the_end_of_an_unfinished_async_generator_takes_no_number() -> None:
    async def numbers() -> AsyncGenerator[int]:
        yield 1
        yield 2

    async def body(run: Run) -> Path:
        async for _ in numbers():
            break
        gc.collect()
        await turns(3)
        return await asyncio.create_task(path())

    assert await result_of(body) == (0,)


@on_every_loop
async def test_a_thread_reads_the_branch_it_was_started_from() -> None:
    def in_thread(loop: asyncio.AbstractEventLoop) -> list[Path]:
        return [current_branch().path, asyncio.run_coroutine_threadsafe(path(), loop).result(), asyncio.run(path())]

    async def child() -> list[Path]:
        return await asyncio.to_thread(in_thread, asyncio.get_running_loop())

    async def body(run: Run) -> list[Any]:
        return [await child(), *await asyncio.gather(child()), await asyncio.create_task(path())]

    assert await result_of(body) == [
        [(), ("callback-0",), ()],
        [(0,), (0, "callback-0"), (0,)],
        (1,),
    ]


@on_every_loop
async def test_tasks_of_a_step_do_not_shift_those_around_it() -> None:
    async def step(run: Run) -> list[Path]:
        with run.branches.scope("charge#0") as branch:
            assert current_branch() is branch
            return [
                current_branch().path,
                *await asyncio.gather(path(), path()),
                await asyncio.to_thread(lambda: current_branch().path),
            ]

    async def body(run: Run) -> list[Any]:
        first = await step(run)
        between = current_branch().path
        in_child = await asyncio.create_task(step(run))
        return [first, between, in_child, await asyncio.create_task(path())]

    assert await result_of(body) == [
        [("charge#0",), ("charge#0", 0), ("charge#0", 1), ("charge#0",)],
        (),
        [(0, "charge#0"), (0, "charge#0", 0), (0, "charge#0", 1), (0, "charge#0")],
        (1,),
    ]


@on_every_loop
async def test_steps_side_by_side_keep_their_branches() -> None:
    async def step(run: Run, label: str) -> list[Path]:
        with run.branches.scope(label):
            before = current_branch().path
            await turns(3)
            return [before, await asyncio.create_task(path()), current_branch().path]

    async def body(run: Run) -> list[Any]:
        return list(await asyncio.gather(step(run, "a"), step(run, "b")))

    assert await result_of(body) == [
        [(0, "a"), (0, "a", 0), (0, "a")],
        [(1, "b"), (1, "b", 0), (1, "b")],
    ]


@on_every_loop
async def test_detached_tasks_are_not_of_the_run() -> None:
    async def outsider() -> str:
        with pytest.raises(LookupError):
            current_branch()
        await asyncio.sleep(0)
        with pytest.raises(LookupError):
            await asyncio.create_task(path())
        return "lives"

    async def body(run: Run) -> list[Any]:
        with detached():
            task = asyncio.create_task(outsider())
            assert len(run.branches.tasks) == 1
        return [current_branch().path, await asyncio.create_task(path()), await task]

    assert await result_of(body) == [(), (0,), "lives"]


@on_every_loop
async def test_there_is_no_branch_outside_of_runs() -> None:
    with pytest.raises(LookupError):
        current_branch()
    await result_of(lambda run: path())
    with pytest.raises(LookupError):
        current_branch()
    with pytest.raises(LookupError):
        await asyncio.create_task(path())


@on_every_loop
async def test_a_task_made_after_the_end_is_refused_a_branch() -> None:
    made: list[asyncio.Future[Path]] = []

    async def body(run: Run) -> None:
        asyncio.get_running_loop().call_later(0.01, lambda: made.append(asyncio.ensure_future(path())))

    run = Run(body)
    await run.root
    await until(lambda: made)
    with pytest.raises(InvalidState, match="set_task_factory"):
        await made[0]


async def test_a_task_that_a_replaced_factory_hides_is_refused_a_branch() -> None:
    loop = asyncio.get_running_loop()
    install(loop)

    async def create_task() -> None:
        with pytest.raises(InvalidState):
            await path()
        with pytest.raises(InvalidState):
            await asyncio.create_task(path())

    async def body(run: Run) -> Path:
        factory = loop.get_task_factory()
        loop.set_task_factory(None)
        hidden = asyncio.create_task(create_task())
        loop.set_task_factory(factory)
        await hidden
        return await asyncio.create_task(path())

    assert await result_of(body) == (0,)
    loop.set_task_factory(None)
    with pytest.raises(InvalidState, match="set_task_factory"):
        Run(lambda run: path())
    uninstall(loop)


# The task factory


def test_the_factory_is_installed_once_and_leaves_what_was_there() -> None:
    def previous(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> AnyTask:
        return asyncio.Task(coro, loop=loop, **kwargs)

    loop = asyncio.new_event_loop()
    loop.set_task_factory(previous)
    install(loop)
    ours = loop.get_task_factory()
    install(loop)
    assert loop.get_task_factory() is ours is not previous
    uninstall(loop)
    assert loop.get_task_factory() is ours
    uninstall(loop)
    assert loop.get_task_factory() is previous
    with pytest.raises(KeyError):
        uninstall(loop)
    loop.close()


async def test_a_factory_put_on_top_stays_and_does_not_number_tasks_twice() -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    install(loop)
    ours: Any = loop.get_task_factory()

    def theirs(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> AnyTask:
        task: AnyTask = ours(loop, coro, **kwargs)
        return task

    async def body(run: Run) -> list[Path]:
        return [await asyncio.create_task(path()), await asyncio.create_task(path())]

    loop.set_task_factory(theirs)
    install(loop)
    assert await result_of(body) == [(0,), (1,)]
    uninstall(loop)
    uninstall(loop)
    assert loop.get_task_factory() is theirs
    install(loop)
    assert await result_of(body) == [(0,), (1,)]
    uninstall(loop)
    loop.set_task_factory(before)


async def test_the_factory_from_before_makes_the_tasks_of_a_run() -> None:
    class Special(asyncio.Task[Any]):
        pass

    def legacy(loop: asyncio.AbstractEventLoop, coro: Any) -> AnyTask:  # as before Python 3.11: no context
        return Special(coro, loop=loop)

    def modern(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> AnyTask:
        seen.append(kwargs)
        return Special(coro, loop=loop, **kwargs)

    async def special() -> Path:
        assert isinstance(asyncio.current_task(), Special)
        return current_branch().path

    async def body() -> Path:
        return await asyncio.create_task(special())

    seen: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    context = contextvars.copy_context()
    for factory in legacy, modern:
        loop.set_task_factory(factory)
        install(loop)
        run = BranchTree(on_quiescent=lambda: None)
        if factory is modern:
            assert await run.start(body(), context=context, name="the run") == (0,)
            assert any(kwargs.get("context") is context for kwargs in seen)
        else:
            task = asyncio.create_task(special())  # outside of runs
            with pytest.raises(LookupError):
                await task
        await run.unwind()
        uninstall(loop)
    loop.set_task_factory(before)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks")
async def test_an_eager_task_knows_its_branch_in_its_first_step() -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    install(loop)
    seen: list[Any] = []

    async def leaf() -> None:
        seen.append(current_branch().path)

    async def child(run: Run) -> None:
        task = asyncio.create_task(leaf())  # before anything has asked for the child's own branch
        with run.branches.scope("step"):
            seen.append(current_branch().path)
            await asyncio.create_task(leaf())
            await asyncio.sleep(0)
            seen.append(current_branch().path)
        seen.append(current_branch().path)
        await task

    async def body(run: Run) -> None:
        assert len(seen) == 0
        task = asyncio.create_task(child(run))
        assert seen == [(0, 0), (0, "step"), (0, "step", 0)]
        assert current_branch().path == ()
        await task

    await result_of(body)
    assert seen[3:] == [(0, "step"), (0,)]
    uninstall(loop)
    loop.set_task_factory(before)


@on_every_loop
async def test_tasks_of_an_event_loop_in_a_thread_are_not_of_the_run() -> None:
    seen: list[bool] = []

    async def look() -> None:
        await asyncio.sleep(0)
        seen.append(asyncio.current_task() in branches.branch_of)

    async def other() -> None:
        install(asyncio.get_running_loop())
        await look()
        await asyncio.gather(look(), asyncio.create_task(look(), context=contextvars.copy_context()))
        uninstall(asyncio.get_running_loop())

    async def child() -> Path:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(asyncio.run, other()))
        thread.start()
        thread.join()  # an eager task has not been adopted yet, meanwhile
        return current_branch().path

    async def body(run: Run) -> list[Path]:
        return [await asyncio.create_task(child()), await asyncio.create_task(path())]

    assert await result_of(body) == [(0,), (1,)]
    assert seen == [False, False, False]


def test_two_event_loops_in_two_threads_do_not_mix() -> None:
    results: list[list[Path]] = []

    def worker() -> None:
        async def body(run: Run) -> list[Path]:
            return await asyncio.gather(*(path() for _ in range(50)))

        async def main() -> None:
            install(asyncio.get_running_loop())
            results.append(await result_of(body))

        asyncio.run(main())

    threads = [threading.Thread(target=worker) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[(number,) for number in range(50)]] * 2


@pytest.mark.parametrize("exception", [SystemExit, KeyboardInterrupt])
@on_every_loop
async def test_a_branch_cannot_end_the_event_loop(exception: type[BaseException]) -> None:
    async def leave(*, late: bool) -> None:
        if late:
            await asyncio.sleep(0)
        raise exception(3)

    async def leave_on_cancel() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise exception(4) from None

    async def body(run: Run) -> None:
        on_cancel = asyncio.create_task(leave_on_cancel())
        await asyncio.sleep(0)
        on_cancel.cancel()
        ended = await asyncio.gather(leave(late=True), leave(late=False), on_cancel, return_exceptions=True)
        assert [(type(end), type(end.__cause__)) for end in ended if end] == [(BranchExit, exception)] * 3
        await leave(late=True)

    with pytest.raises(BranchExit):
        await result_of(body)


@on_every_loop
async def test_a_task_cancelled_before_it_started_leaves_no_coroutine_behind(recwarn: pytest.WarningsRecorder) -> None:
    async def body(run: Run) -> None:
        task = asyncio.create_task(path())
        task.cancel()
        await asyncio.wait([task])

    await result_of(body)
    gc.collect()
    assert not recwarn.list


# Quiescence


@on_every_loop
async def test_a_root_that_waits_alone_is_quiescent_in_the_next_turn() -> None:
    async def body(run: Run) -> None:
        await run.wait()

    run = Run(body)
    await until(lambda: run.waits)
    await turns(2)
    assert run.calls == 1
    await run.end()


@on_every_loop
async def test_quiescence_is_told_outside_of_the_run() -> None:
    told: list[str] = []
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="none")
    mark.set("owner")

    def on_quiescent() -> None:
        with pytest.raises(LookupError):
            current_branch()
        told.append(mark.get())
        told.append("adopted" if asyncio.ensure_future(asyncio.sleep(0)) in run.tasks else "free")

    async def body() -> None:
        mark.set("run")
        loop = asyncio.get_running_loop()
        await asyncio.gather(run.wait(loop.create_future()), run.wait(loop.create_future()))

    run = BranchTree(on_quiescent=on_quiescent)
    root = run.start(body())
    await until(lambda: told)
    assert told == ["owner", "free"]
    await run.unwind()
    assert root.cancelled()


async def in_gather(run: Run) -> None:
    await asyncio.gather(run.wait(), run.wait())


async def in_nested_gather(run: Run) -> None:
    await asyncio.gather(asyncio.gather(run.wait(), asyncio.gather(run.wait(), path())), run.wait())


async def in_gather_with_exceptions(run: Run) -> None:
    async def fail() -> None:
        raise ValueError

    await asyncio.gather(run.wait(), fail(), run.wait(), return_exceptions=True)


async def in_task_groups(run: Run) -> None:
    async def inner() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(run.wait())
            group.create_task(run.wait())

    async with asyncio.TaskGroup() as group:
        group.create_task(inner())
        group.create_task(path())
        await run.wait()


async def in_wait(run: Run) -> None:
    await asyncio.wait([asyncio.create_task(run.wait()) for _ in range(2)], return_when=asyncio.FIRST_COMPLETED)


async def in_as_completed(run: Run) -> None:
    for waiting in asyncio.as_completed([run.wait(), path(), run.wait()]):
        await waiting


async def in_shield(run: Run) -> None:
    await asyncio.shield(run.wait())


async def in_shielded_gather(run: Run) -> None:
    await asyncio.gather(asyncio.shield(asyncio.gather(run.wait(), run.wait())), path())


async def in_a_task(run: Run) -> None:
    await asyncio.create_task(run.wait())


async def in_timeout(run: Run) -> None:
    async with asyncio.timeout(1000):
        await asyncio.gather(run.wait(), run.wait())


async def in_wait_for_without_timeout(run: Run) -> None:
    await asyncio.wait_for(run.wait(), None)


async def beside_a_parked_root(run: Run) -> None:
    task = asyncio.create_task(run.wait())
    await run.wait()
    await task


async def on_a_lock(run: Run) -> None:
    lock = asyncio.Lock()

    async def hold() -> None:
        async with lock:
            await run.wait()

    await asyncio.gather(hold(), hold(), hold())


async def on_semaphores(run: Run) -> None:
    async def hold(semaphore: asyncio.Semaphore) -> None:
        async with semaphore:
            await run.wait()

    bounded, unbounded = asyncio.BoundedSemaphore(1), asyncio.Semaphore(1)
    await asyncio.gather(hold(bounded), hold(bounded), hold(unbounded), hold(unbounded))


async def on_a_queue(run: Run) -> None:
    queue: asyncio.Queue[int] = asyncio.Queue()

    async def feed() -> None:
        await run.wait()
        await queue.put(1)

    await asyncio.gather(feed(), queue.get())


async def on_a_full_queue(run: Run) -> None:
    queue: asyncio.PriorityQueue[int] = asyncio.PriorityQueue(1)
    await queue.put(1)

    async def take() -> None:
        await run.wait()
        await queue.get()

    await asyncio.gather(take(), queue.put(2), queue.join())


async def on_an_event(run: Run) -> None:
    event = asyncio.Event()

    async def tell() -> None:
        await run.wait()
        event.set()

    await asyncio.gather(tell(), event.wait())


async def on_a_condition(run: Run) -> None:
    condition = asyncio.Condition()

    async def tell() -> None:
        await run.wait()
        async with condition:
            condition.notify_all()

    async def listen() -> None:
        async with condition:
            await condition.wait_for(lambda: False)

    await asyncio.gather(tell(), listen(), listen())


async def on_a_barrier(run: Run) -> None:
    barrier = asyncio.Barrier(3)

    async def meet() -> None:
        await barrier.wait()

    async def meet_late() -> None:
        await run.wait()
        await barrier.wait()

    await asyncio.gather(meet(), meet(), meet_late())


async def on_an_async_generator(run: Run) -> None:
    queue: asyncio.Queue[int] = asyncio.Queue()

    async def items() -> AsyncIterator[int]:
        while True:
            yield await queue.get()

    async def consume() -> None:
        async for _ in items():
            pass

    async def consume_one() -> int:
        return await anext(aiter(items()))

    await asyncio.gather(consume(), consume_one(), run.wait())


async def on_hand_written_awaitables(run: Run) -> None:
    event = asyncio.Event()

    class Delegating:
        def __await__(self) -> Generator[Any, Any, Any]:
            return event.wait().__await__()

    class Generating:
        def __await__(self) -> Generator[Any, Any, Any]:
            yield from event.wait().__await__()

    @types.coroutine
    def old() -> Generator[Any, Any, Any]:
        yield from event.wait().__await__()

    async def consume(awaitable: Awaitable[Any]) -> None:
        await awaitable

    await asyncio.gather(consume(Delegating()), consume(Generating()), consume(old()), run.wait())


BLOCKED = [
    *(in_gather, in_nested_gather, in_gather_with_exceptions, in_task_groups, in_wait, in_as_completed, in_shield),
    *(in_shielded_gather, in_a_task, in_timeout, in_wait_for_without_timeout, beside_a_parked_root, on_a_lock),
    *(on_semaphores, on_a_queue, on_a_full_queue, on_an_event, on_a_condition, on_a_barrier, on_an_async_generator),
    on_hand_written_awaitables,
]


@pytest.mark.parametrize("body", BLOCKED)
@on_every_loop
async def test_branches_blocked_on_waits_and_on_each_other_are_quiescent(
    body: Callable[[Run], Coroutine[Any, Any, None]], caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(body)
    assert await run.is_quiescent()
    assert not run.root.done()
    await run.end()
    assert run.calls == 1
    assert not caplog.records


@on_every_loop
async def test_a_branch_that_runs_is_not_quiescent() -> None:
    go_on = True

    async def spin() -> None:
        while go_on:
            await turns(1)
        await run.wait()

    async def body(run: Run) -> None:
        await asyncio.gather(run.wait(), spin())

    run = Run(body)
    assert not await run.is_quiescent(within=0.1)
    go_on = False
    assert await run.is_quiescent()
    await run.end()


@on_every_loop
async def test_branches_that_take_turns_are_not_quiescent() -> None:
    """Of these, one is runnable at any time, but results travel through futures, locks and queues."""
    rounds = 0

    async def play(mine: asyncio.Queue[int], other: asyncio.Queue[int], lock: asyncio.Lock) -> None:
        nonlocal rounds
        while rounds < 2000:
            await other.put(await mine.get())
            async with lock:
                await asyncio.shield(asyncio.gather(asyncio.create_task(asyncio.sleep(0))))
            rounds += 1
        await other.put(0)

    async def body(run: Run) -> None:
        one, two, lock = asyncio.Queue[int](), asyncio.Queue[int](), asyncio.Lock()
        await one.put(0)
        waiting = asyncio.create_task(run.wait())
        await asyncio.gather(play(one, two, lock), play(two, one, lock))
        assert run.calls == 0
        await waiting

    run = Run(body)
    assert await run.is_quiescent(within=20)
    assert rounds >= 2000
    await run.end()


@on_every_loop
async def test_a_result_on_its_way_through_callbacks_is_waited_for() -> None:
    loop = asyncio.get_running_loop()

    def hop(turns_left: int, event: asyncio.Event) -> None:
        if turns_left:
            loop.call_soon(hop, turns_left - 1, event)
        else:
            event.set()

    async def body(run: Run) -> None:
        waiting = [asyncio.create_task(run.wait()) for _ in range(20)]
        for _ in range(4):
            event = asyncio.Event()
            hop(8, event)
            await event.wait()
        for task in waiting:
            task.cancel()

    run = Run(body)
    await run.root
    assert run.calls == 0
    await run.end()


@on_every_loop
async def test_a_result_on_its_way_through_many_gathers_is_waited_for() -> None:
    async def body(run: Run) -> None:
        waiting = asyncio.create_task(run.wait())
        result: asyncio.Future[Any] = asyncio.ensure_future(path())
        for _ in range(20):
            result = asyncio.shield(asyncio.gather(result))
        await result
        waiting.cancel()

    run = Run(body)
    await run.root
    assert run.calls == 0
    await run.end()


@on_every_loop
async def test_a_wait_that_is_resolved_is_not_quiescent() -> None:
    async def body(run: Run) -> list[int]:
        return list(await asyncio.gather(run.wait(), run.wait()))

    run = Run(body)
    await until(lambda: len(run.waits) == 2)
    for number, waiting in enumerate(run.waits):
        waiting.set_result(number)
    assert await run.root == [0, 1]
    await turns(50)
    assert run.calls == 0
    await run.end()


@on_every_loop
async def test_a_wait_resolved_at_the_last_moment_is_not_quiescent() -> None:
    async def body(run: Run) -> int:
        asyncio.get_running_loop().call_soon(lambda: run.waits[0].set_result(7))
        result: int = await run.wait()
        return result

    run = Run(body)
    assert await run.root == 7
    await turns(5)
    assert run.calls == 0
    await run.end()


@on_every_loop
async def test_a_run_is_quiescent_only_after_its_step_has_ended() -> None:
    end = asyncio.Event()

    async def step(run: Run) -> None:
        with run.branches.busy():
            with run.branches.busy():
                pass
            await end.wait()
        await asyncio.Event().wait()

    async def body(run: Run) -> None:
        await asyncio.gather(run.wait(), step(run))

    run = Run(body, grace=0)
    assert not await run.is_quiescent(within=0.1)
    end.set()
    assert await run.is_quiescent()
    await run.end()


@on_every_loop
async def test_nothing_is_looked_at_while_nothing_waits_or_something_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = count_looks(monkeypatch)
    end = asyncio.Event()

    async def busy(run: Run) -> None:
        with run.branches.busy():
            await end.wait()

    async def body(run: Run) -> None:
        await asyncio.gather(*(path() for _ in range(10)))
        with run.branches.busy():
            await turns(1)
        assert run.branches._quiescence._handle is None
        await asyncio.gather(busy(run), run.wait())

    run = Run(body)
    await until(lambda: run.waits)
    await asyncio.sleep(0.02)
    assert not looks
    assert run.branches._quiescence._handle is None
    end.set()
    assert await run.is_quiescent()
    await run.end()


@on_every_loop
async def test_a_run_without_a_durable_wait_is_not_quiescent() -> None:
    async def body(run: Run) -> None:
        waiting = asyncio.create_task(run.wait())
        await turns(1)
        waiting.cancel()
        await asyncio.gather(asyncio.Event().wait(), asyncio.Queue[int]().get())

    run = Run(body, grace=0)
    assert not await run.is_quiescent(within=0.1)
    await run.end()


@on_every_loop
async def test_branches_that_block_without_telling_are_found() -> None:
    async def body(run: Run) -> None:
        async def late() -> None:
            await asyncio.sleep(0.05)
            assert run.calls == 0
            await asyncio.Event().wait()

        await asyncio.gather(run.wait(), late())

    run = Run(body)
    assert await run.is_quiescent()
    await run.end()


@on_every_loop
async def test_the_end_of_a_branch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspension, "SHORTEST_DELAY", 1000)
    monkeypatch.setattr(suspension, "LONGEST_DELAY", 1000)

    async def body(run: Run) -> None:
        await asyncio.gather(run.wait(), asyncio.sleep(0.05))

    run = Run(body, grace=1000)
    assert await run.is_quiescent()
    await run.end()


@on_every_loop
async def test_quiescence_is_told_once() -> None:
    async def body(run: Run) -> None:
        await run.wait()
        await asyncio.gather(run.wait(), run.wait())

    run = Run(body)
    assert await run.is_quiescent()
    run.waits[0].set_result(None)
    await turns(50)
    assert len(run.waits) == 3
    assert run.calls == 1
    await run.end()


@on_every_loop
async def test_the_end_of_a_run_is_not_quiescence() -> None:
    async def body(run: Run) -> None:
        unawaited(run.wait())
        await turns(3)

    run = Run(body)
    await run.root
    await turns(50)
    assert run.calls == 0
    assert len(run.branches.tasks) == 1
    await run.end()


async def sleeping(run: Run) -> None:
    background = asyncio.create_task(asyncio.sleep(1000))
    await run.wait()
    background.cancel()


async def ticking(run: Run) -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(0.01)
            await asyncio.create_task(path())

    background = asyncio.create_task(tick())
    await run.wait()
    background.cancel()


async def in_timed_wait(run: Run) -> None:
    await asyncio.wait([asyncio.create_task(run.wait())], timeout=1000)


async def in_gather_under_wait_for(run: Run) -> None:
    await asyncio.wait_for(asyncio.gather(run.wait(), run.wait()), 1000)


async def in_gather_with_a_foreign_future(run: Run) -> None:
    await asyncio.gather(run.wait(), asyncio.get_running_loop().create_future())


async def in_wait_with_a_foreign_future(run: Run) -> None:
    await asyncio.wait([asyncio.create_task(run.wait()), asyncio.get_running_loop().create_future()])


async def in_shield_of_a_foreign_future(run: Run) -> None:
    background = asyncio.create_task(run.wait())
    await asyncio.shield(asyncio.get_running_loop().create_future())
    await background


async def on_a_task_of_nobody(run: Run) -> None:
    with detached():
        task = asyncio.create_task(asyncio.sleep(0.5))
    await asyncio.gather(run.wait(), task)


async def in_a_thread(run: Run) -> None:
    release = threading.Event()
    try:
        await asyncio.gather(run.wait(), asyncio.to_thread(release.wait))
    finally:
        release.set()


OUTSIDE: dict[Callable[..., Coroutine[Any, Any, None]], str] = {
    sleeping: r"asyncio.tasks\.py:\d+ in sleep\(\)",
    ticking: r"test_branches\.py:\d+ in ticking.<locals>.tick\(\), in asyncio's sleep\(\)",
    in_timed_wait: r"test_branches\.py:\d+ in in_timed_wait\(\), in asyncio's _wait\(\)",
    in_gather_under_wait_for: r"test_branches\.py:\d+ in in_gather_under_wait_for\(\), in asyncio's wait_for\(\)",
    in_gather_with_a_foreign_future: r"test_branches\.py:\d+ in in_gather_with_a_foreign_future\(\)\.",
    in_wait_with_a_foreign_future: r"test_branches\.py:\d+ in in_wait_with_a_foreign_future\(\), in asyncio",
    in_shield_of_a_foreign_future: r"test_branches\.py:\d+ in in_shield_of_a_foreign_future\(\)\.",
    on_a_task_of_nobody: r"test_branches\.py:\d+ in on_a_task_of_nobody\(\)\.",
    in_a_thread: r"asyncio.threads\.py:\d+ in to_thread\(\)",
}


@pytest.mark.parametrize("body", OUTSIDE)
@on_every_loop
async def test_other_awaits_have_a_time_of_grace_and_are_named(
    body: Callable[..., Coroutine[Any, Any, None]], caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    run = Run(body, grace=0.15)
    assert await run.is_quiescent()
    assert 0.13 <= loop.time() - start < 8  # uvloop's clock stands still within a turn
    await run.end()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(OUTSIDE[body], record.getMessage())


@pytest.mark.slow
@on_every_loop
async def test_the_time_of_grace_starts_anew_when_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def body(run: Run) -> None:
        background = asyncio.create_task(asyncio.sleep(1000))
        await run.wait()
        await run.wait()
        background.cancel()

    loop = asyncio.get_running_loop()
    start = loop.time()
    run = Run(body, grace=0.5)
    assert not await run.is_quiescent(within=0.2)
    run.waits[0].set_result(None)
    assert await run.is_quiescent()
    assert loop.time() - start >= 0.65
    await run.end()
    assert len(caplog.records) == 1


@on_every_loop
async def test_an_await_that_ends_in_its_time_of_grace_is_not_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async def body(run: Run) -> str:
        waiting = asyncio.create_task(run.wait())
        await asyncio.wait([waiting], timeout=0.05)
        waiting.cancel()
        return "in time"

    run = Run(body, grace=5)
    assert await run.root == "in time"
    assert run.calls == 0
    assert not caplog.records
    await run.end()


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    looks: list[None] = []
    examine = blocking.examine

    def counted(*args: Any) -> blocking.Blocked:
        looks.append(None)
        return examine(*args)

    monkeypatch.setattr(blocking, "examine", counted)
    return looks


@on_every_loop
async def test_a_thousand_waits_are_looked_at_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = count_looks(monkeypatch)

    async def body(run: Run) -> None:
        await asyncio.gather(*(run.wait() for _ in range(1000)))

    run = Run(body)
    assert await run.is_quiescent()
    assert len(looks) <= 1001 * (suspension.TURNS + 3)
    await run.end()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, -1, 387])
@on_every_loop
async def test_waits_that_begin_one_by_one_are_looked_at_a_few_times_each(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    looks = count_looks(monkeypatch)
    count = 500

    async def late(run: Run, turn: int) -> None:
        await turns(turn)
        await run.wait()

    async def body(run: Run) -> None:
        await asyncio.gather(*(late(run, number * step % count) for number in range(count)))

    run = Run(body)
    assert await run.is_quiescent(within=20)
    assert len(looks) <= count * (suspension.TURNS + 15)
    await run.end()


# asyncio.wait_for


async def directly(run: Run) -> None:
    await asyncio.wait_for(run.wait(), 10)


async def deep_inside(run: Run) -> None:
    async def inner() -> None:
        async with asyncio.Lock():
            await run.wait()

    await asyncio.wait_for(inner(), 10)


async def around_a_task(run: Run) -> None:
    async def late() -> None:
        await turns(2)
        await run.wait()

    await asyncio.wait_for(asyncio.create_task(late()), 10)


@pytest.mark.parametrize("body", [directly, deep_inside, around_a_task])
@on_every_loop
async def test_wait_for_around_a_durable_wait_is_refused(body: Callable[[Run], Coroutine[Any, Any, None]]) -> None:
    run = Run(body)
    with pytest.raises(InvalidState, match="timeout= of await_event"):
        await run.root
    assert run.calls == 0
    await run.end()


@on_every_loop
async def test_wait_for_around_what_is_not_durable_is_left_alone() -> None:
    async def body(run: Run) -> Path:
        await asyncio.wait_for(asyncio.sleep(0), 10)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(1000), 0.01)
        return await asyncio.wait_for(asyncio.create_task(path()), 10)

    assert len(await result_of(body)) == 1


# The end


@on_every_loop
async def test_unwinding_cancels_every_task_and_runs_what_is_finally() -> None:
    ended: list[str] = []

    async def wait(run: Run, name: str) -> None:
        try:
            await run.wait()
        finally:
            await turns(2 * suspension.TURNS)
            ended.append(name)

    async def body(run: Run) -> None:
        with run.branches.busy():
            async with asyncio.TaskGroup() as group:
                group.create_task(wait(run, "a"))
                await asyncio.gather(wait(run, "b"), asyncio.shield(wait(run, "c")))

    run = Run(body)
    await until(lambda: len(run.waits) == 3)
    await run.end()
    assert sorted(ended) == ["a", "b", "c"]
    assert run.root.cancelled()


@on_every_loop
async def test_unwinding_without_live_tasks_does_not_yield() -> None:
    run = Run(lambda run: path())
    await run.root
    with pytest.raises(StopIteration) as stop:
        run.branches.unwind().send(None)
    assert stop.value.value == []


@pytest.mark.slow
@on_every_loop
async def test_unwinding_cancels_again() -> None:
    cancelled: list[float] = []
    loop = asyncio.get_running_loop()

    async def body(run: Run) -> None:
        with run.branches.busy(), contextlib.suppress(asyncio.CancelledError):
            await run.wait()
        while len(cancelled) < 3:
            try:
                await run.wait()
            except asyncio.CancelledError:
                cancelled.append(loop.time())

    run = Run(body)
    await until(lambda: run.waits)
    await run.end()
    assert 0.17 < cancelled[2] - cancelled[0] < 4  # uvloop's clock stands still within a turn
    assert run.calls == 0


@on_every_loop
async def test_unwinding_reaches_tasks_created_meanwhile() -> None:
    async def body(run: Run) -> None:
        try:
            await run.wait()
        finally:
            unawaited(run.wait())

    run = Run(body)
    assert await run.is_quiescent()
    await run.end()
    assert len(run.waits) == 2


@on_every_loop
async def test_unwinding_gives_code_up_that_does_not_end() -> None:
    release = False
    loop = asyncio.get_running_loop()
    parked = loop.create_future()

    async def body(run: Run) -> None:
        task = asyncio.create_task(run.wait())
        while not release:
            with contextlib.suppress(BaseException):
                await asyncio.shield(parked)
        await task

    run = Run(body)
    await turns(3)
    start = loop.time()
    assert await run.branches.unwind(grace=0.3) == [run.root]
    assert 0.28 <= loop.time() - start < 4
    assert run.branches.tasks == set()
    release = True
    parked.set_result(None)
    await asyncio.wait([run.root])


@on_every_loop
async def test_a_task_given_up_ends_in_silence_when_it_is_collected() -> None:
    released: list[str] = []

    async def body(run: Run) -> None:
        with run.branches.scope("step"):
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                try:
                    while True:
                        with contextlib.suppress(asyncio.CancelledError):
                            await asyncio.get_running_loop().create_future()
                finally:
                    released.append("collected")

    run = Run(body)
    await turns(3)
    (root,) = await run.branches.unwind(grace=0)
    assert root is run.root
    with pytest.raises(LookupError):
        current_branch()
    del root, run
    gc.collect()
    assert released == ["collected"]
    with pytest.raises(LookupError):
        current_branch()


@on_every_loop
async def test_what_unwinding_raises_is_nobodys_business() -> None:
    class Poison(BaseException):
        pass

    async def fail(run: Run) -> None:
        try:
            await run.wait()
        except asyncio.CancelledError:
            raise Poison from None

    async def fail_now() -> None:
        raise ValueError

    async def body(run: Run) -> None:
        early = asyncio.create_task(fail_now())
        unawaited = asyncio.gather(fail(run), run.wait())
        shielded = asyncio.gather(asyncio.shield(asyncio.gather(fail(run))))
        background = asyncio.create_task(fail(run))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail(run))
                group.create_task(fail(run))
                await run.wait()
        finally:
            del early, unawaited, shielded, background

    run = Run(body)
    assert await run.is_quiescent()
    await run.end()


async def test_a_failure_that_nobody_looked_at_is_logged_when_the_run_ended_by_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise ValueError

    async def body(run: Run) -> None:
        background.append(asyncio.create_task(fail()))
        await turns(3)

    background: list[asyncio.Task[None]] = []
    install(asyncio.get_running_loop())
    await result_of(body)
    background.clear()
    gc.collect()
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == ["Task exception was never retrieved"]
    uninstall(asyncio.get_running_loop())


@pytest.mark.slow
@on_every_loop
async def test_nothing_refers_to_a_run_after_its_end() -> None:
    def wait(run: BranchTree) -> Coroutine[Any, Any, None]:
        return run.wait(asyncio.get_running_loop().create_future())

    async def waits(run: BranchTree) -> None:
        with run.scope("step"), run.busy():
            await asyncio.create_task(path())
        await asyncio.gather(wait(run), wait(run))

    async def sleeps(run: BranchTree) -> None:
        background = asyncio.create_task(asyncio.sleep(1000))
        await wait(run)
        await background

    async def returns(run: BranchTree) -> None:
        unawaited(wait(run))
        await asyncio.create_task(path())

    class Observer:
        """What a runner is to a run: told of its quiescence."""

        def __init__(self) -> None:
            self.quiescent = asyncio.Event()

        def on_quiescent(self) -> None:
            self.quiescent.set()

    for body, grace in (waits, 60), (returns, 60), (sleeps, 60), (sleeps, 0):
        observer = Observer()
        run = BranchTree(on_quiescent=observer.on_quiescent, grace=grace)
        root = run.start(body(run))
        await (observer.quiescent.wait() if body is waits or not grace else turns(20))
        left = weakref.ref(run), weakref.ref(observer), weakref.ref(root)
        gc.collect()
        gc.disable()
        try:
            await run.unwind()
            await turns(2)
            del run, observer, root
            # A timer keeps its context, and so the branch, until its time has come, even if it is cancelled.
            assert [reference() for reference in left[body is sleeps :]] == [None] * (2 if body is sleeps else 3)
        finally:
            gc.enable()


@pytest.mark.slow
@on_every_loop
async def test_ten_thousand_runs_leave_nothing_behind() -> None:
    async def body(run: BranchTree) -> None:
        await run.wait(asyncio.get_running_loop().create_future())

    async def one() -> None:
        quiescent = asyncio.Event()
        run = BranchTree(on_quiescent=quiescent.set)
        root = run.start(body(run))
        await quiescent.wait()
        await run.unwind()
        assert root.cancelled()

    for _ in range(10):
        await one()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10_000):
        await one()
    gc.collect()
    assert len(gc.get_objects()) - before < 100


@on_every_loop
async def test_the_task_groups_of_anyio_work_beside_runs_and_in_them() -> None:
    """It looks for an eager task factory, to make tasks that do not start at once, and fails if one is hidden."""
    anyio = pytest.importorskip("anyio")
    seen: list[Path | None] = []

    async def child() -> None:
        seen.append(_path())
        await anyio.sleep(0)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep(10)

    async def group() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            tasks.start_soon(child)

    await group()
    assert seen == [None, None]
    tree = BranchTree(on_quiescent=lambda: None)
    await tree.start(group())
    assert seen[2:] == [(0,), (1,)]


def _path() -> Path | None:
    try:
        return current_branch().path
    except LookupError:
        return None
