"""The Typer application of the command `durable`."""

from __future__ import annotations

from typing import Annotated

import typer

from .dashboard import dashboard
from .database import cleanup, migrate
from .demo import demo
from .doctor import doctor
from .embedded import embedded
from .events import events
from .invocation import examples, print_version
from .limits import limits
from .queues import queues
from .roles import roles
from .schedules import schedules
from .tasks import tasks
from .worker import worker
from .workers import workers

Version = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
]

app = typer.Typer(
    name="durable",
    help="Durable tasks on your own Postgres: run workers, inspect tasks and queues, and repair failures.",
    epilog="Exit codes: 0, success; 1, failure, or something was not found; 2, invalid arguments.",
    no_args_is_help=True,
    # Typer's own tracebacks show local variables, and with them params and passwords.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(version: Version = False) -> None:
    pass


app.command(epilog=examples("durable demo"))(demo)
app.command(epilog=examples("DURABLE_DATABASE_URL=postgresql://me@host/app durable migrate"))(migrate)
app.command(
    epilog=examples(
        "durable roles --producer web --worker jobs | psql app",
        "durable roles --producer web --worker jobs --apply",
    )
)(roles)
app.command(
    epilog=examples(
        "durable worker app.tasks:durable --concurrency 20",
        "durable worker app.tasks:durable -q mail -q reports --reload",
        "durable worker app.tasks:durable --health-port 8080",
        "durable worker app.tasks:durable --processes 4 --max-memory-per-process 512M",
    )
)(worker)
app.command(epilog=examples("durable workers", "durable workers --watch"))(workers)
app.command(
    epilog=examples(
        "durable dashboard app.tasks:durable",
        "durable dashboard app.tasks:durable --port 9000 --write",
        "durable dashboard --url postgresql://me@host/app --payloads",
    )
)(dashboard)
app.add_typer(queues, name="queues")
app.add_typer(limits, name="limits")
app.add_typer(tasks, name="tasks")
app.add_typer(events, name="events")
app.add_typer(schedules, name="schedules")
app.add_typer(embedded, name="embedded")
app.command(epilog=examples("durable doctor", "durable doctor --grace 5m --json"))(doctor)
app.command(epilog=examples("durable cleanup --older-than 30d", "durable cleanup --older-than 90d --events -q mail"))(
    cleanup
)
