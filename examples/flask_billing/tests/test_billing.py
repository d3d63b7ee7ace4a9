"""Subscriptions, from their trial to each of their ends."""

from datetime import timedelta

import pytest

from billing import bank
from durable_sa import UserError
from durable_sa.testing import Clock, run_until_idle, time_travel

from .conftest import Office


async def pass_days(office: Office, clock: Clock, days: float) -> None:
    await clock.advance(timedelta(days=days))
    await run_until_idle(office.durable)


async def test_nothing_is_charged_in_the_trial_and_then_every_month(office: Office) -> None:
    subscription_id = office.subscribe()
    await run_until_idle(office.durable)
    async with time_travel(office.durable) as clock:
        await pass_days(office, clock, 13)
        assert office.show(subscription_id)["receipts"] == []
        for _ in range(3):
            await pass_days(office, clock, 30)
    shown = office.show(subscription_id)
    assert shown["receipts"] == [f"receipt for 900 cents, invoice {month}" for month in (1, 2, 3)]
    assert (shown["status"], shown["task_state"]) == ("active", "sleeping")


async def test_a_refused_card_may_be_replaced_within_a_week(office: Office) -> None:
    subscription_id = office.subscribe("expired")
    await run_until_idle(office.durable)
    async with time_travel(office.durable) as clock:
        await pass_days(office, clock, 14)
        assert office.show(subscription_id)["status"] == "overdue"
        await pass_days(office, clock, 6)
        office.http.put(f"/subscriptions/{subscription_id}/card", json={"card": "visa"})
        await run_until_idle(office.durable)
    shown = office.show(subscription_id)
    assert shown["status"] == "active"
    assert shown["receipts"] == ["receipt for 900 cents, invoice 1"]


async def test_whoever_does_not_replace_it_is_suspended(office: Office) -> None:
    subscription_id = office.subscribe("expired")
    await run_until_idle(office.durable)
    async with time_travel(office.durable) as clock:
        await pass_days(office, clock, 14)
        await pass_days(office, clock, 7)
    shown = office.show(subscription_id)
    assert (shown["status"], shown["task_state"], shown["receipts"]) == ("suspended", "completed", [None])
    assert office.http.delete(f"/subscriptions/{subscription_id}").status_code == 409


async def test_a_cancelled_subscription_is_never_charged(office: Office) -> None:
    subscription_id = office.subscribe()
    await run_until_idle(office.durable)
    assert office.http.delete(f"/subscriptions/{subscription_id}").status_code == 204
    async with time_travel(office.durable) as clock:
        await pass_days(office, clock, 14)
    shown = office.show(subscription_id)
    assert (shown["status"], shown["task_state"], shown["receipts"]) == ("cancelled", "cancelled", [])


async def test_a_subscription_that_is_not_there(office: Office) -> None:
    assert office.http.get("/subscriptions/1").status_code == 404
    assert office.http.delete("/subscriptions/1").status_code == 404


async def test_a_failed_task_is_put_back(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> str:
        raise UserError("the bank has closed our account")

    subscription_id = office.subscribe()
    await run_until_idle(office.durable)
    async with time_travel(office.durable) as clock:
        with monkeypatch.context() as patch:
            patch.setattr(bank, "charge", down)
            await pass_days(office, clock, 14)
        assert office.show(subscription_id)["error"] == "the bank has closed our account"
        assert office.http.post(f"/subscriptions/{subscription_id}/retry").status_code == 200
        await run_until_idle(office.durable)
    assert office.show(subscription_id)["receipts"] == ["receipt for 900 cents, invoice 1"]
    assert office.http.post(f"/subscriptions/{subscription_id}/retry").status_code == 409
