"""A PostgreSQL 18 that comes as a wheel: nothing to install, nothing to configure.

`server()` is for applications: it lives in the user's data directory, keeps its data and is shared by all processes
of the user. `temporary_server()` is for tests: it lives in a temporary directory and is deleted with it. Both need the
`embedded` extra and Linux or macOS, and both block while they start: some tenths of a second, longer the first time.
Where root starts them they run as the system user `pgserver`: see `durable_sa.embedded.binaries`.
"""

from .postgres import EmbeddedServer, server, temporary_server

__all__ = ["EmbeddedServer", "server", "temporary_server"]
