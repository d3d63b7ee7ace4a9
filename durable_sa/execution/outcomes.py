"""How a run ends: what is written as its outcome, and what its worker is told when that is committed.

`waited` says whether waits of the task may be stored, which then have to go.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from ..errors import DurableError
from ..ids import new_id
from ..serialization.codec import check_size
from ..serialization.failures import encode_error, is_retryable
from ..signals import LeaseLost
from ..statements.claiming import ClaimedRun
from .host import RunHost
from .writes import Kind, WaitSpec, Write

if TYPE_CHECKING:
    from ..tasks import Task

logger = logging.getLogger("durable_sa")

_RELEASED = '{"name":"Released","message":"the worker shut down and gave the run back"}'


def complete(host: RunHost, claimed: ClaimedRun, task: Task[Any, Any], result: Any, *, waited: bool) -> None:
    """The task has returned a result; one that cannot be stored is a failure."""
    try:
        output = task.output_codec.encode(result, f"the output of task {claimed.task_name!r}")
        check_size(output, host.max_payload_bytes, f"the output of task {claimed.task_name!r}")
    except DurableError as refusal:
        fail(host, claimed, task, refusal, waited=waited)
        return
    told = functools.partial(_told, host, claimed, task, waited, "completed")
    values = (output, waited)
    host.writer.submit(Write(Kind.COMPLETION, claimed.task_id, claimed.fence, told, None, values, (), len(output)))


def fail(host: RunHost, claimed: ClaimedRun, task: Task[Any, Any], error: BaseException, *, waited: bool) -> None:
    """The task has raised an error."""
    told = functools.partial(_failure_told, host, claimed, error)
    values = (encode_error(error), is_retryable(error, task.no_retry_on), new_id(), waited)
    host.writer.submit(Write(Kind.FAILURE, claimed.task_id, claimed.fence, told, None, values, (), len(values[0])))


def suspend(host: RunHost, claimed: ClaimedRun, task: Task[Any, Any], waits: list[WaitSpec], *, waited: bool) -> None:
    """The task goes on when one of its waits is over."""
    told = functools.partial(_told, host, claimed, task, waited, "suspended")
    host.writer.submit(Write(Kind.SUSPENSION, claimed.task_id, claimed.fence, told, None, (waited,), waits))


def release(host: RunHost, claimed: ClaimedRun, task: Task[Any, Any], *, waited: bool) -> None:
    """Another worker goes on with the task."""
    told = functools.partial(_told, host, claimed, task, waited, "released")
    host.writer.submit(Write(Kind.RELEASE, claimed.task_id, claimed.fence, told, None, (_RELEASED, new_id())))


def _told(
    host: RunHost,
    claimed: ClaimedRun,
    task: Task[Any, Any],
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


def _failure_told(
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
