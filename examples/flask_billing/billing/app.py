"""Subscriptions over HTTP. Nothing in these processes is asynchronous."""

from datetime import timedelta
from typing import Any

from flask import Flask, abort, request
from flask.typing import ResponseReturnValue
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from durable_sa import Durable, TaskStatus

from .models import Invoice, Subscription
from .settings import DATABASE_URL, TRIAL_DAYS
from .tasks import Terms, card_event, subscription

durable = Durable()
"""The client has no database, because the application writes with its own sessions."""


def create_app(url: Any = DATABASE_URL, trial_days: float = TRIAL_DAYS) -> Flask:
    app = Flask(__name__)
    sessions = sessionmaker(create_engine(url, hide_parameters=True))
    app.extensions["sessions"] = sessions

    @app.post("/subscriptions")
    def subscribe() -> ResponseReturnValue:
        body = request.get_json()
        with sessions.begin() as session:
            row = Subscription(customer=body["customer"], card=body["card"])
            session.add(row)
            session.flush()  # for row.id
            terms = Terms(subscription_id=row.id, trial=timedelta(days=trial_days))
            row.task_id = durable.spawn_with(session, subscription, terms).task_id
            return {"id": row.id, "status": row.status}, 201

    @app.get("/subscriptions/<int:subscription_id>")
    def show(subscription_id: int) -> ResponseReturnValue:
        with sessions() as session:
            row = found(session, subscription_id)
            return {
                "id": row.id,
                "status": row.status,
                "task_state": row.task and row.task.state,
                "receipts": [invoice.receipt for invoice in row.invoices],
            }

    @app.put("/subscriptions/<int:subscription_id>/card")
    def change_card(subscription_id: int) -> ResponseReturnValue:
        card = request.get_json()["card"]
        with sessions.begin() as session:
            row = found(session, subscription_id)
            row.card = card
            if row.status == "overdue":
                latest = select(func.max(Invoice.month)).where(Invoice.subscription_id == row.id)
                durable.emit_event_with(session, card_event(row.id, session.scalars(latest).one()), card)
            return {"id": row.id, "status": row.status}

    @app.delete("/subscriptions/<int:subscription_id>")
    def unsubscribe(subscription_id: int) -> ResponseReturnValue:
        with sessions.begin() as session:
            row = found(session, subscription_id)
            if row.task_id is None or durable.cancel_task_with(session, row.task_id) is not TaskStatus.CANCELLED:
                abort(409)
            row.status = "cancelled"
        return "", 204

    def found(session: Session, subscription_id: int) -> Subscription:
        row = session.get(Subscription, subscription_id, with_for_update=request.method != "GET")
        return row or abort(404)

    return app
