"""Reviews, the checks that they consist of, and the daily digest."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import Durable, TaskContext, TaskTimeout, task

from .checks import CHECKS
from .mail import Mailer
from .models import Article
from .settings import DURABLE_SCHEMA

REMINDERS = 3


@dataclass
class Check:
    name: str
    text: str


@dataclass
class Verdict:
    reader: str
    accepted: bool


def verdict_event(article_id: int) -> str:
    return f"verdict on article {article_id}"


async def begin(session: AsyncSession, article_id: int) -> str:
    article = await session.get_one(Article, article_id)
    article.status = "checking"
    return article.text


async def note(session: AsyncSession, article_id: int, findings: list[str]) -> None:
    article = await session.get_one(Article, article_id)
    article.status = "reading"
    article.findings = findings


async def give_up(session: AsyncSession, article_id: int) -> str:
    """Close an article as unread, unless the verdict came at the last moment."""
    article = await session.get_one(Article, article_id, with_for_update=True)
    if article.status == "reading":
        article.status = "unread"
    return article.status


async def count_unread(session: AsyncSession) -> int:
    return await session.scalar(select(func.count()).where(Article.status == "reading")) or 0


@task
async def check(ctx: TaskContext[Mailer], params: Check) -> list[str]:
    return CHECKS[params.name](params.text)


@task
async def review(ctx: TaskContext[Mailer], article_id: int) -> str:
    text = await ctx.transaction("begin", begin, article_id)
    checks = [await ctx.spawn(name, check, Check(name, text)) for name in CHECKS]
    found = await asyncio.gather(*(ctx.join(child) for child in checks))
    await ctx.transaction("note", note, article_id, [finding for findings in found for finding in findings])
    for number in range(1, REMINDERS + 1):
        try:
            verdict = await ctx.await_event(verdict_event(article_id), timeout=timedelta(days=1), type=Verdict)
            return "accepted" if verdict.accepted else "refused"
        except TaskTimeout:
            await ctx.step("remind", ctx.state.send, f"reminder {number}: article {article_id} waits for its reader")
    return await ctx.transaction("give-up", give_up, article_id)


@task
async def digest(ctx: TaskContext[Mailer]) -> None:
    unread = await ctx.transaction("count", count_unread)
    await ctx.step("send", ctx.state.send, f"{unread} articles wait for their readers")


def make_durable(
    sessions: async_sessionmaker[AsyncSession], mailer: Callable[[], AbstractAsyncContextManager[Mailer]]
) -> Durable[Mailer]:
    return Durable(sessions, lifespan=mailer, schema=DURABLE_SCHEMA, tasks=[review, check, digest])


async def define_schedules(durable: Durable[Mailer]) -> None:
    """Define the schedules; each process that starts may do so, because the same name replaces the schedule."""
    await durable.create_schedule("digest", task=digest, cron_expression="0 8 * * *", timezone="Europe/Berlin")
