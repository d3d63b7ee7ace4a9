"""Alembic's autogenerate: ignores durable's tables, and writes a call of `upgrade` when they are outdated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

from alembic import util
from alembic.autogenerate import comparators, renderers
from alembic.autogenerate.api import AutogenContext
from alembic.migration import MigrationContext
from alembic.operations.ops import MigrateOperation, MigrationScript, OpContainer, UpgradeOps
from alembic.script import ScriptDirectory
from sqlalchemy import text

from ..models import SCHEMA, metadata
from .chain import BASE, head, is_known, scripts
from .running import configured_schema
from .sql import quoted
from .version import current, downgrade_call, mismatch, upgrade_call

_IMPORT: Final = "from durable_sa import migrations as durable"
_PATH_BEFORE: Final = "durable_search_path"
_SEARCH_PATH: Final = text(
    "SELECT pg_catalog.current_schemas(false) AS schemas, pg_catalog.current_setting('search_path') AS setting"
)
_SET_SEARCH_PATH: Final = text("SELECT pg_catalog.set_config('search_path', :path, false)")
_TABLES: Final = frozenset(table.name for table in metadata.tables.values())

Comparator = Callable[..., None]


class Move(MigrateOperation):
    """A call of `durable.upgrade` in a generated revision, or of `durable.downgrade`."""

    def __init__(self, revision: str, since: str, schema: str, *, down: bool = False) -> None:
        self.revision = revision
        self.since = since
        self.schema = schema
        self.down = down

    def reverse(self) -> Move:
        return Move(self.since, self.revision, self.schema, down=not self.down)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return the text that `alembic check` prints."""
        return (self.render(),)

    def render(self) -> str:
        call = downgrade_call if self.down else upgrade_call
        return call(self.revision, self.since, self.schema)


@renderers.dispatch_for(Move)
def _render(context: AutogenContext, operation: Move) -> str:
    context.imports.add(_IMPORT)
    return operation.render()


def autogenerate(context: MigrationContext, revision: Any, directives: list[MigrationScript]) -> None:
    """Make `alembic revision --autogenerate` write the upgrade of durable's tables when one is due.

    Pass this in env.py: `context.configure(..., process_revision_directives=durable.autogenerate)`. The call becomes
    the first of the upgrade, so that foreign keys to durable's tables find them, and its reverse the last of the
    downgrade. `alembic check` reports a due upgrade. If durable's revisions are a branch of the application's history,
    nothing is written, because `alembic upgrade heads` runs them.

    If you have a hook already, call this first in it, or chain a `Rewriter`: `writer.chain(durable.autogenerate)`.

    Raises:
        SchemaMismatch: a newer version of the package migrated the database.
    """
    connection = context.connection
    if connection is None or not directives or not _is_autogenerate(context) or _is_branch(context.script):
        return
    schema = configured_schema(context) or SCHEMA
    installed = current(connection, schema) or BASE
    if installed == head():
        return
    if not is_known(installed):
        raise mismatch(installed, schema)
    move = Move(head(), installed, schema)
    directives[0].upgrade_ops_list[-1].ops.insert(0, move)
    directives[0].downgrade_ops_list[-1].ops.append(move.reverse())


def _is_autogenerate(context: MigrationContext) -> bool:
    """Return whether models are compared. With `revision_environment = true` env.py also runs for empty revisions."""
    return bool(context.opts["revision_context"].command_args["autogenerate"])


def _is_branch(script: ScriptDirectory | None) -> bool:
    ours = {script.revision for script in scripts()}
    return script is not None and any(revision.revision in ours for revision in script.walk_revisions())


def _first(comparator: Comparator) -> Comparator:
    """Register a comparison that runs before Alembic's own; before Alembic 1.18 only the list of them can do that."""
    if priorities := getattr(util, "DispatchPriority", None):
        return comparators.dispatch_for("schema", priority=priorities.FIRST)(comparator)
    cast("Any", comparators)._registry["schema", "default"].insert(0, comparator)
    return comparator


def _last(comparator: Comparator) -> Comparator:
    """Register a comparison that runs after Alembic's own."""
    if priorities := getattr(util, "DispatchPriority", None):
        return comparators.dispatch_for("schema", priority=priorities.LAST)(comparator)
    return comparators.dispatch_for("schema")(comparator)


@_first
def _hide(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Iterable[str | None]) -> None:
    """Take durable's schema off the search path while Alembic compares.

    Alembic gives every table that the search path finds the schema None. It would take durable's tables for the
    application's, and drop them, or compare them with models that have the same names.
    """
    schema = configured_schema(context.migration_context)
    connection = context.connection
    if schema is None or connection is None:
        return
    path = connection.execute(_SEARCH_PATH).one()
    others = [name for name in path.schemas if name not in (SCHEMA, schema)]
    # Behind a path that begins with durable's schema, the application's tables may be in that schema.
    if len(others) < len(path.schemas) and path.schemas[:1] == others[:1]:
        context.migration_context.opts[_PATH_BEFORE] = path.setting
        connection.execute(_SET_SEARCH_PATH, {"path": ", ".join(map(quoted, others))})


@_last
def _leave_alone(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Iterable[str | None]) -> None:
    """Remove durable's tables from the result of the comparison.

    Otherwise `include_schemas=True` would drop them, and durable's metadata in `target_metadata` would create them.
    """
    schema = configured_schema(context.migration_context)
    connection = context.connection
    if schema is None or connection is None:
        return
    # The dialect's default schema is that of the engine's first connection, when durable's may not have existed.
    _without(upgrade_ops, {SCHEMA, schema}, connection.execute(_SEARCH_PATH).one().schemas[:1])
    if (before := context.migration_context.opts.pop(_PATH_BEFORE, None)) is not None:
        connection.execute(_SET_SEARCH_PATH, {"path": before})


def _without(container: OpContainer, schemas: set[str], default_schema: Sequence[str]) -> None:
    def is_ours(operation: MigrateOperation) -> bool:
        schema = getattr(operation, "schema", None) or next(iter(default_schema), None)
        return schema in schemas and getattr(operation, "table_name", None) in _TABLES

    container.ops[:] = [operation for operation in container.ops if not is_ours(operation)]
