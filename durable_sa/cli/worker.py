"""`durable worker`: runs the tasks of an application until it is told to stop."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from .. import Durable, WorkerOptions
from ..errors import InvalidConfiguration
from . import reloading
from .invocation import refused, reported

logger = logging.getLogger("durable_sa")


class LogLevel(StrEnum):
    """How much a worker says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Target = Annotated[
    str, typer.Argument(metavar="MODULE:DURABLE", help="Where your Durable is, such as app.tasks:durable.")
]
Queues = Annotated[
    list[str] | None,
    typer.Option(
        "--queue", "-q", help="A queue to serve; may be repeated, first come first claimed. The client's if absent."
    ),
]
Concurrency = Annotated[int, typer.Option("--concurrency", "-c", help="How many runs are in progress at once.")]
BatchSize = Annotated[int | None, typer.Option(help="How many tasks are claimed at once, at most.")]
ClaimTimeout = Annotated[
    float, typer.Option(help="Seconds of silence after which other workers take this one's runs over.")
]
PollInterval = Annotated[float, typer.Option(help="Seconds between looks at the queues while LISTEN does not work.")]
WorkerId = Annotated[str | None, typer.Option(help="A label.", show_default="host:pid")]
Fatal = Annotated[
    bool, typer.Option("--fatal-on-lease-timeout", help="Exit with code 1 when others have taken the runs over.")
]
ShutdownTimeout = Annotated[float, typer.Option(help="Seconds that runs get to end when the worker is stopped.")]
HealthPort = Annotated[
    int | None,
    typer.Option(
        help="Answer GET /live and GET /ready on this port, for probes: 503 if the event loop is stuck, or if the "
        "database is away."
    ),
]
Listen = Annotated[bool, typer.Option("--listen/--no-listen", help="Use LISTEN for wake-up hints.")]
ListenUrl = Annotated[
    str | None,
    typer.Option(
        help="A URL for LISTEN that leads around a connection pooler. Rather set the variable.",
        envvar="DURABLE_LISTEN_URL",
        show_default=False,
    ),
]
Reload = Annotated[bool, typer.Option("--reload", help="For development: start anew when a Python file changes.")]
ReloadDir = Annotated[
    list[Path] | None,
    typer.Option("--reload-dir", help="A directory to watch; may be repeated. The current one if absent."),
]
Level = Annotated[LogLevel, typer.Option("--log-level", help="What is logged, on stderr.")]


def worker(
    target: Target,
    queues: Queues = None,
    concurrency: Concurrency = 1,
    batch_size: BatchSize = None,
    claim_timeout: ClaimTimeout = 120,
    poll_interval: PollInterval = 0.25,
    worker_id: WorkerId = None,
    fatal: Fatal = False,
    shutdown_timeout: ShutdownTimeout = 30,
    listen: Listen = True,
    listen_url: ListenUrl = None,
    health_port: HealthPort = None,
    reload: Reload = False,
    reload_dirs: ReloadDir = None,
    log_level: Level = LogLevel.INFO,
) -> None:
    """Run a worker until SIGTERM or SIGINT.

    The first signal lets runs end for up to --shutdown-timeout seconds and gives the others back; a second one gives
    all of them back at once. uvloop is used where it is installed.
    """
    if reload:
        raise typer.Exit(reloading.supervise(reload_dirs or [Path.cwd()]))
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    options = WorkerOptions(
        queue_names=queues or None,
        concurrency=concurrency,
        batch_size=batch_size,
        claim_timeout=claim_timeout,
        poll_interval=poll_interval,
        worker_id=worker_id,
        fatal_on_lease_timeout=fatal,
        shutdown_timeout=shutdown_timeout,
        listen=listen,
        listen_url=listen_url,
        health_port=health_port,
    )
    # What goes wrong in the application itself comes with its traceback.
    with refused():
        durable = load(target)
    if not durable.tasks:
        logger.warning("%s knows no task and will run none: let its module import those that define them", target)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(durable, options))


async def _run(durable: Durable[Any], options: WorkerOptions) -> None:
    async with durable:
        with reported():
            await durable.check_schema()
        with refused():
            await durable.run_worker(**options)


def load(target: str) -> Durable[Any]:
    """Import a `Durable`, with the current directory on the path.

    Raises:
        InvalidConfiguration: there is no such module, or no Durable of that name in it.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise InvalidConfiguration("MODULE:DURABLE", f"{target!r} is not of that form", "An example: app.tasks:durable")
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - the path holds strings
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the application itself misses is its own affair: the traceback says where.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InvalidConfiguration(
            "MODULE:DURABLE",
            f"there is no module {error.name!r}",
            f"It was looked for in {here} and where Python's packages are.",
        ) from error
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, Durable):
        raise InvalidConfiguration("MODULE:DURABLE", f"{name!r} in {module_name} is no Durable", _suggestion(module))
    return found  # pyright: ignore[reportUnknownVariableType] - of any state


def _suggestion(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, Durable))
    if not names:
        return "There is none in that module."
    return f"Write {' or '.join(f'{module.__name__}:{name}' for name in names)}."


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory
