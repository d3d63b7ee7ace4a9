"""The revisions, one file each. They are part of the package: `durable_sa.migrations` runs them.

A new one is made in the repository's own environment, on a database that is at the revision before:

    DURABLE_DATABASE_URL=... alembic revision --autogenerate --rev-id durable_0005 -m "what it does"

- Its id becomes `REVISION` in `durable_sa.models`, whose tables it has to arrive at. Autogenerate sees no check
  constraints, index predicates or storage parameters; the tests compare the catalogs.
- `op` and `schema` are parameters. Every operation gets `schema=schema` and every constraint `name=op.f(...)`, since an
  application's naming convention applies otherwise.
- It runs in the application's transaction, while workers of the version before are at work and go on afterwards: new
  columns are nullable or have a constant default, nothing is rewritten, constraints are added `NOT VALID`, and what is
  no longer used is dropped by a later release.
- While that holds, `oldest` in it is the revision whose versions of the package may go on with the tables: workers that
  are started with such a version accept them. Without it they accept their own revision only.
- A released one is never changed.
"""
