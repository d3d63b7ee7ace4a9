"""Agents of pydantic-ai inside tasks: each model request and each tool call is a step.

```python
from pydantic_ai import Agent
from pydantic_ai.capabilities import RequestInput

from durable_sa.integrations.pydantic_ai import DurableAgents

support = Agent(
    "openai:gpt-5",
    name="support",
    capabilities=[DurableAgents(stream="events"), RequestInput(ask)],
)


@durable.task
async def answer(ctx: TaskContext, question: str) -> str:
    return (await support.run(question)).output
```

It needs the extra `pydantic-ai`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, JsonValue, TypeAdapter, ValidationError
from pydantic_core import to_json

try:
    from pydantic_ai import RunContext, ToolsetTool
    from pydantic_ai.agent import Agent, EventStreamHandler
    from pydantic_ai.capabilities.abstract import WrapRunHandler
    from pydantic_ai.durable_exec import (
        JSON_CODEC,
        BaseDurabilityCapability,
        DurabilityCodec,
        DurabilityEngineSpec,
        DurableOperationId,
        ExternalEventError,
        ExternalEventWaiter,
        JournalCallableOperationBackend,
        RoleBasedOperationConfig,
        ToolsetCallToolId,
        ToolsetKind,
        ToolsetValidateToolArgumentsId,
        external_event_scope,
        record_durable_unit,
        replay_scope,
    )
    from pydantic_ai.messages import AgentStreamEvent
    from pydantic_ai.models import Model
    from pydantic_ai.run import AgentRunResult
except ImportError as error:
    raise ImportError(
        "pydantic-ai 2.68 or newer is not installed. Install it: pip install 'durable_sa[pydantic-ai]'", name=error.name
    ) from error

from ..context import TaskContext
from ..current import context_or_none
from ..errors import InvalidConfiguration, InvalidState, SerializationError, TaskTimeout
from ..names import validate_name
from ..steps import step

__all__ = ["DurableAgents"]

_OPTIONS = frozenset({"max_attempts", "retry_strategy", "timeout"})
_OF_A_RUN = frozenset({"timestamp", "run_id", "conversation_id", "tool_call_id"})
"""Fields of pydantic-ai's own classes that differ from run to run, although the request is the same."""
_EVENT: TypeAdapter[Any] = TypeAdapter(AgentStreamEvent)

StepConfig = Mapping[str, Any]


@functools.cache
def _adapter(tp: Any) -> TypeAdapter[Any]:
    return TypeAdapter(tp)


class _Codec(DurabilityCodec):
    """The JSON form of results. Neither a value without one nor a record that no longer fits is met a second time."""

    def dump(self, tp: Any, value: Any) -> Any:
        # Warnings would show the value, for instance of a result that is neither text nor JSON.
        return _adapter(tp).dump_python(value, mode="json", warnings=False)

    def load(self, tp: Any, payload: Any) -> Any:
        try:
            return JSON_CODEC.load(tp, payload)
        except ValidationError as error:
            # Its text and its cause would show what was recorded.
            problem = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in problem["loc"]) or "it"
            raise SerializationError(
                "The recorded result of a step of an agent", f"{place}: {problem['msg']}"
            ) from None


class DurableAgents(BaseDurabilityCapability[Any]):
    """A capability that makes the runs of an agent durable inside tasks; outside of tasks it changes nothing.

    Each model request and each tool call is a step of the task, so a run that was cut off goes on behind the last one
    that has ended. A request for input (`RequestInput`) suspends the task until `durable.emit_event(token, ...)` has
    the answer, on the queue of the task. The agent needs a name, and each toolset of MCP servers an id: the steps are
    named after them.

    A model request is known by its messages, tools and settings, without the times and ids of the run, and a tool call
    by its name and arguments: others are another step, by the task's `replay` rule.
    `metadata={"durable_sa": {"max_attempts": 3, "timeout": 30}}` of a tool sets the options of its step, and
    `{"durable_sa": False}` has it called without one; `model_options` are those of model requests.

    With `stream`, the events of the runs, as JSON, go to that stream of the task, which its end ends. Agents that run
    at the same time in one task need streams of their own.
    """

    engine_spec: ClassVar[DurabilityEngineSpec] = DurabilityEngineSpec(
        engine_name="durable_sa",
        durable_unit_noun="step",
        durable_container_noun="task",
        codec=_Codec(),
        serialization_failure=lambda error: SerializationError(
            "The result of a step of an agent", f"has no JSON form ({type(error).__name__})"
        ),
        toolset_lifecycles={"function": "enter-always", "mcp": "enter-in-durable-unit", "dynamic": "enter-never"},
        unsupported_runtime_toolset_kinds=frozenset({"function", "mcp", "dynamic"}),
        tool_config_key="durable_sa",
    )

    def __init__(
        self,
        *,
        stream: str | None = None,
        model_options: StepConfig | None = None,
        models: Mapping[str, Model] | None = None,
        name: str | None = None,
    ) -> None:
        self.stream = None if stream is None else validate_name("stream", stream)
        self.model_options = _checked(dict(model_options or {}), "model_options")
        handler: EventStreamHandler[Any] | None = None if stream is None else self._write_events
        super().__init__(models=models, event_stream_handler=handler, name=name)

    @property
    def in_durable_context(self) -> bool:
        """True in the code of a task.

        Raises:
            InvalidState: in a `def` task, whose thread runs no agents.
        """
        context = context_or_none()
        if context is not None and getattr(context, "blocking", False):
            raise InvalidState("The agent", "run in a `def` task", "Write the task as `async def`.")
        return isinstance(context, TaskContext)

    @property
    def has_wrap_run_event_stream(self) -> bool:
        """True if the events of the run go to a stream, for which the model's answers are streamed."""
        return self.stream is not None and self.in_durable_context

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        """Return when the run was started first, for its time limit."""
        return await _context().now() if self.in_durable_context else None

    async def wrap_run(self, ctx: RunContext[Any], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        """Let the run wait for input and pause as a task does."""
        if not self.in_durable_context:
            return await handler()
        with replay_scope(), external_event_scope(_Waiter(self.name)), Agent.using_sleep(_sleep):
            return await super().wrap_run(ctx, handler=handler)

    def get_durable_operation_backend(self) -> _Backend:
        """Return what turns operations of the agent into steps."""

        def of_tool(
            operation_id: DurableOperationId, tool: ToolsetTool[Any] | None, name: str
        ) -> StepConfig | Literal[False]:
            config: Any = self._build_resolve_tool_config(None)(tool, name)
            return config if config is False else _checked(dict(config or {}), f"metadata of tool {name!r}")

        config = RoleBasedOperationConfig[StepConfig](
            model=self.model_options,
            event={},
            capability={},
            tool={},
            resolve_tool=of_tool,  # type: ignore[arg-type]
        )
        return _Backend(agent_name=self.name, default_model_id=self.default_model_id, config=config)

    def _toolset_base_config(self, kind: ToolsetKind) -> Any:
        return {}

    async def _write_events(self, ctx: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        context = context_or_none()
        if self.stream is None or not isinstance(context, TaskContext):
            async for _ in events:
                pass
            return
        async with context.stream(self.stream, keep_open=True) as stream:
            async for event in events:
                await stream.write(_EVENT.dump_python(event, mode="json", fallback=_type_name))


class _Backend(JournalCallableOperationBackend[StepConfig]):
    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: StepConfig,
    ) -> object:
        executed = False

        @step(**config)
        async def unit(digest: str) -> Any:
            nonlocal executed
            executed = True
            return await body()

        if isinstance(operation_id, ToolsetCallToolId | ToolsetValidateToolArgumentsId):
            # The name and the arguments. A tool whose description was changed must not be called for a second time.
            cache_key = cache_key[:2]
        text = json.dumps(_projected(cache_key), sort_keys=True, ensure_ascii=False)
        digest = blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
        result = await _context().step(name, unit, digest)
        record_durable_unit(executed=executed)
        return result


class _Waiter(ExternalEventWaiter):
    """Waits for events of durable_sa, whose names are the tokens."""

    def __init__(self, agent_name: str) -> None:
        self._agent_name = agent_name

    async def wait(
        self, name: str, *, ask: Callable[[str], Awaitable[JsonValue]], timeout: timedelta | None
    ) -> JsonValue:
        context = _context()
        token = str(await context.uuid7())

        async def asked(token: str) -> Any:
            return await ask(token)

        answer: JsonValue = await context.step(f"{self._agent_name}__external_event.{name}.ask", asked, token)
        if answer is not None:
            return answer
        try:
            payload: JsonValue = await context.await_event(token, timeout=timeout)
        except TaskTimeout as error:
            raise ExternalEventError(f"No answer came within {timeout}.") from error
        return payload


async def _sleep(delay: float) -> None:
    await _context().sleep_for("agent", max(delay, 0.0))


def _context() -> TaskContext[Any]:
    context = context_or_none()
    if not isinstance(context, TaskContext):
        raise InvalidState("The run of a durable agent", "continued outside of its task")
    return cast("TaskContext[Any]", context)


def _checked(config: dict[str, Any], what: str) -> StepConfig:
    if unknown := config.keys() - _OPTIONS:
        raise InvalidConfiguration(
            what, f"{min(unknown)!r} is no option of a step", f"There are {', '.join(sorted(_OPTIONS))}."
        )
    step(**config)
    return config


def _projected(value: Any) -> Any:
    """Return what identifies a value, as JSON that is the same in every run."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray():
            return {"bytes": blake2b(value, digest_size=16).hexdigest()}
        case RunContext():
            # What a request or call depends on is beside it.
            return None
        case Mapping():
            pairs = cast("Mapping[Any, Any]", value)
            return {str(key): _projected(item) for key, item in pairs.items()}
        case set() | frozenset():
            return sorted((_projected(item) for item in cast("Iterable[Any]", value)), key=repr)
        case list() | tuple():
            return [_projected(item) for item in cast("Iterable[Any]", value)]
        case _ if is_dataclass(value) and not isinstance(value, type):
            own = type(value).__module__.partition(".")[0] == "pydantic_ai"
            names = (field.name for field in fields(value) if not (own and field.name in _OF_A_RUN))
            return {name: _projected(getattr(value, name)) for name in names if not name.startswith("_")}
        case BaseModel():
            return {name: _projected(getattr(value, name)) for name in type(value).model_fields}
        case _:
            with contextlib.suppress(Exception):
                return to_json(value).decode()
            return _type_name(value)


def _type_name(value: object) -> str:
    """Stand in for a value without a JSON form."""
    return f"<{type(value).__qualname__}>"
