"""Questions, from the browser to the agent and back, with a human in between."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic_ai.messages import ModelMessage, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall

from agent.app import customer
from agent.scripted import scripted

from .conftest import Shop

BROKEN = "The lamp of order 17 is broken."
REFUNDED = (
    "I have asked about it, and here is what I know. 1200 cents of order 17 are refunded. Is there anything else?"
)


def tokens(events: list[tuple[int, Any]]) -> list[str]:
    """Return the words of the model, in the order in which the browser gets them."""
    found = []
    for _, event in events:
        match event:
            case {"event_kind": "part_start", "part": {"part_kind": "text", "content": words}}:
                found.append(words)
            case {"event_kind": "part_delta", "delta": {"part_delta_kind": "text", "content_delta": words}}:
                found.append(words)
    return found


async def test_a_refund_waits_for_a_human_and_the_browser_gets_each_word_in_order(shop: Shop) -> None:
    turn = await shop.ask(BROKEN)
    assert (turn["answer"], turn["task_state"]) == (None, "sleeping")
    assert await shop.refunded(17) == 0
    (refund,) = await shop.waiting()
    assert (refund["order_id"], refund["cents"]) == (17, 1200)

    assert await shop.decide(refund["id"], approved=True) == 200
    turn = await shop.turn(turn["id"])
    assert (turn["answer"], turn["task_state"]) == (REFUNDED, "completed")
    assert await shop.refunded(17) == 1200
    assert await shop.decide(refund["id"], approved=True) == 404
    assert await shop.waiting() == []

    events = await shop.events(turn["id"])
    assert [position for position, _ in events] == sorted({position for position, _ in events})
    assert tokens(events) == [f"{word} " for word in REFUNDED.split()[:-1]] + ["else?"]
    kinds = [event["event_kind"] for _, event in events]
    asked = kinds.index("deferred_tool_requests")
    assert kinds[:asked].count("function_tool_result") == 1
    assert kinds[asked:].count("function_tool_result") == 1
    # A browser that comes back gets what it has missed.
    position = events[asked][0]
    assert await shop.events(turn["id"], **{"Last-Event-ID": str(position)}) == events[asked + 1 :]


async def test_a_refusal_is_told_to_the_model_and_nothing_is_refunded(shop: Shop) -> None:
    turn = await shop.ask(BROKEN)
    (refund,) = await shop.waiting()
    assert await shop.decide(refund["id"], approved=False) == 200
    turn = await shop.turn(turn["id"])
    assert turn["task_state"] == "completed"
    assert "denied" in turn["answer"]
    assert await shop.refunded(17) == 0


async def test_the_model_is_shown_what_was_said_before(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def repeat(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        seen.append(" | ".join(str(getattr(part, "content", "")) for message in messages for part in message.parts))
        yield f"answer {len(seen)}"

    monkeypatch.setattr(scripted, "stream_function", repeat)
    await shop.ask("first")
    shop.app.dependency_overrides[customer] = lambda: "bob"
    await shop.ask("of another customer")
    shop.app.dependency_overrides.clear()
    await shop.ask("second")
    assert seen == ["first", "of another customer", "first | answer 1 | second"]


async def test_no_customer_reaches_the_orders_and_turns_of_another(shop: Shop) -> None:
    for question in ("Where is order 18?", "The lamp of order 18 is broken."):
        assert "There is no order 18 of this customer." in (await shop.ask(question))["answer"]
    turn = await shop.ask("Where is order 17?")
    assert "lamp, 1200 cents" in turn["answer"]
    shop.app.dependency_overrides[customer] = lambda: "bob"
    assert (await shop.http.get(f"/turns/{turn['id']}/events")).status_code == 404
    assert (await shop.http.get("/turns")).json() == []


async def test_refunds_of_one_request_are_decided_one_by_one_and_impossible_ones_ask_nobody(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def demand(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        parts = [part for message in messages for part in message.parts]
        results = [str(part.content) for part in parts if isinstance(part, ToolReturnPart)]
        calls = {0: [(17, 700), (18, 5)], 2: [(17, 300), (17, 400)]}.get(len(results), [])
        for index, (order, cents) in enumerate(calls):
            args = f'{{"order_id": "{order}", "cents": {cents}}}'
            yield {index: DeltaToolCall("refund", args, tool_call_id=f"{len(results)}-{index}")}
        if not calls:
            yield " ".join(results)

    monkeypatch.setattr(scripted, "stream_function", demand)
    turn = await shop.ask("Money!")
    # The first request was denied as a whole, since order 18 is Bob's.
    first, second = await shop.waiting()
    assert (first["cents"], second["cents"]) == (300, 400)
    assert await shop.decide(second["id"], approved=True) == 200
    assert await shop.decide(second["id"], approved=False) == 409
    assert (await shop.turn(turn["id"]))["task_state"] == "sleeping"
    assert await shop.decide(first["id"], approved=False) == 200
    turn = await shop.turn(turn["id"])
    assert "400 cents of order 17 are refunded." in turn["answer"]
    assert await shop.refunded(17) == 400


async def test_the_desk_is_for_colleagues_and_pages_run_no_code_but_their_own(shop: Shop) -> None:
    for path in ("/desk", "/refunds", "/orders/17"):
        assert (await shop.http.get(path)).status_code == 401
    assert (await shop.http.put("/refunds/1/verdict", json={"approved": True})).status_code == 401
    for path in ("/", "/desk"):
        page = await shop.http.get(path, auth=("operator", "a secret of tests"))
        assert page.headers["content-security-policy"].startswith("default-src 'self';")
        assert "<script>" not in page.text
        (script,) = [part.split('"')[0] for part in page.text.split('<script src="')[1:]]
        assert (await shop.http.get(script)).status_code == 200
