"""`durable limits`: list keys with their states, set limits, close and open keys."""

from __future__ import annotations

import dataclasses
import re
import shlex
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, cast

import typer

from ..policies import Limit, Rate
from ..results import LimitKeyState
from .arguments import duration, moment
from .completion import complete_queues
from .invocation import USAGE, Invocation, connected, examples, fail, listing

limits = typer.Typer(
    help="List and set limits of queues and their keys.",
    epilog=examples(
        "durable limits list llm --state full",
        "durable limits set llm --concurrency 20 --key acme",
        "durable limits close llm acme --for 10m",
    ),
    no_args_is_help=True,
)

Queue = Annotated[str, typer.Argument(metavar="QUEUE", autocompletion=complete_queues, show_default=False)]
Key = Annotated[str, typer.Argument(metavar="KEY", show_default=False)]

_COLUMNS = {"key": "key", "state": "state", "running": "running", "waiting": "waiting", "opens_at": "opens at"}
_RATE = re.compile(r"(\d+)\s*/\s*(.+)")


def _rate(text: str) -> tuple[int, timedelta]:
    """Parse a rate such as `60/1m`: starts, and the time in which there may be so many."""
    if match := _RATE.fullmatch(text.strip()):
        per = match[2] if match[2][:1].isdigit() else f"1{match[2]}"
        return int(match[1]), duration(per)
    raise typer.BadParameter(f"{text!r} is not a rate. Write, for example, 60/1m, 5/s or 1000/h.")


async def _list(
    invocation: Invocation,
    queue: Queue,
    state: Annotated[str | None, typer.Option(help="Only keys that are open, full, throttled or closed.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Number of keys.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="KEY", help="Only keys whose names come after this one.")] = None,
) -> None:
    """List the keys of a queue, with the slots that their tasks hold, and the tasks that wait (up to 1000)."""
    keys = await invocation.durable.list_limit_keys(
        queue, state=cast("LimitKeyState | None", state), limit=limit, after=after
    )
    rows = [dataclasses.asdict(info) for info in keys]
    invocation.output.table(rows, _COLUMNS, empty="No keys.")
    if len(keys) == limit:
        invocation.output.note(f"There may be more keys: --after {shlex.quote(keys[-1].key or '')}")


limits.command("list", epilog=examples("durable limits list llm", "durable limits list llm --state closed --json"))(
    listing(_list)
)


@limits.command(
    "set",
    epilog=examples(
        "durable limits set llm --concurrency 200",
        "durable limits set llm --per-key --concurrency 2 --rate 60/1m --burst 10",
        "durable limits set llm --key acme --weight 3",
        "durable limits set llm --key acme --none",
    ),
)
@connected
async def set_limit(
    invocation: Invocation,
    queue: Queue,
    key: Annotated[str | None, typer.Option(help="Of this key alone.")] = None,
    per_key: Annotated[bool, typer.Option("--per-key", help="Of each key.")] = False,
    concurrency: Annotated[int | None, typer.Option(help="Tasks that run at once.")] = None,
    rate: Annotated[str | None, typer.Option(metavar="COUNT/TIME", help="Starts in a time, such as 60/1m.")] = None,
    burst: Annotated[int | None, typer.Option(help="Starts that may come at once; 1 by default.")] = None,
    hold: Annotated[str, typer.Option(help="How long a task holds its slot: for a run, or for the task.")] = "run",
    weight: Annotated[int | None, typer.Option(help="Share of turns of the key.")] = None,
    none: Annotated[bool, typer.Option("--none", help="Remove the limit.")] = False,
) -> None:
    """Set the limit of a queue, of each of its keys, or of one key. It holds at once, on all workers."""
    given = concurrency is not None or rate is not None
    if none == given and not (weight is not None and not none):
        fail("Give --concurrency or --rate, or --none to remove the limit.", USAGE)
    if burst is not None and rate is None:
        fail("Give --rate with --burst.", USAGE)
    limit = None
    if given:
        starts = None if rate is None else Rate(*_rate(rate), burst=1 if burst is None else burst)
        limit = Limit(concurrency, starts, cast("Literal['run', 'task']", hold))
    await invocation.durable.set_limit(queue, limit, key=key, per_key=per_key, weight=weight)
    whose = f"key {key!r} of queue {queue!r}" if key is not None else f"queue {queue!r}"
    invocation.output.say(
        f"Limit of {'each key of ' if per_key else ''}{whose} {'removed' if none else 'set'}.",
        queue_name=queue,
        key=key,
        per_key=per_key,
    )


@limits.command("close", epilog=examples("durable limits close llm acme --for 10m"))
@connected
async def close(
    invocation: Invocation,
    queue: Queue,
    key: Key,
    span: Annotated[
        timedelta | None, typer.Option("--for", parser=duration, metavar="DURATION", help="How long it is closed.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option("--until", parser=moment, metavar="TIME", help="When it opens, as ISO 8601.")
    ] = None,
) -> None:
    """Let no task of a key start, or go on after a sleep. Running tasks go on."""
    if (span is None) == (until is None) or isinstance(until, timedelta):
        fail("Give --for DURATION or --until TIME.", USAGE)
    try:
        opens_at = until if span is None else datetime.now(UTC) + span
    except OverflowError:
        fail("--for ends after the year 9999. Give a shorter time.", USAGE)
    await invocation.durable.close_limit_key(queue, key, opens_at)
    shown = "" if opens_at is None else opens_at.isoformat(timespec="seconds")
    invocation.output.say(f"Key {key!r} of queue {queue!r} closed until {shown}.", queue_name=queue, key=key)


@limits.command("open", epilog=examples("durable limits open llm acme"))
@connected
async def open_key(invocation: Invocation, queue: Queue, key: Key) -> None:
    """Open a closed key."""
    await invocation.durable.close_limit_key(queue, key, None)
    invocation.output.say(f"Key {key!r} of queue {queue!r} opened.", queue_name=queue, key=key)
