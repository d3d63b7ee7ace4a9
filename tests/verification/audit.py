"""A schema for tests in which triggers write down every change of the durable tables: their history, not their end."""

DDL = """
CREATE SCHEMA audit;

CREATE TABLE audit.log (
    seq bigserial PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    application text NOT NULL DEFAULT current_setting('application_name'),
    relation text NOT NULL,
    was json,
    became json
);

CREATE FUNCTION audit.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit.log (relation, was, became) VALUES (
        TG_TABLE_NAME,
        CASE WHEN TG_OP <> 'INSERT' THEN row_to_json(OLD) END,
        CASE WHEN TG_OP <> 'DELETE' THEN row_to_json(NEW) END
    );
    RETURN NULL;
END $$;

CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON durable.tasks FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON durable.runs FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON durable.checkpoints
    FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON durable.waits FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER note AFTER INSERT OR DELETE ON durable.events FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER note AFTER INSERT OR DELETE ON durable.workers FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER lost AFTER UPDATE OF lost_at ON durable.workers FOR EACH ROW EXECUTE FUNCTION audit.note();

CREATE SEQUENCE audit.raised;

CREATE FUNCTION audit.fail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.03 THEN
        PERFORM nextval('audit.raised');
        RAISE EXCEPTION 'injected' USING ERRCODE = CASE WHEN random() < 0.5 THEN '40001' ELSE '40P01' END;
    END IF;
    RETURN NEW;
END $$;

CREATE TABLE effects (id bigserial, task_id uuid NOT NULL, what text NOT NULL);
CREATE TABLE accounts (account int PRIMARY KEY, balance bigint NOT NULL);
CREATE TABLE transfers (task_id uuid NOT NULL, source int NOT NULL, target int NOT NULL, amount bigint NOT NULL);
CREATE TABLE orders (op text NOT NULL, task_id uuid);
INSERT INTO accounts SELECT account, 1000 FROM generate_series(1, 10) account;
"""
"""Besides the triggers, what the tasks of the tests write; without unique keys, so that whatever is doubled shows."""

ACCOUNTS = 10
BALANCE = 1000
