"""Engine only: the asyncio tasks and threads of a run, and when all of them wait. Not for applications."""
