"""A subscription, from its trial to its end."""

from datetime import timedelta
from itertools import count

from pydantic import BaseModel
from sqlalchemy.orm import Session

from durable_sa import SyncTaskContext, TaskTimeout, step, task, transaction

from . import bank, subscriptions
from .subscriptions import CENTS, Bill

MONTH = timedelta(days=30)
PATIENCE = timedelta(days=7)


class Terms(BaseModel):
    subscription_id: int
    trial: timedelta


def card_event(subscription_id: int, month: int) -> str:
    return f"new card for month {month} of subscription {subscription_id}"


# The session of a transaction is `db.session`, so the application's own functions write in it.


@transaction
def write_invoice(session: Session, subscription_id: int, month: int) -> Bill:
    return subscriptions.write_invoice(subscription_id, month)


@transaction
def settle(session: Session, bill: Bill, receipt: str) -> None:
    subscriptions.settle(bill.invoice_id, receipt)


@transaction
def set_status(session: Session, subscription_id: int, status: str) -> None:
    subscriptions.set_status(subscription_id, status)


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
        bill = write_invoice(terms.subscription_id, month)
        receipt = charge(bill)
        if receipt is None:
            set_status(terms.subscription_id, "overdue")
            try:
                card = ctx.await_event(card_event(terms.subscription_id, month), timeout=PATIENCE, type=str)
                receipt = charge(Bill(invoice_id=bill.invoice_id, card=card))
            except TaskTimeout:
                pass
        if receipt is None:
            break
        settle(bill, receipt)
        ctx.sleep_for(f"month {month}", MONTH)
    set_status(terms.subscription_id, "suspended")
    return "suspended"
