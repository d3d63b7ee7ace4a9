-- pg_dump --inserts --no-owner --no-privileges --schema=durable, of a database at durable_0001 with tasks in each state.
-- PostgreSQL database dump

-- Dumped from database version 18.4
-- Dumped by pg_dump version 18.4

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

-- Name: durable; Type: SCHEMA; Schema: -; Owner: -

CREATE SCHEMA durable;

SET default_tablespace = '';

SET default_table_access_method = heap;

-- Name: checkpoints; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.checkpoints (
    task_id uuid NOT NULL,
    key uuid NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    status text DEFAULT 'completed'::text NOT NULL,
    value json,
    child_task_id uuid,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

-- Name: COLUMN checkpoints.key; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.checkpoints.key IS 'hash of kind, name, arguments, branch and occurrence';

-- Name: COLUMN checkpoints.child_task_id; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.checkpoints.child_task_id IS 'the child that was spawned or joined';

-- Name: events; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.events (
    queue_name text NOT NULL,
    name text NOT NULL,
    payload json,
    metadata jsonb,
    emitted_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    delivered_at timestamp with time zone,
    CONSTRAINT events_name_check CHECK ((((octet_length(name) >= 1) AND (octet_length(name) <= 200)) AND ("left"(name, 1) <> '$'::text)))
);

-- Name: COLUMN events.delivered_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.events.delivered_at IS 'when workers had handed it to every waiter';

-- Name: queues; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.queues (
    queue_name text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    paused_at timestamp with time zone,
    retention interval DEFAULT '30 days'::interval,
    event_retention interval DEFAULT '30 days'::interval,
    CONSTRAINT queues_event_retention_check CHECK (((event_retention >= '00:00:00'::interval) AND (event_retention <= '36525 days'::interval))),
    CONSTRAINT queues_retention_check CHECK (((retention >= '00:00:00'::interval) AND (retention <= '36525 days'::interval)))
);

-- Name: TABLE queues; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON TABLE durable.queues IS 'schema version: durable_0001';

-- Name: COLUMN queues.paused_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.queues.paused_at IS 'set: nothing is claimed until it is resumed';

-- Name: COLUMN queues.retention; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.queues.retention IS 'age at which finished tasks are deleted; null: never';

-- Name: COLUMN queues.event_retention; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.queues.event_retention IS 'age at which events are deleted; null: never';

-- Name: runs; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.runs (
    task_id uuid NOT NULL,
    attempt integer NOT NULL,
    run_id uuid NOT NULL,
    state text NOT NULL,
    worker_id uuid,
    started_at timestamp with time zone,
    finished_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    error json
);

-- Name: schedules; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.schedules (
    name text NOT NULL,
    queue_name text NOT NULL,
    task_name text NOT NULL,
    cron_expression text NOT NULL,
    timezone text DEFAULT 'UTC'::text NOT NULL,
    params json,
    spawn_options jsonb DEFAULT '{}'::jsonb NOT NULL,
    metadata jsonb,
    backend text DEFAULT 'worker'::text NOT NULL,
    pgcron_job_name text,
    misfire text DEFAULT 'run_once'::text NOT NULL,
    overlap text DEFAULT 'allow'::text NOT NULL,
    paused_at timestamp with time zone,
    next_tick_at timestamp with time zone,
    last_tick_at timestamp with time zone,
    last_task_id uuid,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    updated_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT schedules_backend_check CHECK ((backend = ANY (ARRAY['worker'::text, 'pg_cron'::text]))),
    CONSTRAINT schedules_misfire_check CHECK ((misfire = ANY (ARRAY['skip'::text, 'run_once'::text, 'run_all'::text]))),
    CONSTRAINT schedules_name_check CHECK (((name ~ '^[A-Za-z0-9_-]+$'::text) AND (octet_length(name) <= 200))),
    CONSTRAINT schedules_next_tick_at_check CHECK (((next_tick_at >= to_timestamp(('-62135510400'::bigint)::double precision)) AND (next_tick_at <= to_timestamp(('253402128000'::bigint)::double precision)))),
    CONSTRAINT schedules_overlap_check CHECK ((overlap = ANY (ARRAY['allow'::text, 'skip'::text])))
);

-- Name: COLUMN schedules.next_tick_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.schedules.next_tick_at IS 'null: the expression never fires again';

-- Name: tasks; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.tasks (
    task_id uuid NOT NULL,
    queue_name text NOT NULL,
    task_name text NOT NULL,
    params json,
    headers jsonb,
    state text DEFAULT 'pending'::text NOT NULL,
    outcome text,
    priority smallint DEFAULT '0'::smallint NOT NULL,
    attempt integer DEFAULT 0 NOT NULL,
    run_id uuid NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    lease_losses integer DEFAULT 0 NOT NULL,
    max_attempts integer NOT NULL,
    retry_kind text NOT NULL,
    retry_base_delay double precision NOT NULL,
    retry_factor double precision NOT NULL,
    retry_max_backoff double precision NOT NULL,
    retry_jitter double precision NOT NULL,
    max_pending_time interval,
    max_running_time interval,
    cancel_at timestamp with time zone,
    parent_task_id uuid,
    cancelled_by uuid,
    parent_fence bigint,
    idempotency_key text,
    fence bigint DEFAULT '0'::bigint NOT NULL,
    claimed_by uuid,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    available_at timestamp with time zone,
    first_started_at timestamp with time zone,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    output json,
    error json,
    CONSTRAINT tasks_available_at_check CHECK (((available_at >= to_timestamp(('-62135510400'::bigint)::double precision)) AND (available_at <= to_timestamp(('253402128000'::bigint)::double precision)))),
    CONSTRAINT tasks_cancel_at_check CHECK (((cancel_at >= to_timestamp(('-62135510400'::bigint)::double precision)) AND (cancel_at <= to_timestamp(('253402128000'::bigint)::double precision)))),
    CONSTRAINT tasks_finished_check CHECK (((finished_at IS NULL) = (outcome IS NULL))),
    CONSTRAINT tasks_state_check CHECK ((state = ANY (ARRAY['pending'::text, 'running'::text, 'sleeping'::text, 'completed'::text, 'failed'::text, 'cancelled'::text])))
)
WITH (fillfactor='40');

-- Name: COLUMN tasks.task_id; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.task_id IS 'UUIDv7, drawn by the spawning client';

-- Name: COLUMN tasks.params; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.params IS 'SQL null: the task takes none';

-- Name: COLUMN tasks.state; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.state IS 'pending, running, sleeping, completed, failed or cancelled';

-- Name: COLUMN tasks.outcome; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.outcome IS 'null until the end, then completed, failed or cancelled';

-- Name: COLUMN tasks.priority; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.priority IS 'smaller is claimed first';

-- Name: COLUMN tasks.attempt; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.attempt IS 'attempts begun';

-- Name: COLUMN tasks.run_id; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.run_id IS 'of the attempt that runs, or comes next';

-- Name: COLUMN tasks.failures; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.failures IS 'failures of the task''s own code';

-- Name: COLUMN tasks.lease_losses; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.lease_losses IS 'workers lost in a row while running it';

-- Name: COLUMN tasks.max_attempts; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.max_attempts IS 'failures at which it is given up';

-- Name: COLUMN tasks.retry_kind; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.retry_kind IS 'none, fixed or exponential';

-- Name: COLUMN tasks.retry_base_delay; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.retry_base_delay IS 'seconds';

-- Name: COLUMN tasks.retry_max_backoff; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.retry_max_backoff IS 'seconds';

-- Name: COLUMN tasks.retry_jitter; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.retry_jitter IS 'share of the delay, 0 to 1';

-- Name: COLUMN tasks.max_pending_time; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.max_pending_time IS 'from available_at to the first start';

-- Name: COLUMN tasks.max_running_time; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.max_running_time IS 'from the first start on';

-- Name: COLUMN tasks.cancel_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.cancel_at IS 'when the limit in force now cancels it';

-- Name: COLUMN tasks.cancelled_by; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.cancelled_by IS 'the ancestor whose end cancelled it';

-- Name: COLUMN tasks.parent_fence; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.parent_fence IS 'the parent''s when it was put back by hand: that end of the parent is none of its concern';

-- Name: COLUMN tasks.fence; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.fence IS 'rises with every change of hands; a run writes only under its own';

-- Name: COLUMN tasks.claimed_by; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.claimed_by IS 'workers.worker_id that runs it; null: nobody';

-- Name: COLUMN tasks.available_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.available_at IS 'when it may be claimed; null: once a wait resolves';

-- Name: COLUMN tasks.started_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.started_at IS 'start of the current attempt';

-- Name: COLUMN tasks.error; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.tasks.error IS 'the last failure: name, message, traceback, raw';

-- Name: waits; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.waits (
    task_id uuid NOT NULL,
    key uuid NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    queue_name text NOT NULL,
    event_name text,
    child_task_id uuid,
    due_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT waits_due_at_check CHECK (((due_at >= to_timestamp(('-62135510400'::bigint)::double precision)) AND (due_at <= to_timestamp(('253402128000'::bigint)::double precision))))
);

-- Name: COLUMN waits.key; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.waits.key IS 'of the checkpoint that will resolve it';

-- Name: COLUMN waits.due_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.waits.due_at IS 'when it times out';

-- Name: workers; Type: TABLE; Schema: durable; Owner: -

CREATE TABLE durable.workers (
    worker_id uuid NOT NULL,
    name text NOT NULL,
    queue_names text[] NOT NULL,
    claim_timeout interval NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    heartbeat_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    lost_at timestamp with time zone,
    CONSTRAINT workers_expires_at_check CHECK (((expires_at >= to_timestamp(('-62135510400'::bigint)::double precision)) AND (expires_at <= to_timestamp(('253402128000'::bigint)::double precision)))),
    CONSTRAINT workers_queue_names_check CHECK (((array_position(queue_names, NULL::text) IS NULL) AND (COALESCE(array_ndims(queue_names), 1) = 1)))
);

-- Name: COLUMN workers.worker_id; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.workers.worker_id IS 'drawn anew at every start';

-- Name: COLUMN workers.name; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.workers.name IS 'a label, host:pid unless given';

-- Name: COLUMN workers.claim_timeout; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.workers.claim_timeout IS 'how long it may be silent before others take over';

-- Name: COLUMN workers.lost_at; Type: COMMENT; Schema: durable; Owner: -

COMMENT ON COLUMN durable.workers.lost_at IS 'when another worker found it silent';

-- Data for Name: checkpoints; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.checkpoints VALUES ('01a228ff-927d-7588-8507-e811f7591c59', '100637a9-5e85-aecf-090d-c48f9b41093c', 'step', 'double', 'completed', '2', NULL, '2026-11-29 20:29:27.731093+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-9288-736a-bec7-1e1eea8a4aa3', 'dec1ad32-1502-9bb7-077c-c04ff349c356', 'step', 'double', 'completed', '4', NULL, '2026-11-29 20:29:27.731232+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-927d-7588-8507-e811f7591c59', '35a13390-261a-c7dd-68de-d0f37db15146', 'spawn', 'part', 'completed', '"dd408cdd10937e0a880c389d"', '01a228ff-927d-7d5c-aa8a-820da0537783', '2026-11-29 20:29:27.76602+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-9288-736a-bec7-1e1eea8a4aa3', '35a13390-261a-c7dd-68de-d0f37db15146', 'spawn', 'part', 'completed', '"97bf93ca0242cceadb7a601a"', '01a228ff-9288-7804-bbab-83264be5b9e9', '2026-11-29 20:29:27.766036+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-927d-7d5c-aa8a-820da0537783', 'dec1ad32-1502-9bb7-077c-c04ff349c356', 'step', 'double', 'completed', '4', NULL, '2026-11-29 20:29:27.779693+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-9288-7804-bbab-83264be5b9e9', '0c74822e-e0e1-b7d8-b1b6-fb547388b710', 'step', 'double', 'completed', '8', NULL, '2026-11-29 20:29:27.77972+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-927d-7588-8507-e811f7591c59', 'b46eaffc-f914-59ed-8e98-6283371d8362', 'join', '$join', 'completed', '4', '01a228ff-927d-7d5c-aa8a-820da0537783', '2026-11-29 20:29:27.819288+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-9288-736a-bec7-1e1eea8a4aa3', '03cc35c3-8111-ee46-8e4f-b6e8317b5b34', 'join', '$join', 'completed', '8', '01a228ff-9288-7804-bbab-83264be5b9e9', '2026-11-29 20:29:27.819331+00');
INSERT INTO durable.checkpoints VALUES ('01a228ff-927d-7588-8507-e811f7591c59', 'c9ca9502-535f-37a1-32f4-502a73fd2e06', 'event', 'paid:1', 'completed', '100', NULL, '2026-11-29 20:29:27.834959+00');

-- Data for Name: events; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.events VALUES ('default', 'paid:1', '100', NULL, '2026-11-29 20:29:27.573292+00', '2026-11-29 20:29:27.728328+00');
INSERT INTO durable.events VALUES ('default', 'paid:3', '300', NULL, '2026-11-29 20:29:27.853372+00', NULL);

-- Data for Name: queues; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.queues VALUES ('default', '2026-11-29 20:29:27.495487+00', NULL, NULL, NULL);
INSERT INTO durable.queues VALUES ('west', '2026-11-29 20:29:27.54825+00', NULL, NULL, NULL);

-- Data for Name: runs; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.runs VALUES ('01a228ff-9289-7176-81ad-e4455a23a4d7', 1, '01a228ff-9289-7176-81ad-e4467190139f', 'failed', '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.716138+00', '2026-11-29 20:29:27.745275+00', '{"name":"ValueError","message":"as recorded","traceback":"Traceback (most recent call last):\n  File \"/tmp/ev_dump.py\", line 28, in failing\n    raise ValueError(\"as recorded\")\nValueError: as recorded\n","raw":null}');
INSERT INTO durable.runs VALUES ('01a228ff-927d-7d5c-aa8a-820da0537783', 1, '01a228ff-933d-72c8-9bc2-f13561269944', 'completed', '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.776862+00', '2026-11-29 20:29:27.783829+00', NULL);
INSERT INTO durable.runs VALUES ('01a228ff-9288-7804-bbab-83264be5b9e9', 1, '01a228ff-933e-706c-8a18-03c57311d1ee', 'completed', '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.776914+00', '2026-11-29 20:29:27.78385+00', NULL);
INSERT INTO durable.runs VALUES ('01a228ff-9289-7176-81ad-e4455a23a4d7', 2, '01a228ff-9333-72ab-9e3a-f437c23934d5', 'failed', '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.765246+00', '2026-11-29 20:29:27.8163+00', '{"name":"ValueError","message":"as recorded","traceback":"Traceback (most recent call last):\n  File \"/tmp/ev_dump.py\", line 28, in failing\n    raise ValueError(\"as recorded\")\nValueError: as recorded\n","raw":null}');
INSERT INTO durable.runs VALUES ('01a228ff-927d-7588-8507-e811f7591c59', 1, '01a228ff-927d-7588-8507-e8127265bc52', 'completed', '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.716046+00', '2026-11-29 20:29:27.838458+00', NULL);

-- Data for Name: schedules; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.schedules VALUES ('nightly', 'default', 'report', '0 3 * * *', 'Europe/Paris', '"Monday"', '{"priority": 0, "cancellation": {"max_pending_time": null, "max_running_time": null}, "max_attempts": 5, "retry_strategy": {"kind": "fixed", "factor": 1.0, "jitter": 0.0, "base_delay": 5.0, "max_backoff": 3155760000.0}}', '{"team": "a"}', 'worker', NULL, 'run_once', 'allow', NULL, '2026-11-30 02:00:00+00', NULL, NULL, '2026-11-29 20:29:27.872301+00', '2026-11-29 20:29:27.872301+00');
INSERT INTO durable.schedules VALUES ('weekly', 'west', 'report', '0 4 * * sun', 'UTC', '"Sunday"', '{"priority": 0, "cancellation": {"max_pending_time": null, "max_running_time": null}, "max_attempts": 5, "retry_strategy": {"kind": "fixed", "factor": 1.0, "jitter": 0.0, "base_delay": 5.0, "max_backoff": 3155760000.0}}', '{}', 'worker', NULL, 'run_once', 'skip', NULL, '2026-12-06 04:00:00+00', NULL, NULL, '2026-11-29 20:29:27.880113+00', '2026-11-29 20:29:27.880113+00');

-- Data for Name: tasks; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.tasks VALUES ('01a228ff-927d-7588-8507-e811f7591c59', 'default', 'order', '1', NULL, 'completed', 'completed', 0, 1, '01a228ff-927d-7588-8507-e8127265bc52', 0, 0, 5, 'fixed', 5, 1, 3155760000, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 5, '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.557903+00', '2026-11-29 20:29:27.819253+00', '2026-11-29 20:29:27.716046+00', '2026-11-29 20:29:27.716046+00', '2026-11-29 20:29:27.838376+00', '104', NULL);
INSERT INTO durable.tasks VALUES ('01a228ff-93af-74c8-8a18-fa27eb8e94e9', 'west', 'report', '"Friday"', NULL, 'pending', NULL, 3, 0, '01a228ff-93af-74c8-8a18-fa28b98401be', 0, 0, 5, 'fixed', 5, 1, 3155760000, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL, '2026-11-29 20:29:27.856237+00', '2026-11-29 20:29:27.856237+00', NULL, NULL, NULL, NULL, NULL);
INSERT INTO durable.tasks VALUES ('01a228ff-9289-7176-81ad-e4455a23a4d7', 'default', 'failing', NULL, NULL, 'failed', 'failed', 0, 2, '01a228ff-9333-72ab-9e3a-f437c23934d5', 2, 0, 2, 'fixed', 0, 1, 3155760000, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 4, NULL, '2026-11-29 20:29:27.564284+00', '2026-11-29 20:29:27.745194+00', '2026-11-29 20:29:27.716138+00', '2026-11-29 20:29:27.765246+00', '2026-11-29 20:29:27.816236+00', NULL, '{"name":"ValueError","message":"as recorded","traceback":"Traceback (most recent call last):\n  File \"/tmp/ev_dump.py\", line 28, in failing\n    raise ValueError(\"as recorded\")\nValueError: as recorded\n","raw":null}');
INSERT INTO durable.tasks VALUES ('01a228ff-927d-7d5c-aa8a-820da0537783', 'default', 'child', '2', NULL, 'completed', 'completed', 0, 1, '01a228ff-933d-72c8-9bc2-f13561269944', 0, 0, 5, 'fixed', 5, 1, 3155760000, 0, NULL, NULL, NULL, '01a228ff-927d-7588-8507-e811f7591c59', NULL, NULL, NULL, 2, '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.765812+00', '2026-11-29 20:29:27.765812+00', '2026-11-29 20:29:27.776862+00', '2026-11-29 20:29:27.776862+00', '2026-11-29 20:29:27.781993+00', '4', NULL);
INSERT INTO durable.tasks VALUES ('01a228ff-9288-7804-bbab-83264be5b9e9', 'default', 'child', '4', NULL, 'completed', 'completed', 0, 1, '01a228ff-933e-706c-8a18-03c57311d1ee', 0, 0, 5, 'fixed', 5, 1, 3155760000, 0, NULL, NULL, NULL, '01a228ff-9288-736a-bec7-1e1eea8a4aa3', NULL, NULL, NULL, 2, '01a228ff-9298-71b7-bfa9-82889b32141b', '2026-11-29 20:29:27.765816+00', '2026-11-29 20:29:27.765816+00', '2026-11-29 20:29:27.776914+00', '2026-11-29 20:29:27.776914+00', '2026-11-29 20:29:27.783801+00', '8', NULL);
INSERT INTO durable.tasks VALUES ('01a228ff-93a9-729c-aeb7-b609f5314b8d', 'default', 'order', '3', NULL, 'running', NULL, 0, 1, '01a228ff-93a9-729c-aeb7-b60adec75157', 0, 0, 5, 'fixed', 5, 1, 3155760000, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, '01900000-0000-7000-8000-000000000001', '2026-11-29 20:29:27.851136+00', '2026-11-29 20:29:27.851136+00', '2026-11-29 20:29:27.881102+00', '2026-11-29 20:29:27.881102+00', NULL, NULL, NULL);
INSERT INTO durable.tasks VALUES ('01a228ff-9288-736a-bec7-1e1eea8a4aa3', 'default', 'order', '2', '{"tenant": "acme"}', 'sleeping', NULL, 0, 1, '01a228ff-9288-736a-bec7-1e1f1ac6a192', 0, 0, 5, 'fixed', 5, 1, 3155760000, 0, NULL, NULL, NULL, NULL, NULL, NULL, 'order-2', 5, NULL, '2026-11-29 20:29:27.561233+00', '2126-11-05 20:29:27.835823+00', '2026-11-29 20:29:27.716119+00', '2026-11-29 20:29:27.716119+00', NULL, NULL, NULL);

-- Data for Name: waits; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.waits VALUES ('01a228ff-9288-736a-bec7-1e1eea8a4aa3', 'bf8a04f1-5680-3820-72d8-334b63c673a8', 'event', 'paid:2', 'default', 'paid:2', NULL, '2126-11-05 20:29:27.835823+00', '2026-11-29 20:29:27.836857+00');

-- Data for Name: workers; Type: TABLE DATA; Schema: durable; Owner: -

INSERT INTO durable.workers VALUES ('01900000-0000-7000-8000-000000000001', 'gone:1', '{default}', '00:02:00', '2026-11-29 20:29:27.881102+00', '2026-11-29 20:29:27.881102+00', '2026-11-29 20:31:27.881102+00', NULL);

-- Name: checkpoints checkpoints_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.checkpoints
    ADD CONSTRAINT checkpoints_pkey PRIMARY KEY (task_id, key);

-- Name: events events_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (queue_name, name);

-- Name: queues queues_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.queues
    ADD CONSTRAINT queues_pkey PRIMARY KEY (queue_name);

-- Name: runs runs_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.runs
    ADD CONSTRAINT runs_pkey PRIMARY KEY (task_id, attempt);

-- Name: schedules schedules_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.schedules
    ADD CONSTRAINT schedules_pkey PRIMARY KEY (name);

-- Name: tasks tasks_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.tasks
    ADD CONSTRAINT tasks_pkey PRIMARY KEY (task_id);

-- Name: waits waits_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.waits
    ADD CONSTRAINT waits_pkey PRIMARY KEY (task_id, key);

-- Name: workers workers_pkey; Type: CONSTRAINT; Schema: durable; Owner: -

ALTER TABLE ONLY durable.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (worker_id);

-- Name: events_emitted_at_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX events_emitted_at_idx ON durable.events USING btree (queue_name, emitted_at);

-- Name: events_undelivered_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX events_undelivered_idx ON durable.events USING btree (emitted_at) WHERE (delivered_at IS NULL);

-- Name: schedules_next_tick_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX schedules_next_tick_idx ON durable.schedules USING btree (next_tick_at) WHERE (paused_at IS NULL);

-- Name: tasks_cancel_at_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX tasks_cancel_at_idx ON durable.tasks USING btree (cancel_at) WHERE ((finished_at IS NULL) AND (cancel_at IS NOT NULL));

-- Name: tasks_claim_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX tasks_claim_idx ON durable.tasks USING btree (queue_name, priority, available_at, task_id) WHERE (finished_at IS NULL);

-- Name: tasks_finished_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX tasks_finished_idx ON durable.tasks USING btree (queue_name, outcome, finished_at) WHERE (finished_at IS NOT NULL);

-- Name: tasks_idempotency_idx; Type: INDEX; Schema: durable; Owner: -

CREATE UNIQUE INDEX tasks_idempotency_idx ON durable.tasks USING btree (queue_name, idempotency_key) WHERE (idempotency_key IS NOT NULL);

-- Name: tasks_parent_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX tasks_parent_idx ON durable.tasks USING btree (parent_task_id) WHERE (parent_task_id IS NOT NULL);

-- Name: waits_child_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX waits_child_idx ON durable.waits USING btree (child_task_id) WHERE (child_task_id IS NOT NULL);

-- Name: waits_event_idx; Type: INDEX; Schema: durable; Owner: -

CREATE INDEX waits_event_idx ON durable.waits USING btree (queue_name, event_name) WHERE (event_name IS NOT NULL);

-- PostgreSQL database dump complete

