"""`durable events`: emit what tasks wait for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..models import DEFAULT_QUEUE
from .arguments import json_value
from .invocation import Invocation, connected, examples

events = typer.Typer(help="Events that tasks wait for.", no_args_is_help=True)


@events.command(
    "emit",
    epilog=examples("durable events emit order-17-paid '{\"amount\": 12}'", "durable events emit report @report.json"),
)
@connected
async def emit(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="EVENT", help="Its name.", show_default=False)],
    payload: Annotated[
        Any, typer.Argument(parser=json_value, metavar="JSON", help="What the waiting tasks get, or @FILE, or @-.")
    ] = None,
    queue_name: Annotated[str, typer.Option("--queue", "-q", help="The queue of the waiting tasks.")] = DEFAULT_QUEUE,
) -> None:
    """Emit an event. The first of a name wins: emitting it again changes nothing, and is no error."""
    emitted = await invocation.durable.emit_event(name, payload, queue_name=queue_name)
    message = f"Event {name!r} is emitted." if emitted else f"Event {name!r} had been emitted before: nothing changes."
    invocation.output.say(message, name=name, queue_name=queue_name, emitted=emitted)
