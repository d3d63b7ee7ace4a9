"""The tables' migrations, for Alembic and without it.

In the history of your application
----------------------------------

The usual way. Durable's tables are upgraded by revisions of your own, which call this package, so that there is one
history, one head and one transaction. Have Alembic write the calls, by two lines in `env.py`:

    from durable_sa import migrations as durable

    context.configure(
        ...,
        process_revision_directives=durable.autogenerate,
    )

Now, and after every upgrade of durable_sa that brings new revisions:

    alembic revision --autogenerate -m "durable tables"
    alembic upgrade head

The revision has the calls beside what changed in your models, in the order that foreign keys to durable's tables need;
they can as well be written by hand:

    from durable_sa import migrations as durable

    def upgrade() -> None:
        durable.upgrade("durable_0001")

    def downgrade() -> None:
        durable.downgrade("base", since="durable_0001")

and later `durable.upgrade("durable_0003", since="durable_0001")`, which goes back by
`durable.downgrade("durable_0001", since="durable_0003")`. `alembic check` fails, naming the call, while one is due:
let your CI run it. `--sql` works.

A hook that you have already calls this one first, `durable.autogenerate(context, revision, directives)`; a `Rewriter`
is chained, `process_revision_directives=writer.chain(durable.autogenerate)`.

As a branch beside your history
-------------------------------

Durable's revisions are run by Alembic themselves, as the branch `durable`. In `alembic.ini`, from Alembic 1.16 on:

    path_separator = newline
    version_locations =
        %(here)s/alembic/versions
        durable_sa:migrations/versions

Alembic's own setting `path_separator = os` splits the second location at its colon and then ignores it. Before 1.16
write both locations on one line, and `version_path_separator = space`. In `pyproject.toml` they are a list, which needs
no separator. Upgrades are by

    alembic upgrade heads

with an s. There are two heads, so new revisions of yours name the one they follow, and the first one its directory:

    alembic revision --autogenerate -m "orders" --head base --version-path alembic/versions
    alembic revision --autogenerate -m "more orders" --head <your latest revision>

While a revision of durable's is due, `alembic check` says `Target database is not up to date`, as for any that is not
run yet, and `alembic heads` beside `alembic current` shows which.

A label makes that `--head app@head`: `branch_labels = ("app",)` in your first revision. A revision with foreign keys to
durable's tables says on which revision it builds, `--depends-on durable_0001`.

Without Alembic's files
-----------------------

`await durable.migrate()` of the client, or `durable migrate` on the command line, takes the tables to the newest
revision in a transaction of its own. An application may turn to one of the other ways later: revisions that the
database has are not run again. Autogenerate has nothing to write on such a database; write the call by hand, or
generate it on an empty one.

Either way
----------

- Autogenerate neither drops durable's tables (as it would others with `include_schemas=True`) nor creates them (with
  `target_metadata=[Base.metadata, durable_sa.models.metadata]`). It does so wherever this module is imported: in
  `env.py`, or by a revision.
- Another schema than `durable` is named in `env.py`, for generated calls and for the branch, by
  `context.configure(..., durable_schema="jobs")`; calls have it as `durable.upgrade("durable_0001", schema="jobs")`. It
  is created where it does not exist; a role that may not create schemas needs one that does. Foreign keys of your
  models then go to a copy, `tasks = TaskRow.__table__.to_metadata(Base.metadata, schema="jobs")`.
- A downgrade to `base` drops the tables, and what is in them, and leaves the schema with its grants.
- A database says at which revision its tables are in the comment of the table `queues`. Workers read it when they
  start and refuse tables that are too old or too new. Newer ones that say they are for the workers' version as well
  they accept, so that a deploy may migrate first. Keep comments in dumps (no `pg_dump --no-comments`).
"""

from .chain import head
from .directives import autogenerate
from .running import downgrade, migrate, upgrade
from .version import check, current

__all__ = ["autogenerate", "check", "current", "downgrade", "head", "migrate", "upgrade"]
