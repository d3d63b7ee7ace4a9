"""The revisions, one file each. They are part of the package: `durable_sa.migrations` runs them."""
