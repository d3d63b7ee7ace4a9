"""The `durable` command. It needs the `cli` extra, which brings typer and rich.

Exit codes: 0, success; 1, failure, or something was not found; 2, invalid arguments.
"""

import gc
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
    gc.freeze()
    gc.enable()
    app()
