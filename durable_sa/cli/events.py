"""`durable events`: emit events that tasks wait for."""

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
    name: Annotated[str, typer.Argument(metavar="EVENT", help="The name of the event.", show_default=False)],
    payload: Annotated[
        Any, typer.Argument(parser=json_value, metavar="JSON", help="The payload, or @FILE, or @- for stdin.")
    ] = None,
    queue_name: Annotated[str, typer.Option("--queue", "-q", help="The queue of the waiting tasks.")] = DEFAULT_QUEUE,
) -> None:
    """Emit an event. The first emit of a name wins; later ones change nothing and are not an error."""
    emitted = await invocation.durable.emit_event(name, payload, queue_name=queue_name)
    message = f"Event {name!r} emitted." if emitted else f"Event {name!r} was already emitted; nothing changed."
    invocation.output.say(message, name=name, queue_name=queue_name, emitted=emitted)
