"""Measures durable_sa against its peers and against plain SQL, all on one server and in turns. See README.md."""
