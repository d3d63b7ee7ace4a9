"""Setting limits up: of a queue whose tasks were claimed without, of one key, and repairing what was counted."""

from __future__ import annotations

from typing import Final

from sqlalchemy import ARRAY, Boolean, DateTime, Float, Integer, Interval, Text, Uuid

from .sql import Sql

_TIME = DateTime(timezone=True)

LOCK_TIMEOUT: Final = "500ms"
"""The longest wait for a lock on a whole table, and so the longest that it holds up others, which queue behind it."""

SET_LOCK_TIMEOUT = Sql(f"SELECT pg_catalog.set_config('lock_timeout', '{LOCK_TIMEOUT}', true)")

LOCK_CLAIMS = Sql("LOCK TABLE {workers} IN ACCESS EXCLUSIVE MODE")
"""Wait for the claims in flight, each of which reads this table, and hold up those that come.

A claim gets its snapshot after this lock is released: it sees what was committed under the lock.
"""

LOCK_KEYS = Sql("LOCK TABLE {limit_keys} IN SHARE ROW EXCLUSIVE MODE")
"""Wait for the claims of limited queues and the drains in flight, and hold up those that come."""

OLD_WORKERS = Sql(
    """
SELECT w.name FROM {workers} w
WHERE w.knows_limits IS NOT TRUE AND w.lost_at IS NULL AND w.expires_at > {clock} ORDER BY w.name
"""
)
"""Workers that are alive and of a version that knows no limits."""

MARK_LIMITED = Sql(
    """
UPDATE {queues} SET limited_at = coalesce(limited_at, {clock}),
  limits_ready_at = CASE WHEN :is_new THEN {clock} ELSE limits_ready_at END
WHERE queue_name = :queue_name RETURNING limits_ready_at
""",
    queue_name=Text(),
    is_new=Boolean(),
)
"""Make a queue one whose tasks are claimed key by key; one that is new has no tasks to be prepared."""

LIMITED_STATE = Sql(
    "SELECT q.limited_at, q.limits_ready_at FROM {queues} q WHERE q.queue_name = :queue_name", queue_name=Text()
)
"""Read whether a queue has limits, and whether it is prepared. Returns no row if it does not exist."""

LIMITED_QUEUES = Sql(
    "SELECT q.queue_name FROM {queues} q WHERE q.limited_at IS NOT NULL AND q.queue_name = ANY (:queue_names)",
    queue_names=ARRAY(Text()),
)
"""Which of these queues have limits."""

ADOPT_RUNNING = Sql(
    """
WITH found AS MATERIALIZED (
  SELECT task_id FROM {tasks}
  WHERE queue_name = :queue_name AND finished_at IS NULL AND available_at <= {now}
    AND claimed_by IS NOT NULL AND slot IS NULL
  LIMIT 1000 FOR NO KEY UPDATE SKIP LOCKED
), adopted AS (
  UPDATE {tasks} SET slot = 'run', limit_key = coalesce(limit_key, '')
  WHERE task_id = ANY (ARRAY(SELECT task_id FROM found)) AND claimed_by IS NOT NULL AND slot IS NULL
  RETURNING queue_name, limit_key
), counted AS (
  INSERT INTO {limit_arrivals} (queue_name, limit_key, slots)
  SELECT queue_name, limit_key, count(*) FROM adopted GROUP BY queue_name, limit_key
)
SELECT count(*) AS adopted FROM adopted
""",
    queue_name=Text(),
)
"""Count tasks that were claimed before their queue had limits: each holds a slot until its run ends."""

MARK_READY = Sql(
    """
UPDATE {queues} q SET limits_ready_at = {clock}
WHERE q.queue_name = :queue_name AND q.limited_at IS NOT NULL AND q.limits_ready_at IS NULL
  AND NOT EXISTS (SELECT FROM {limit_arrivals} n WHERE n.queue_name = :queue_name AND n.slots > 0)
  AND NOT EXISTS (
    SELECT FROM {tasks} x WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.available_at <= {now}
      AND x.claimed_by IS NOT NULL AND x.slot IS NULL)
RETURNING q.queue_name
""",
    queue_name=Text(),
)
"""Let claims begin, once all running tasks of the queue have been counted."""

ADOPT_WAITING = Sql(
    """
WITH page AS MATERIALIZED (
  SELECT task_id FROM {tasks} WHERE task_id > :after ORDER BY task_id LIMIT 5000
), found AS MATERIALIZED (
  SELECT task_id FROM {tasks}
  WHERE task_id = ANY (ARRAY(SELECT task_id FROM page)) AND queue_name = :queue_name AND finished_at IS NULL
    AND limit_key IS NULL AND claimed_by IS NULL
  FOR NO KEY UPDATE SKIP LOCKED
), adopted AS (
  UPDATE {tasks} SET limit_key = '', resumes_at = CASE WHEN state = 'sleeping' THEN available_at END
  WHERE task_id = ANY (ARRAY(SELECT task_id FROM found)) AND limit_key IS NULL
  RETURNING available_at
), arrived AS (
  INSERT INTO {limit_arrivals} (queue_name, limit_key, available_at)
  SELECT :queue_name, '', min(available_at) FROM adopted HAVING min(available_at) IS NOT NULL
)
SELECT (SELECT task_id FROM page ORDER BY task_id DESC LIMIT 1) AS last, (SELECT count(*) FROM adopted) AS adopted
""",
    queue_name=Text(),
    after=Uuid(),
)
"""Give a page of tasks that were spawned before their queue had limits the empty key."""

ADOPT_STRAYS = Sql(
    """
WITH found AS MATERIALIZED (
  SELECT task_id FROM {tasks}
  WHERE queue_name = :queue_name AND finished_at IS NULL AND limit_key IS NULL AND claimed_by IS NULL
  LIMIT 1000 FOR NO KEY UPDATE SKIP LOCKED
), adopted AS (
  UPDATE {tasks} SET limit_key = '', resumes_at = CASE WHEN state = 'sleeping' THEN available_at END
  WHERE task_id = ANY (ARRAY(SELECT task_id FROM found)) AND limit_key IS NULL
  RETURNING available_at
), arrived AS (
  INSERT INTO {limit_arrivals} (queue_name, limit_key, available_at)
  SELECT :queue_name, '', min(available_at) FROM adopted HAVING min(available_at) IS NOT NULL
)
SELECT count(*) AS adopted FROM adopted
""",
    queue_name=Text(),
)
"""Give tasks the empty key that a transaction begun before the limits, or a client that knows none, has spawned."""

PUT_LIMIT = Sql(
    """
INSERT INTO {limits} AS l
  (queue_name, scope, limit_key, limited, concurrency, rate_count, rate_seconds, rate_interval, burst, hold, weight)
VALUES (:queue_name, :scope, :limit_key, :limited, :concurrency, :rate_count, :rate_seconds, :rate_interval, :burst,
  coalesce(:hold, 'run'), :weight)
ON CONFLICT (queue_name, scope, limit_key) DO UPDATE SET limited = excluded.limited,
  concurrency = excluded.concurrency, rate_count = excluded.rate_count, rate_seconds = excluded.rate_seconds,
  rate_interval = excluded.rate_interval, burst = excluded.burst, hold = excluded.hold,
  weight = coalesce(excluded.weight, l.weight)
""",
    queue_name=Text(),
    scope=Text(),
    limit_key=Text(),
    limited=Boolean(),
    concurrency=Integer(),
    rate_count=Integer(),
    rate_seconds=Float(53),
    rate_interval=Interval(),
    burst=Integer(),
    hold=Text(),
    weight=Integer(),
)
"""Set a limit, or the weight of a key."""

READ_LIMIT = Sql(
    "SELECT l.limited, l.concurrency, l.rate_count, l.rate_seconds, l.rate_interval, l.burst, l.hold FROM {limits} l"
    " WHERE l.queue_name = :queue_name AND l.scope = :scope AND l.limit_key = ''",
    queue_name=Text(),
    scope=Text(),
)
"""Read a limit of a queue, or of each of its keys."""

LOCK_LIMIT = Sql(
    "SELECT l.weight, l.limited, l.hold, l.rate_interval, l.burst FROM {limits} l"
    " WHERE l.queue_name = :queue_name AND l.scope = :scope AND l.limit_key = :limit_key FOR UPDATE",
    queue_name=Text(),
    scope=Text(),
    limit_key=Text(),
)
"""Lock a limit, and read its parts as they are before the change."""

DELETE_LIMIT = Sql(
    "DELETE FROM {limits} WHERE queue_name = :queue_name AND scope = :scope AND limit_key = :limit_key",
    queue_name=Text(),
    scope=Text(),
    limit_key=Text(),
)
"""Remove a limit."""

COUNT_TOTAL = Sql(
    """
INSERT INTO {limit_totals} AS t (queue_name, running)
SELECT :queue_name, coalesce(sum(k.running), 0) FROM {limit_keys} k WHERE k.queue_name = :queue_name
ON CONFLICT (queue_name) DO UPDATE SET running = excluded.running
""",
    queue_name=Text(),
)
"""Count the slots that all keys of a queue hold, under :data:`LOCK_KEYS`: claims count them while it has a limit."""

DELETE_TOTAL = Sql("DELETE FROM {limit_totals} WHERE queue_name = :queue_name", queue_name=Text())
"""Count the slots of a queue no more."""

RELEASE_KEPT = Sql(
    """
WITH found AS MATERIALIZED (
  SELECT x.task_id FROM {tasks} x
  WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL
    AND x.slot = 'task' AND x.claimed_by IS NULL
    AND NOT EXISTS (
      SELECT FROM {limits} l WHERE l.queue_name = :queue_name AND l.hold = 'task' AND l.scope = 'queue')
    AND coalesce(
      (SELECT l.hold FROM {limits} l WHERE l.queue_name = :queue_name AND l.scope = 'key' AND l.limited
        AND l.limit_key = x.limit_key),
      (SELECT l.hold FROM {limits} l WHERE l.queue_name = :queue_name AND l.scope = 'per_key'), 'run') = 'run'
  ORDER BY x.task_id FOR NO KEY UPDATE
), given_back AS (
  UPDATE {tasks} SET slot = NULL
  WHERE task_id = ANY (ARRAY(SELECT task_id FROM found)) AND slot = 'task' AND claimed_by IS NULL
  RETURNING queue_name, limit_key
)
INSERT INTO {limit_arrivals} (queue_name, limit_key, slots)
SELECT queue_name, limit_key, -count(*) FROM given_back GROUP BY queue_name, limit_key
""",
    queue_name=Text(),
)
"""Give back the slots that suspended tasks hold under a limit that let them keep them, and does no more."""

SHORTEN_WAITS = Sql(
    """
WITH found AS MATERIALIZED (
  -- All of them, because a claim in flight may be about to use the rate.
  SELECT k.limit_key, k.tat, p.rate_interval * p.burst AS most FROM {limit_keys} k
  CROSS JOIN LATERAL (
    SELECT l.scope, l.rate_interval, l.burst FROM {limits} l
    WHERE l.queue_name = k.queue_name AND k.limit_key <> ''
      AND (l.scope = 'per_key' OR l.scope = 'key' AND l.limited AND l.limit_key = k.limit_key)
    ORDER BY l.scope LIMIT 1) p
  WHERE k.queue_name = :queue_name
    -- Keys with a limit of their own have another rate than that of each key.
    AND CASE WHEN :limit_key::text IS NULL THEN p.scope = 'per_key' ELSE k.limit_key = :limit_key END
  ORDER BY k.queue_name, k.limit_key FOR NO KEY UPDATE OF k
)
UPDATE {limit_keys} k SET tat = {clock} + f.most FROM found f
WHERE k.queue_name = :queue_name AND k.limit_key = f.limit_key AND f.tat > {clock} + f.most
""",
    queue_name=Text(),
    limit_key=Text(),
)
"""Let keys wait no longer than for the next start at their new rate, as the old one may have been slower."""

SHORTEN_WAIT_OF_ALL = Sql(
    """
UPDATE {limit_totals} t SET tat = {clock} + l.rate_interval * l.burst
FROM {limits} l
WHERE t.queue_name = :queue_name AND l.queue_name = :queue_name AND l.scope = 'queue' AND l.limit_key = ''
  AND t.tat > {clock} + l.rate_interval * l.burst
""",
    queue_name=Text(),
)
"""Let a queue wait no longer than for the next start at its new rate."""

WAKE_KEYS = Sql(
    """
INSERT INTO {limit_arrivals} (queue_name, limit_key, available_at)
SELECT k.queue_name, k.limit_key, {now} FROM {limit_keys} k
WHERE k.queue_name = :queue_name AND (:limit_key::text IS NULL OR k.limit_key = :limit_key)
""",
    queue_name=Text(),
    limit_key=Text(),
)
"""Have claims look at the keys of a queue, or at one, because their limits have changed.

At all of them: a claim in flight, which does not see the change, may be about to park a key that is ready now.
"""

FORGET_CLOSINGS = Sql(
    """
UPDATE {limit_arrivals} SET closed_until = NULL WHERE queue_name = :queue_name AND arrival_id = ANY (ARRAY(
  SELECT n.arrival_id FROM {limit_arrivals} n
  WHERE n.queue_name = :queue_name AND n.limit_key = :limit_key AND n.closed_until IS NOT NULL
  ORDER BY n.arrival_id FOR UPDATE))
""",
    queue_name=Text(),
    limit_key=Text(),
)
"""Let arrivals of a key that wait to be added close it no more, before :data:`CLOSE_KEY` in the same transaction.

It waits for a drain that has taken such an arrival, and locks no key before, for which the drain may wait.
"""

CLOSE_KEY = Sql(
    """
INSERT INTO {limit_keys} AS k (queue_name, limit_key, closed_until, ready_at, version)
VALUES (:queue_name, :limit_key, :until, {now}, 1)
ON CONFLICT (queue_name, limit_key) DO UPDATE SET closed_until = excluded.closed_until,
  ready_at = least(k.ready_at, excluded.ready_at), version = k.version + 1, used_at = {clock}
""",
    queue_name=Text(),
    limit_key=Text(),
    until=_TIME,
)
"""Close a key until a time, or open it."""

LIST_KEYS = Sql(
    """
WITH keys AS MATERIALIZED (
  (SELECT k.limit_key FROM {limit_keys} k
   WHERE k.queue_name = :queue_name AND k.limit_key >= :first AND k.limit_key IS DISTINCT FROM :after
   ORDER BY k.limit_key LIMIT CASE WHEN :state::text IS NULL THEN :most END)
  UNION
  (SELECT l.limit_key FROM {limits} l
   WHERE l.queue_name = :queue_name AND l.scope = 'key' AND l.limit_key >= :first
     AND l.limit_key IS DISTINCT FROM :after
   ORDER BY l.limit_key LIMIT CASE WHEN :state::text IS NULL THEN :most END)
  UNION
  (SELECT DISTINCT n.limit_key FROM {limit_arrivals} n
   WHERE n.queue_name = :queue_name AND n.limit_key >= :first AND n.limit_key IS DISTINCT FROM :after
   ORDER BY n.limit_key LIMIT CASE WHEN :state::text IS NULL THEN :most END)
), states AS MATERIALIZED (
  SELECT s.limit_key, k.running, k.tat, p.*,
    greatest(k.closed_until, a.closed_until) AS closed_until, coalesce(k.running, 0) + coalesce(a.slots, 0) AS held,
    k.tat + p.every * (1 - p.burst) AS token_at
  FROM keys s
  LEFT JOIN {limit_keys} k ON k.queue_name = :queue_name AND k.limit_key = s.limit_key
  LEFT JOIN (
    SELECT n.limit_key, sum(n.slots) AS slots, max(n.closed_until) AS closed_until
    FROM {limit_arrivals} n WHERE n.queue_name = :queue_name GROUP BY n.limit_key
  ) a ON a.limit_key = s.limit_key
  LEFT JOIN {limits} own ON own.queue_name = :queue_name AND own.scope = 'key' AND own.limited
    AND own.limit_key = s.limit_key
  LEFT JOIN {limits} pk ON pk.queue_name = :queue_name AND pk.scope = 'per_key' AND pk.limit_key = ''
  CROSS JOIN LATERAL (
    SELECT CASE WHEN s.limit_key = '' THEN NULL WHEN own.limited THEN own.concurrency ELSE pk.concurrency END
      AS concurrency,
      CASE WHEN s.limit_key = '' THEN NULL WHEN own.limited THEN own.rate_interval ELSE pk.rate_interval END AS every,
      CASE WHEN s.limit_key = '' THEN NULL WHEN own.limited THEN own.burst ELSE pk.burst END AS burst
  ) p
), named AS MATERIALIZED (
  SELECT s.*, CASE WHEN s.closed_until > {now} THEN 'closed' WHEN s.held >= s.concurrency THEN 'full'
    WHEN s.token_at > {now} THEN 'throttled' ELSE 'open' END AS state
  FROM states s
)
SELECT n.limit_key, n.state, greatest(n.held, 0)::integer AS running, n.concurrency,
  (SELECT count(*) FROM (
    SELECT FROM {tasks} x
    WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL
      AND (x.limit_key, x.priority) >= (n.limit_key, -32768) AND (x.limit_key, x.priority) <= (n.limit_key, 32767)
      AND x.available_at <= {now} AND x.claimed_by IS NULL
    ORDER BY x.limit_key, x.priority, x.available_at LIMIT 1000) w)::integer AS waiting,
  CASE n.state WHEN 'closed' THEN n.closed_until WHEN 'throttled' THEN n.token_at END AS opens_at
FROM named n WHERE :state::text IS NULL OR n.state = :state
ORDER BY n.limit_key LIMIT :most
""",
    queue_name=Text(),
    state=Text(),
    first=Text(),
    after=Text(),
    most=Integer(),
)
"""The keys of a queue with their states, by name: from `first` on, without `after`.

Keys of any state are read only as far as they are returned; those in one state are searched among all from `first` on.
"""

COUNT_KEYS = Sql(
    """
SELECT s.queue_name, s.state, count(*)::integer AS keys FROM (
  SELECT k.queue_name, CASE WHEN k.closed_until > {now} THEN 'closed' WHEN k.running >= p.concurrency THEN 'full'
    WHEN k.tat + p.every * (1 - p.burst) > {now} THEN 'throttled' ELSE 'open' END AS state
  FROM {limit_keys} k
  LEFT JOIN {limits} own ON own.queue_name = k.queue_name AND own.scope = 'key' AND own.limited
    AND own.limit_key = k.limit_key
  LEFT JOIN {limits} pk ON pk.queue_name = k.queue_name AND pk.scope = 'per_key' AND k.limit_key <> ''
  CROSS JOIN LATERAL (
    SELECT CASE WHEN own.limited THEN own.concurrency ELSE pk.concurrency END AS concurrency,
      CASE WHEN own.limited THEN own.rate_interval ELSE pk.rate_interval END AS every,
      CASE WHEN own.limited THEN own.burst ELSE pk.burst END AS burst
  ) p
  WHERE k.queue_name = ANY (:queue_names)
) s GROUP BY s.queue_name, s.state
""",
    queue_names=ARRAY(Text()),
)
"""Count the keys of queues by their states, of those that were used within a minute."""

DELETE_IDLE_KEYS = Sql(
    """
DELETE FROM {limit_keys} WHERE (queue_name, limit_key) IN (
  SELECT k.queue_name, k.limit_key FROM {limit_keys} k
  WHERE k.running = 0 AND k.ready_at IS NULL AND k.used_at < {clock} - interval '1 minute'
    AND (k.tat IS NULL OR k.tat <= {clock}) AND (k.closed_until IS NULL OR k.closed_until <= {clock})
  LIMIT 1000 FOR UPDATE SKIP LOCKED)
RETURNING limit_key
"""
)
"""Delete a batch of keys that nothing has used for a minute: no task holds a slot of them, or waits for a time."""

DROP_LIMITS = (
    Sql("DELETE FROM {limits} WHERE queue_name = :queue_name", queue_name=Text()),
    Sql("DELETE FROM {limit_totals} WHERE queue_name = :queue_name", queue_name=Text()),
    Sql("DELETE FROM {limit_arrivals} WHERE queue_name = :queue_name", queue_name=Text()),
    Sql("DELETE FROM {limit_keys} WHERE queue_name = :queue_name", queue_name=Text()),
)
"""Delete what belongs to the limits of a dropped queue."""
