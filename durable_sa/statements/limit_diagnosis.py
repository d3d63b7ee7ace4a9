"""Problems of queues with limits, for `durable doctor`, and the repair of a key's count.

A key is counted under its lock, in a second statement, whose snapshot is later than the lock. Claims pass over it
meanwhile, and drains wait: what they have not committed is still an arrival.
"""

from __future__ import annotations

from sqlalchemy import Float, Integer, Text

from .sql import Sql

MISCOUNTED = Sql(
    """
WITH held AS MATERIALIZED (
  SELECT x.queue_name, x.limit_key, count(*) AS slots FROM {tasks} x
  WHERE x.finished_at IS NULL AND x.limit_key IS NOT NULL AND x.slot IS NOT NULL GROUP BY 1, 2
), pending AS MATERIALIZED (
  SELECT n.queue_name, n.limit_key, sum(n.slots) AS slots FROM {limit_arrivals} n GROUP BY 1, 2
)
SELECT c.queue_name, c.limit_key, c.counted, c.held FROM (
  SELECT queue_name, limit_key, coalesce(k.running, 0) + coalesce(p.slots, 0) AS counted, coalesce(h.slots, 0) AS held
  FROM {limit_keys} k FULL JOIN held h USING (queue_name, limit_key) FULL JOIN pending p USING (queue_name, limit_key)
) c JOIN {queues} q ON q.queue_name = c.queue_name
WHERE c.counted <> c.held ORDER BY c.queue_name, c.limit_key LIMIT :wanted
""",
    wanted=Integer(),
)
"""Keys whose count of slots differs from that of the tasks that hold one."""

PARKED = Sql(
    """
SELECT k.queue_name, k.limit_key, w.oldest_seconds FROM {limit_keys} k
LEFT JOIN {limits} own ON own.queue_name = k.queue_name AND own.scope = 'key' AND own.limited
  AND own.limit_key = k.limit_key
LEFT JOIN {limits} pk ON pk.queue_name = k.queue_name AND pk.scope = 'per_key' AND pk.limit_key = ''
CROSS JOIN LATERAL (
  SELECT extract(epoch FROM {clock} - min(x.available_at)) AS oldest_seconds FROM {tasks} x
  WHERE x.queue_name = k.queue_name AND x.limit_key = k.limit_key AND x.finished_at IS NULL AND x.claimed_by IS NULL
    AND x.available_at < {now} - make_interval(secs => :grace)
) w
WHERE k.ready_at IS NULL AND w.oldest_seconds IS NOT NULL
  AND NOT EXISTS (
    SELECT FROM {limit_arrivals} n WHERE n.queue_name = k.queue_name AND n.limit_key = k.limit_key)
  AND (CASE WHEN k.limit_key = '' THEN NULL WHEN own.limited THEN own.concurrency ELSE pk.concurrency END
    > k.running) IS NOT FALSE
ORDER BY w.oldest_seconds DESC LIMIT :wanted
""",
    grace=Float(53),
    wanted=Integer(),
)
"""Keys that have room and due tasks, and that no claim looks at."""

SELF_JOINS = Sql(
    """
SELECT p.task_id, p.task_name, p.queue_name, p.limit_key, c.task_id AS child_id FROM {waits} w
JOIN {tasks} p ON p.task_id = w.task_id AND p.finished_at IS NULL AND p.slot = 'task'
JOIN {tasks} c ON c.task_id = w.child_task_id AND c.finished_at IS NULL AND c.slot IS NULL
  AND c.queue_name = p.queue_name
LEFT JOIN {limits} ql ON ql.queue_name = p.queue_name AND ql.scope = 'queue' AND ql.limit_key = ''
LEFT JOIN {limit_totals} t ON t.queue_name = p.queue_name
LEFT JOIN {limits} own ON own.queue_name = p.queue_name AND own.scope = 'key' AND own.limited
  AND own.limit_key = p.limit_key
LEFT JOIN {limits} pk ON pk.queue_name = p.queue_name AND pk.scope = 'per_key' AND pk.limit_key = ''
LEFT JOIN {limit_keys} k ON k.queue_name = p.queue_name AND k.limit_key = p.limit_key AND c.limit_key = p.limit_key
WHERE w.child_task_id IS NOT NULL AND c.available_at < {now} - make_interval(secs => :grace)
  AND (t.running >= ql.concurrency
    OR k.running >= CASE WHEN own.limited THEN own.concurrency ELSE pk.concurrency END)
ORDER BY p.task_id LIMIT :wanted
""",
    grace=Float(53),
    wanted=Integer(),
)
"""Tasks that keep a slot while they wait for a child that waits for one of the same full key, or queue."""

UNLIMITED_WORKERS = Sql(
    """
SELECT w.name AS worker_name, q.queue_name FROM {workers} w JOIN {queues} q ON q.queue_name = ANY (w.queue_names)
WHERE q.limited_at IS NOT NULL AND w.knows_limits IS NOT TRUE AND w.lost_at IS NULL AND w.expires_at > {clock}
ORDER BY w.name, q.queue_name LIMIT :wanted
""",
    wanted=Integer(),
)
"""Workers of a version that knows no limits, on queues that have some."""

LOCK_KEY = Sql(
    "SELECT k.running FROM {limit_keys} k WHERE k.queue_name = :queue_name AND k.limit_key = :limit_key FOR UPDATE",
    queue_name=Text(),
    limit_key=Text(),
)
"""Lock a key before it is counted anew."""

RECOUNT_KEY = Sql(
    """
INSERT INTO {limit_keys} AS k (queue_name, limit_key, running, ready_at, version)
SELECT :queue_name, :limit_key, (
    SELECT count(*) FROM {tasks} x WHERE x.queue_name = :queue_name AND x.limit_key = :limit_key
      AND x.finished_at IS NULL AND x.slot IS NOT NULL
  ) - (
    SELECT coalesce(sum(n.slots), 0) FROM {limit_arrivals} n
    WHERE n.queue_name = :queue_name AND n.limit_key = :limit_key
  ), {now}, 1
ON CONFLICT (queue_name, limit_key) DO UPDATE SET running = excluded.running, ready_at = {now}, version = k.version + 1
""",
    queue_name=Text(),
    limit_key=Text(),
)
"""Count the slots of a key anew, under its lock, and have claims look at it."""

RECOUNT_TOTAL = Sql(
    """
UPDATE {limit_totals} t SET running = (
    SELECT count(*) FROM {tasks} x WHERE x.queue_name = :queue_name AND x.limit_key IS NOT NULL
      AND x.finished_at IS NULL AND x.slot IS NOT NULL
  ) - (SELECT coalesce(sum(n.slots), 0) FROM {limit_arrivals} n WHERE n.queue_name = :queue_name)
WHERE t.queue_name = :queue_name
""",
    queue_name=Text(),
)
"""Count the slots of a queue anew, under a lock on all keys."""

MISCOUNTED_TOTALS = Sql(
    """
SELECT t.queue_name, t.running + coalesce(p.slots, 0) AS counted, coalesce(h.slots, 0) AS held FROM {limit_totals} t
LEFT JOIN LATERAL (
  SELECT count(*) AS slots FROM {tasks} x WHERE x.queue_name = t.queue_name AND x.limit_key IS NOT NULL
    AND x.finished_at IS NULL AND x.slot IS NOT NULL
) h ON true
LEFT JOIN LATERAL (SELECT sum(n.slots) AS slots FROM {limit_arrivals} n WHERE n.queue_name = t.queue_name) p ON true
WHERE t.running + coalesce(p.slots, 0) <> coalesce(h.slots, 0) LIMIT :wanted
""",
    wanted=Integer(),
)
"""Queues whose count of slots differs from that of the tasks that hold one."""
