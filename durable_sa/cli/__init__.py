"""The `durable` command. It needs the `cli` extra, which brings typer and rich.

Exit codes: 0, all is well; 1, something is wrong or was not found; 2, the command was not written right.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of the process: the entry point of the script `durable`."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("error: The command line is not installed. Install it: pip install 'durable_sa[cli]'")
    app()
