"""A disk that is full: what it has no room for is refused, and what was accepted comes to its end once there is room.

One that only a worker has fails the tasks that need it, which are retried, and nothing else.
"""

import asyncio
import contextlib
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable, TaskContext
from durable_sa.database_errors import sqlstate
from durable_sa.embedded import EmbeddedServer, temporary_server
from durable_sa.embedded.binaries import Binaries

from ..support import eventually
from . import audit, workload
from .ledger import entries
from .nursery import Nursery
from .producer import SECRET
from .workload import Op

MEGABYTE = 1024 * 1024


@contextlib.contextmanager
def mounted(directory: Path, size: str) -> Generator[Path]:
    """A disk of that size."""
    directory.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disks can be made here: {getattr(error, 'stderr', error)}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    with mounted(tmp_path / "disk", "96m") as directory:
        yield directory


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    with mounted(tmp_path / "small", "64k") as directory:
        yield directory


@pytest.fixture
def server(disk: Path) -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off", "min_wal_size": "32MB", "max_wal_size": "32MB"}) as server:
        Binaries().give(disk)
        yield server


def fill(disk: Path, *, but: int) -> Path:
    """Leave only so many bytes free."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - but)))
    return ballast


async def nothing_is_lost(
    url: object, disk: Path, server: EmbeddedServer, *, left: int, refusals: set[str | None]
) -> None:
    """Spawn until the disk is full and a while longer, with a worker beside it; then make room."""
    engine = create_async_engine(url)  # type: ignore[arg-type]
    accepted = []
    refused: list[str | None] = []
    async with Durable(engine) as durable:

        @durable.task(max_attempts=1)
        async def work(ctx: TaskContext, padding: str) -> int:
            lengths = [await ctx.step(f"copy-{number}", str, padding[:20_000]) for number in range(3)]
            await ctx.sleep_for("nap", 0.01)
            return sum(map(len, lengths))

        await durable.migrate()
        async with durable.worker(concurrency=10, claim_timeout=60):
            ballast = fill(disk, but=left)
            # Compressed it would take no room.
            padding = (disk / "ballast").name + "".join(map(chr, range(0x4E00, 0x9000))) * 2
            for _ in range(2000):
                try:
                    accepted.append(await durable.spawn(work, padding))
                except (SQLAlchemyError, OSError) as error:
                    refused.append(sqlstate(error))
                    if len(refused) == 20:
                        break
            assert len(refused) == 20
            assert refusals & set(refused)
            ballast.unlink()

            async def serves() -> bool:
                await asyncio.to_thread(server.start)
                with contextlib.suppress(SQLAlchemyError, OSError):
                    async with engine.connect() as connection:
                        return (await connection.execute(text("SELECT NOT pg_is_in_recovery()"))).scalar() is True
                return False

            await eventually(serves, within=30)
            for spawned in accepted:
                assert (await durable.wait_for_result(spawned, timeout=60)).output == 60_000
    async with engine.connect() as connection:
        ends = text("SELECT outcome, sum(failures) FROM durable.tasks GROUP BY 1")
        assert (await connection.execute(ends)).all() == [("completed", 0)]
        known = set(await connection.scalars(text("SELECT task_id FROM durable.tasks")))
    assert {spawned.task_id for spawned in accepted} <= known
    await engine.dispose()


def move_log(server: EmbeddedServer, disk: Path) -> None:
    log = server.data_dir / "pg_wal"
    shutil.copytree(log, disk / "pg_wal")
    for path in (disk / "pg_wal", *(disk / "pg_wal").rglob("*")):
        Binaries().give(path)
    shutil.rmtree(log)
    log.symlink_to(disk / "pg_wal")


async def test_a_full_disk_of_tables(server: EmbeddedServer, disk: Path) -> None:
    space = disk / "space"
    space.mkdir(mode=0o700)
    Binaries().give(space)
    admin = create_async_engine(server.url(), isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(text(f"CREATE TABLESPACE small LOCATION '{space}'"))
        await connection.execute(text("CREATE DATABASE small TABLESPACE small"))
    await admin.dispose()
    await nothing_is_lost(server.url(database="small"), disk, server, left=2 * MEGABYTE, refusals={"53100"})


async def test_a_full_disk_of_the_log(server: EmbeddedServer, disk: Path) -> None:
    """The server ends itself then, and again at each start for as long as there is no room."""
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(move_log, server, disk)
    await asyncio.to_thread(server.start)
    await nothing_is_lost(server.url(), disk, server, left=10 * MEGABYTE, refusals={None, "57P02", "57P03"})


async def test_a_full_disk_of_a_worker(database_url: URL, durable: Durable, small_disk: Path, tmp_path: Path) -> None:
    """It has no room for what tasks write into its directory, nor for its log."""
    plain = await asyncpg.connect(database_url.set(drivername="postgresql").render_as_string(hide_password=False))
    await plain.execute(audit.DDL)
    for known in workload.TASKS:
        durable.register(known)
    url = database_url.render_as_string(hide_password=False)
    common = {
        "url": url,
        "directory": str(tmp_path),
        "queue_names": ["default"],
        "concurrency": 20,
        "claim_timeout": 10.0,
    }

    def raised() -> list[str]:
        return [entry["task"] for entry in entries(tmp_path) if entry["what"] == "raised"]

    async def ended(task_name: str) -> bool:
        left = "SELECT count(*) FROM durable.tasks WHERE outcome IS NULL AND task_name = $1"
        return int(await plain.fetchval(left, task_name)) == 0

    async with Nursery() as nursery:
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(1024)):
                pass
        full = await nursery.fork("worker", "full", small_disk / "full.log", cwd=str(small_disk), **common)
        await durable.spawn_many(
            [(workload.spool, Op(op=f"spool-{number}", secret=SECRET, number=5000)) for number in range(5)]
        )
        await eventually(lambda: len(raised()) > 10 and len(set(raised())) == 5)
        tours = [(workload.tour, Op(op=f"tour-{number}", secret=SECRET, number=number)) for number in range(10)]
        await durable.spawn_many(tours)
        await eventually(lambda: ended("tour"))
        # Another one has room. Beside it the first would, with luck, be sooner for each of many attempts.
        other = await nursery.fork("worker", "other", tmp_path / "other.log", cwd=str(tmp_path), **common)
        full.send(signal.SIGTERM)
        assert await full.ended == 0
        await eventually(lambda: ended("spool"))
        other.send(signal.SIGTERM)
        assert await other.ended == 0
    rows = await plain.fetch("SELECT task_id::text, task_name, outcome, failures, lease_losses FROM durable.tasks")
    await plain.close()
    failures = Counter(raised())
    for row in rows:
        assert (row["outcome"], row["lease_losses"]) == ("completed", 0)
        assert row["failures"] == failures[row["task_id"]], row["task_name"]
    assert len(rows) == 25
    assert len(failures) == 5
