"""The tables' migrations, for Alembic and without it.

In the history of your application
----------------------------------

This is the usual way. Durable's tables are upgraded by revisions of your own, which call this package, so that there
is one history, one head and one transaction. Alembic writes the calls if `env.py` has these lines:

    from durable_sa import migrations as durable

    context.configure(
        ...,
        process_revision_directives=durable.autogenerate,
    )

Now, and after every upgrade of durable_sa that brings new revisions:

    alembic revision --autogenerate -m "durable tables"
    alembic upgrade head

The generated revision contains the calls beside the changes of your models, in the order that foreign keys to durable's
tables need. You can also write them by hand:

    from durable_sa import migrations as durable

    def upgrade() -> None:
        durable.upgrade("durable_0009")

    def downgrade() -> None:
        durable.downgrade("base", since="durable_0009")

and later `durable.upgrade("durable_0010", since="durable_0009")`, whose reverse is
`durable.downgrade("durable_0009", since="durable_0010")`. `alembic check` fails while a call is due, and prints it: run
it in CI. `--sql` works.

If you have a hook already, call `durable.autogenerate(context, revision, directives)` first in it, or chain a
`Rewriter`: `process_revision_directives=writer.chain(durable.autogenerate)`.

As a branch beside your history
-------------------------------

Alembic runs durable's revisions directly, as the branch `durable`. In `alembic.ini`, from Alembic 1.16 on:

    path_separator = newline
    version_locations =
        %(here)s/alembic/versions
        durable_sa:migrations/versions

Alembic's own setting `path_separator = os` splits the second location at its colon and then ignores it. Before 1.16
write both locations on one line, and `version_path_separator = space`. In `pyproject.toml` they are a list, which needs
no separator. Upgrade with

    alembic upgrade heads

with an s. There are two heads, so name the revision that a new one follows, and the directory of the first one:

    alembic revision --autogenerate -m "orders" --head base --version-path alembic/versions
    alembic revision --autogenerate -m "more orders" --head <your latest revision>

While one of durable's revisions is due, `alembic check` reports `Target database is not up to date`, as for any
revision that was not run yet; compare `alembic heads` with `alembic current`.

With a label, `branch_labels = ("app",)` in your first revision, that is `--head app@head`. A revision with foreign keys
to durable's tables declares which of durable's revisions it needs: `--depends-on durable_0009`.

Without Alembic's files
-----------------------

`await durable.migrate()` of the client, or `durable migrate` on the command line, upgrades the tables to the newest
revision in a transaction of its own. An application may switch to one of the other ways later: revisions that the
database already has are not run a second time. Autogenerate writes nothing on such a database: write the call by hand,
or generate it on an empty database.

Either way
----------

- Autogenerate neither drops durable's tables (as it drops unknown tables with `include_schemas=True`) nor creates them
  (with `target_metadata=[Base.metadata, durable_sa.models.metadata]`), as long as this module is imported: in `env.py`,
  or by a revision.
- To use another schema than `durable`, write `context.configure(..., durable_schema="jobs")` in `env.py`, for generated
  calls and for the branch; in calls, `durable.upgrade("durable_0009", schema="jobs")`. The schema is created if it does
  not exist; for a role that may not create schemas it has to exist. Foreign keys of your models then refer to a copy,
  `tasks = TaskRow.__table__.to_metadata(Base.metadata, schema="jobs")`.
- A downgrade to `base` drops the tables with their data. It keeps the schema and the grants on it.
- The comment of the table `queues` has the revision of the tables. Workers read it when they start, and refuse tables
  that are too old or too new. They accept newer tables whose comment declares them compatible with the workers'
  version, so that a deploy may migrate first. Keep comments in dumps (no `pg_dump --no-comments`).
"""

from .chain import head
from .concurrent import finish
from .directives import autogenerate
from .running import downgrade, migrate, upgrade
from .version import check, current

__all__ = ["autogenerate", "check", "current", "downgrade", "finish", "head", "migrate", "upgrade"]
