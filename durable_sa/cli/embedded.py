"""`durable embedded`: the PostgreSQL server that the `embedded` extra brings, for development and demos."""

from __future__ import annotations

import subprocess
from typing import Annotated

import typer

from .invocation import AsJson, examples, exit_on_package_errors
from .output import Output

embedded = typer.Typer(
    help="The embedded PostgreSQL server of this user, for development.",
    no_args_is_help=True,
    epilog=examples("export DURABLE_DATABASE_URL=$(durable embedded url)"),
)


@embedded.command("start", epilog=examples("durable embedded start"))
def start(as_json: AsJson = False) -> None:
    """Start the server, if it is not running, and let it run until `durable embedded stop`.

    Its data is in DURABLE_EMBEDDED_DIR, by default in the user's data directory.
    """
    with exit_on_package_errors():
        from ..embedded.postgres import keep_running

        server = keep_running()
        url = server.url(driver=None).render_as_string(hide_password=False)
        message = f"The embedded server is running, with its data in {server.data_dir}."
        Output(as_json=as_json).say(message, url=url, data_dir=str(server.data_dir))


@embedded.command("url", epilog=examples("export DURABLE_DATABASE_URL=$(durable embedded url)"))
def url(as_json: AsJson = False) -> None:
    """Print the URL of the server, which is started as by `durable embedded start` if it is not running.

    Durable and the programs of PostgreSQL take the URL.
    """
    with exit_on_package_errors():
        from ..embedded.postgres import keep_running

        address = keep_running().url(driver=None).render_as_string(hide_password=False)
        Output(as_json=as_json).say(address, url=address)


@embedded.command("stop", epilog=examples("durable embedded stop"))
def stop(as_json: AsJson = False) -> None:
    """Stop the server, also if other processes use it. Its data is kept."""
    with exit_on_package_errors():
        from ..embedded.postgres import stop_server

        stopped = stop_server()
        message = "The embedded server was stopped." if stopped else "The embedded server was not running."
        Output(as_json=as_json).say(message, stopped=stopped)


@embedded.command(
    "psql",
    epilog=examples("durable embedded psql", "durable embedded psql -- -c 'SELECT count(*) FROM durable.tasks'"),
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="Arguments for psql.", show_default=False)
    ] = None,
) -> None:
    """Open psql on the server, which is started if it is not running."""
    with exit_on_package_errors():
        from ..embedded import server
        from ..embedded.binaries import Binaries

        address = server().url(driver=None).render_as_string(hide_password=False)
        program = Binaries().directory / "psql"
    raise typer.Exit(subprocess.run([program, address, *(arguments or ())], check=False).returncode)
