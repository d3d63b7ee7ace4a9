"""The chat of the customers, and the desk where a human decides on refunds."""

from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import Durable, TaskRow
from durable_sa.dashboard import dashboard
from durable_sa.integrations.starlette import stream_response

from .models import Order, Refund, Turn
from .operators import colleague, operator
from .support import EVENTS
from .tasks import Sessions, answer

PAGES = Path(__file__).parent / "pages"
POLICY = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'"}


def customer() -> str:
    """Stand in for a login: each visitor is Ada."""
    return "ada"


Customer = Annotated[str, Depends(customer)]
Colleague = Annotated[str, Depends(colleague)]


class NewOrder(BaseModel):
    customer: str
    item: str
    cents: Annotated[int, Field(gt=0)]


class OrderView(NewOrder):
    model_config = ConfigDict(from_attributes=True)

    refunded: int


class Question(BaseModel):
    question: Annotated[str, Field(min_length=1, max_length=2000)]


class TurnView(Question):
    id: int
    answer: str | None = None
    task_state: str | None = None


class RefundView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    order_id: int
    cents: int


class Verdict(BaseModel):
    approved: bool


def create_app(sessions: async_sessionmaker[AsyncSession], durable: Durable[Sessions]) -> FastAPI:
    app = FastAPI(title="Support")
    app.mount("/durable", dashboard(durable, auth=operator))
    app.mount("/pages", StaticFiles(directory=PAGES))

    @app.get("/")
    async def chat() -> FileResponse:
        return FileResponse(PAGES / "chat.html", headers=POLICY)

    @app.post("/turns", status_code=201)
    async def ask(body: Question, customer: Customer) -> TurnView:
        async with sessions.begin() as session:
            turn = Turn(customer=customer, question=body.question)
            session.add(turn)
            await session.flush()  # for turn.id
            turn.task_id = (await durable.spawn_with(session, answer, turn.id)).task_id
        return TurnView(id=turn.id, question=turn.question, task_state="pending")

    @app.get("/turns")
    async def turns(customer: Customer) -> list[TurnView]:
        query = select(Turn, TaskRow.state).outerjoin(Turn.task).where(Turn.customer == customer).order_by(Turn.id)
        async with sessions() as session:
            found = (await session.execute(query)).all()
        return [
            TurnView(id=turn.id, question=turn.question, answer=turn.answer, task_state=state) for turn, state in found
        ]

    @app.get("/turns/{turn_id}/events")
    async def events(turn_id: int, customer: Customer, request: Request) -> StreamingResponse:
        async with sessions() as session:
            turn = await session.get(Turn, turn_id)
        if turn is None or turn.customer != customer or turn.task_id is None:
            raise HTTPException(404)
        return await stream_response(durable, turn.task_id, EVENTS, request)

    @app.get("/desk")
    async def desk(colleague: Colleague) -> FileResponse:
        return FileResponse(PAGES / "desk.html", headers=POLICY)

    @app.put("/orders/{order_id}")
    async def put_order(order_id: int, body: NewOrder, colleague: Colleague) -> NewOrder:
        async with sessions.begin() as session:
            await session.merge(Order(id=order_id, **body.model_dump()))
        return body

    @app.get("/orders/{order_id}")
    async def get_order(order_id: int, colleague: Colleague) -> OrderView:
        async with sessions() as session:
            order = await session.get(Order, order_id)
        if order is None:
            raise HTTPException(404)
        return OrderView.model_validate(order)

    # Those of a question whose task has ended, because it was cancelled for example, wait no longer.
    waiting = select(Refund).join(Turn).join(Turn.task).where(TaskRow.finished_at.is_(None)).order_by(Refund.id)

    @app.get("/refunds")
    async def refunds(colleague: Colleague) -> list[RefundView]:
        async with sessions() as session:
            found = await session.scalars(waiting.where(Refund.approved.is_(None)))
            return [RefundView.model_validate(refund) for refund in found]

    @app.put("/refunds/{refund_id}/verdict")
    async def decide(refund_id: int, body: Verdict, colleague: Colleague) -> Verdict:
        """Store a verdict, and answer the agent with the last one it waits for, in one commit. The first one counts."""
        token = select(Refund.token).where(Refund.id == refund_id).scalar_subquery()
        query = waiting.where(Refund.token == token).with_for_update(of=Refund)
        async with sessions.begin() as session:
            asked = {refund.id: refund for refund in await session.scalars(query)}
            refund = asked.get(refund_id)
            if refund is None:
                raise HTTPException(404)
            if refund.approved is not None:
                raise HTTPException(409, f"{refund.decided_by} has decided already.")
            refund.approved, refund.decided_by = body.approved, colleague
            verdicts = {other.call_id: other.approved for other in asked.values()}
            if None not in verdicts.values():
                await durable.emit_event_with(session, refund.token, {"approvals": verdicts})
        return body

    return app
