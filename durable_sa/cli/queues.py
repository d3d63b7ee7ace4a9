"""`durable queues`: list, create, pause, resume and drop queues."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..client import QueuePolicy
from ..client.wording import span
from ..statements import queues as statements
from .arguments import retention
from .completion import complete_queues
from .connection import App, Embedded, SchemaName, Url
from .invocation import USAGE, AsJson, Invocation, Watch, connected, examples, fail, listing
from .output import as_dicts

queues = typer.Typer(
    help="List and manage queues. Without a command, lists them.",
    epilog=examples("durable queues", "durable queues create mail --retention 7d", "durable queues pause mail"),
)


def _age(deleted: str) -> Any:
    return typer.Option(
        parser=retention,
        metavar="DURATION",
        help=f"Age at which {deleted} are deleted, or never. 30d for a new queue.",
        show_default=False,
    )


NewName = Annotated[str, typer.Argument(metavar="QUEUE", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="QUEUE", autocompletion=complete_queues, show_default=False)]
Retention = Annotated[Any, _age("ended tasks")]
EventRetention = Annotated[Any, _age("events")]

_COLUMNS = {
    "queue_name": "queue",
    "status": "status",
    "ready": "ready",
    "scheduled": "scheduled",
    "running": "running",
    "failed": "failed",
    "oldest": "oldest ready",
}


@queues.callback(invoke_without_command=True)
def _alone(
    context: typer.Context,
    url: Url = None,
    app: App = None,
    embedded: Embedded = False,
    schema: SchemaName = None,
    as_json: AsJson = False,
    watch: Watch = False,
) -> None:
    command = context.invoked_subcommand
    if command is None:
        listing(_list)(url=url, app=app, embedded=embedded, schema=schema, as_json=as_json, watch=watch)
        return
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            # The option would be ignored, and the command would act on another database or schema.
            fail(f"Put {parameter.opts[0]} after the command: durable queues {command} {parameter.opts[0]}", USAGE)


async def _list(invocation: Invocation) -> None:
    """List the queues with the numbers of their tasks.

    Ready tasks can be claimed now. Scheduled ones are due later, or wait for an event or a child.
    """
    rows = as_dicts(await invocation.durable.database.execute(statements.QUEUE_STATISTICS, {"queue_names": None}))
    keys = await invocation.durable.count_limit_keys([row["queue_name"] for row in rows if row.pop("limited")])
    for row in rows:
        row["limit_keys"] = keys.get(row["queue_name"], {})
    if not invocation.output.as_json:
        for row in rows:
            row["status"] = "open" if row["paused_at"] is None else "paused"
            row["oldest"] = span(row["oldest_ready_seconds"])
            row["keys"] = ", ".join(f"{number} {state}" for state, number in sorted(row["limit_keys"].items()))
    columns = _COLUMNS | ({"keys": "limit keys"} if keys else {})
    invocation.output.table(rows, columns, empty="No queues. Create one: durable queues create NAME")


queues.command("list", epilog=examples("durable queues list --json"))(listing(_list))


@queues.command(
    "create",
    epilog=examples("durable queues create mail --retention 7d", "durable queues create audit --retention never"),
)
@connected
async def create(
    invocation: Invocation, name: NewName, retention: Retention = None, event_retention: EventRetention = None
) -> None:
    """Create a queue, or change the given settings of an existing one."""
    policy = QueuePolicy()
    if retention is not None:
        policy["retention"] = None if retention == "never" else retention
    if event_retention is not None:
        policy["event_retention"] = None if event_retention == "never" else event_retention
    await invocation.durable.create_queue(name, **policy)
    invocation.output.say(f"Queue {name!r} created.", queue_name=name)


@queues.command("pause", epilog=examples("durable queues pause mail"))
@connected
async def pause(invocation: Invocation, name: Name) -> None:
    """Stop claiming from a queue. Running tasks continue, and tasks can still be spawned."""
    await invocation.durable.pause_queue(name)
    invocation.output.say(f"Queue {name!r} paused.", queue_name=name, paused=True)


@queues.command("resume", epilog=examples("durable queues resume mail"))
@connected
async def resume(invocation: Invocation, name: Name) -> None:
    """Resume claiming from a paused queue."""
    await invocation.durable.resume_queue(name)
    invocation.output.say(f"Queue {name!r} resumed.", queue_name=name, paused=False)


@queues.command("drop", epilog=examples("durable queues drop mail --yes"))
@connected
async def drop(
    invocation: Invocation,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a queue with all its tasks, events and schedules, after a confirmation."""
    await invocation.durable.require_queue(name)
    if not yes:
        typer.confirm(f"Delete queue {name!r} with everything in it?", abort=True, err=True)
    await invocation.durable.drop_queue(name)
    invocation.output.say(f"Queue {name!r} deleted.", queue_name=name)
