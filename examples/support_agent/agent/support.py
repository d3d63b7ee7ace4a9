"""The agent: its tools, and how it asks a human."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults, RunContext, ToolDenied
from pydantic_ai.capabilities import RequestInput
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import current_context
from durable_sa.integrations.pydantic_ai import DurableAgents

from .models import Order, Refund
from .refunds import pay_back, refusal
from .scripted import scripted
from .settings import MODEL

EVENTS = "events"
"""The stream of a task that has the events of its agent: words, calls of tools, their results."""

Number = Annotated[int, Field(gt=0, lt=2**31)]
"""An integer that fits into the columns; for any other, pydantic-ai asks the model to correct its call."""


@dataclass(frozen=True)
class Case:
    """Whom the agent helps. Tools see no orders but this customer's, whatever the model asks for."""

    customer: str
    turn_id: int
    sessions: async_sessionmaker[AsyncSession]


async def ask(run: RunContext[Case], requests: DeferredToolRequests, token: str) -> DeferredToolResults | None:
    """Put refunds on the desk of a human; impossible ones are denied at once.

    This is a step, which a crash may repeat: the token stays the same, so each refund is on the desk once.
    """
    case = run.deps
    refunds: list[dict[str, Any]] = []
    for call in requests.approvals:
        # As the model has written them: the types of the tool are checked, but a number may be a text.
        args = call.args_as_dict()
        refunds.append({"call_id": call.tool_call_id, "order_id": int(args["order_id"]), "cents": int(args["cents"])})
    async with case.sessions.begin() as session:
        for refund in sorted(refunds, key=lambda refund: refund["order_id"]):
            if reason := await refusal(session, case.customer, refund["order_id"], refund["cents"]):
                return requests.build_results(
                    approvals={call.tool_call_id: ToolDenied(reason) for call in requests.approvals}
                )
        rows = [{**refund, "token": token, "turn_id": case.turn_id} for refund in refunds]
        await session.execute(insert(Refund).values(rows).on_conflict_do_nothing())
    return None


support = Agent(
    MODEL or scripted,
    name="support",
    deps_type=Case,
    instructions="You help the customers of a shop, briefly and politely. Look an order up before you speak about it.",
    capabilities=[
        DurableAgents(stream=EVENTS, model_options={"max_attempts": 5, "timeout": 120}),
        RequestInput(ask, name="approve"),
    ],
    # The web server imports this module too, and has no key of the model.
    defer_model_check=True,
)


@support.tool
async def find_order(run: RunContext[Case], order_id: Number) -> str:
    """Look up an order of the customer by its number."""
    # A step: it has no effect, so a crash that repeats it does no harm.
    async with run.deps.sessions() as session:
        order = await session.get(Order, order_id)
    if order is None or order.customer != run.deps.customer:
        return f"There is no order {order_id} of this customer."
    return f"Order {order.id}: {order.item}, {order.cents} cents, of which {order.refunded} are refunded."


@support.tool(requires_approval=True, metadata={"durable_sa": False})
async def refund(run: RunContext[Case], order_id: Number, cents: Number) -> str:
    """Refund an order, or a part of it, in cents. A colleague decides whether that is done."""
    # Not a step but a transaction of the task: the payment and its checkpoint are one commit.
    paid: str = await current_context().transaction("refund", pay_back, run.deps.customer, order_id, cents)
    return paid
