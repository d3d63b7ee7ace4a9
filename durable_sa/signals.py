"""The signals by which the engine ends a run, raised in the task's code.

BaseException
└── ControlFlow
    ├── Suspended      the run waits (sleep, event, child) and frees its slot
    ├── TaskCancelled  the task was cancelled
    └── LeaseLost      another worker may have taken the run over

They are not errors: they derive from `BaseException`, so that `except Exception` in task code does not catch them, they
use up no retry, and nothing is recorded as failed.
"""


class ControlFlow(BaseException):
    """Base class of the signals. Let them pass: `finally` blocks run as usual."""


class Suspended(ControlFlow):
    """Raised when the run is suspended. It goes on from its checkpoints when one of its waits is over."""


class TaskCancelled(ControlFlow):
    """Raised when the task is cancelled while it runs."""


class LeaseLost(ControlFlow):
    """Raised when the run no longer owns its task. All further writes of the run are refused."""
