"""The drivers: one module per system, which uses its public API and runs in an environment of its own."""
