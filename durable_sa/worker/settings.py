"""The settings of a worker."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import URL

from ..database.urls import resolve_url
from ..errors import InvalidConfiguration
from ..names import validate_name
from ..options import DEFAULT_CONCURRENCY, WorkerOptions
from ..validation import instance, integer, seconds


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a worker, checked and complete."""

    queue_names: tuple[str, ...]
    concurrency: int
    batch_size: int | None
    claim_timeout: float
    poll_interval: float
    name: str
    fatal_on_lease_timeout: bool
    shutdown_timeout: float
    listen: bool
    listen_url: URL | None
    health_port: int | None
    queue_concurrency: Mapping[str, int]

    @classmethod
    def resolve(cls, options: WorkerOptions, queue_name: str) -> Settings:
        """Check `WorkerOptions`.

        Raises:
            TypeError: an unknown option.
            InvalidConfiguration, InvalidName: a value that cannot work.
        """
        if unknown := options.keys() - WorkerOptions.__annotations__.keys():
            raise TypeError(f"a worker got an unexpected keyword argument {min(unknown)!r}")
        names = options.get("queue_names")
        if isinstance(names, str):
            raise InvalidConfiguration("queue_names", "it is one str", f"Write queue_names=[{names!r}].")
        names = [queue_name] if names is None else list(dict.fromkeys(names))
        if not names:
            raise InvalidConfiguration("queue_names", "there is no queue in it")
        batch_size, listen_url = options.get("batch_size"), options.get("listen_url")
        label = options.get("worker_id")
        health_port = options.get("health_port")
        by_queue = options.get("queue_concurrency") or {}
        instance(by_queue, Mapping, "queue_concurrency")
        if unserved := by_queue.keys() - set(names):
            raise InvalidConfiguration(
                "queue_concurrency", f"{min(unserved)!r} is not in queue_names", "Name queues that the worker serves."
            )
        return cls(
            tuple(validate_name("queue", name) for name in names),
            integer(options.get("concurrency", DEFAULT_CONCURRENCY), "concurrency", minimum=1, maximum=100_000),
            None if batch_size is None else integer(batch_size, "batch_size", minimum=1, maximum=100_000),
            seconds(options.get("claim_timeout", 120.0), "claim_timeout", minimum=1.0),
            seconds(options.get("poll_interval", 0.25), "poll_interval", minimum=0.001),
            validate_name("worker", f"{socket.gethostname()}:{os.getpid()}" if label is None else label),
            bool(options.get("fatal_on_lease_timeout", False)),
            seconds(options.get("shutdown_timeout", 30.0), "shutdown_timeout"),
            bool(options.get("listen", True)),
            None if listen_url is None else resolve_url(listen_url, "listen_url"),
            None if health_port is None else integer(health_port, "health_port", minimum=0, maximum=65535),
            {
                name: integer(number, f"queue_concurrency[{name!r}]", minimum=1, maximum=100_000)
                for name, number in by_queue.items()
            },
        )
