"""The `alembic` command in a process of its own, forked from one that has done the imports: ten times as fast."""

import multiprocessing
import os
import sys
import warnings
from pathlib import Path

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "alembic.config",
        "alembic.autogenerate.api",
        "asyncpg",
        "durable_sa.migrations",
        "mako.template",
        "psycopg",
        "sqlalchemy.dialects.postgresql.asyncpg",
        "sqlalchemy.dialects.postgresql.psycopg",
        "sqlalchemy.ext.asyncio",
    ]
)


def alembic(directory: Path, arguments: tuple[str, ...]) -> tuple[int, str, str]:
    """Run the command in a directory; its exit code and what it wrote to stdout and stderr."""
    out, err = directory / ".stdout", directory / ".stderr"
    process = _PROCESSES.Process(target=_run, args=(directory, arguments, out, err))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, out.read_text(), err.read_text()


def _run(directory: Path, arguments: tuple[str, ...], out: Path, err: Path) -> None:
    from alembic.config import main

    os.chdir(directory)
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    warnings.simplefilter("error")
    sys.argv = ["alembic", *arguments]
    main()
