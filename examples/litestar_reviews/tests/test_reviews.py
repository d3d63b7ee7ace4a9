"""Articles, from their submission to a verdict, or to the end of the wait for one."""

from datetime import timedelta

from durable_sa.testing import run_until_idle, time_travel

from .conftest import Desk


async def test_an_article_is_checked_and_then_read(desk: Desk) -> None:
    article_id = await desk.submit("Teh owl is is a bird.")
    assert (await desk.article(article_id))["status"] == "submitted"
    await run_until_idle(desk.durable)
    article = await desk.article(article_id)
    assert article["status"] == "reading"
    assert article["findings"] == ["spelling: Teh", "repeated: is"]

    assert await desk.decide(article_id, accepted=False) == 200
    await run_until_idle(desk.durable)
    article = await desk.article(article_id)
    assert (article["status"], article["reader"]) == ("refused", "Ada")


async def test_the_first_verdict_is_the_one_that_counts(desk: Desk) -> None:
    article_id = await desk.submit()
    assert await desk.decide(article_id) == 409
    await run_until_idle(desk.durable)
    assert await desk.decide(article_id) == 200
    assert await desk.decide(article_id, accepted=False) == 409
    assert (await desk.article(article_id))["status"] == "accepted"


async def test_a_reader_is_reminded_every_day_and_then_no_longer(desk: Desk) -> None:
    article_id = await desk.submit()
    await run_until_idle(desk.durable)
    async with time_travel(desk.durable) as clock:
        for _ in range(5):
            await clock.advance(timedelta(days=1))
            await run_until_idle(desk.durable)
    reminders = [mail for mail in desk.outbox.sent if mail.startswith("reminder")]
    assert reminders == [f"reminder {number}: article {article_id} waits for its reader" for number in (1, 2, 3)]
    assert (await desk.article(article_id))["status"] == "unread"
    assert await desk.decide(article_id) == 409


async def test_every_day_there_is_a_digest(desk: Desk) -> None:
    await desk.submit()
    await desk.submit()
    await run_until_idle(desk.durable)
    async with time_travel(desk.durable) as clock:
        for _ in range(7):
            await clock.advance(timedelta(days=1))
            await run_until_idle(desk.durable)
    digests = [mail for mail in desk.outbox.sent if "articles wait" in mail]
    assert digests[0] == "2 articles wait for their readers"
    # One per day; a change of the clocks may make a day shorter or longer.
    assert 6 <= len(digests) <= 8


async def test_an_article_that_is_not_there(desk: Desk) -> None:
    assert (await desk.http.get("/articles/1")).status_code == 404
    assert await desk.decide(1) == 404
