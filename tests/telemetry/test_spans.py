"""One trace from the request through every attempt and child, and links to what has woken a task."""

import asyncio
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from durable_sa import (
    Durable,
    QueueNotFound,
    RetryStrategy,
    Spawn,
    SyncTaskContext,
    TaskContext,
    TaskRow,
    TaskStatus,
    task,
)
from durable_sa.models import Event
from durable_sa.telemetry import OTEL_CONTEXT, Telemetry, extract, inject
from durable_sa.telemetry.meters import Meters
from durable_sa.testing import run_until_idle
from tests.support import eventually
from tests.telemetry.support import Spans, Values, is_below, is_linked, trace_of

SECRET = "correct-horse-battery-staple"


@task
async def child(ctx: TaskContext, number: int) -> int:
    return await ctx.step("double", lambda: number * 2)


@task
async def parent(ctx: TaskContext, payload: str) -> int:
    handle = await ctx.spawn("child", child, 21)
    await ctx.sleep_for("nap", 0.05)
    await ctx.heartbeat()
    await ctx.emit_event("said", payload)
    return await ctx.join(handle)


@task
async def waiter(ctx: TaskContext) -> str:
    return str(await ctx.await_event("go"))


@task(max_attempts=2)
async def flaky(ctx: TaskContext) -> None:
    def try_it() -> None:
        if ctx.attempt == 1:
            raise ValueError(SECRET)

    await ctx.step("try it", try_it)


@task
async def nothing(ctx: TaskContext) -> None:
    pass


@pytest.fixture(autouse=True)
def registered(durable: Durable) -> None:
    for each in (child, parent, waiter, flaky, nothing):
        durable.register(each)


async def test_one_trace_goes_from_the_request_through_every_run_and_child(
    durable: Durable, spans: Spans, tracer_provider: TracerProvider
) -> None:
    with tracer_provider.get_tracer("app").start_as_current_span("POST /orders"):
        spawned = await durable.spawn(parent, SECRET)
    async with durable.worker(concurrency=2):
        await durable.wait_for_result(spawned, timeout=10)
    request, spawn = spans.one("POST /orders"), spans.one("spawn parent")
    assert is_below(spawn, request)
    assert spawn.kind is SpanKind.PRODUCER
    executions = spans.all("execute parent")
    assert len(executions) >= 2  # the sleep, perhaps the join, and the end
    assert all(is_below(each, spawn) and each.kind is SpanKind.CONSUMER for each in executions)
    assert is_below(spans.one("spawn child"), executions[0])
    assert is_below(spans.one("sleep nap"), executions[0])
    assert spans.one("sleep nap").attributes == {
        "durable.task.id": str(spawned.task_id),
        "durable.task.name": "parent",
        "durable.run.id": str(spawned.run_id),
        "durable.attempt": 1,
        "durable.queue": "default",
        "durable.step.name": "nap",
        "durable.interrupted": True,
    }
    assert is_below(spans.one("execute child"), spans.one("spawn child"))
    assert is_below(spans.one("step double"), spans.one("execute child"))
    for name in ("heartbeat", "emit", "join"):
        assert any(is_below(span, execution) for span in spans.all(name) for execution in executions)
    outcomes = [(each.attributes or {})["durable.outcome"] for each in executions]
    assert outcomes == ["suspended"] * (len(outcomes) - 1) + ["completed"]
    in_trace = {"spawn parent", "execute parent", "spawn child", "execute child", "step double", "emit", "join"}
    assert {trace_of(span) for name in in_trace for span in spans.all(name)} == {trace_of(request)}
    assert SECRET not in spans.everything()


async def test_a_claim_has_a_span_only_if_it_brings_something(durable: Durable, spans: Spans) -> None:
    async with durable.worker(poll_interval=0.01, listen=False):
        await asyncio.sleep(0.1)
        assert spans.all("claim") == []
        await durable.wait_for_result(await durable.spawn(nothing), timeout=10)
    claim = spans.one("claim")
    assert claim.attributes == {"durable.queue": "default", "durable.claimed": 1}
    assert claim.parent is None


async def test_whoever_wakes_is_linked_from_whoever_is_woken(durable: Durable, spans: Spans) -> None:
    await durable.spawn(waiter)
    await run_until_idle(durable)
    assert await durable.emit_event("go", SECRET)
    await run_until_idle(durable)
    first, second = spans.all("execute waiter")
    assert not first.links
    assert is_linked(second, spans.one("emit"))
    assert trace_of(second) == trace_of(first) != trace_of(spans.one("emit"))
    assert (spans.one("await").attributes or {})["durable.event"] == "go"
    assert SECRET not in spans.everything()


async def test_a_wait_that_finds_its_event_is_linked_to_the_emit(durable: Durable, spans: Spans) -> None:
    assert await durable.emit_event("go", SECRET)
    await durable.spawn(waiter)
    await run_until_idle(durable)
    assert is_linked(spans.one("await"), spans.one("emit"))
    assert not spans.one("execute waiter").links


def test_a_context_is_put_into_headers_and_taken_out(tracer_provider: TracerProvider) -> None:
    headers: dict[str, Any] = {"tenant": "acme"}
    assert inject(headers) is headers
    assert headers == {"tenant": "acme"}
    with tracer_provider.get_tracer("app").start_as_current_span("request") as span:
        inject(headers)
    assert set(headers[OTEL_CONTEXT]) == {"traceparent"}
    found = trace.get_current_span(extract(headers)).get_span_context()
    assert (found.trace_id, found.span_id) == (span.get_span_context().trace_id, span.get_span_context().span_id)
    for unreadable in ({}, {OTEL_CONTEXT: 17}, {OTEL_CONTEXT: {"traceparent": None}}):
        assert not trace.get_current_span(extract(unreadable)).get_span_context().is_valid


async def test_a_parent_is_linked_to_the_child_that_it_joins(durable: Durable, spans: Spans) -> None:
    held = asyncio.Event()

    @durable.task
    async def slow(ctx: TaskContext) -> None:
        await ctx.step("wait", held.wait)

    @durable.task
    async def joins(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("slow", slow))

    async with durable.worker(concurrency=2):
        spawned = await durable.spawn(joins)

        async def asleep() -> bool:
            result = await durable.get_task_result(spawned)
            return result is not None and result.status is TaskStatus.SLEEPING

        await eventually(asleep)
        held.set()
        await durable.wait_for_result(spawned, timeout=10)
    first, second = spans.all("execute joins")
    assert not first.links
    assert is_linked(second, spans.one("spawn slow"))


async def test_attempts_are_in_the_same_trace_and_say_how_they_failed(durable: Durable, spans: Spans) -> None:
    await durable.spawn(flaky)
    await run_until_idle(durable)
    first, second = spans.all("execute flaky")
    assert [(each.attributes or {})["durable.attempt"] for each in (first, second)] == [1, 2]
    assert trace_of(first) == trace_of(second)
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert (first.attributes or {})["error.type"] == "ValueError"
    tries = spans.all("step try it")
    assert [each.status.status_code for each in tries] == [StatusCode.ERROR, StatusCode.UNSET]
    assert SECRET not in spans.everything()


async def test_the_code_of_a_step_finds_its_span_current(durable: Durable, spans: Spans) -> None:
    seen: dict[str, tuple[int, bool]] = {}

    def look(name: str) -> None:
        span: Any = trace.get_current_span()
        seen[name] = (span.get_span_context().span_id, threading.current_thread() is threading.main_thread())

    @durable.task
    async def asynchronous(ctx: TaskContext) -> None:
        look("execute asynchronous")
        await ctx.step("in a thread", look, "step in a thread")
        await ctx.transaction("write", in_transaction)

    async def in_transaction(session: AsyncSession) -> None:
        look("step write")

    @durable.task
    def synchronous(ctx: SyncTaskContext) -> None:
        look("execute synchronous")
        ctx.step("inline", look, "step inline")

    await durable.spawn(asynchronous)
    await durable.spawn(synchronous)
    await run_until_idle(durable)
    for name, (span_id, _) in seen.items():
        context = spans.one(name).context
        assert context is not None
        assert context.span_id == span_id, name
    assert len(seen) == 5
    assert is_below(spans.one("step inline"), spans.one("execute synchronous"))


@pytest.mark.parametrize("kind", [AsyncSession, Session])
async def test_a_spawn_in_the_callers_transaction_carries_its_span(
    durable: Durable, engine: AsyncEngine, spans: Spans, kind: type
) -> None:
    def spawn(session: Session) -> Any:
        return durable.spawn_with(session, nothing, headers={"mine": 1})

    async with AsyncSession(engine) as session:
        spawned = await (
            durable.spawn_with(session, nothing, headers={"mine": 1})
            if kind is AsyncSession
            else session.run_sync(spawn)
        )
        await session.commit()
    async with engine.connect() as connection:
        headers = (
            await connection.execute(sa.select(TaskRow.headers).where(TaskRow.task_id == spawned.task_id))
        ).scalar_one()
    span = spans.one("spawn nothing")
    assert span.context is not None
    assert headers.keys() == {"mine", OTEL_CONTEXT}
    assert headers[OTEL_CONTEXT].keys() == {"traceparent"}
    assert headers[OTEL_CONTEXT]["traceparent"].startswith(f"00-{trace_of(span)}-{span.context.span_id:016x}-")


async def test_many_spawns_of_one_call_share_a_span(durable: Durable, spans: Spans, metrics: Values) -> None:
    await durable.spawn_many([Spawn(nothing), (child, 1), (child, 2)])
    await run_until_idle(durable)
    spawn = spans.one("spawn")
    for each in [*spans.all("execute nothing"), *spans.all("execute child")]:
        assert is_below(each, spawn)
    assert metrics.of("durable_tasks_spawned_total") == {("default", "nothing"): 1, ("default", "child"): 2}


async def test_a_refused_spawn_ends_its_span_with_the_error(durable: Durable, spans: Spans, metrics: Values) -> None:
    with pytest.raises(QueueNotFound):
        await durable.spawn(nothing, queue_name="nowhere")
    with pytest.raises(QueueNotFound):
        await durable.emit_event("go", queue_name="nowhere")
    for name in ("spawn nothing", "emit"):
        assert spans.one(name).status.status_code is StatusCode.ERROR
        assert (spans.one(name).attributes or {})["error.type"] == "QueueNotFound"
    assert metrics.of("durable_tasks_spawned_total") == metrics.of("durable_events_emitted_total") == {}


async def test_the_context_is_in_the_metadata_of_events(durable: Durable, engine: AsyncEngine, spans: Spans) -> None:
    await durable.emit_event("outside")

    @durable.task
    async def emits(ctx: TaskContext) -> None:
        await ctx.emit_event("inside")

    await durable.spawn(emits)
    await run_until_idle(durable)
    async with engine.connect() as connection:
        rows = (await connection.execute(sa.select(Event.name, Event.metadata_))).all()
    stored = {row.name: row.metadata for row in rows}
    traces = {trace_of(span) for span in spans.all("emit")}
    assert {
        name: metadata[OTEL_CONTEXT]["traceparent"][3:35] in traces for name, metadata in stored.items() if metadata
    } == {
        "outside": True,
        "inside": True,
    }


@pytest.mark.slow
async def test_a_context_that_nobody_can_read_does_no_harm(durable: Durable, engine: AsyncEngine, spans: Spans) -> None:
    spawned = await durable.spawn(waiter)
    await run_until_idle(durable)
    await durable.emit_event("go", 1)
    async with engine.begin() as connection:
        await connection.execute(sa.update(TaskRow).values(headers={OTEL_CONTEXT: ["no", {"traceparent": 1}]}))
        await connection.execute(sa.update(Event).values(metadata_={OTEL_CONTEXT: {"traceparent": "nonsense"}}))
    await run_until_idle(durable)
    assert (await durable.wait_for_result(spawned, timeout=5)).output == "1"
    assert [len(span.links) for span in spans.all("execute waiter")] == [0, 0]


class Broken(SpanProcessor):
    """What an exporter may do wrong."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("on start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on end")


def refuse(*_: Any) -> Any:
    raise RuntimeError("no labels")


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["spans", "metrics"])
async def test_telemetry_that_fails_fails_no_task(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr("durable_sa.telemetry.spans._failed", set())
    if broken == "spans":
        provider.add_span_processor(Broken())
    else:
        monkeypatch.setattr(Meters, "labels", refuse)
        monkeypatch.setattr(Meters, "queue", refuse)
    telemetry = Telemetry(tracer_provider=provider)
    strategy = RetryStrategy.fixed(0)
    tasks: list[Any] = [parent, child, flaky, waiter]
    async with Durable(engine, telemetry=telemetry, tasks=tasks, default_retry_strategy=strategy) as durable:
        spawned = await durable.spawn(parent, "x")
        await durable.spawn_many([(waiter, None)])
        with pytest.raises(QueueNotFound):
            await durable.spawn(flaky, queue_name="nowhere")
        await durable.spawn(flaky)
        await durable.emit_event("go")
        async with durable.worker(concurrency=4):
            assert (await durable.wait_for_result(spawned, timeout=10)).output == 42
    assert "telemetry failed in" in caplog.text
    # The failure of the task itself is logged with its message.
    others = [record for record in caplog.records if not record.getMessage().startswith("task ")]
    assert SECRET not in "".join(map(caplog.handler.format, others))


async def test_messages_and_races_have_spans_without_what_they_say(durable: Durable, spans: Spans) -> None:
    @durable.task
    async def talk(ctx: TaskContext) -> None:
        await ctx.send(ctx.task_id, "note", SECRET)
        await ctx.receive("note")
        await ctx.send(ctx.task_id, "note", SECRET)
        await ctx.race("first", note=ctx.receive("note"), late=ctx.sleep_for("late", 3600))
        await ctx.publish("value", SECRET)

    await durable.spawn(talk)
    await run_until_idle(durable)
    assert [(span.attributes or {})["durable.topic"] for span in spans.all("send")] == ["note"] * 2
    assert (spans.one("receive").attributes or {})["durable.topic"] == "note"
    assert is_below(spans.one("race first"), spans.one("execute talk"))
    assert SECRET not in spans.everything()
