"""Changes of a subscription, on `db.session`. Requests and tasks call these functions, which depend on neither."""

from pydantic import BaseModel
from sqlalchemy import func, select

from .database import db
from .models import Invoice, Subscription

CENTS = 900


class Bill(BaseModel):
    invoice_id: int
    card: str


def write_invoice(subscription_id: int, month: int) -> Bill:
    subscription = db.session.get_one(Subscription, subscription_id)
    invoice = Invoice(subscription_id=subscription_id, month=month, cents=CENTS)
    db.session.add(invoice)
    db.session.flush()
    return Bill(invoice_id=invoice.id, card=subscription.card)


def settle(invoice_id: int, receipt: str) -> None:
    invoice = db.session.get_one(Invoice, invoice_id)
    invoice.receipt = receipt
    set_status(invoice.subscription_id, "active")


def set_status(subscription_id: int, status: str) -> None:
    db.session.get_one(Subscription, subscription_id).status = status


def latest_month(subscription_id: int) -> int:
    return db.session.scalars(select(func.max(Invoice.month)).filter_by(subscription_id=subscription_id)).one()
