"""The claim of queues with limits, the drain of their arrivals, and the look for what comes next.

How limits hold
---------------
Tasks of a queue with limits have a limit key, which may be empty. Each key has a row in `limit_keys`: the slots that
its tasks hold, the state of its rate, and `ready_at`, the time from which a claim may find something there. Claims and
drains alone write these rows, in short transactions of their own. Whatever else makes a task claimable or gives back a
slot, in the statement that does so under its fence, or in a transaction of the application, appends a row to
`limit_arrivals`. It exists once that is committed, a slot is given back exactly once, and no other transaction ever
waits for a key.

- A claim locks ready keys, those served longest ago first, and skips what others hold locked. What it reads of a locked
  row is the newest version, so it never admits on the grounds of an older count. It charges each key for the tasks that
  its own update has returned.
- A claim looks for tasks in a snapshot that may be older than the lock. If it finds none, it parks the key
  (`ready_at` null) only if `version` in the snapshot is that of the locked row: a drain in between has raised it, for a
  task that the snapshot does not show.
- A drain locks keys in their order. A claim waits for nothing. So there is no deadlock.
- `ready_at` is only ever set to now or later when a key is served: the order is that of the last service.

A task that has begun, and goes on after a sleep or an attempt, while it holds its slot or has only to get one, is
claimed before those that have not begun: `resumes_at` has an index of its own. In a full key with `hold="task"` they
would wait for each other otherwise, and in one with a rate it would wait behind all starts.

Tasks of a key are found by comparisons of rows in the order of an index. With equal signs the planner would also take
the index of tasks without keys, if it knows little of the keys, and walk the tasks of all of them. The constant limits
let it expect few rows: with a tenth of the table, which it expects otherwise, the server would compile the plan.

The rate is the generic cell rate algorithm: `tat` is when the bucket will be full. A start takes `rate_interval` times
its weight, and is admitted while the bucket has as much; one that is heavier than the bucket needs it full.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import ARRAY, BigInteger, Boolean, DateTime, Integer, SmallInteger, Text, Uuid

from .sql import Sql

_TIME = DateTime(timezone=True)

DRAIN_LIMIT = 2000
"""Arrivals that one drain takes, as its text says."""

DRAIN_ARRIVALS = Sql(
    """
WITH taken AS (
  DELETE FROM {limit_arrivals} WHERE queue_name = :queue_name AND arrival_id = ANY (ARRAY(
    SELECT arrival_id FROM {limit_arrivals}
    WHERE queue_name = :queue_name AND arrival_id > :floor
    ORDER BY arrival_id LIMIT 2000 FOR UPDATE SKIP LOCKED))
  RETURNING arrival_id, queue_name, limit_key, available_at, slots, closed_until
), news AS MATERIALIZED (
  SELECT queue_name, limit_key, sum(slots)::integer AS slots, min(available_at) AS available_at,
    -- A slot that was given back may be taken at once.
    min(CASE WHEN slots < 0 OR available_at IS NULL THEN {now} ELSE greatest(available_at, {now}) END) AS ready_at,
    max(closed_until) AS closed_until
  FROM taken GROUP BY queue_name, limit_key
), keys AS (
  INSERT INTO {limit_keys} AS k
    (queue_name, limit_key, running, ready_at, version, floor_at, closed_until, served, used_at)
  SELECT n.queue_name, n.limit_key, n.slots, n.ready_at, 1, n.available_at, n.closed_until, 0, {clock}
  FROM news n WHERE EXISTS (SELECT FROM {queues} q WHERE q.queue_name = n.queue_name)
  ORDER BY n.queue_name, n.limit_key
  ON CONFLICT (queue_name, limit_key) DO UPDATE SET
    running = k.running + excluded.running,
    ready_at = least(k.ready_at, excluded.ready_at),
    version = k.version + 1,
    floor_at = least(k.floor_at, excluded.floor_at),
    closed_until = greatest(k.closed_until, excluded.closed_until),
    used_at = excluded.used_at
), totals AS (
  UPDATE {limit_totals} t SET running = t.running + s.slots
  FROM (SELECT queue_name, sum(slots)::integer AS slots FROM news GROUP BY queue_name HAVING sum(slots) <> 0) s
  WHERE t.queue_name = s.queue_name
)
SELECT count(*) AS drained, max(arrival_id) AS last FROM taken
""",
    queue_name=Text(),
    floor=BigInteger(),
)
"""Add the arrivals of a queue to their keys. Those that another drain has locked are that one's to add."""

_CLAIM: Final = """
WITH opened AS MATERIALIZED (
  SELECT ql.queue_name IS NOT NULL AS bounded, ql.concurrency AS whole_slots, ql.rate_interval AS whole_interval,
    ql.burst AS whole_burst, coalesce(ql.hold, 'run') AS whole_hold,
    pk.concurrency, pk.rate_interval, pk.burst, coalesce(pk.hold, 'run') AS hold
  FROM {queues} q
  LEFT JOIN {limits} ql ON ql.queue_name = q.queue_name AND ql.scope = 'queue' AND ql.limit_key = ''
  LEFT JOIN {limits} pk ON pk.queue_name = q.queue_name AND pk.scope = 'per_key' AND pk.limit_key = ''
  WHERE q.queue_name = :queue_name AND q.paused_at IS NULL AND q.limits_ready_at IS NOT NULL
    AND EXISTS (SELECT FROM {workers} w WHERE w.worker_id = :worker_id AND w.lost_at IS NULL)
), suspects AS MATERIALIZED (
  -- In any order, so that none waits for all others.
  SELECT x.task_id, x.limit_key, x.slot, coalesce(x.weight, 1)::integer AS weight FROM {tasks} x
  WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL AND x.lease_losses >= 2
    AND x.claimed_by IS NULL AND x.available_at <= {now}
    AND x.task_name = ANY (:task_names) AND (x.cancel_at IS NULL OR x.cancel_at > {now}) AND [admitted]
  ORDER BY random() LIMIT 100
), whole AS MATERIALIZED (
  SELECT t.running, t.tat FROM {limit_totals} t
  WHERE t.queue_name = :queue_name AND (SELECT bounded FROM opened)
  FOR NO KEY UPDATE SKIP LOCKED
), budget AS MATERIALIZED (
  SELECT o.*,
    CASE
      WHEN NOT o.bounded THEN :wanted
      -- Another claim has it.
      WHEN w.running IS NULL THEN 0
      WHEN o.whole_slots <= w.running + r.slots AND NOT EXISTS (
        SELECT FROM {limits} l WHERE l.queue_name = :queue_name AND l.hold = 'task') THEN 0
      ELSE :wanted
    END AS wanted,
    o.whole_slots - w.running - r.slots AS free_slots,
    coalesce(o.whole_slots <= w.running + r.slots, false) AS whole_full,
    CASE WHEN o.whole_interval IS NULL THEN NULL ELSE floor(
      extract(epoch FROM {now} + o.whole_interval * o.whole_burst - greatest(w.tat, {now}))
      / extract(epoch FROM o.whole_interval))::bigint - r.starts END AS tokens,
    w.tat AS whole_tat
  FROM opened o LEFT JOIN whole w ON true
  -- What is kept for a suspect, which waits for a worker without runs.
  CROSS JOIN (
    SELECT least(count(*) FILTER (WHERE [keeps] AND s.slot IS NULL), 1)::integer AS slots,
      coalesce(max(s.weight) FILTER (WHERE [keeps]), 0) AS starts FROM suspects s
  ) r
), room AS MATERIALIZED (
  SELECT k.limit_key, k.version, k.running, k.tat, k.closed_until, k.ready_at, k.served,
    CASE WHEN k.floor_of = :floor_of AND :floors THEN k.floor_at END AS floor_at,
    k.ctid AS locked_at, seen.seen_at, seen.version = k.version AS fresh
  FROM {limit_keys} k
  -- Of the version in the snapshot: a subquery is not computed anew for the newer one that is locked.
  CROSS JOIN LATERAL (SELECT k.version, k.ctid AS seen_at OFFSET 0) seen
  WHERE k.queue_name = :queue_name AND [of_keys]
    -- In a full queue those go on that hold a slot, and nothing else.
    AND (NOT (SELECT whole_full FROM budget) OR k.limit_key = ANY (ARRAY(
      SELECT x.limit_key FROM {tasks} x
      WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.resumes_at <= {now} AND x.slot IS NOT NULL
        AND x.claimed_by IS NULL AND (SELECT whole_full FROM budget))))
  ORDER BY k.ready_at, k.limit_key
  LIMIT [most_keys]
  FOR NO KEY UPDATE OF k SKIP LOCKED
), policy AS MATERIALIZED (
  SELECT r.*, own.weight,
    CASE WHEN r.limit_key = '' THEN NULL WHEN own.limited THEN own.concurrency ELSE b.concurrency END AS concurrency,
    CASE WHEN r.limit_key = '' THEN NULL WHEN own.limited THEN own.rate_interval ELSE b.rate_interval END AS every,
    CASE WHEN r.limit_key = '' THEN NULL WHEN own.limited THEN own.burst ELSE b.burst END AS burst,
    CASE WHEN b.whole_hold = 'task' THEN 'task' WHEN r.limit_key = '' THEN 'run'
      WHEN own.limited THEN own.hold ELSE b.hold END AS hold,
    sum(own.weight) OVER () AS weights, b.wanted, b.whole_full, kept.slots AS kept_slots, kept.starts AS kept_starts
  FROM room r CROSS JOIN budget b
  -- The limit keeps the planner from joining, for which it would read the whole table.
  CROSS JOIN LATERAL (
    SELECT coalesce(max(l.weight), 1) AS weight, bool_or(l.limited) AS limited, max(l.concurrency) AS concurrency,
      max(l.rate_interval) AS rate_interval, max(l.burst) AS burst, max(l.hold) AS hold
    FROM {limits} l WHERE l.queue_name = :queue_name AND l.scope = 'key' AND l.limit_key = r.limit_key
  ) own
  CROSS JOIN LATERAL (
    SELECT least(count(*) FILTER (WHERE [keeps] AND s.slot IS NULL), 1)::integer AS slots,
      coalesce(max(s.weight) FILTER (WHERE [keeps]), 0) AS starts
    FROM suspects s WHERE s.limit_key = r.limit_key
  ) kept
), turns AS MATERIALIZED (
  SELECT p.*, coalesce(p.closed_until > {now}, false) AS closed,
    p.concurrency - p.running - p.kept_slots AS slots, t.tokens,
    CASE WHEN p.whole_full OR coalesce(p.closed_until > {now}, false) THEN 0
      -- Without tokens one head is looked at, for its weight.
      ELSE greatest(0, least(100, p.concurrency - p.running - p.kept_slots,
        CASE WHEN t.tokens < 1 THEN 1 ELSE t.tokens END,
        ceil(p.wanted::numeric * p.weight / p.weights)))::integer END AS turn
  FROM policy p CROSS JOIN LATERAL (
    SELECT CASE WHEN p.every IS NULL THEN NULL ELSE floor(
      extract(epoch FROM {now} + p.every * p.burst - greatest(p.tat, {now})) / extract(epoch FROM p.every))::bigint
      - p.kept_starts END AS tokens
  ) t
), resumed AS MATERIALIZED (
  SELECT t.limit_key, t.ready_at, t.slots AS free_slots, t.tokens, t.burst, n.task_id, n.available_at, n.place,
    CASE WHEN n.slot IS NULL THEN 1 ELSE 0 END AS slots,
    CASE WHEN n.state = 'pending' THEN n.weight ELSE 0 END AS starts
  FROM turns t CROSS JOIN LATERAL (
    SELECT l.*, row_number() OVER (ORDER BY l.resumes_at, l.task_id) AS place FROM (SELECT i.* FROM (
      SELECT x.task_id, x.available_at, x.slot, x.state, coalesce(x.weight, 1)::integer AS weight, x.resumes_at
      FROM {tasks} x
      WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.resumes_at IS NOT NULL
        AND (x.limit_key, x.resumes_at) >= (t.limit_key, '0001-01-01 UTC')
        AND (x.limit_key, x.resumes_at) <= (t.limit_key, {now})
        AND x.available_at <= {now} AND x.claimed_by IS NULL AND [of_tasks]
        AND x.task_name = ANY (:task_names) AND (x.cancel_at IS NULL OR x.cancel_at > {now})
        AND x.attempt < 2147483647 AND x.fence < 4611686018427387904
      ORDER BY x.limit_key, x.resumes_at, x.task_id LIMIT 100
      FOR NO KEY UPDATE SKIP LOCKED) i LIMIT t.wanted) l) n
  WHERE NOT t.closed
), heads AS MATERIALIZED (
  SELECT t.limit_key, t.ready_at, t.slots AS free_slots, t.tokens, t.burst, n.task_id, n.available_at, n.place,
    CASE WHEN n.slot IS NULL THEN 1 ELSE 0 END AS slots,
    CASE WHEN n.state = 'pending' THEN n.weight ELSE 0 END AS starts
  FROM turns t CROSS JOIN LATERAL (
    SELECT l.*, row_number() OVER (ORDER BY l.priority, l.available_at, l.task_id) AS place FROM (
      SELECT h.* FROM unnest(:priorities) WITH ORDINALITY AS p (priority, position) CROSS JOIN LATERAL (
        SELECT x.task_id, x.available_at, x.slot, x.state, coalesce(x.weight, 1)::integer AS weight, x.priority
        FROM {tasks} x
        WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL
          AND (x.limit_key, x.priority, x.available_at)
            >= (t.limit_key, p.priority, coalesce(t.floor_at, '0001-01-01 UTC'))
          AND (x.limit_key, x.priority, x.available_at) <= (t.limit_key, p.priority, {now})
          AND x.resumes_at IS NULL AND x.claimed_by IS NULL AND [of_tasks]
          AND x.task_name = ANY (:task_names) AND (x.cancel_at IS NULL OR x.cancel_at > {now})
          AND x.attempt < 2147483647 AND x.fence < 4611686018427387904
        ORDER BY x.limit_key, x.priority, x.available_at, x.task_id LIMIT 100
        FOR NO KEY UPDATE SKIP LOCKED) h
      LIMIT t.turn) l) n
  WHERE t.turn > 0
), summed AS MATERIALIZED (
  SELECT c.limit_key, c.task_id, c.available_at, c.lane, c.place, c.slots, c.starts, c.ready_at,
    (c.slots = 0 OR c.free_slots IS NULL OR sum(c.slots) OVER upto <= c.free_slots)
    AND (c.starts = 0 OR c.tokens IS NULL
      OR c.tokens - (sum(c.starts) OVER upto - c.starts) >= least(c.starts, c.burst)) AS admitted
  FROM (SELECT 0 AS lane, * FROM resumed UNION ALL SELECT 1, * FROM heads) c
  WINDOW upto AS (PARTITION BY c.limit_key ORDER BY c.lane, c.place)
), in_turn AS MATERIALIZED (
  -- One that has to wait is not overtaken within its key.
  SELECT s.*, bool_and(s.admitted OR s.lane = 0) OVER upto AND s.admitted AS admits
  FROM summed s WINDOW upto AS (PARTITION BY s.limit_key ORDER BY s.lane, s.place)
), ranked AS MATERIALIZED (
  SELECT s.*, row_number() OVER everything AS place_of_all,
    (s.slots = 0 OR b.free_slots IS NULL OR sum(s.slots) OVER everything <= b.free_slots)
    AND (s.starts = 0 OR b.tokens IS NULL
      OR b.tokens - (sum(s.starts) OVER everything - s.starts) >= least(s.starts, b.whole_burst)) AS fits
  FROM in_turn s CROSS JOIN budget b WHERE s.admits
  WINDOW everything AS (ORDER BY s.lane, s.place, s.ready_at, s.limit_key ROWS UNBOUNDED PRECEDING)
), picked AS MATERIALIZED (
  SELECT r.task_id, r.limit_key, r.lane, r.available_at, r.slots, r.starts FROM (
    SELECT r.*, bool_and(r.fits OR r.lane = 0) OVER (ORDER BY r.place_of_all) AS goes FROM ranked r) r
  WHERE r.goes AND r.fits AND r.place_of_all <= :wanted
), claimed AS (
  UPDATE {tasks} SET state = 'running', claimed_by = :worker_id, fence = fence + 1,
    attempt = attempt + CASE WHEN state = 'pending' THEN 1 ELSE 0 END,
    started_at = CASE WHEN state = 'pending' THEN {now} ELSE started_at END,
    first_started_at = coalesce(first_started_at, {now}),
    cancel_at = CASE WHEN first_started_at IS NULL THEN {clock} + CASE
        WHEN max_running_time < interval '0' THEN interval '0'
        WHEN max_running_time > interval '36525 days' THEN interval '36525 days'
        ELSE max_running_time END
      ELSE cancel_at END,
    slot = CASE WHEN limit_key IN (SELECT t.limit_key FROM turns t WHERE t.hold = 'task') THEN 'task' ELSE 'run' END,
    resumes_at = NULL
  WHERE task_id = ANY (ARRAY(SELECT task_id FROM picked))
  RETURNING task_id, run_id, queue_name, priority, available_at, task_name, params::text AS params,
    headers::text AS headers, attempt, fence, cancel_at, {clock} AS now, limit_key
), counted AS MATERIALIZED (
  SELECT c.limit_key, count(*)::integer AS tasks, sum(p.slots)::integer AS slots, sum(p.starts)::bigint AS starts,
    count(*) FILTER (WHERE p.lane = 1)::integer AS heads,
    max(c.available_at) FILTER (WHERE p.lane = 1) AS last_at
  FROM claimed c JOIN picked p ON p.task_id = c.task_id GROUP BY c.limit_key
), looked_at AS MATERIALIZED (
  SELECT i.limit_key, count(*) FILTER (WHERE i.lane = 1) AS found, count(*) FILTER (WHERE i.admits) AS admitted,
    -- The weight of the first that has to wait for tokens.
    (array_agg(i.starts ORDER BY i.place) FILTER (WHERE NOT i.admits AND i.lane = 1))[1] AS next_weight
  FROM in_turn i GROUP BY i.limit_key
), changes AS MATERIALIZED (
  SELECT t.*, coalesce(c.tasks, 0) AS n, t.running + coalesce(c.slots, 0) AS new_running,
    CASE WHEN t.every IS NULL OR coalesce(c.starts, 0) = 0 THEN t.tat
      ELSE greatest(t.tat, {now}) + t.every * c.starts END AS new_tat,
    coalesce(l.found, 0) AS found,
    t.whole_full OR coalesce(l.admitted, 0) > coalesce(c.tasks, 0) AS held_up,
    coalesce(c.heads, 0) AS heads, c.last_at, coalesce(l.next_weight, 1) AS next_weight
  -- Full joins, because the planner cannot make nested loops of them, for which it expects few enough keys.
  FROM turns t FULL JOIN counted c ON c.limit_key = t.limit_key FULL JOIN looked_at l ON l.limit_key = t.limit_key
), states AS MATERIALIZED (
  SELECT c.*,
    c.concurrency IS NOT NULL AND c.new_running >= c.concurrency AS is_full,
    CASE WHEN c.every IS NULL THEN NULL
      ELSE c.new_tat - c.every * (c.burst - least(c.next_weight, c.burst)::integer) END AS token_at,
    -- All heads of the key were seen, and taken as far as they may be.
    c.turn > 0 AND c.found < c.turn AND c.heads = c.found AS is_drained
  FROM changes c
), nexts AS MATERIALIZED (
  SELECT s.*,
    (SELECT x.resumes_at FROM {tasks} x
      WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.resumes_at IS NOT NULL
        AND (x.limit_key, x.resumes_at) >= (s.limit_key, '0001-01-01 UTC')
        AND (x.limit_key, x.resumes_at) <= (s.limit_key, 'infinity')
        AND x.claimed_by IS NULL AND x.lease_losses < 2
        AND (s.hold = 'task' OR NOT s.is_full) AND NOT s.closed
        AND x.task_id <> ALL (ARRAY(SELECT task_id FROM picked))
      ORDER BY x.limit_key, x.resumes_at LIMIT 1) AS next_resume,
    CASE WHEN s.is_drained THEN least(
      (SELECT min(n.next_at) FROM unnest(:priorities) AS p (priority) CROSS JOIN LATERAL (
        -- Without the floor, which may hide one that was locked.
        SELECT x.available_at AS next_at FROM {tasks} x
        WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL
          AND (x.limit_key, x.priority, x.available_at) >= (s.limit_key, p.priority, '0001-01-01 UTC')
          AND (x.limit_key, x.priority, x.available_at) <= (s.limit_key, p.priority, 'infinity')
          AND x.resumes_at IS NULL AND x.claimed_by IS NULL AND x.lease_losses < 2
          AND x.task_id <> ALL (ARRAY(SELECT task_id FROM picked))
        ORDER BY x.limit_key, x.priority, x.available_at LIMIT 1) n),
      -- Priorities that this worker does not know of yet.
      (SELECT min(n.next_at) FROM unnest(
          ARRAY[-32769] || :priorities::integer[], :priorities::integer[] || 32768) AS p (above, below)
        CROSS JOIN LATERAL (
          SELECT {now} AS next_at FROM {tasks} x
          WHERE x.queue_name = :queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL
            AND (x.limit_key, x.priority) > (s.limit_key, p.above)
            AND (x.limit_key, x.priority) < (s.limit_key, p.below)
            AND x.available_at IS NOT NULL AND x.resumes_at IS NULL AND x.claimed_by IS NULL AND x.lease_losses < 2
          ORDER BY x.limit_key, x.priority, x.available_at LIMIT 1) n)) END AS next_head
  FROM states s
), due AS MATERIALIZED (
  SELECT n.*, least(n.next_resume, CASE
      WHEN n.is_full THEN NULL
      WHEN n.is_drained THEN greatest(n.next_head, CASE WHEN n.next_head IS NOT NULL THEN n.token_at END)
      ELSE greatest(n.token_at, {now}) END) AS next_at
  FROM nexts n
), charged AS (
  -- By the place of the row: under a held snapshot, the key has as many index entries as it has had versions.
  UPDATE {limit_keys} k SET [changes] FROM due s WHERE k.ctid = s.seen_at AND s.seen_at = s.locked_at
), charged_later AS (
  -- Of a row that was changed after the snapshot, the update finds the newest version from the one in the snapshot.
  UPDATE {limit_keys} k SET [changes] FROM due s
  WHERE EXISTS (SELECT FROM due WHERE seen_at <> locked_at) AND s.seen_at <> s.locked_at AND s.limit_key = k.limit_key
    AND k.queue_name = :queue_name AND k.limit_key = ANY (ARRAY(SELECT limit_key FROM due WHERE seen_at <> locked_at))
), charged_whole AS (
  UPDATE {limit_totals} t SET running = t.running + (SELECT coalesce(sum(slots), 0) FROM counted),
    tat = CASE WHEN b.whole_interval IS NULL OR (SELECT coalesce(sum(starts), 0) FROM counted) = 0 THEN t.tat
      ELSE greatest(t.tat, {now}) + b.whole_interval * (SELECT sum(starts) FROM counted)::bigint END
  FROM budget b
  WHERE t.queue_name = :queue_name AND b.bounded AND EXISTS (SELECT FROM counted)
)
SELECT * FROM claimed
"""

_CHANGES: Final = """(running, tat, version, ready_at, served, floor_at, floor_of, used_at) = (
    s.new_running, s.new_tat, s.version + 1,
    CASE [next_look]
      WHEN s.closed THEN s.closed_until
      WHEN NOT s.fresh AND (s.is_drained OR s.is_full) THEN {now}
      -- It has its turn, but the queue has no room: it keeps its place.
      WHEN s.held_up AND s.n = 0 THEN s.ready_at
      WHEN s.held_up THEN {now}
      WHEN s.next_at > {now} OR s.next_at IS NULL THEN s.next_at
      -- This worker cannot take them: others may know their names, or have them locked.
      WHEN s.n = 0 THEN {now} + interval '0.1 s' * (0.5 + random())
      -- The next turns are its own, too, until it has had as many as its weight.
      WHEN s.served + s.n < s.weight THEN s.ready_at
      ELSE {now} END,
    CASE WHEN s.served + s.n < s.weight AND NOT s.is_drained THEN s.served + s.n ELSE 0 END,
    CASE WHEN [keeps] AND s.heads > 0 AND cardinality(:priorities) = 1 AND s.heads = s.found
      THEN CASE WHEN k.floor_of = :floor_of THEN greatest(k.floor_at, s.last_at) ELSE s.last_at END
      ELSE k.floor_at END,
    CASE WHEN [keeps] AND s.heads > 0 AND cardinality(:priorities) = 1 AND s.heads = s.found THEN :floor_of
      ELSE k.floor_of END,
    {clock})"""
"""The columns of a key that a claim changes, with their new values."""

_ADMITTED: Final = """coalesce((
      SELECT coalesce(k.closed_until <= {now}, true)
        AND coalesce(k.tat + p.rate_interval * (1 - p.burst) <= {now}, true)
        AND (x.slot IS NOT NULL OR coalesce(k.running < p.concurrency, true))
      FROM {limit_keys} k LEFT JOIN LATERAL (
        SELECT l.concurrency, l.rate_interval, l.burst FROM {limits} l
        WHERE l.queue_name = k.queue_name AND k.limit_key <> ''
          AND (l.scope = 'per_key' OR l.scope = 'key' AND l.limited AND l.limit_key = k.limit_key)
        ORDER BY l.scope LIMIT 1) p ON true
      WHERE k.queue_name = x.queue_name AND k.limit_key = x.limit_key), true)"""
"""The key of task `x` has room for it. A subquery, because the planner would read all keys for a join."""


def _claim(parts: dict[str, str]) -> Sql:
    text = _CLAIM.replace("[changes]", _CHANGES)
    for name, part in parts.items():
        text = text.replace(f"[{name}]", part)
    return Sql(
        text,
        "queue_name",
        "wanted",
        "priorities",
        "ready_floor",
        queue_name=Text(),
        worker_id=Uuid(),
        wanted=Integer(),
        task_names=ARRAY(Text()),
        priorities=ARRAY(SmallInteger()),
        ready_floor=_TIME,
        floors=Boolean(),
        floor_of=BigInteger(),
    )


CLAIM_LIMITED = _claim(
    {
        "admitted": _ADMITTED,
        "of_keys": "k.ready_at <= {now} AND k.ready_at >= :ready_floor",
        "most_keys": "coalesce((SELECT wanted FROM budget), 0)",
        "keeps": "true",
        "of_tasks": "x.lease_losses < 2",
        "next_look": "",
    }
)
"""Claim up to `wanted` tasks of a queue with limits, from the keys that were served longest ago.

Suspects are left out. A slot and the tokens of one whose key has room are kept for it, in the key and in the queue, or
it would never find them free.
"""

CLAIM_LIMITED_SUSPECT = _claim(
    {
        "admitted": _ADMITTED,
        "of_keys": "k.limit_key = ANY (ARRAY(SELECT limit_key FROM suspects))",
        "most_keys": "CASE WHEN (SELECT wanted FROM budget) > 0 THEN 100 ELSE 0 END",
        "keeps": "false",
        "of_tasks": "x.task_id = ANY (ARRAY(SELECT task_id FROM suspects))",
        "next_look": "WHEN true THEN s.ready_at",
    }
)
"""Claim one suspect of a queue with limits, for a worker that runs nothing else."""

WAITING_LIMITED_SUSPECTS = Sql(
    """
SELECT x.task_id, (
    SELECT array_agg(w.worker_id) FROM {workers} w WHERE w.lost_at IS NULL AND x.queue_name = ANY (w.queue_names)
  ) AS worker_ids
FROM {tasks} x JOIN {queues} q ON q.queue_name = x.queue_name
WHERE x.queue_name = ANY (:queue_names) AND x.finished_at IS NULL AND x.limit_key IS NOT NULL AND x.lease_losses >= 2
  AND x.claimed_by IS NULL AND x.available_at <= {now}
  AND x.task_name = ANY (:task_names) AND (x.cancel_at IS NULL OR x.cancel_at > {now})
  AND q.paused_at IS NULL AND q.limits_ready_at IS NOT NULL AND [admitted]
LIMIT 100
""".replace("[admitted]", _ADMITTED),
    queue_names=ARRAY(Text()),
    task_names=ARRAY(Text()),
)
"""Ready suspects of queues with limits whose keys have room for them, and the workers of their queue."""

LOOK = Sql(
    """
SELECT a.queue_name, a.floor_at,
  EXISTS (SELECT FROM {limit_arrivals} n WHERE n.queue_name = a.queue_name) AS arrivals,
  CASE
    WHEN q.paused_at IS NOT NULL OR q.limits_ready_at IS NULL THEN NULL
    WHEN l.concurrency <= t.running THEN (
      -- In a full queue those go on that hold a slot.
      SELECT min(x.resumes_at) FROM {tasks} x
      WHERE x.queue_name = a.queue_name AND x.finished_at IS NULL AND x.resumes_at IS NOT NULL AND x.slot IS NOT NULL)
    ELSE greatest(k.ready_at, t.tat + l.rate_interval * (1 - l.burst)) END AS next_at,
  k.ready_at AS earliest,
  q.limits_ready_at IS NULL AS preparing,
  EXISTS (
    SELECT FROM {tasks} x
    WHERE x.queue_name = a.queue_name AND x.finished_at IS NULL AND x.limit_key IS NOT NULL AND x.lease_losses >= 2
      AND x.claimed_by IS NULL AND x.available_at <= {now}) AS suspects,
  {clock} AS now
FROM unnest(:queue_names, :ready_floors) AS a (queue_name, floor_at)
JOIN {queues} q ON q.queue_name = a.queue_name
LEFT JOIN {limits} l ON l.queue_name = a.queue_name AND l.scope = 'queue' AND l.limit_key = ''
LEFT JOIN {limit_totals} t ON t.queue_name = a.queue_name AND l.queue_name IS NOT NULL
CROSS JOIN LATERAL (
  SELECT min(y.ready_at) AS ready_at FROM {limit_keys} y
  WHERE y.queue_name = a.queue_name AND y.ready_at IS NOT NULL AND y.ready_at >= a.floor_at
) k
""",
    queue_names=ARRAY(Text()),
    ready_floors=ARRAY(_TIME),
)
"""When a claim of these queues may find something next, null: after an arrival; and whether arrivals wait."""
