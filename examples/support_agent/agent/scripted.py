"""A function in the place of a model, for tests and for a look at the application without a key."""

import asyncio
import re
from collections.abc import AsyncIterator

from pydantic_ai.messages import ModelMessage, ModelRequest, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel

PAUSE = 0.05
"""Seconds between two words."""


async def words(text: str) -> AsyncIterator[str]:
    for word in re.findall(r"\S+\s*", text):
        yield word
        await asyncio.sleep(PAUSE)


async def reply(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str | DeltaToolCalls]:
    """Look the order up, refund it if the customer complains, and repeat what the tools have said."""
    question, results = "", list[str]()
    for part in (part for message in messages if isinstance(message, ModelRequest) for part in message.parts):
        if isinstance(part, UserPromptPart):
            question, results = str(part.content), []
        elif isinstance(part, ToolReturnPart):
            results.append(str(part.content))
    order = re.search(r"order (\d+)", question)
    if order is None:
        answer = "Hello! Which order is it about? Please tell me its number."
    elif not results:
        yield {0: DeltaToolCall("find_order", f'{{"order_id": {order[1]}}}', tool_call_id="look")}
        return
    elif len(results) == 1 and re.search("broken|refund|money", question, re.IGNORECASE):
        price = re.search(r"(\d+) cents", question) or re.search(r"(\d+) cents", results[0])
        if price is not None:
            args = f'{{"order_id": {order[1]}, "cents": {price[1]}}}'
            yield {0: DeltaToolCall("refund", args, tool_call_id="refund")}
            return
        answer = results[0]
    else:
        answer = f"I have asked about it, and here is what I know. {results[-1]} Is there anything else?"
    async for word in words(answer):
        yield word


scripted = FunctionModel(stream_function=reply, model_name="scripted")
