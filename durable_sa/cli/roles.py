"""`durable roles`: the least privileges of database roles on durable's tables."""

from __future__ import annotations

from typing import Annotated

import typer

from ..migrations import roles as privileges
from ..migrations.sql import verbatim
from .invocation import Invocation, offline


@offline
async def roles(
    invocation: Invocation,
    producer: Annotated[
        str | None,
        typer.Option(help="The role of the application: spawns, emits, cancels, reads results.", metavar="ROLE"),
    ] = None,
    worker: Annotated[str | None, typer.Option(help="The role of workers.", metavar="ROLE")] = None,
    operator: Annotated[
        str | None,
        typer.Option(
            help="The role of this command line, or of an application that defines queues and schedules.",
            metavar="ROLE",
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Execute the SQL, as the owner of the tables.")] = False,
) -> None:
    """Print the SQL that grants database roles their least privileges.

    The roles must exist; one role may be named several times. Their earlier privileges on durable's tables are revoked.
    Repeat the command after an upgrade that adds tables. Migrations are run by the owner of the tables.
    """
    named = {"producer": producer, "worker": worker, "operator": operator}
    names = {kind: role for kind, role in named.items() if role is not None}
    statements = privileges.grants(names, invocation.durable.schema)
    if apply:
        invocation.announce()
        async with invocation.durable.database.transaction() as connection:
            for statement in statements:
                await connection.execute(verbatim(statement))
        invocation.output.say("Privileges granted.", statements=statements)
    else:
        script = "".join(f"{statement};\n" for statement in statements)
        invocation.output.say(f"BEGIN;\n{script}COMMIT;", statements=statements)
