"""Subscriptions over HTTP. Nothing in these processes is asynchronous."""

from datetime import timedelta
from typing import Any

from flask import Blueprint, Flask, abort, current_app, request
from flask.typing import ResponseReturnValue

from durable_sa import Durable, InvalidState, TaskStatus

from . import subscriptions
from .database import db
from .models import Subscription
from .settings import DATABASE_URL, TRIAL_DAYS
from .tasks import Terms, card_event, subscription

durable = Durable(tasks=[subscription])
"""The client has no database, because the application writes with its own session."""

views = Blueprint("subscriptions", __name__, url_prefix="/subscriptions")


def create_app(url: Any = DATABASE_URL, trial_days: float = TRIAL_DAYS) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"hide_parameters": True}
    app.config["TRIAL"] = timedelta(days=trial_days)
    db.init_app(app)
    app.register_blueprint(views)
    return app


@views.post("")
def subscribe() -> ResponseReturnValue:
    body = request.get_json()
    row = Subscription(customer=body["customer"], card=body["card"])
    db.session.add(row)
    db.session.flush()  # for row.id
    terms = Terms(subscription_id=row.id, trial=current_app.config["TRIAL"])
    row.task_id = durable.spawn_with(db.session, subscription, terms).task_id
    db.session.commit()
    return {"id": row.id, "status": row.status}, 201


@views.get("/<int:subscription_id>")
def show(subscription_id: int) -> ResponseReturnValue:
    row = found(subscription_id)
    result = None if row.task_id is None else durable.get_task_result_with(db.session, row.task_id)
    return {
        "id": row.id,
        "status": row.status,
        "task_state": None if result is None else result.status,
        "error": None if result is None or result.error is None else result.error.message,
        "receipts": [invoice.receipt for invoice in row.invoices],
    }


@views.put("/<int:subscription_id>/card")
def change_card(subscription_id: int) -> ResponseReturnValue:
    card = request.get_json()["card"]
    row = found(subscription_id)
    row.card = card
    if row.status == "overdue":
        durable.emit_event_with(db.session, card_event(row.id, subscriptions.latest_month(row.id)), card)
    db.session.commit()
    return {"id": row.id, "status": row.status}


@views.post("/<int:subscription_id>/retry")
def retry(subscription_id: int) -> ResponseReturnValue:
    """Let a subscription go on whose task has failed, once its cause is mended."""
    row = found(subscription_id)
    try:
        status = durable.retry_task_with(db.session, row.task_id or abort(409))
    except InvalidState:
        abort(409)
    db.session.commit()
    return {"id": row.id, "task_state": status}


@views.delete("/<int:subscription_id>")
def unsubscribe(subscription_id: int) -> ResponseReturnValue:
    row = found(subscription_id)
    if row.task_id is None or durable.cancel_task_with(db.session, row.task_id) is not TaskStatus.CANCELLED:
        abort(409)
    row.status = "cancelled"
    db.session.commit()
    return "", 204


def found(subscription_id: int) -> Subscription:
    row = db.session.get(Subscription, subscription_id, with_for_update=request.method != "GET")
    return row or abort(404)
