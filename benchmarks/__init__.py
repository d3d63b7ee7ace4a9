"""Benchmarks of durable_sa, its peers and plain SQL, in turns on one server. See README.md."""
