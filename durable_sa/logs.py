"""A logging filter that adds the running task to each record.

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
    """Adds the attributes `task_id`, `task_name`, `run_id`, `attempt` and `queue_name` to every record.

    They are those of the task that logs the record, in its steps and their threads as well, or of the task that a
    record of durable's own is about; None for all other records. Add the filter to handlers. No record is dropped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the attributes that are missing."""
        if not hasattr(record, "task_id"):
            context = context_or_none()
            for field in FIELDS:
                value = getattr(context, field, None)
                setattr(record, field, str(value) if field.endswith("_id") and value is not None else value)
        return True
