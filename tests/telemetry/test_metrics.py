"""What the counters count, how many series there can be, and what it takes to have none."""

import asyncio
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, Limit, TaskContext, UserError, task
from durable_sa.telemetry.meters import MAX_QUEUES, Meters
from durable_sa.testing import run_until_idle
from durable_sa.worker import sampler
from tests.support import eventually
from tests.telemetry.support import Values


@task
async def work(ctx: TaskContext, number: int) -> int:
    await ctx.step("one", lambda: 1)
    await ctx.emit_event(f"done-{number}")
    await ctx.emit_event("done")
    return number


@task(max_attempts=2)
async def fails(ctx: TaskContext, retried: bool) -> None:
    raise (ValueError if retried else UserError)("no")


@task
async def sleeps(ctx: TaskContext) -> None:
    await ctx.sleep_for("nap", 0.02)


@pytest.fixture(autouse=True)
def registered(durable: Durable) -> None:
    for each in (work, fails, sleeps):
        durable.register(each)


@pytest.mark.slow
async def test_the_counters_agree_with_the_tables(durable: Durable, metrics: Values) -> None:
    for number in range(3):
        await durable.spawn(work, number, idempotency_key=f"{number}")
        assert not (await durable.spawn(work, number, idempotency_key=f"{number}")).created
    await durable.spawn(fails, True)
    await durable.spawn(fails, False)
    slept = await durable.spawn(sleeps)
    await durable.emit_event("done")
    assert not await durable.emit_event("done")
    async with durable.worker(concurrency=3):
        await durable.wait_for_result(slept, timeout=10)
    await run_until_idle(durable)
    spawned = {("default", "work"): 3, ("default", "fails"): 2, ("default", "sleeps"): 1}
    assert metrics.of("durable_tasks_spawned_total") == spawned
    assert metrics.of("durable_tasks_claimed_total") == {
        ("default", "work"): 3,
        ("default", "fails"): 3,
        ("default", "sleeps"): 2,
    }
    assert metrics.of("durable_tasks_completed_total") == {("default", "work"): 3, ("default", "sleeps"): 1}
    assert metrics.of("durable_tasks_failed_total") == {("default", "fails"): 2}
    assert metrics.of("durable_events_emitted_total") == {("default",): 4}
    assert metrics.counts("durable_task_execution_duration_seconds") == {
        ("completed", "default", "work"): 3,
        ("failed", "default", "fails"): 3,
        ("suspended", "default", "sleeps"): 1,
        ("completed", "default", "sleeps"): 1,
    }
    assert metrics.counts("durable_checkpoint_duration_seconds") == {("default", "work"): 9}
    assert metrics.counts("durable_task_claim_duration_seconds")["default",] >= 3


async def test_tasks_that_nobody_knows_and_queues_beyond_the_bound_share_a_series(
    durable: Durable, metrics: Values
) -> None:
    for number in range(MAX_QUEUES + 2):
        await durable.create_queue(f"tenant-{number}")
        await durable.spawn_by_name(f"made up {number}", unchecked=True, queue_name=f"tenant-{number}")
    points = metrics.of("durable_tasks_spawned_total")
    assert len(points) == MAX_QUEUES + 1
    assert points["other", "other"] == 2
    assert {task_name for _, task_name in points} == {"other"}


async def test_gauges_show_workers_their_runs_and_what_is_ready(
    durable: Durable, metrics: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "SAMPLE_INTERVAL", 0.01)
    monkeypatch.setattr(sampler, "SAMPLE_PAUSE_RATIO", 1)
    held = asyncio.Event()

    @durable.task
    async def waits(ctx: TaskContext) -> None:
        await ctx.step("wait", held.wait)

    assert metrics.of("durable_worker_active") == {}
    await durable.create_queue("mail", limit_per_key=Limit(concurrency=1))
    await durable.close_limit_key("mail", "acme", datetime.now(UTC) + timedelta(hours=1))
    await durable.spawn_by_name("nobody", unchecked=True, queue_name="mail")
    async with durable.worker(queue_names=["default", "mail"], concurrency=2):
        spawned = [await durable.spawn(waits) for _ in range(4)]
        await eventually(lambda: metrics.of("durable_worker_concurrent_tasks") == {("default",): 2, ("mail",): 0})
        assert metrics.of("durable_worker_active") == {("default",): 1, ("mail",): 1}
        await eventually(lambda: metrics.of("durable_queue_depth") == {("default",): 2, ("mail",): 1})
        assert metrics.of("durable_limit_keys")["mail", "closed"] == 1
        ages = metrics.of("durable_queue_oldest_ready_age_seconds")
        assert 0 < ages["default",] < ages["mail",] < 60
        held.set()
        for each in spawned:
            await durable.wait_for_result(each, timeout=10)
        await eventually(lambda: metrics.of("durable_queue_depth") == {("default",): 0, ("mail",): 1})
        assert metrics.of("durable_queue_oldest_ready_age_seconds")["default",] == 0
    assert metrics.of("durable_worker_active") == {}
    assert metrics.of("durable_queue_depth") == {}


async def test_false_is_none_at_all(engine: AsyncEngine, telemetry: Any) -> None:
    durable = Durable(engine, telemetry=False)
    assert durable.telemetry is None


@pytest.mark.slow
def test_without_the_extra_it_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import durable_sa; import durable_sa.telemetry"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'durable_sa[telemetry]'" in result.stderr.splitlines()[-1]


SET_UP = """
import asyncio, sys
from durable_sa import Durable, TaskContext, task

@task
async def work(ctx: TaskContext) -> None:
    await ctx.step("one", lambda: 1)

async def run(durable):
    spawned = await durable.spawn(work)
    async with durable.worker():
        await durable.wait_for_result(spawned, timeout=20)

async def main():
    async with Durable(tasks=[work]) as durable:
        await run(durable)
        assert not [name for name in sys.modules if name.startswith("opentelemetry")], "imported for nobody"
        assert durable.telemetry is None
        from opentelemetry import trace
        assert durable.telemetry is None, "nothing is set up yet"
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        await run(durable)
        assert durable.telemetry is Durable().telemetry
        print(sorted(span.name for span in exporter.get_finished_spans()))

asyncio.run(main())
"""


@pytest.mark.slow
async def test_it_comes_by_itself_when_the_application_sets_it_up(
    durable: Durable, database_url: URL, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SET_UP,
        cwd=tmp_path,
        env={"DURABLE_DATABASE_URL": database_url.render_as_string(hide_password=False)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert stdout.decode() == "['claim', 'execute work', 'spawn work', 'step one']\n", stderr.decode()


def test_the_folded_depth_is_a_sum_and_the_age_the_oldest() -> None:
    from opentelemetry.metrics import CallbackOptions, NoOpMeter

    class Sampled:
        def __init__(self) -> None:
            self.queue_samples = {f"q{number}": (1.0, float(number)) for number in range(MAX_QUEUES + 3)}

    meters = Meters(NoOpMeter("test"))
    sampled: Any = Sampled()
    meters.workers.add(sampled)
    for position, expected in ((0, 3.0), (1, float(MAX_QUEUES + 2))):
        observed = list(meters._sample(position)(CallbackOptions()))
        assert len(observed) == MAX_QUEUES + 1
        assert {point.attributes["queue"]: point.value for point in observed if point.attributes}["other"] == expected
