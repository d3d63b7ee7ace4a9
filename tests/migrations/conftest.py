"""A database without durable's tables, what its catalog says, and applications with their own Alembic environment."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import migrations
from durable_sa.testing.database import TestServer

from .command import alembic

CATALOG = [
    # Relations of any kind, so that a stray sequence or view is seen.
    """SELECT 'relation', c.relname, c.relkind::text, c.relpersistence::text, c.relrowsecurity, c.reloptions::text,
              pg_catalog.obj_description(c.oid, 'pg_class')
       FROM pg_class c WHERE c.relnamespace = :schema""",
    """SELECT 'column', c.relname, a.attnum, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull,
              pg_catalog.pg_get_expr(d.adbin, d.adrelid), a.attidentity::text, a.attgenerated::text,
              a.attstorage::text, a.attcollation,
              pg_catalog.col_description(c.oid, a.attnum)
       FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
       LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
       WHERE c.relnamespace = :schema AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped""",
    """SELECT 'constraint', conrelid::regclass::text, conname, contype::text, condeferrable, convalidated,
              pg_catalog.pg_get_constraintdef(oid)
       FROM pg_constraint WHERE connamespace = :schema""",
    """SELECT 'index', i.indrelid::regclass::text, i.indisunique, i.indisprimary, i.indisvalid,
              pg_catalog.pg_get_indexdef(i.indexrelid)
       FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = :schema""",
    "SELECT 'function', p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = :schema",
    "SELECT 'type', t.typname FROM pg_type t WHERE t.typnamespace = :schema",
    """SELECT 'trigger', t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
       WHERE c.relnamespace = :schema AND NOT t.tgisinternal""",
]


def _read_catalog(connection: Connection, schema: str = "durable") -> list[str]:
    """Everything about the schema's tables, and the queues in them, without its name."""
    oid = connection.scalar(sa.text("SELECT oid FROM pg_namespace WHERE nspname = :name"), {"name": schema})
    if oid is None:
        return []
    rows = [row for query in CATALOG for row in connection.execute(sa.text(query), {"schema": oid})]
    quoted = connection.scalar(sa.select(sa.func.quote_ident(schema)))
    lines = sorted(" ".join(str(value).replace(f"{quoted}.", "") for value in row) for row in rows)
    if lines:
        queues = sa.table("queues", sa.column("queue_name"), schema=schema)
        lines.append(f"queues: {connection.scalars(sa.select(queues.c.queue_name)).all()}")
    return lines


@pytest.fixture(scope="session")
def read_catalog() -> Callable[..., list[str]]:
    return _read_catalog


@pytest.fixture
def empty_database(durable_server: TestServer) -> Generator[URL]:
    url = durable_server.create_database()
    yield url
    durable_server.drop_database(url)


@pytest.fixture
async def empty_engine(request: pytest.FixtureRequest, empty_database: URL) -> AsyncGenerator[AsyncEngine]:
    url = empty_database.set(drivername=f"postgresql+{getattr(request, 'param', 'asyncpg')}")
    # The server's default may be another one.
    engine = create_async_engine(url, isolation_level="READ COMMITTED")
    yield engine
    await engine.dispose()


MODELS = """
from uuid import UUID

from sqlalchemy import ForeignKey, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from durable_sa.models import Task as TaskRow


class Base(DeclarativeBase):
    # Explicit names must survive a convention that would wrap them.
    metadata = MetaData(naming_convention={
        "pk": "pk_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    })


class Task(Base):
    __tablename__ = "tasks"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Order(Base):
    # Before durable's tables in any order by name.
    __tablename__ = "a_orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[UUID | None] = mapped_column(ForeignKey(TaskRow.task_id, ondelete="SET NULL"))
    task: Mapped[TaskRow | None] = relationship(TaskRow, viewonly=True)
"""


@dataclass
class Application:
    """A directory made by `alembic init`, and then changed by pasting."""

    directory: Path
    url: URL

    def paste(self, file: str, after: str, lines: str, *, documented: bool = True) -> None:
        """Put lines behind a text; those of durable's have to stand in the documentation like that."""
        if documented:
            assert migrations.__doc__
            documentation = [line.strip() for line in migrations.__doc__.splitlines()]
            assert [line for line in lines.splitlines() if line.strip() not in documentation] == []
        path = self.directory / file
        text = path.read_text()
        assert after in text
        path.write_text(text.replace(after, f"{after}{lines}"))

    def replace(self, file: str, pattern: str, by: str, *, count: int = 0) -> None:
        """Change what matches in the lines of a file."""
        path = self.directory / file
        text, found = re.subn(pattern, by, path.read_text(), count=count, flags=re.MULTILINE)
        assert found
        path.write_text(text)

    def alembic(self, *arguments: str, fails: bool = False) -> str:
        """Run the command and give what it printed."""
        code, out, err = alembic(self.directory, arguments)
        assert bool(code) == fails, f"{out}\n{err}"
        return out + err if fails else out

    def revision(self, *arguments: str) -> str:
        """Autogenerate a revision and give its text."""
        self.alembic("revision", "--autogenerate", *arguments)
        return (self.directory / self.latest).read_text()

    @property
    def latest(self) -> str:
        """The file of the newest revision."""
        versions = self.directory.glob("alembic/versions/*.py")
        return str(max(versions, key=lambda path: path.stat().st_ctime_ns).relative_to(self.directory))


@pytest.fixture(scope="session")
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What `alembic init` makes of one of its templates."""
    directory = tmp_path_factory.mktemp(request.param)
    Application(directory, sa.make_url("postgresql://")).alembic("init", "-t", request.param, "alembic")
    return request.param, directory


@pytest.fixture
def application(template: tuple[str, Path], empty_database: URL, tmp_path: Path) -> Application:
    """An application with models of its own, whose env.py is as Alembic makes it, but for their metadata."""
    name, directory = template
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    application = Application(tmp_path, empty_database)
    (tmp_path / "models.py").write_text(MODELS)
    driver = {"generic": "postgresql+psycopg", "async": "postgresql+asyncpg"}[name]
    url = empty_database.set(drivername=driver).render_as_string(hide_password=False).replace("%", "%%")
    application.replace("alembic.ini", "driver://user:pass@localhost/dbname", url)
    application.replace(
        "alembic/env.py", "^target_metadata = None", "from models import Base\n\ntarget_metadata = Base.metadata"
    )
    return application
