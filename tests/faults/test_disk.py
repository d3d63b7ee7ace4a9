"""A disk that is full: what it has no room for is refused, and what was accepted comes to its end once there is room."""

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable, TaskContext
from durable_sa.binaries import Binaries
from durable_sa.database_errors import sqlstate
from durable_sa.embedded import EmbeddedServer, temporary_server

from ..support import eventually

MEGABYTE = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A disk of 96 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(directory)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disks can be made here: {getattr(error, 'stderr', error)}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


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
