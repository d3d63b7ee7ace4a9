"""`durable worker`: runs the tasks of an application until it is stopped."""

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
from ..options import DEFAULT_CONCURRENCY
from ..worker.interrupts import ENDING_TIMEOUT, Watchdog
from . import reloading
from .invocation import exit_on_errors, exit_on_package_errors

logger = logging.getLogger("durable_sa")


class LogLevel(StrEnum):
    """The level of the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Target = Annotated[
    str, typer.Argument(metavar="MODULE:DURABLE", help="The Durable of your application, such as app.tasks:durable.")
]
Queues = Annotated[
    list[str] | None,
    typer.Option(
        "--queue",
        "-q",
        help="A queue to serve; may be repeated, in order of precedence. The client's queue by default.",
    ),
]
Concurrency = Annotated[int, typer.Option("--concurrency", "-c", help="Maximum number of concurrent runs.")]
BatchSize = Annotated[int | None, typer.Option(help="Maximum number of tasks claimed at once.")]
ClaimTimeout = Annotated[
    float, typer.Option(help="Seconds without a heartbeat after which other workers take this worker's runs over.")
]
PollInterval = Annotated[float, typer.Option(help="Seconds between polls of the queues while LISTEN does not work.")]
WorkerId = Annotated[str | None, typer.Option(help="A label for logs and lists.", show_default="host:pid")]
Fatal = Annotated[
    bool, typer.Option("--fatal-on-lease-timeout", help="Exit with code 1 when other workers have taken the runs over.")
]
ShutdownTimeout = Annotated[float, typer.Option(help="Seconds that runs have to finish when the worker is stopped.")]
HealthPort = Annotated[
    int | None,
    typer.Option(
        help="Port for health probes, GET /live and GET /ready: 503 if the event loop is stuck, or the database is "
        "unavailable."
    ),
]
Listen = Annotated[bool, typer.Option("--listen/--no-listen", help="Use LISTEN for wake-up hints.")]
ListenUrl = Annotated[
    str | None,
    typer.Option(
        help="A URL for LISTEN that bypasses a connection pooler. Prefer the variable.",
        envvar="DURABLE_LISTEN_URL",
        show_default=False,
    ),
]
Reload = Annotated[bool, typer.Option("--reload", help="For development: restart when a Python file changes.")]
ReloadDir = Annotated[
    list[Path] | None,
    typer.Option("--reload-dir", help="A directory to watch; may be repeated. The current one by default."),
]
Level = Annotated[LogLevel, typer.Option("--log-level", help="Minimum level of the log on stderr.")]


def worker(
    target: Target,
    queues: Queues = None,
    concurrency: Concurrency = DEFAULT_CONCURRENCY,
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

    After the first signal runs have --shutdown-timeout seconds to finish, and the remaining ones are released for other
    workers; a second signal releases all at once. uvloop is used if it is installed.
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
    # Errors of the application itself keep their traceback.
    with exit_on_package_errors():
        durable = load(target)
    if not durable.tasks:
        logger.warning("%s has no registered task and will run none: import the modules that define them", target)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(durable, options))


async def _run(durable: Durable[Any], options: WorkerOptions) -> None:
    async with durable:
        with exit_on_errors():
            await durable.check_schema()
        with exit_on_package_errors():
            await durable.run_worker(signals=True, **options)
    # Nothing is left to do: what keeps the process now is code of the application.
    Watchdog(list).expect_end_within(ENDING_TIMEOUT)


def load(target: str) -> Durable[Any]:
    """Import a `Durable`, with the current directory on the path.

    Raises:
        InvalidConfiguration: the module does not exist, or has no Durable of that name.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise InvalidConfiguration(
            "MODULE:DURABLE", f"{target!r} has another form", "Write, for example, app.tasks:durable."
        )
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - the path holds strings
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # If the application's own import fails, its traceback says where.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InvalidConfiguration(
            "MODULE:DURABLE",
            f"the module {error.name!r} was not found",
            f"The search path is {here} and Python's packages.",
        ) from error
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, Durable):
        raise InvalidConfiguration("MODULE:DURABLE", f"{name!r} in {module_name} is not a Durable", _suggestion(module))
    return found  # pyright: ignore[reportUnknownVariableType] - of any state


def _suggestion(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, Durable))
    if not names:
        return "The module contains none."
    return f"Write {' or '.join(f'{module.__name__}:{name}' for name in names)}."


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory
