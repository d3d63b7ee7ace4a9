"""A subscription, from its trial to its end."""

from datetime import timedelta
from itertools import count

from pydantic import BaseModel
from sqlalchemy.orm import Session

from durable_sa import SyncTaskContext, TaskTimeout, step, task

from . import bank
from .models import Invoice, Subscription

MONTH = timedelta(days=30)
PATIENCE = timedelta(days=7)
CENTS = 900


class Terms(BaseModel):
    subscription_id: int
    trial: timedelta


class Bill(BaseModel):
    invoice_id: int
    card: str


def card_event(subscription_id: int, month: int) -> str:
    return f"new card for month {month} of subscription {subscription_id}"


def write_invoice(session: Session, subscription_id: int, month: int) -> Bill:
    subscription = session.get_one(Subscription, subscription_id)
    invoice = Invoice(subscription_id=subscription_id, month=month, cents=CENTS)
    session.add(invoice)
    session.flush()
    return Bill(invoice_id=invoice.id, card=subscription.card)


def settle(session: Session, invoice_id: int, receipt: str) -> None:
    invoice = session.get_one(Invoice, invoice_id)
    invoice.receipt = receipt
    session.get_one(Subscription, invoice.subscription_id).status = "active"


def set_status(session: Session, subscription_id: int, status: str) -> None:
    session.get_one(Subscription, subscription_id).status = status


@step(max_attempts=5)
def charge(bill: Bill) -> str | None:
    """Return a receipt, or None if the card was refused. If the bank does not answer, the request is retried."""
    try:
        return bank.charge(bill.invoice_id, bill.card, CENTS)
    except bank.CardRefusedError:
        return None


@task(max_attempts=20)
def subscription(ctx: SyncTaskContext, terms: Terms) -> str:
    ctx.sleep_for("trial", terms.trial)
    for month in count(1):
        bill = ctx.transaction(f"invoice {month}", write_invoice, terms.subscription_id, month)
        receipt = charge(bill)
        if receipt is None:
            ctx.transaction(f"overdue {month}", set_status, terms.subscription_id, "overdue")
            try:
                card = ctx.await_event(card_event(terms.subscription_id, month), timeout=PATIENCE, type=str)
                receipt = charge(Bill(invoice_id=bill.invoice_id, card=card))
            except TaskTimeout:
                pass
        if receipt is None:
            break
        ctx.transaction(f"settle {month}", settle, bill.invoice_id, receipt)
        ctx.sleep_for(f"month {month}", MONTH)
    ctx.transaction("suspend", set_status, terms.subscription_id, "suspended")
    return "suspended"
