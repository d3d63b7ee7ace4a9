"""The task of `durable demo`: research with subtasks and a sleep, and a ledger of the executed steps.

Worker processes load it as `durable_sa.cli.research:durable`. The ledger is a file outside the database, to which steps
append a line when they begin and when they end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from .. import Durable, TaskContext, TaskHandle

STEP_SECONDS = 0.8
LEDGER_VARIABLE = "DURABLE_DEMO_LEDGER"

durable: Durable[None] = Durable()


class Question(BaseModel):
    """The params of the task."""

    topic: str


class Note(BaseModel):
    """The finding of a source."""

    source: str
    finding: str


class Report(BaseModel):
    """The result of the task."""

    summary: str
    sources: list[str]


class Entry(BaseModel):
    """A line of the ledger: a step begins or ends in a process."""

    step: str
    event: Literal["begins", "ends"]
    pid: int


def read_ledger(path: Path) -> list[Entry]:
    """Read the entries written so far, without a last line that is still being written."""
    lines = path.read_text().splitlines(keepends=True)
    return [Entry.model_validate_json(line) for line in lines if line.endswith("\n")]


@asynccontextmanager
async def work(step: str) -> AsyncGenerator[None]:
    """Take as long as a call of a model or a web page, and write to the ledger before and after."""
    _record(step, "begins")
    await asyncio.sleep(STEP_SECONDS)
    yield
    _record(step, "ends")


def _record(step: str, event: Literal["begins", "ends"]) -> None:
    entry = Entry(step=step, event=event, pid=os.getpid())
    with Path(os.environ[LEDGER_VARIABLE]).open("a") as ledger:
        ledger.write(f"{entry.model_dump_json()}\n")


async def find_sources(topic: str) -> list[str]:
    async with work("find-sources"):
        return [f"{kind} on {topic}" for kind in ("a paper", "a talk", "a book")]


async def read(source: str) -> Note:
    async with work(f"read {source}"):
        return Note(source=source, finding=f"{source} recommends checkpoints")


async def compare(note: Note) -> bool:
    async with work(f"check {note.source}"):
        return "checkpoints" in note.finding


async def analyze(notes: list[Note], confirmed: int) -> str:
    async with work("analyze"):
        return f"{len(notes)} sources agree, {confirmed} of them were checked: write a checkpoint after each step."


@durable.task
async def check(ctx: TaskContext, note: Note) -> bool:
    """Check a note, as a subtask that any worker may run."""
    return await ctx.step("compare", compare, note)


@durable.task
async def research(ctx: TaskContext, question: Question) -> Report:
    """Research a topic in several steps, two subtasks and a sleep."""
    sources = await ctx.step("find-sources", find_sources, question.topic)
    notes = [await ctx.step("read", read, source) for source in sources]
    children: list[TaskHandle[bool]] = [await ctx.spawn("check", check, note) for note in notes[:2]]
    await ctx.sleep_for("let it sink in", timedelta(seconds=1))
    confirmed = await asyncio.gather(*(ctx.join(child) for child in children))
    summary = await ctx.step("analyze", analyze, notes, sum(confirmed))
    return Report(summary=summary, sources=sources)
