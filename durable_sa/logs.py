"""Which task a line in the log belongs to.

```python
import logging

from durable_sa.logs import TaskFields

handler = logging.StreamHandler()
handler.addFilter(TaskFields())
handler.setFormatter(logging.Formatter("%(levelname)s %(message)s task=%(task_name)s/%(task_id)s"))
```
"""

from __future__ import annotations

import logging
from typing import Final

from .current import context_or_none

FIELDS: Final = ("task_id", "task_name", "run_id", "attempt", "queue_name")


class TaskFields(logging.Filter):
    """Gives every record the attributes `task_id`, `task_name`, `run_id`, `attempt` and `queue_name`.

    They are those of the task that logs it, also below its steps and in their threads, or that durable's own line is
    about; None anywhere else. Lets all records pass. To be added to handlers.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the attributes that are missing."""
        if not hasattr(record, "task_id"):
            context = context_or_none()
            for field in FIELDS:
                value = getattr(context, field, None)
                setattr(record, field, str(value) if field.endswith("_id") and value is not None else value)
        return True
