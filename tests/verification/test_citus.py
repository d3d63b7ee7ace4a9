"""A client that sees Citus behind a real PgBouncer, which refuses parameters that it does not know."""

import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from durable_sa import Durable
from tests.database.test_citus import PRETEND
from tests.verification.pooler import PROGRAM, Pooler
from tests.verification.server import private_server


@pytest.fixture
def directory() -> Generator[Path]:
    """One that PgBouncer can read, which does not run as root."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed")
async def test_connections_without_the_setting_are_made(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with private_server() as server:
        await server.sql(str(PRETEND))
        async with (
            Pooler(server, directory) as pooler,
            Durable(server.url("postgres", pooler.port).set(drivername="postgresql")) as durable,
        ):
            await durable.migrate()
            for _ in range(3):
                assert await durable.list_queues() == ["default"]
                await durable.engine.dispose()
    assert caplog.text.count("Citus") == 1
