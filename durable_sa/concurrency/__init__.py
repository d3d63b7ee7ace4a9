"""Engine only: the asyncio tasks and threads of user code, and the detection that all of them wait.

In reading order: `branches` numbers the asyncio tasks of a run, `task_factory` tells runs of their tasks, `tree` starts
and ends all tasks of a run, `suspension` detects that a run does nothing but wait, `blocking` what one task waits for.
"""
