"""The drivers: one module a system, which speaks its public API and runs in an environment of its own."""
