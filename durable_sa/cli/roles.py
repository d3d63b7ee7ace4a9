"""`durable roles`: database roles that may do what they need to durable's tables, and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from ..migrations import roles as privileges
from ..migrations.sql import verbatim
from .invocation import Invocation, connected


@connected
async def roles(
    invocation: Invocation,
    producer: Annotated[
        str | None, typer.Option(help="Of the application: spawns, emits, cancels, asks for results.", metavar="ROLE")
    ] = None,
    worker: Annotated[str | None, typer.Option(help="Of the workers.", metavar="ROLE")] = None,
    operator: Annotated[
        str | None,
        typer.Option(help="Of this command line, or an application that defines queues and schedules.", metavar="ROLE"),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Execute it, as the owner of the tables.")] = False,
) -> None:
    """Print the SQL that gives database roles the least they need.

    The roles have to be there; one may be named for several purposes. What they could do to durable's tables before,
    they no longer can. Repeat it after an upgrade that brings new tables. The owner of the tables runs the migrations.
    """
    named = {"producer": producer, "worker": worker, "operator": operator}
    names = {kind: role for kind, role in named.items() if role is not None}
    statements = privileges.grants(names, invocation.durable.schema)
    if apply:
        async with invocation.durable.database.transaction() as connection:
            for statement in statements:
                await connection.execute(verbatim(statement))
        invocation.output.say("The roles are set up.", statements=statements)
    else:
        script = "".join(f"{statement};\n" for statement in statements)
        invocation.output.say(f"BEGIN;\n{script}COMMIT;", statements=statements)
