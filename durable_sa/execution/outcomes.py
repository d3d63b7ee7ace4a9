"""The outcomes of a run: each is written under the run's fence, and its worker is notified once that is committed.

`waited` says that waits of the task may be stored, which the outcome then deletes or replaces.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from ..errors import DurableError
from ..ids import new_id
from ..serialization.codec import check_size
from ..serialization.failures import encode_error, is_retryable
from ..signals import LeaseLost
from ..statements.claiming import ClaimedRun
from ..tasks import Task
from .host import RunHost
from .waits import WaitSpec
from .writes import CompletionValues, FailureValues, Kind, ReleaseValues, SuspensionValues, Write

logger = logging.getLogger("durable_sa")

AnyTask = Task[Any, Any]

_RELEASED = '{"name":"Released","message":"the worker shut down and gave the run back"}'


def complete(host: RunHost, claimed: ClaimedRun, task: AnyTask, result: Any, *, waited: bool) -> None:
    """Write the result of the task, or a failure if the result cannot be stored."""
    what = f"the output of task {claimed.task_name!r}"
    try:
        output = task.output_codec.encode(result, what)
        check_size(output, host.max_payload_bytes, what)
    except DurableError as refusal:
        fail(host, claimed, task, refusal, waited=waited)
        return
    on_written = functools.partial(_report_outcome, host, claimed, task, waited, "completed")
    values = CompletionValues(output, waited)
    host.writer.submit(Write(Kind.COMPLETION, claimed.task_id, claimed.fence, on_written, values, size=len(output)))


def fail(host: RunHost, claimed: ClaimedRun, task: AnyTask, error: BaseException, *, waited: bool) -> None:
    """Write the error that the task has raised."""
    on_written = functools.partial(_report_failure, host, claimed, error)
    values = FailureValues(encode_error(error), is_retryable(error, task.no_retry_on), new_id(), waited)
    size = len(values.error)
    host.writer.submit(Write(Kind.FAILURE, claimed.task_id, claimed.fence, on_written, values, size=size))


def suspend(host: RunHost, claimed: ClaimedRun, task: AnyTask, waits: list[WaitSpec], *, waited: bool) -> None:
    """Write the waits of the task, which goes on when one of them is over."""
    on_written = functools.partial(_report_outcome, host, claimed, task, waited, "suspended")
    values = SuspensionValues(waited)
    host.writer.submit(Write(Kind.SUSPENSION, claimed.task_id, claimed.fence, on_written, values, waits=waits))


def release(host: RunHost, claimed: ClaimedRun, task: AnyTask, *, waited: bool) -> None:
    """Give the task back, for another worker to go on with."""
    on_written = functools.partial(_report_outcome, host, claimed, task, waited, "released")
    values = ReleaseValues(_RELEASED, new_id())
    host.writer.submit(Write(Kind.RELEASE, claimed.task_id, claimed.fence, on_written, values))


def _report_outcome(
    host: RunHost,
    claimed: ClaimedRun,
    task: AnyTask,
    waited: bool,
    outcome: str,
    _: Any,
    refusal: BaseException | None,
) -> None:
    if refusal is None:
        host.outcome_stored(claimed, outcome, None)
    elif isinstance(refusal, LeaseLost):
        host.outcome_stored(claimed, "lost", None)
    else:
        fail(host, claimed, task, refusal, waited=waited)


def _report_failure(
    host: RunHost, claimed: ClaimedRun, error: BaseException, stored: Any, refusal: BaseException | None
) -> None:
    if refusal is None:
        host.outcome_stored(claimed, "failed" if stored.state == "failed" else "retried", error)
    elif isinstance(refusal, LeaseLost):
        host.outcome_stored(claimed, "lost", None)
    else:
        logger.error(
            "the failure of task %s cannot be stored", claimed.task_id, exc_info=refusal, extra=claimed.log_fields
        )
