"""Engine only: the SQL statements of the engine and the command line, one module per subject.

Statements are module constants with bind parameters, so that each is rendered once per dialect and schema and prepared
once per connection. Lists are bound as arrays and unnested, so that one statement serves one item or a thousand. JSON
is bound and returned as text, because the application's engine may have a JSON serializer of its own.

A module is executed on its first use, because a process that only spawns needs few of the statements.
"""

from ..concurrency.deferred import defer

defer(__name__, __path__)
