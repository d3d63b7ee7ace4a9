"""Agents in tasks: each model request and each tool call happens once, also across suspensions and crashes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
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
from tests.support import eventually

pytest.importorskip("pydantic_ai", reason="the extra pydantic-ai is not installed")

from pydantic_ai import Agent
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

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
                yield {number: DeltaToolCall("look", f'{{"order":{number}}}', f"c{number}") for number in (1, 2)}
            case [_, _]:
                yield {0: DeltaToolCall("refund", '{"order":1}', "c3")}
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
        return desk.agent.run_sync("hello").output

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
