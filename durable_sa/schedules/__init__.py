"""Engine only: schedules as they are stored, and the spawns that they fire. Not for applications."""

from ..concurrency.deferred import defer

# A module is executed on its first use, because a process that only spawns needs none but `cron`.
defer(__name__, __path__)
