"""The outcomes of a run: each is written under the run's fence, and its worker is notified once that is committed.

`waited` says that waits of the task may be stored, which the outcome then deletes or replaces.
"""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..database_errors import reason, without_values
from ..errors import DurableError
from ..ids import new_id
from ..serialization.codec import check_size
from ..serialization.failures import by_class_alone, encode_error, in_ascii, is_retryable, put_off, retry_delay
from ..signals import LeaseLost
from ..tasks import Task
from .host import RunHost
from .waits import WaitSpec
from .writes import CompletionValues, FailureValues, Kind, ReleaseValues, SuspensionValues, Write

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun

logger = logging.getLogger("durable_sa")

AnyTask = Task[Any, Any]

REFUSED_RETRY_DELAY = 30.0
"""The longest pause, in seconds, between two writes of a failure that the database refuses in every form."""

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
    host.writer.submit(
        Write(
            Kind.COMPLETION,
            claimed.task_id,
            claimed.fence,
            on_written,
            values,
            size=len(output),
            limited=claimed.limit_key is not None,
        )
    )


def fail(
    host: RunHost,
    claimed: ClaimedRun,
    task: AnyTask,
    error: BaseException,
    *,
    waited: bool,
    timeouts: Sequence[uuid.UUID] = (),
) -> None:
    """Write the error that the task has raised, and delete the records of the waits whose timeout it is."""
    try:
        retryable = is_retryable(error, task.no_retry_on, task.retry_on)
        delay = retry_delay(error) if retryable else None
    except Exception:  # noqa: BLE001 - methods of the exception's class are user code
        retryable, delay = True, None
    if puts_off := (seconds := put_off(error)) is not None:
        delay = seconds
    encoded = encode_error(error, claimed.run_id)
    values = FailureValues(encoded, retryable, new_id(), waited, delay, puts_off, timeouts)
    _submit_failure(host, claimed, error, values)


def _submit_failure(
    host: RunHost, claimed: ClaimedRun, error: BaseException, values: FailureValues, refusals: int = 0
) -> None:
    on_written = functools.partial(_report_failure, host, claimed, error, values, refusals)
    write = Write(Kind.FAILURE, claimed.task_id, claimed.fence, on_written, values, size=len(values.error))
    write.limited = claimed.limit_key is not None
    host.writer.submit(write, delay=_pause(refusals))


def _pause(refusals: int) -> float:
    """Return the seconds before a failure is written that the database has refused, at first in its reduced forms."""
    return 0.0 if refusals < 3 else min(REFUSED_RETRY_DELAY, 2.0 ** (refusals - 3))


def suspend(host: RunHost, claimed: ClaimedRun, task: AnyTask, waits: list[WaitSpec], *, waited: bool) -> None:
    """Write the waits of the task, which goes on when one of them is over."""
    on_written = functools.partial(_report_outcome, host, claimed, task, waited, "suspended")
    values = SuspensionValues(waited)
    write = Write(Kind.SUSPENSION, claimed.task_id, claimed.fence, on_written, values, waits=waits)
    write.limited = claimed.limit_key is not None
    host.writer.submit(write)


def release(host: RunHost, claimed: ClaimedRun, task: AnyTask, *, waited: bool) -> None:
    """Give the task back, for another worker to go on with."""
    on_written = functools.partial(_report_outcome, host, claimed, task, waited, "released")
    values = ReleaseValues(_RELEASED, new_id())
    write = Write(Kind.RELEASE, claimed.task_id, claimed.fence, on_written, values)
    write.limited = claimed.limit_key is not None
    host.writer.submit(write)


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
    host: RunHost,
    claimed: ClaimedRun,
    error: BaseException,
    values: FailureValues,
    refusals: int,
    stored: Any,
    refusal: BaseException | None,
) -> None:
    """Report a stored failure. One that the database refuses is reduced until it can be stored, so the run ends."""
    if refusal is None:
        host.outcome_stored(claimed, "failed" if stored.state == "failed" else "retried", error)
        return
    if isinstance(refusal, LeaseLost):
        host.outcome_stored(claimed, "lost", None)
        return
    if refusals == 0:
        values = values._replace(error=in_ascii(values.error))
    else:
        # Without the record of a cause, the reason may be another part of the row, or the database: it is written
        # until the database accepts it.
        values = values._replace(error=by_class_alone(error, reason(refusal)))
        logger.error(
            "the failure of task %s cannot be stored as it is; its class is, as soon as the database accepts it",
            claimed.task_id,
            exc_info=without_values(refusal),
            extra=claimed.log_fields,
        )
    _submit_failure(host, claimed, error, values, refusals + 1)
