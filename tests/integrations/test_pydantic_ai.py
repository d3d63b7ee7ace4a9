"""Agents in tasks: each model request and each tool call happens once, also across suspensions and crashes."""

import asyncio
import importlib.util
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import date, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    Durable,
    InvalidConfiguration,
    RetryStrategy,
    StreamRestart,
    SyncTaskContext,
    TaskContext,
    TaskStatus,
)
from durable_sa.testing import run_until_idle, task_context, time_travel
from tests.support import eventually

pytest.importorskip("pydantic_ai", reason="the extra pydantic-ai is not installed")

from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

from durable_sa.integrations import pydantic_ai as integration
from durable_sa.integrations.pydantic_ai import DurableAgents


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    async with Durable(engine, default_retry_strategy=RetryStrategy.fixed(0)) as durable:
        yield durable


def results(messages: list[ModelMessage]) -> list[Any]:
    return [part.content for message in messages for part in message.parts if isinstance(part, ToolReturnPart)]


class Desk:
    """An agent that looks two orders up at once, then refunds one, which a human has to approve."""

    def __init__(self, *, stream: str | None = None, **options: Any) -> None:
        self.calls: list[str] = []
        self.tokens: list[tuple[str, list[str]]] = []
        self.fail_once: set[str] = set()
        self.agent: Agent[None, str] = Agent(
            FunctionModel(self.respond, stream_function=self.stream),
            name="support",
            capabilities=[DurableAgents(stream=stream), RequestInput(self.ask, name="approve")],
        )
        self.agent.tool_plain(name="look", **options)(self.look)
        self.agent.tool_plain(name="refund", requires_approval=True)(self.refund)

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fail_once:
            self.fail_once.remove(call)
            raise RuntimeError(call)

    async def respond(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        self.note("model")
        match results(messages):
            case []:
                return ModelResponse(parts=[ToolCallPart("look", {"order": number}) for number in (1, 2)])
            case [_, _]:
                return ModelResponse(parts=[ToolCallPart("refund", {"order": 1})])
            case found:
                return ModelResponse(parts=[TextPart(" ".join(found))])

    async def stream(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        self.note("model")
        match results(messages):
            case []:
                yield {
                    number: DeltaToolCall("look", f'{{"order":{number}}}', tool_call_id=f"c{number}")
                    for number in (1, 2)
                }
            case [_, _]:
                yield {0: DeltaToolCall("refund", '{"order":1}', tool_call_id="c3")}
            case _:
                for number, word in enumerate(("It ", "is ", "done")):
                    yield word
                    self.note(f"word {number}")

    async def look(self, order: int) -> str:
        self.note(f"look {order}")
        return f"order {order}"

    async def refund(self, order: int) -> str:
        self.note(f"refund {order}")
        return f"refunded {order}"

    async def ask(self, ctx: Any, requests: Any, token: str) -> None:
        self.note("ask")
        self.tokens.append((token, [call.tool_call_id for call in requests.approvals]))

    async def approve(self, durable: Durable) -> None:
        token, calls = self.tokens[0]
        await durable.emit_event(token, {"approvals": dict.fromkeys(calls, True)})

    def register(self, durable: Durable) -> Any:
        @durable.task
        async def answer(ctx: TaskContext, question: str) -> str:
            return (await self.agent.run(question)).output

        return answer


async def asleep(durable: Durable, spawned: Any) -> bool:
    found = await durable.get_task_result(spawned)
    return found is not None and found.status is TaskStatus.SLEEPING


async def test_a_run_waits_for_a_human_across_a_restart_and_calls_nothing_twice(durable: Durable) -> None:
    desk = Desk()
    spawned = await durable.spawn(desk.register(durable), "Refund order 1")
    async with durable.worker():
        await eventually(lambda: desk.tokens)
        await eventually(lambda: asleep(durable, spawned))
    await desk.approve(durable)
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=20)
    assert result.output == "order 1 order 2 refunded 1"
    assert sorted(desk.calls) == sorted(["model"] * 3 + ["look 1", "look 2", "ask", "refund 1"])


async def test_a_run_that_fails_goes_on_behind_the_last_step(durable: Durable) -> None:
    desk = Desk(metadata={"durable_sa": {"max_attempts": 2, "retry_strategy": RetryStrategy.fixed(0)}})
    desk.fail_once = {"look 2", "refund 1"}
    spawned = await durable.spawn(desk.register(durable), "Refund order 1")
    async with durable.worker():
        await eventually(lambda: desk.tokens)
        await desk.approve(durable)
        result = await durable.wait_for_result(spawned, timeout=20)
    assert result.output == "order 1 order 2 refunded 1"
    # The tool with two tries has failed no attempt, the other one has.
    assert desk.calls.count("look 1") == 1
    assert desk.calls.count("look 2") == desk.calls.count("refund 1") == 2
    assert desk.calls.count("model") == 3
    assert (await durable.get_task(spawned)).attempt == 2


async def test_events_go_to_a_stream_and_a_model_that_is_cut_off_restarts_it(durable: Durable) -> None:
    desk = Desk(stream="events")
    desk.fail_once = {"word 1"}
    spawned = await durable.spawn(desk.register(durable), "Refund order 1")
    entries: list[Any] = []
    async with durable.worker():
        await eventually(lambda: desk.tokens)
        await desk.approve(durable)
        async with asyncio.timeout(20):
            async for entry in durable.read_stream(spawned, "events"):
                entries.append(entry)  # noqa: PERF401
        assert (await durable.wait_for_result(spawned, timeout=20)).output == "It is done"
    kept = [entry async for entry in durable.read_stream(spawned, "events")]
    kinds = [entry.value["event_kind"] for entry in kept if not isinstance(entry, StreamRestart)]
    assert kinds.count("function_tool_result") == 3
    deltas = [entry.value for entry in kept if not isinstance(entry, StreamRestart)][-4:]
    assert "".join(each["delta"]["content_delta"] for each in deltas if each["event_kind"] == "part_delta") == "is done"


async def test_another_prompt_is_another_step(durable: Durable) -> None:
    requests = 0

    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        nonlocal requests
        requests += 1
        return ModelResponse(parts=[TextPart("hello")])

    agent = Agent(FunctionModel(respond), name="greeter", capabilities=[DurableAgents()])

    @durable.task
    async def answer(ctx: TaskContext) -> str:
        for prompt in ("a", "a", f"{ctx.attempt}"):
            await agent.run(prompt)
        if ctx.attempt == 1:
            raise RuntimeError
        return "done"

    spawned = await durable.spawn(answer)
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=20)).output == "done"
    assert requests == 4


async def test_what_cannot_work_is_refused(durable: Durable) -> None:
    desk = Desk(metadata={"durable_sa": {"attempts": 2}})
    with pytest.raises(InvalidConfiguration, match="'retries' is no option of a step"):
        DurableAgents(model_options={"retries": 2})

    @durable.task(max_attempts=1)
    def plain(ctx: SyncTaskContext) -> str:
        return asyncio.run(desk.agent.run("hello")).output

    async with durable.worker():
        failed = await durable.wait_for_result(await durable.spawn(plain), timeout=20)
        assert failed.error is not None
        assert failed.error.name == "InvalidState"
        failed = await durable.wait_for_result(
            await durable.spawn(desk.register(durable), "Refund", max_attempts=1), timeout=20
        )
        assert failed.error is not None
        assert "'attempts' is no option of a step" in failed.error.message


async def test_outside_of_tasks_an_agent_is_as_it_was() -> None:
    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart("hello")])

    agent = Agent(FunctionModel(respond), name="greeter", capabilities=[DurableAgents(stream="events")])
    assert (await agent.run("hello")).output == "hello"


async def done(durable: Durable, task: Any) -> Any:
    return await durable.wait_for_result(await durable.spawn(task), timeout=20)


def words(*answers: str) -> FunctionModel:
    """A model that calls the tools of these names, one after another, and says how often it was asked in the end."""

    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        asked = sum(isinstance(message, ModelResponse) for message in messages)
        if asked < len(answers):
            return ModelResponse(parts=[ToolCallPart(answers[asked], {})])
        return ModelResponse(parts=[TextPart(f"{results(messages)}")])

    return FunctionModel(respond)


async def test_runs_within_runs_are_steps_of_their_own_name(durable: Durable) -> None:
    """Of a tool that is called without a step; one that is a step keeps the inner run as its own part."""
    clerk = Agent(words("fetch"), name="clerk", capabilities=[DurableAgents()])
    chief = Agent(words("by_step", "in_body"), name="chief", capabilities=[DurableAgents()])
    calls: list[str] = []

    @clerk.tool_plain
    def fetch() -> str:
        calls.append("fetch")
        return "files"

    @chief.tool_plain
    async def by_step() -> str:
        output = (await clerk.run("first")).output
        calls.append("by_step")
        if calls.count("by_step") == 1:
            raise RuntimeError
        return output

    @chief.tool_plain(metadata={"durable_sa": False})
    async def in_body() -> str:
        return (await clerk.run("second")).output

    @durable.task
    async def answer(ctx: TaskContext) -> str:
        output = (await chief.run("go")).output
        if ctx.attempt < 3:
            raise RuntimeError
        return output

    spawned = await durable.spawn(answer)
    async with durable.worker():
        result = await durable.wait_for_result(spawned, timeout=20)
    assert result.output == """["['files']", "['files']"]"""
    # The inner run of the tool that failed goes on behind its steps, too.
    assert calls == ["fetch", "by_step", "by_step", "fetch"]
    steps = [entry.name for entry in await durable.get_history(spawned) if entry.kind == "step"]
    assert [name for name in dict.fromkeys(steps) if name.startswith("clerk")] == [
        "clerk__model.request",
        "clerk__function_toolset__<agent>.call_tool:fetch",
    ]


async def test_a_tool_with_another_description_is_not_called_for_a_second_time(durable: Durable) -> None:
    calls: list[str] = []

    def agent(description: str) -> Agent[None, str]:
        made = Agent(words("pay"), name="payer", capabilities=[DurableAgents()])

        @made.tool_plain(description=description)
        def pay() -> str:
            calls.append(description)
            return description

        return made

    @durable.task
    async def answer(ctx: TaskContext) -> str:
        output = (await agent(f"version {ctx.attempt}").run("go")).output
        if ctx.attempt == 1:
            raise RuntimeError
        return output

    async with durable.worker():
        assert (await done(durable, answer)).output == "['version 1']"
    assert calls == ["version 1"]


class Polled(FunctionModel):
    """A model whose answers are ready after an hour."""

    cancelled = 0

    def continuation_delay(self, response: ModelResponse) -> float | None:
        return 3600

    async def cancel_suspended_response(self, response: ModelResponse) -> None:
        self.cancelled += 1


async def test_the_pauses_of_a_run_suspend_the_task(durable: Durable) -> None:
    requests = 0

    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        nonlocal requests
        requests += 1
        if requests == 1:
            return ModelResponse(parts=[], state="suspended", provider_response_id="job", provider_name="function")
        return ModelResponse(parts=[TextPart("ready")], provider_response_id="job", provider_name="function")

    model = Polled(respond)
    agent = Agent(model, name="thinker", capabilities=[DurableAgents()])

    @durable.task
    async def answer(ctx: TaskContext) -> str:
        return (await agent.run("think")).output

    spawned = await durable.spawn(answer)
    async with time_travel(durable) as clock:
        await run_until_idle(durable)
        assert await asleep(durable, spawned)
        await clock.advance(timedelta(hours=1))
        await run_until_idle(durable)
    assert (await durable.wait_for_result(spawned)).output == "ready"
    assert requests == 2
    assert model.cancelled == 0


async def test_a_record_that_does_not_fit_fails_the_task_without_a_retry(durable: Durable, engine: AsyncEngine) -> None:
    desk = Desk()
    spawned = await durable.spawn(desk.register(durable), "Refund order 1")
    await run_until_idle(durable)
    changed = text("""UPDATE durable.checkpoints SET value = '{"parts": "secret"}' WHERE name LIKE '%model.request'""")
    async with engine.begin() as connection:
        await connection.execute(changed)
    await desk.approve(durable)
    await run_until_idle(durable)
    failed = await durable.wait_for_result(spawned)
    assert failed.error is not None
    assert failed.error.name == "SerializationError"
    assert "parts" in failed.error.message
    assert "secret" not in f"{failed.error}"
    assert (await durable.get_task(spawned)).attempt == 1


async def test_a_result_without_a_json_form_fails_the_task_without_a_retry(durable: Durable) -> None:
    agent = Agent(words("look"), name="looker", capabilities=[DurableAgents()])

    @agent.tool_plain(metadata={"durable_sa": {"max_attempts": 3}})
    def look() -> object:
        return object()

    @durable.task
    async def answer(ctx: TaskContext) -> str:
        return (await agent.run("look")).output

    async with durable.worker():
        spawned = await durable.spawn(answer)
        failed = await durable.wait_for_result(spawned, timeout=20)
    assert failed.error is not None
    assert failed.error.name == "SerializationError"
    assert (await durable.get_task(spawned)).attempt == 1


async def test_results_of_tools_come_back_as_plain_json_and_are_shown_in_no_warning(
    durable: Durable, recwarn: pytest.WarningsRecorder
) -> None:
    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if not (found := results(messages)):
            return ModelResponse(parts=[ToolCallPart("raw", {}), ToolCallPart("when", {"day": "2024-01-02"})])
        return ModelResponse(parts=[TextPart(repr(found))])

    agent = Agent(FunctionModel(respond), name="support", capabilities=[DurableAgents()])

    @agent.tool_plain
    def raw() -> bytes:
        return b"\xff"

    @agent.tool_plain
    def when(day: date) -> date:
        return day.replace(year=2025)

    @durable.task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        return (await agent.run("")).output

    async with durable.worker():
        assert (await done(durable, work)).output == "['_w==', '2025-01-02']"
    assert not [warning for warning in recwarn if "Pydantic" in str(warning.message)]


async def test_an_answer_that_comes_too_late_is_a_refusal_to_the_model(durable: Durable) -> None:
    desk = Desk()
    asking = RequestInput(desk.ask, name="approve", timeout=timedelta(hours=1))
    agent = Agent(words("refund"), name="support", capabilities=[DurableAgents(), asking])

    @agent.tool_plain(requires_approval=True)
    def refund() -> str:
        return "refunded"

    @durable.task
    async def answer(ctx: TaskContext) -> str:
        return (await agent.run("refund")).output

    spawned = await durable.spawn(answer)
    async with time_travel(durable) as clock:
        await run_until_idle(durable)
        await clock.advance(timedelta(hours=1))
        await run_until_idle(durable)
    output = (await durable.wait_for_result(spawned)).output or ""
    assert "No answer came within 1:00:00." in output
    assert "refunded" not in output


async def test_units_that_are_replayed_are_reported_as_such(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the spans of a run would be exported once more by each replay."""
    units: list[bool] = []
    monkeypatch.setattr(integration, "record_durable_unit", lambda *, executed: units.append(executed))
    desk = Desk()
    spawned = await durable.spawn(desk.register(durable), "Refund order 1")
    await run_until_idle(durable)
    assert units == [True] * 4
    await desk.approve(durable)
    await run_until_idle(durable)
    assert units == [True] * 4 + [False] * 4 + [True] * 2
    assert (await durable.wait_for_result(spawned)).output == "order 1 order 2 refunded 1"


async def test_a_task_with_an_agent_can_be_tested_in_memory() -> None:
    agent = Agent(words("look"), name="looker", capabilities=[DurableAgents(stream=None)])
    seen: list[Any] = []

    @agent.tool
    def look(ctx: RunContext[object]) -> str:
        seen.append(ctx.tool_name)
        return "seen"

    with task_context():
        assert (await agent.run("look")).output == "['seen']"
    assert seen == ["look"]


def test_without_the_extra_the_import_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic_ai.durable_exec", None)
    assert integration.__file__ is not None
    spec = importlib.util.spec_from_file_location("durable_sa.integrations.copy", integration.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'durable_sa\[pydantic-ai\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
