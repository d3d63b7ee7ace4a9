"""Mails to the readers of articles."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol


class Mailer(Protocol):
    async def send(self, text: str) -> None: ...


class PrintingMailer:
    """Stand in for a mail server."""

    async def send(self, text: str) -> None:
        print(f"mail: {text}", flush=True)


@asynccontextmanager
async def mailer() -> AsyncGenerator[Mailer]:
    """Open the mail server for a worker, from its start to its end; tasks get it as `ctx.state`."""
    yield PrintingMailer()
