"""The `durable` command. It needs the `cli` extra, which brings typer and rich.

Exit codes: 0, success; 1, failure, or something was not found; 2, invalid arguments.
"""

import gc
import io
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of the process: the entry point of the script `durable`."""
    # What is imported stays until the process ends: to search it for garbage took 0.2 of 1.2 seconds of each command.
    gc.disable()
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("error: The command line is not installed. Install it with: pip install 'durable_sa[cli]'")
    for stream in (sys.stdout, sys.stderr):
        # What the encoding of the output has no character for must not fail a command that has done its work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.freeze()
    gc.enable()
    app()
