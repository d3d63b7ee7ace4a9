"""Requests whose transaction is rolled back, and the tasks that they have spawned run in it: no worker, no waiting."""

from datetime import timedelta

import pytest
from flask import Flask
from sqlalchemy import select

from billing import bank
from billing.database import db
from billing.models import Invoice, Subscription
from billing.tasks import Terms, subscription
from durable_sa.testing import assert_spawned, run_spawned, spawned


def subscribe(app: Flask, card: str) -> int:
    response = app.test_client().post("/subscriptions", json={"customer": "ada", "card": card})
    assert response.status_code == 201, response.text
    return int(response.get_json()["id"])


def test_a_subscription_has_a_task(app: Flask) -> None:
    subscription_id = subscribe(app, "visa")
    terms = Terms(subscription_id=subscription_id, trial=timedelta(days=14))
    assert_spawned(db.session, subscription, terms, max_attempts=20)


def test_nothing_is_spawned_for_a_request_that_fails(app: Flask) -> None:
    assert app.test_client().put("/subscriptions/1/card", json={"card": "visa"}).status_code == 404
    assert spawned(db.session) == []


def test_a_card_that_is_refused_to_the_end(app: Flask) -> None:
    subscription_id = subscribe(app, "expired")
    (task,) = run_spawned(db.session)
    assert (task.status, task.output) == ("completed", "suspended")
    assert db.session.get_one(Subscription, subscription_id).status == "suspended"
    assert [invoice.receipt for invoice in db.session.scalars(select(Invoice))] == [None]


def test_a_bank_that_does_not_answer_at_first(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([TimeoutError, TimeoutError, bank.CardRefusedError])

    def charge(*_: object) -> str:
        raise next(answers)

    monkeypatch.setattr(bank, "charge", charge)
    subscribe(app, "visa")
    (task,) = run_spawned(db.session)
    assert (task.status, task.attempt) == ("completed", 1)
