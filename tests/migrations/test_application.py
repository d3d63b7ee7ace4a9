"""Applications with an Alembic history of their own, driven by the `alembic` command, as the documentation says.

What is pasted and typed are the lines of the page on adopting, and they have to stand in the package's docstring, too.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import alembic
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa.migrations import current, migrate
from durable_sa.testing.database import TestServer
from tests.verification.docs import snippets

if TYPE_CHECKING:
    from .conftest import Application

T = TypeVar("T")
Catalog = Callable[..., list[str]]

both = pytest.mark.parametrize("template", ["generic", "async"], indirect=True)
generic = pytest.mark.parametrize("template", ["generic"], indirect=True)

PAGE = snippets.DOCS / "guides/adopting.md"
_, IMPORT, CONFIGURE = snippets.file(PAGE, "alembic/env.py").split("\n\n")
COMMANDS = [
    shlex.split(line)[1:]
    for block in snippets.blocks(PAGE)
    if block.language == "sh"
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.startswith("alembic ")
]
SEPARATOR_HAS_NEWLINE = tuple(int(part) for part in alembic.__version__.split(".")[:2]) >= (1, 16)


def on(url: URL, function: Callable[[Connection], T]) -> T:
    """Call a function with a connection."""

    async def call() -> T:
        engine = create_async_engine(url, poolclass=NullPool, isolation_level="READ COMMITTED")
        async with engine.begin() as connection:
            return await connection.run_sync(function)

    return asyncio.run(call())


def tables(url: URL, schema: str = "public") -> list[str]:
    return on(url, lambda connection: sorted(sa.inspect(connection).get_table_names(schema)))


def foreign_key(url: URL) -> str:
    query = sa.text("""
        SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'a_orders'::regclass AND contype = 'f'
    """)
    return on(url, lambda connection: str(connection.scalars(query).one()))


def execute_script(url: URL, script: str) -> None:
    """Execute several statements at once, which drivers do only outside of SQLAlchemy."""

    async def execute() -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.execute(script)

    asyncio.run(execute())


@pytest.fixture(scope="module")
def migrated(durable_server: TestServer, read_catalog: Catalog) -> list[str]:
    """The catalog after `migrate`."""

    def read(connection: Connection) -> list[str]:
        migrate(connection)
        return read_catalog(connection)

    url = durable_server.create_database()
    try:
        return on(url, read)
    finally:
        durable_server.drop_database(url)


def command(first: str, *others: str) -> list[str]:
    """The one command of the page that begins like this and has these words."""
    (found,) = [words for words in COMMANDS if words[0] == first and set(others) <= set(words)]
    return found


def add_hook(application: Application) -> None:
    application.paste("alembic/env.py", "from alembic import context", f"\n{IMPORT}")
    (argument,) = [line for line in CONFIGURE.splitlines() if "=" in line and "#" not in line]
    application.paste("alembic/env.py", "context.configure(", f"\n    {argument}\n")


def add_option(application: Application, option: str) -> None:
    application.paste("alembic/env.py", "context.configure(", f"\n        {option},\n", documented=False)


def add_branch(application: Application) -> None:
    application.replace("alembic.ini", r"^(version_)?path_separator = os.*\n", "")
    if SEPARATOR_HAS_NEWLINE:
        section, _, settings = snippets.file(PAGE, "alembic.ini").partition("\n")
        application.paste("alembic.ini", section, f"\n{settings}")
    else:
        application.paste(
            "alembic.ini",
            "[alembic]",
            """
version_path_separator = space
version_locations = %(here)s/alembic/versions durable_sa:migrations/versions
""",
            documented=False,
        )


@both
@pytest.mark.slow
def test_in_the_history_of_the_application(
    application: Application, durable_server: TestServer, read_catalog: Catalog, migrated: list[str]
) -> None:
    add_hook(application)
    assert 'durable.upgrade("durable_0009")' in application.alembic("check", fails=True)

    application.alembic(*command("revision", "durable tables"))
    revision = (application.directory / application.latest).read_text()
    assert revision.count(IMPORT) == 1
    upgrade, downgrade = revision.split("def downgrade()")
    assert upgrade.index('durable.upgrade("durable_0009")') < upgrade.index("op.create_table('a_orders'")
    assert downgrade.index("op.drop_table('a_orders')") < downgrade.index(
        'durable.downgrade("base", since="durable_0009")'
    )
    assert revision.count("_table(") == 4  # the application's own two, made and dropped

    # A script made without a database does the same.
    script = application.alembic("upgrade", "head", "--sql")
    by_script = durable_server.create_database()
    execute_script(by_script, script)
    assert on(by_script, read_catalog) == migrated
    execute_script(by_script, application.alembic("downgrade", "head:base", "--sql"))
    assert on(by_script, read_catalog) == []
    durable_server.drop_database(by_script)

    application.alembic(*command("upgrade", "head"))
    assert on(application.url, read_catalog) == migrated
    assert tables(application.url) == ["a_orders", "alembic_version", "tasks"]
    assert foreign_key(application.url) == (
        "FOREIGN KEY (task_id) REFERENCES durable.tasks(task_id) ON DELETE SET NULL"
    )
    assert "No new upgrade operations" in application.alembic("check")

    application.alembic("downgrade", "-1")
    assert on(application.url, read_catalog) == []
    assert on(application.url, current) is None
    application.alembic("upgrade", "head")
    assert on(application.url, read_catalog) == migrated


@both
@pytest.mark.slow
def test_as_a_branch(application: Application, read_catalog: Catalog, migrated: list[str]) -> None:
    add_branch(application)
    application.alembic(*command("upgrade", "heads"))
    assert on(application.url, read_catalog) == migrated
    application.alembic(*command("revision", "orders"))
    revision = (application.directory / application.latest).read_text()
    assert "durable_0009" in revision
    assert revision.count("_table(") == 4
    application.replace(application.latest, r"^branch_labels(.*)= None", r"branch_labels\1= ('app',)")
    application.alembic("upgrade", "heads")
    assert "REFERENCES durable.tasks(task_id)" in foreign_key(application.url)
    assert "No new upgrade operations" in application.alembic("check")
    assert set(re.findall(r"\((\w+)\)", application.alembic("heads"))) == {"app", "durable", "head"}

    application.paste("models.py", "title: Mapped[str]", "\n    done: Mapped[bool]", documented=False)
    application.alembic(*command("revision", "more orders"))
    assert "durable" not in (application.directory / application.latest).read_text()
    application.alembic("upgrade", "heads")

    application.alembic("downgrade", "app@base")
    application.alembic("downgrade", "durable@base")
    assert on(application.url, read_catalog) == []
    # From nothing, in the order of the dependency.
    application.alembic("upgrade", "heads")
    assert on(application.url, read_catalog) == migrated


@generic
@pytest.mark.parametrize(
    ("branch", "merged"),
    [
        (False, None),
        (False, "[metadata, Base.metadata]"),
        (False, "[Base.metadata, metadata]"),
        (True, "[Base.metadata, metadata]"),
    ],
)
@pytest.mark.slow
def test_autogenerate_leaves_durables_tables_alone(application: Application, branch: bool, merged: str | None) -> None:
    """Also where it compares all schemas, or has durable's models among its own, in whichever order."""
    arguments = []
    if branch:
        # Without a word in env.py.
        add_branch(application)
        application.alembic("upgrade", "heads")
        arguments = ["--head", "base", "--version-path", "alembic/versions", "--depends-on", "durable_0009"]
    else:
        add_hook(application)
    add_option(application, "include_schemas=True")
    if merged is not None:
        application.replace("alembic/env.py", "^target_metadata = .*", f"target_metadata = {merged}")
        application.paste(
            "alembic/env.py", "from models import Base", "\nfrom durable_sa.models import metadata", documented=False
        )
    revision = application.revision("-m", "first", *arguments)
    assert revision.count("_table(") == 4
    assert revision.count("_index(") == 0
    application.alembic("upgrade", "heads")
    assert "No new upgrade operations" in application.alembic("check")


@pytest.mark.slow
@generic
def test_metadata_is_merged_without_comparing_schemas(application: Application) -> None:
    add_hook(application)
    application.paste("alembic/env.py", "target_metadata = ", "[TaskRow.metadata, ", documented=False)
    application.paste("alembic/env.py", "Base.metadata", "]", documented=False)
    application.paste("alembic/env.py", "from models import Base", ", TaskRow", documented=False)
    assert application.revision("-m", "first").count("_table(") == 4
    application.alembic("upgrade", "head")
    assert "No new upgrade operations" in application.alembic("check")


@generic
@pytest.mark.slow
def test_after_an_upgrade_of_the_library(application: Application, read_catalog: Catalog, migrated: list[str]) -> None:
    add_hook(application)
    application.revision("-m", "durable tables")
    application.alembic("upgrade", "head")

    later = application.directory / "later"
    later.mkdir()
    (later / "durable_0010_later.py").write_text(LATER)
    application.paste(
        "alembic/env.py",
        IMPORT,
        f"\nfrom durable_sa.migrations import versions\nversions.__path__.append({str(later)!r})",
        documented=False,
    )
    upgrade, downgrade = (
        'durable.upgrade("durable_0010", since="durable_0009")',
        'durable.downgrade("durable_0009", since="durable_0010")',
    )
    assert upgrade in application.alembic("check", fails=True)
    revision = application.revision("-m", "durable tables once more")
    assert revision.index(upgrade) < revision.index("def downgrade()") < revision.index(downgrade)
    application.alembic("upgrade", "head")
    assert on(application.url, current) == "durable_0010"
    assert "later" in tables(application.url, "durable")
    assert "No new upgrade operations" in application.alembic("check")

    application.alembic("downgrade", "-1")
    assert on(application.url, read_catalog) == migrated
    application.alembic("downgrade", "base")
    # Both revisions on an empty database, and from a script.
    script = application.alembic("upgrade", "head", "--sql")
    assert script.index(
        "COMMENT ON TABLE durable.queues IS 'schema version: durable_0009 (for durable_0001 and later)'"
    ) < script.index("CREATE TABLE durable.later")
    application.alembic("upgrade", "head")
    assert on(application.url, current) == "durable_0010"


LATER = """
revision = "durable_0010"
down_revision = "durable_0009"

def up(op, schema):
    op.create_table("later", schema=schema)

def down(op, schema):
    op.drop_table("later", schema=schema)
"""


@generic
@pytest.mark.parametrize("branch", [False, True], ids=["own history", "branch"])
@pytest.mark.slow
def test_another_schema(application: Application, read_catalog: Catalog, migrated: list[str], branch: bool) -> None:
    schema = 'my "jobs"'
    application.paste(
        "models.py",
        "\n    })\n",
        f"\n\ndurable_tasks = TaskRow.__table__.to_metadata(Base.metadata, schema={schema!r})\n",
        documented=False,
    )
    application.replace("models.py", r"ForeignKey\(TaskRow\.task_id", "ForeignKey(durable_tasks.c.task_id")
    application.replace("models.py", r"    task: .*\n", "")
    add_option(application, f"durable_schema={schema!r}")
    add_option(application, "include_schemas=True")
    if branch:
        add_branch(application)
        application.alembic("upgrade", "heads")
        revision = application.revision(
            "-m", "first", "--head", "base", "--version-path", "alembic/versions", "--depends-on", "durable_0009"
        )
    else:
        add_hook(application)
        revision = application.revision("-m", "first")
        assert 'durable.upgrade("durable_0009", schema="my \\"jobs\\"")' in revision
        assert 'durable.downgrade("base", since="durable_0009", schema="my \\"jobs\\"")' in revision
    assert revision.count("_table(") == 4
    application.alembic("upgrade", "heads")
    assert on(application.url, lambda connection: read_catalog(connection, schema)) == migrated
    assert 'REFERENCES "my ""jobs""".tasks(task_id)' in foreign_key(application.url)
    assert "No new upgrade operations" in application.alembic("check")
    application.alembic("downgrade", "base")
    assert on(application.url, lambda connection: read_catalog(connection, schema)) == []


HOOK = """
from alembic.autogenerate import rewriter
from alembic.operations import ops
from durable_sa import migrations as durable

writer = rewriter.Rewriter()

@writer.rewrites(ops.CreateTableOp)
def add_statement(context, revision, op):
    return [op, ops.ExecuteSQLOp("SELECT 1")]

def hook(context, revision, directives):
    durable.autogenerate(context, revision, directives)
    writer(context, revision, directives)
    if directives[0].upgrade_ops.is_empty():
        directives.clear()
"""


@pytest.mark.slow
@generic
@pytest.mark.parametrize("hook", ["writer.chain(durable.autogenerate)", "hook"])
def test_a_hook_of_the_application_goes_on(application: Application, hook: str) -> None:
    application.paste("alembic/env.py", "from alembic import context", HOOK, documented=False)
    add_option(application, f"process_revision_directives={hook}")
    revision = application.revision("-m", "first")
    assert revision.count("SELECT 1") == 2
    assert 'durable.upgrade("durable_0009")' in revision
    application.alembic("upgrade", "head")
    first = application.latest
    application.alembic("revision", "--autogenerate", "-m", "nothing")
    assert (application.latest == first) == (hook == "hook")


@generic
def test_a_revision_that_is_not_generated_is_left_as_it_is(application: Application) -> None:
    add_hook(application)
    application.paste("alembic.ini", "[alembic]", "\nrevision_environment = true", documented=False)
    application.alembic("revision", "-m", "by hand")
    assert "durable" not in (application.directory / application.latest).read_text()


@generic
@pytest.mark.parametrize("branch", [False, True], ids=["own history", "branch"])
def test_tables_that_were_there_before_alembic_are_taken_over(
    application: Application, read_catalog: Catalog, migrated: list[str], branch: bool
) -> None:
    on(application.url, migrate)
    if branch:
        add_branch(application)
    else:
        application.alembic("revision", "-m", "by hand")
        by_hand = snippets.file(PAGE, "alembic/versions/0001_durable_tables.py")
        (upgrade,) = re.findall(r"    durable\.upgrade\(.*\n", by_hand)
        application.replace(application.latest, r"    pass\n", upgrade, count=1)
        application.paste(application.latest, "from alembic import op", f"\n{IMPORT}")
    application.alembic("upgrade", "heads")
    assert on(application.url, read_catalog) == migrated


@generic
@pytest.mark.slow
def test_after_an_upgrade_of_the_library_as_a_branch(application: Application) -> None:
    add_branch(application)
    application.alembic("upgrade", "heads")

    later = application.directory / "later"
    later.mkdir()
    (later / "durable_0010_later.py").write_text(f"{LATER}\n{LATER_IN_A_BRANCH}")
    application.replace("alembic.ini", r"(\s+)(durable_sa:migrations/versions)$", rf"\1\2\1{later}")
    application.paste(
        "alembic/env.py",
        "from alembic import context",
        f"\nfrom durable_sa.migrations import versions\nversions.__path__.append({str(later)!r})",
        documented=False,
    )
    assert "Target database is not up to date" in application.alembic("check", fails=True)
    assert "durable_0010" in application.alembic("heads")
    application.alembic("upgrade", "heads")
    assert on(application.url, current) == "durable_0010"
    assert "later" in tables(application.url, "durable")
    # As a worker of the version before says where it finds these tables.
    application.alembic("downgrade", "durable@durable_0009")
    assert on(application.url, current) == "durable_0009"


LATER_IN_A_BRANCH = """
from durable_sa.migrations import running

def upgrade(**_):
    running.upgrade_branch(revision, since=down_revision)

def downgrade(**_):
    running.downgrade_branch(down_revision, since=revision)
"""
