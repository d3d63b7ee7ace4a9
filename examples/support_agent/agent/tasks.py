"""The answer to a question, as a task."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import Durable, TaskContext, task

from .models import Turn
from .support import Case, support

Sessions = async_sessionmaker[AsyncSession]

MEMORY = 20
"""The number of earlier turns that the model is shown."""


@dataclass
class Talk:
    customer: str
    question: str
    earlier: list[tuple[str, str]]


async def read(session: AsyncSession, turn_id: int) -> Talk:
    """Read a question, and the turns of the customer that were answered before."""
    turn = await session.get_one(Turn, turn_id)
    query = (
        select(Turn.question, Turn.answer)
        .where(Turn.customer == turn.customer, Turn.id < turn_id, Turn.answer.is_not(None))
        .order_by(Turn.id.desc())
        .limit(MEMORY)
    )
    earlier = [(question, answer or "") for question, answer in await session.execute(query)]
    return Talk(turn.customer, turn.question, earlier[::-1])


async def write(session: AsyncSession, turn_id: int, answer: str) -> None:
    (await session.get_one(Turn, turn_id)).answer = answer


@task("answer-question")
async def answer(ctx: TaskContext[Sessions], turn_id: int) -> None:
    """Each request of the model and each call of a tool is recorded, so none that has ended is made once more."""
    talk = await ctx.transaction("read", read, turn_id)
    history: list[ModelMessage] = []
    for question, earlier in talk.earlier:
        history += [ModelRequest.user_text_prompt(question), ModelResponse(parts=[TextPart(earlier)])]
    case = Case(talk.customer, turn_id, ctx.state)
    result = await support.run(talk.question, deps=case, message_history=history)
    await ctx.transaction("write", write, turn_id, result.output)


def make_durable(sessions: Sessions) -> Durable[Sessions]:
    @asynccontextmanager
    async def state() -> AsyncGenerator[Sessions]:
        yield sessions

    return Durable(sessions, lifespan=state, tasks=[answer])
