"""`durable worker`: runs the tasks of an application until it is stopped."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import sys
from collections.abc import Callable
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .. import Durable, WorkerOptions
from ..options import DEFAULT_CONCURRENCY
from ..worker.interrupts import ENDING_TIMEOUT, Watchdog
from ..worker.settings import Settings
from ..worker.supervision import Supervision
from . import reloading
from .arguments import numbered, size
from .completion import complete_queues
from .connection import App, Embedded, Source, description, require_database
from .invocation import USAGE, exit_on_errors, exit_on_package_errors, fail
from .output import make_console
from .watcher import watch

logger = logging.getLogger("durable_sa")


class LogLevel(StrEnum):
    """The level of the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Target = Annotated[
    str | None,
    typer.Argument(
        metavar="MODULE:DURABLE",
        help="The Durable of your application, such as app.tasks:durable.",
        show_default=False,
    ),
]
Queues = Annotated[
    list[str] | None,
    typer.Option(
        "--queue",
        "-q",
        autocompletion=complete_queues,
        help="A queue to serve; may be repeated, in order of precedence. The client's queue by default.",
    ),
]
Concurrency = Annotated[int, typer.Option("--concurrency", "-c", help="Maximum number of concurrent runs.")]
QueueConcurrency = Annotated[
    list[Any] | None,
    typer.Option(
        "--queue-concurrency",
        metavar="QUEUE=N",
        parser=numbered,
        help="Maximum number of concurrent runs of a queue in this worker; may be repeated.",
    ),
]
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
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        max=1000,
        help="Run so many worker processes, each with its own --concurrency, and restart those that end.",
    ),
]
MaxTasks = Annotated[
    int | None,
    typer.Option("--max-tasks-per-process", min=1, help="Runs after which a process ends, when none is in progress."),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory-per-process",
        metavar="SIZE",
        parser=size,
        help="Resident memory, such as 512M, above which a process ends, when no run is in progress.",
    ),
]
Reload = Annotated[bool, typer.Option("--reload", help="For development: restart when a Python file changes.")]
ReloadDir = Annotated[
    list[Path] | None,
    typer.Option("--reload-dir", help="A directory to watch; may be repeated. The current one by default."),
]
Level = Annotated[LogLevel, typer.Option("--log-level", help="Minimum level of the log on stderr.")]


def worker(
    target: Target = None,
    queues: Queues = None,
    concurrency: Concurrency = DEFAULT_CONCURRENCY,
    queue_concurrency: QueueConcurrency = None,
    batch_size: BatchSize = None,
    claim_timeout: ClaimTimeout = 120,
    poll_interval: PollInterval = 0.25,
    worker_id: WorkerId = None,
    fatal: Fatal = False,
    shutdown_timeout: ShutdownTimeout = 30,
    listen: Listen = True,
    listen_url: ListenUrl = None,
    health_port: HealthPort = None,
    processes: Processes = None,
    max_tasks: MaxTasks = None,
    max_memory: MaxMemory = None,
    reload: Reload = False,
    reload_dirs: ReloadDir = None,
    log_level: Level = LogLevel.INFO,
    app: App = None,
    embedded: Embedded = False,
) -> None:
    """Run a worker until SIGTERM, SIGINT or SIGHUP.

    After the first signal runs have --shutdown-timeout seconds to finish, and the remaining ones are given back for
    other workers; a second signal, or SIGQUIT, gives all back at once. uvloop is used if it is installed.
    """
    link = Supervision.of_this_process()
    if (target is None) == (app is None):
        fail("Name the Durable of your application once, for example: durable worker app.tasks:durable", USAGE)
    if reload:
        raise typer.Exit(reloading.supervise(reload_dirs or [Path.cwd()]))
    if link is None and processes is None and (max_tasks is not None or max_memory is not None):
        option = "--max-memory-per-process" if max_tasks is None else "--max-tasks-per-process"
        fail(f"{option} needs a watcher that replaces the process. Add --processes 1, or more.", USAGE)
    watching = link is None and processes is not None
    logging.basicConfig(
        level=log_level.upper(),
        format=f"{'[watcher] ' if watching else ''}%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if watching:
        with exit_on_package_errors():
            raise typer.Exit(watch(cast(int, processes), shutdown_timeout, health_port))
    if link is not None:
        link.max_runs, link.max_memory = max_tasks, max_memory
        worker_id = None if worker_id is None else f"{worker_id}:{link.number}"
        health_port = None if health_port is None else 0
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
        queue_concurrency=dict(queue_concurrency or ()),
    )
    # Errors of the application itself keep their traceback.
    with exit_on_package_errors():
        durable = Source(app=target or app, embedded=embedded).client()
        require_database(durable, target or app)
        make_console(stderr=True).print(f"database: {description(durable)}", soft_wrap=True)
    if not durable.tasks:
        logger.warning(
            "%s has no registered task and will run none: import the modules that define them", target or app
        )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(durable, options, link))


async def _run(durable: Durable[Any], options: WorkerOptions, link: Supervision | None) -> None:
    async with durable:
        with exit_on_errors(durable):
            await durable.check_schema()
        with exit_on_package_errors():
            settings = Settings.resolve(options, durable.queue_name)
            # Modules stay until the process ends: frozen, they are not searched for garbage each time, which takes a
            # quarter of the CPU of short tasks.
            gc.collect()
            gc.freeze()
            await durable._run_worker(settings, True, link)  # pyright: ignore[reportPrivateUsage]
    # Nothing is left to do: what keeps the process now is code of the application.
    Watchdog(list).expect_end_within(ENDING_TIMEOUT)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if find_spec("uvloop") is None:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    return factory
