"""Control flow of a run: how the engine takes a run away from task code.

BaseException
└── ControlFlow
    ├── Suspended      the run waits (sleep, event, child) and gives its slot back
    ├── TaskCancelled  the task was cancelled
    └── LeaseLost      another worker has taken the run over

These are no errors. They derive from `BaseException`, so that `except Exception` in task code never catches one, they
spend no retry, and nothing is recorded as failed.
"""


class ControlFlow(BaseException):
    """Root of what unwinds a run without its being a failure. Let it pass: `finally` blocks run as usual."""


class Suspended(ControlFlow):
    """Raised when the run has been put to sleep; it goes on from its checkpoints once a wait is over."""


class TaskCancelled(ControlFlow):
    """Raised when the task was cancelled while it ran."""


class LeaseLost(ControlFlow):
    """Raised when the run no longer owns its task. Whatever it would write from here on is refused."""
