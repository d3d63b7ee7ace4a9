"""Mails to those who read."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol


class Mailer(Protocol):
    async def send(self, text: str) -> None: ...


class PrintingMailer:
    """Stands for a mail server."""

    async def send(self, text: str) -> None:
        print(f"mail: {text}", flush=True)


@asynccontextmanager
async def mailer() -> AsyncGenerator[Mailer]:
    """Opened by each worker when it starts and closed when it ends; tasks have it as `ctx.state`."""
    yield PrintingMailer()
