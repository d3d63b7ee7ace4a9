"""What the tables must hold after each operation of the engine, in plain Python: the specification that tests compare.

Time is given with each operation and stands still during it. Nothing here knows of statements, locks or snapshots.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from durable_sa.execution.waits import WaitSpec
from durable_sa.ids import child_id, step_key
from durable_sa.policies import MAX_LOST_WORKERS, SUSPECT_AFTER, RetryStrategy
from durable_sa.worker.takeover import LOST_WORKER_RETENTION

from .engine_steps import LANES

LOST = "lost"
NEW = "new"
STORED = "stored"


def _span(seconds: float | None) -> timedelta:
    return timedelta(seconds=seconds or 0.0)


@dataclass
class TaskModel:
    """A row of ``tasks``."""

    task_id: uuid.UUID
    queue_name: str
    task_name: str
    priority: int
    max_attempts: int
    strategy: RetryStrategy
    max_pending_time: float | None
    max_running_time: float | None
    available_at: datetime | None
    idempotency_key: str | None = None
    params: Any = None
    parent_task_id: uuid.UUID | None = None
    state: str = "pending"
    outcome: str | None = None
    attempt: int = 0
    failures: int = 0
    lease_losses: int = 0
    fence: int = 0
    claimed_by: uuid.UUID | None = None
    cancel_at: datetime | None = None
    first_started_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cancelled_by: uuid.UUID | None = None
    parent_fence: int | None = None
    output: str | None = None
    error: str | None = None


@dataclass
class WorkerModel:
    """A row of ``workers``."""

    claim_timeout: float
    expires_at: datetime
    lost_at: datetime | None = None


@dataclass
class WaitModel:
    """A row of ``waits``."""

    kind: str
    name: str
    queue_name: str
    event_name: str | None
    child_task_id: uuid.UUID | None
    due_at: datetime | None


@dataclass
class EventModel:
    """A row of ``events``."""

    payload: str
    emitted_at: datetime
    delivered: bool = False


Checkpoint = tuple[str, str, str, Any, uuid.UUID | None]
"""Kind, name, status, value, child."""


@dataclass
class EngineModel:
    """All tables."""

    tasks: dict[uuid.UUID, TaskModel] = field(default_factory=dict)
    runs: dict[tuple[uuid.UUID, int], tuple[str, uuid.UUID | None, str | None]] = field(default_factory=dict)
    """State, worker and name of the error."""
    checkpoints: dict[tuple[uuid.UUID, uuid.UUID], Checkpoint] = field(default_factory=dict)
    waits: dict[tuple[uuid.UUID, uuid.UUID], WaitModel] = field(default_factory=dict)
    events: dict[tuple[str, str], EventModel] = field(default_factory=dict)
    workers: dict[uuid.UUID, WorkerModel] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)

    # Reading

    def same_key(self, queue_name: str, key: str | None) -> TaskModel | None:
        if key is None:
            return None
        return next((t for t in self.tasks.values() if (t.queue_name, t.idempotency_key) == (queue_name, key)), None)

    def unfinished(self) -> list[TaskModel]:
        return [self.tasks[task_id] for task_id in sorted(self.tasks) if self.tasks[task_id].outcome is None]

    def children(self, task_id: uuid.UUID) -> list[TaskModel]:
        return [task for task in self.tasks.values() if task.parent_task_id == task_id]

    def waits_of(self, task_id: uuid.UUID) -> dict[uuid.UUID, WaitModel]:
        return {key: wait for (owner, key), wait in self.waits.items() if owner == task_id}

    def ready(self, queue_name: str, now: datetime) -> list[TaskModel]:
        """What can be claimed, in order within each priority."""
        if queue_name in self.paused:
            return []
        found = [
            task
            for task in self.unfinished()
            if task.queue_name == queue_name
            and task.claimed_by is None
            and task.available_at is not None
            and task.available_at <= now
            and (task.cancel_at is None or task.cancel_at > now)
        ]
        return sorted(found, key=lambda task: (task.available_at, task.task_id))

    # Clients

    def spawn(self, task: TaskModel) -> None:
        if task.max_pending_time is not None and task.available_at is not None:
            task.cancel_at = task.available_at + _span(task.max_pending_time)
        self.tasks[task.task_id] = task

    def emit(self, queue_name: str, name: str, payload: str, now: datetime) -> bool:
        if (queue_name, name) in self.events:
            return False
        self.events[queue_name, name] = EventModel(payload, now)
        return True

    def cancel(self, task_id: uuid.UUID, now: datetime) -> None:
        if self.tasks[task_id].outcome is None:
            ended = [task_id, *self._cancel_below(task_id, now, first=True)]
            self.resolve(self._waiting_for(ended), now)

    def _cancel_below(self, task_id: uuid.UUID, now: datetime, *, first: bool) -> list[uuid.UUID]:
        if first:
            self._cancel_one(self.tasks[task_id], now, None, None)
        found = [task for task in self._descendants(task_id) if task.outcome is None]
        for task in found:
            self._cancel_one(task, now, task_id, None)
        return [task.task_id for task in found]

    def _descendants(self, task_id: uuid.UUID) -> list[TaskModel]:
        fence = self.tasks[task_id].fence
        below = [child for child in self.children(task_id) if child.parent_fence != fence]
        return below + [task for child in below for task in self._descendants(child.task_id)]

    def _cancel_one(self, task: TaskModel, now: datetime, by: uuid.UUID | None, reason: str | None) -> None:
        if task.state in ("running", "sleeping"):
            self.runs[task.task_id, task.attempt] = ("cancelled", task.claimed_by, reason)
        task.error = reason or task.error
        task.state = task.outcome = "cancelled"
        task.finished_at = now
        task.cancelled_by = by
        task.fence += 1
        self._forget_waits(task.task_id)

    def _forget_waits(self, task_id: uuid.UUID) -> None:
        self.waits = {key: wait for key, wait in self.waits.items() if key[0] != task_id}

    def retry(self, task_id: uuid.UUID, max_attempts: int | None, now: datetime) -> None:
        task = self.tasks[task_id]
        origins = {task_id, task.cancelled_by or task_id}
        self._put_back(task, now, self._fence_of(task.parent_task_id))
        task.max_attempts = max_attempts or task.max_attempts
        fallen = [t for t in self._all_below(task_id) if t.outcome == "cancelled" and t.cancelled_by in origins]
        fences = [self._fence_of(t.parent_task_id) for t in fallen]
        for restored, fence in zip(fallen, fences, strict=True):
            self._put_back(restored, now, fence)
        family = {task_id, *(t.task_id for t in fallen)}
        for (owner, key), (kind, _, status, _, child) in list(self.checkpoints.items()):
            if owner in family and kind == "join" and status in ("failed", "cancelled") and child in self.tasks:
                joined = self.tasks[child]
                if joined.parent_task_id == owner and joined.outcome in (None, "completed"):
                    del self.checkpoints[owner, key]

    def _fence_of(self, task_id: uuid.UUID | None) -> int | None:
        return self.tasks[task_id].fence if task_id in self.tasks else None

    def _all_below(self, task_id: uuid.UUID) -> list[TaskModel]:
        below = self.children(task_id)
        return below + [task for child in below for task in self._all_below(child.task_id)]

    def _put_back(self, task: TaskModel, now: datetime, parent_fence: int | None) -> None:
        task.state, task.outcome, task.available_at = "pending", None, now
        task.finished_at = task.first_started_at = task.started_at = None
        task.error = task.output = task.cancelled_by = task.claimed_by = None
        task.failures = task.lease_losses = 0
        task.parent_fence = parent_fence
        task.cancel_at = None if task.max_pending_time is None else now + _span(task.max_pending_time)
        task.fence += 1

    def clean_up_tasks(self, queue_name: str, age: float, now: datetime) -> int:
        deleted = 0
        while gone := [task for task in self.tasks.values() if self._forgettable(task, queue_name, age, now)]:
            for task in gone:
                del self.tasks[task.task_id]
                self.checkpoints = {key: value for key, value in self.checkpoints.items() if key[0] != task.task_id}
                self.runs = {key: value for key, value in self.runs.items() if key[0] != task.task_id}
            deleted += len(gone)
        return deleted

    def _forgettable(self, task: TaskModel, queue_name: str, age: float, now: datetime) -> bool:
        if task.queue_name != queue_name or task.finished_at is None or task.finished_at >= now - _span(age):
            return False
        if self.children(task.task_id) or any(wait.child_task_id == task.task_id for wait in self.waits.values()):
            return False
        ancestor = task.parent_task_id
        while ancestor in self.tasks:
            if self.tasks[ancestor].outcome is None:
                return False
            ancestor = self.tasks[ancestor].parent_task_id
        return True

    def clean_up_events(self, queue_name: str, age: float, now: datetime) -> int:
        awaited = {(wait.queue_name, wait.event_name) for wait in self.waits.values()}
        gone = [
            key
            for key, emitted in self.events.items()
            if key[0] == queue_name and emitted.emitted_at < now - _span(age) and key not in awaited
        ]
        for key in gone:
            del self.events[key]
        return len(gone)

    # Workers

    def register(self, worker_id: uuid.UUID, claim_timeout: float, now: datetime) -> None:
        self.workers[worker_id] = WorkerModel(claim_timeout, now + _span(claim_timeout))

    def holds_lease(self, worker_id: uuid.UUID) -> bool:
        return worker_id in self.workers and self.workers[worker_id].lost_at is None

    def heartbeat(self, worker_id: uuid.UUID, now: datetime) -> bool:
        if not self.holds_lease(worker_id):
            return False
        worker = self.workers[worker_id]
        worker.expires_at = now + _span(worker.claim_timeout)
        return True

    def claim(self, worker_id: uuid.UUID, wanted: int, now: datetime) -> list[tuple[uuid.UUID, int]]:
        if not self.holds_lease(worker_id):
            return []
        ready = [task for queue, priority in LANES for task in self.ready(queue, now) if task.priority == priority]
        suspects = [task for task in ready if task.lease_losses >= SUSPECT_AFTER]
        found = [task for task in ready if task.lease_losses < SUSPECT_AFTER][:wanted] or suspects[:1]
        for task in found:
            if task.state == "pending":
                task.attempt += 1
                task.started_at = now
            if task.first_started_at is None:
                task.cancel_at = None if task.max_running_time is None else now + _span(task.max_running_time)
                task.first_started_at = now
            task.state, task.claimed_by = "running", worker_id
            task.fence += 1
        return sorted((task.task_id, task.fence) for task in found)

    def held(self, task_id: uuid.UUID, fence: int) -> TaskModel | None:
        """The task, if it still is under that fence."""
        task = self.tasks.get(task_id)
        return task if task is not None and task.fence == fence else None

    def record(self, task_id: uuid.UUID, fence: int, kind: str, name: str, value: Any, child: Any = None) -> str:
        if self.held(task_id, fence) is None:
            return LOST
        key = (task_id, step_key(kind, name, "", (), 0))
        if key in self.checkpoints:
            return STORED
        self.checkpoints[key] = (kind, name, "completed", value, child)
        return NEW

    def spawn_child(self, task_id: uuid.UUID, fence: int, name: str, child: TaskModel) -> str:
        told = self.record(task_id, fence, "spawn", name, "digest", child.task_id)
        if told == NEW:
            self.spawn(child)
        return told

    @staticmethod
    def child_id(task_id: uuid.UUID, name: str) -> uuid.UUID:
        return child_id(task_id, step_key("spawn", name, "", (), 0))

    def emit_in_run(self, task_id: uuid.UUID, fence: int, name: str, payload: str, now: datetime) -> str:
        task = self.held(task_id, fence)
        if task is None:
            return LOST
        return self.record(task_id, fence, "emit", name, self.emit(task.queue_name, name, payload, now))

    def register_waits(self, task_id: uuid.UUID, fence: int, waits: Iterable[WaitSpec], now: datetime) -> str:
        task = self.held(task_id, fence)
        if task is None:
            return LOST
        for wait in waits:
            due_at = wait.due_at if wait.due_at is not None or wait.delay is None else now + _span(wait.delay)
            key = (task_id, wait.key)
            if wait.kind == "sleep":
                assert due_at is not None
                self.checkpoints.setdefault(key, ("sleep", wait.name, "completed", due_at, None))
            else:
                stored = WaitModel(wait.kind, wait.name, task.queue_name, wait.event_name, wait.child_task_id, due_at)
                self.waits.setdefault(key, stored)
        return STORED

    def suspend(self, task_id: uuid.UUID, fence: int, waits: list[WaitSpec], now: datetime) -> str:
        task = self.held(task_id, fence)
        if task is None:
            return LOST
        wanted = {(task_id, wait.key) for wait in waits}
        self.waits = {key: wait for key, wait in self.waits.items() if key[0] != task_id or key in wanted}
        self.register_waits(task_id, fence, waits, now)
        times = [wait.due_at if wait.delay is None else now + _span(wait.delay) for wait in waits]
        task.available_at = min((time for time in times if time is not None), default=None)
        task.state, task.claimed_by, task.lease_losses = "sleeping", None, 0
        task.fence += 1
        return STORED

    def complete(self, task_id: uuid.UUID, fence: int, output: str, now: datetime) -> str:
        task = self.held(task_id, fence)
        if task is None:
            return LOST
        self.runs[task_id, task.attempt] = ("completed", task.claimed_by, None)
        task.state = task.outcome = "completed"
        task.output, task.error, task.finished_at = output, None, now
        task.fence += 1
        self._forget_waits(task_id)
        return NEW

    def fail(self, task_id: uuid.UUID, fence: int, retryable: bool, now: datetime) -> str:
        task = self.held(task_id, fence)
        if task is None:
            return LOST
        self.runs[task_id, task.attempt] = ("failed", task.claimed_by, "ValueError")
        task.failures += 1
        task.error, task.lease_losses, task.claimed_by = "ValueError", 0, None
        task.fence += 1
        if retryable and task.strategy.kind != "none" and task.failures < task.max_attempts:
            task.state, task.available_at = "pending", now + _span(task.strategy.delay(task.failures))
        else:
            task.state = task.outcome = "failed"
            task.finished_at = now
            self._forget_waits(task_id)
        return STORED

    def release(self, task_id: uuid.UUID, fence: int, now: datetime) -> str:
        task = self.held(task_id, fence)
        if task is None:
            return LOST
        self.runs[task_id, task.attempt] = ("failed", task.claimed_by, "Released")
        task.lease_losses = 0
        self._again(task, now)
        return STORED

    def _again(self, task: TaskModel, now: datetime) -> None:
        task.state, task.claimed_by, task.available_at = "pending", None, now
        task.fence += 1

    # What goes on by itself

    def take_over(self, now: datetime) -> None:
        for worker in self.workers.values():
            if worker.lost_at is None and worker.expires_at < now:
                worker.lost_at = now
        for task in self.unfinished():
            worker = self.workers.get(task.claimed_by) if task.claimed_by is not None else None
            if task.claimed_by is not None and (worker is None or worker.lost_at is not None):
                self.runs[task.task_id, task.attempt] = ("failed", task.claimed_by, "LeaseLost")
                task.lease_losses += 1
                self._again(task, now)
                if task.lease_losses >= SUSPECT_AFTER + MAX_LOST_WORKERS:
                    task.state = task.outcome = "failed"
                    task.error, task.finished_at = "LeaseLost", now
                    self._forget_waits(task.task_id)
        forgotten = now - _span(LOST_WORKER_RETENTION)
        self.workers = {
            key: worker for key, worker in self.workers.items() if worker.lost_at is None or worker.lost_at >= forgotten
        }

    def cancel_overdue(self, now: datetime) -> None:
        """What follows for others, a worker does afterwards."""
        for task in self.unfinished():
            if task.cancel_at is not None and task.cancel_at <= now:
                self._cancel_one(task, now, None, "CancellationPolicy")

    def _waiting_for(self, task_ids: Iterable[uuid.UUID]) -> list[uuid.UUID]:
        ended = set(task_ids)
        return [owner for (owner, _), wait in self.waits.items() if wait.child_task_id in ended]

    def resolve(self, task_ids: Iterable[uuid.UUID], now: datetime) -> None:
        for task_id in sorted(set(task_ids)):
            task = self.tasks.get(task_id)
            if task is None or task.outcome is not None:
                continue
            over = {
                key: settled for key, wait in self.waits_of(task_id).items() if (settled := self._settled(wait, now))
            }
            for key, (status, value) in over.items():
                wait = self.waits.pop((task_id, key))
                self.checkpoints.setdefault((task_id, key), (wait.kind, wait.name, status, value, wait.child_task_id))
            if over and task.state == "sleeping":
                then = now + _span(min(len(self.waits_of(task_id)) * 0.001, 1.0))
                task.available_at = then if task.available_at is None else min(task.available_at, then)
                task.fence += 1

    def _settled(self, wait: WaitModel, now: datetime) -> tuple[str, Any] | None:
        """How a wait has ended, if it has."""

        def in_time(moment: datetime) -> bool:
            return wait.due_at is None or wait.due_at > now or moment <= wait.due_at

        emitted = self.events.get((wait.queue_name, wait.event_name or ""))
        if emitted is not None and in_time(emitted.emitted_at):
            return "completed", json.loads(emitted.payload)
        if wait.kind == "join":
            child = self.tasks.get(wait.child_task_id) if wait.child_task_id is not None else None
            if child is None:
                return "cancelled", None
            if child.finished_at is not None and in_time(child.finished_at):
                assert child.outcome is not None
                ended_well = child.outcome == "completed"
                return child.outcome, json.loads(child.output or "null") if ended_well else child.error
        if wait.due_at is not None and wait.due_at <= now:
            return "timeout", None
        return None

    def deliver(self, now: datetime) -> None:
        pending = [key for key, emitted in self.events.items() if not emitted.delivered]
        waiting = [owner for (owner, _), wait in self.waits.items() if (wait.queue_name, wait.event_name) in pending]
        self.resolve(waiting, now)
        still = {(wait.queue_name, wait.event_name) for wait in self.waits.values()}
        for key in pending:
            self.events[key].delivered = key not in still

    def tend(
        self, resolve: set[uuid.UUID], ended: set[uuid.UUID], cascade: set[uuid.UUID], deliver: bool, now: datetime
    ) -> None:
        """Do what a worker was asked to, and what follows from that."""
        self.resolve(resolve | set(self._waiting_for(ended)), now)
        if deliver:
            self.deliver(now)
        cancelled: list[uuid.UUID] = []
        for origin in sorted(cascade):
            if origin in self.tasks and self.tasks[origin].outcome in ("failed", "cancelled"):
                cancelled += self._cancel_below(origin, now, first=False)
        self.resolve(self._waiting_for(cancelled), now)
