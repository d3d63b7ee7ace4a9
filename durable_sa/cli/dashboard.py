"""`durable dashboard`: pages about tasks, queues and workers in the browser, for one user on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import typer

from .. import Durable
from .connection import App, Embedded, SchemaName, Source, Url, description, require_database
from .invocation import FAILED, USAGE, exit_on_errors, exit_on_package_errors, fail
from .output import make_console

HOST = "127.0.0.1"
_STARTING_PAUSE = 0.01

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="MODULE:DURABLE",
        help="The Durable of your application, such as app.tasks:durable; or name a database.",
        show_default=False,
    ),
]
Port = Annotated[int, typer.Option("--port", "-p", help="The port, on the loopback interface.", min=0, max=65535)]
Write = Annotated[
    bool,
    typer.Option(
        "--write", help="Allow actions: cancel, retry, send, emit, pause, trigger, limit, delete. Read-only without."
    ),
]
Payloads = Annotated[
    bool, typer.Option("--payloads", help="Show params, results, payloads of events and the values in errors.")
]


def dashboard(
    target: Target = None,
    port: Port = 8080,
    write: Write = False,
    payloads: Payloads = False,
    url: Url = None,
    app: App = None,
    embedded: Embedded = False,
    schema: SchemaName = None,
) -> None:
    """Serve the dashboard on this machine until Ctrl-C, at a URL with a token, which it prints.

    It needs the extra: pip install 'durable_sa[cli,dashboard]'. To give it to others, mount it in your application.
    """
    if target is not None and app is not None:
        fail("Name the Durable of your application once, for example: durable dashboard app.tasks:durable", USAGE)
    with exit_on_package_errors():
        durable = Source(url=url, app=target or app, embedded=embedded, schema=schema).client()
        require_database(durable, target or app)
        make_console(stderr=True).print(f"database: {description(durable)}", soft_wrap=True)
    with exit_on_errors(durable), contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(durable, port, write=write, payloads=payloads))


async def _serve(durable: Durable[Any], port: int, *, write: bool, payloads: bool) -> None:
    try:
        import uvicorn

        from ..dashboard.local import LocalDashboard
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette", "jinja2"):
            raise
        fail("The dashboard is not installed. Install it with: pip install 'durable_sa[cli,dashboard]'", FAILED)
    async with durable:
        await durable.check_schema()
        local = LocalDashboard(durable, write=write, payloads=payloads)
        config = uvicorn.Config(local, host=HOST, port=port, log_level="warning", server_header=False)
        try:
            socket = config.bind_socket()
        except SystemExit:
            fail(f"Port {port} is in use. Choose another: durable dashboard --port {port + 1}", FAILED)
        with socket:
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve(sockets=[socket]))
            while not server.started and not serving.done():  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(_STARTING_PAUSE)
            place = f"http://{HOST}:{socket.getsockname()[1]}/?token={local.token}"
            make_console().print(place, soft_wrap=True)
            make_console(stderr=True).print("Press Ctrl-C to end it.", soft_wrap=True)
            await serving
