"""An embedded PostgreSQL 18, which is installed as a wheel and needs no configuration.

`server()` is for applications: its data is kept in the user's data directory, and all processes of the user share it.
`temporary_server()` is for tests: its data is in a temporary directory, which is deleted at the end. Both need the
`embedded` extra and Linux or macOS, and block while the server starts: some tenths of a second, longer the first time.
A server started by root runs as the system user `pgserver`.
"""

from .postgres import EmbeddedServer, server, temporary_server

__all__ = ["EmbeddedServer", "server", "temporary_server"]
