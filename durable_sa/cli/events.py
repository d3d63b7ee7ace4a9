"""`durable events`: list, show, emit and replace the events that tasks wait for."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from pydantic_core import from_json

from ..errors import InvalidState
from ..models import DEFAULT_QUEUE
from ..statements import inspection
from .arguments import json_value
from .completion import complete_queues
from .invocation import FAILED, Invocation, connected, examples, fail, listing
from .output import as_dicts, shown

events = typer.Typer(help="Events that tasks wait for.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="EVENT", help="The name of the event.", show_default=False)]
Payload = Annotated[
    Any, typer.Argument(parser=json_value, metavar="JSON", help="The payload, or @FILE, or @- for stdin.")
]
Queue = Annotated[
    str, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue of the waiting tasks.")
]

_COLUMNS = {
    "name": "event",
    "queue_name": "queue",
    "emitted_at": "emitted",
    "delivered_at": "delivered",
    "waiting": "waiting tasks",
}


@events.command("list", epilog=examples("durable events list", "durable events list -q mail --prefix order-17"))
@listing
async def list_(
    invocation: Invocation,
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="Only events of this queue.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Only events whose names begin with this.")] = "",
    awaited: Annotated[
        bool, typer.Option("--awaited", help="Events that tasks wait for and that were not emitted, instead.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", "-l", help="Maximum number of events.", min=1, max=10_000)] = 20,
) -> None:
    """List emitted events, the latest first."""
    if queue_name is not None:
        await invocation.durable.require_queue(queue_name)
    parameters = {"queue_name": queue_name, "prefix": prefix, "wanted": limit + 1}
    statement = inspection.AWAITED_EVENTS if awaited else inspection.EVENTS
    rows = as_dicts(await invocation.durable.database.execute(statement, parameters))
    invocation.output.table(rows[:limit], _COLUMNS, empty="No events.")
    if len(rows) > limit:
        invocation.output.note("There are more events: give --limit, --queue or --prefix.")


@events.command("show", epilog=examples("durable events show order-17-paid --payloads"))
@connected
async def show(
    invocation: Invocation,
    name: Name,
    queue_name: Queue = DEFAULT_QUEUE,
    payloads: Annotated[bool, typer.Option("--payloads", help="Show the payload.")] = False,
) -> None:
    """Show one event, and the tasks that wait for it or have received it."""
    await invocation.durable.require_queue(queue_name)
    parameters = {"queue_name": queue_name, "name": name, "with_payloads": payloads, "wanted": 100}
    found = as_dicts(await invocation.durable.database.execute(inspection.EVENT, parameters))
    waiters = as_dicts(await invocation.durable.database.execute(inspection.EVENT_WAITERS, parameters))
    if not found and not waiters:
        fail(
            f"No event named {name!r} was emitted in queue {queue_name!r}, and no task waits for one. "
            "List them: durable events list",
            FAILED,
        )
    event = found[0] if found else {"name": name, "queue_name": queue_name, "emitted_at": None, "delivered_at": None}
    if invocation.output.as_json:
        if (payload := event.pop("payload", None)) is not None:
            event["payload"] = from_json(payload)
        invocation.output.json({**event, "waiting": waiters})
        return
    labels = {"name": "event", "queue_name": "queue", "emitted_at": "emitted", "delivered_at": "delivered"}
    facts = [{"fact": label, "value": shown(event[key])} for key, label in labels.items()]
    if not found:
        facts[2]["value"] = "never"
    if event.get("payload") is not None:
        facts.append({"fact": "payload", "value": shown(event["payload"])})
    invocation.output.print_table(facts, {"fact": "", "value": ""}, headed=False)
    if waiters:
        invocation.output.heading("waiting tasks")
        columns = {"task_id": "task", "task_name": "name", "created_at": "since", "due_at": "until"}
        invocation.output.print_table(waiters, columns)


@events.command(
    "emit",
    epilog=examples("durable events emit order-17-paid '{\"amount\": 12}'", "durable events emit report @report.json"),
)
@connected
async def emit(invocation: Invocation, name: Name, payload: Payload = None, queue_name: Queue = DEFAULT_QUEUE) -> None:
    """Emit an event. The first emit of a name wins; later ones change nothing and are not an error."""
    emitted = await invocation.durable.emit_event(name, payload, queue_name=queue_name)
    message = f"Event {name!r} emitted." if emitted else f"Event {name!r} was already emitted; nothing changed."
    invocation.output.say(message, name=name, queue_name=queue_name, emitted=emitted)


@events.command("replace", epilog=examples("durable events replace order-17-paid '{\"amount\": 12}'"))
@connected
async def replace(invocation: Invocation, name: Name, payload: Payload, queue_name: Queue = DEFAULT_QUEUE) -> None:
    """Replace the payload of an emitted event, for waits that come later.

    A task that failed because it could not read the old payload reads the new one when it is retried. Tasks that have
    read the old payload keep it.
    """
    try:
        await invocation.durable.replace_event(name, payload, queue_name=queue_name)
    except InvalidState:
        fail(
            f"No event named {name!r} was emitted in queue {queue_name!r}. Emit it: durable events emit "
            f"{shlex.quote(name)}",
            FAILED,
        )
    invocation.output.say(f"Event {name!r} replaced.", name=name, queue_name=queue_name)
