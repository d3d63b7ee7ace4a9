"""A worker of examples/support_agent that dies as soon as a refund is committed: `durable worker killed:durable`."""

import os
import signal
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, Pool

__all__ = ["durable"]

from agent.main import durable
from agent.models import Order


@event.listens_for(Session, "before_flush")
def note(session: Session, *_: Any) -> None:
    if any(isinstance(changed, Order) for changed in session.dirty):
        session.connection().info["refunds"] = True


@event.listens_for(Pool, "checkin")
def die(_: Any, record: ConnectionPoolEntry) -> None:
    """Die when the connection comes back from its transaction, before anything else is written."""
    if record.info.get("refunds"):
        os.kill(os.getpid(), signal.SIGKILL)
