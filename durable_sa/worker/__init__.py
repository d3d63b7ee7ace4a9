"""Engine only: the worker, from claim to shutdown. Applications start one with `Durable.start_worker`."""

from ..concurrency.deferred import load
from ..statements import cancelling, checkpoints, claiming, outcomes, queues, scheduling, spawning, suspending, waits

# The statements of runs are built here: the first task is not to wait for that, and `gc.freeze` is to hold them.
load(cancelling, checkpoints, claiming, outcomes, queues, scheduling, spawning, suspending, waits)
