"""Engine only: the worker, from claim to shutdown. Applications start one with `Durable.start_worker`."""
