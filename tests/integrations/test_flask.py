"""`FlaskTasks`: an application context around tasks and steps, and `db.session` as the session of a transaction."""

from collections.abc import Generator
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, select
from sqlalchemy.orm import Mapped, Session, mapped_column, sessionmaker

from durable_sa import Durable, InvalidConfiguration, RetryStrategy, SyncTaskContext, TaskContext, task
from durable_sa.integrations.flask import FlaskTasks
from durable_sa.testing import run_spawned, spawned
from tests.context.support import Runner

flask = pytest.importorskip("flask", reason="flask is not installed")
flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy", reason="flask-sqlalchemy is not installed")


class Shop:
    """A Flask application with Flask-SQLAlchemy."""

    def __init__(self, url: URL, driver: str) -> None:
        self.app = flask.Flask("shop")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url.set(drivername=f"postgresql+{driver}")
        self.db = db = flask_sqlalchemy.SQLAlchemy(self.app)

        class Order(db.Model):  # type: ignore[name-defined,misc]
            id: Mapped[int] = mapped_column(primary_key=True)
            item: Mapped[str]

        self.Order = Order
        self.ended: list[str] = []
        self.app.teardown_appcontext(lambda _: self.ended.append("context"))
        with self.app.app_context():
            db.create_all()

    def items(self) -> list[str]:
        with self.app.app_context():
            return list(self.db.session.scalars(select(self.Order.item).order_by(self.Order.id)))


@pytest.fixture(params=["psycopg", "psycopg2"])
def shop(request: pytest.FixtureRequest, durable: Durable, database_url: URL) -> Generator[Shop]:
    shop = Shop(database_url, request.param)
    yield shop
    with shop.app.app_context():
        shop.db.engine.dispose()


def client(shop: Shop, database_url: URL, **options: Any) -> Durable:
    return Durable(
        database_url.set(drivername="postgresql+psycopg"),
        hooks=[FlaskTasks(shop.app, shop.db)],
        default_retry_strategy=RetryStrategy.fixed(0),
        **options,
    )


def tasks_of(shop: Shop) -> list[Any]:
    db, order = shop.db, shop.Order

    def save(item: str) -> None:
        """Code of the application, which knows of no tasks."""
        assert flask.current_app.name == "shop"
        db.session.add(order(item=item))
        db.session.flush()

    def place(session: Session, item: str) -> str:
        assert db.session() is session
        save(item)
        if item == "refused":
            raise LookupError
        return item

    def name_in_step() -> str:
        return flask.current_app.name

    @task("in async")
    async def first(ctx: TaskContext, item: str) -> str:
        await ctx.transaction("place", place, item)
        return await ctx.step("name", name_in_step)

    @task("in sync")
    def second(ctx: SyncTaskContext, item: str) -> str:
        outside = db.session()
        ctx.transaction("place", place, item)
        assert db.session() is outside
        return ctx.step("name", name_in_step) + flask.current_app.name

    return [first, second]


async def test_the_session_is_that_of_the_transaction(shop: Shop, database_url: URL):
    first, second = tasks_of(shop)
    async with client(shop, database_url, tasks=[first, second]) as durable, durable.worker():
        run = Runner(durable)
        assert await run(first, "a") == "shop"
        assert await run(second, "b") == "shopshop"
        for failing in (first, second):
            assert (await run.failure(failing, "refused", max_attempts=1)).name == "LookupError"
    assert shop.items() == ["a", "b"]
    assert len(shop.ended) >= 8


async def test_it_is_so_in_a_context_that_its_code_enters(shop: Shop, database_url: URL):
    def place(session: Session, item: str) -> None:
        for number in range(2):
            with shop.app.app_context():
                assert shop.db.session() is session
                shop.db.session.add(shop.Order(item=f"{item}{number}"))
        assert shop.db.session() is session

    @task
    def work(ctx: SyncTaskContext, item: str) -> None:
        ctx.transaction("place", place, item)
        with shop.app.app_context():
            shop.db.session.add(shop.Order(item="not committed"))

    async with client(shop, database_url, tasks=[work]) as durable, durable.worker():
        run = Runner(durable)
        for spawned_task in [await run.spawn(work, item) for item in "ab"]:
            assert (await run.wait(spawned_task)).status == "completed"
    assert sorted(shop.items()) == ["a0", "a1", "b0", "b1"]
    with shop.app.app_context():
        durable.spawn_with(shop.db.session, work, "c")
        (ran,) = run_spawned(shop.db.session, durable)
        assert ran.status == "completed"
        assert {"c0", "c1"} < set(shop.db.session.scalars(select(shop.Order.item)))
        shop.db.session.rollback()
    assert len(shop.items()) == 4


async def test_commit_inside_is_refused(shop: Shop, database_url: URL):
    def commits(session: Session) -> None:
        shop.db.session.add(shop.Order(item="x"))
        shop.db.session.commit()

    @task
    def work(ctx: SyncTaskContext) -> None:
        ctx.transaction("commits", commits)

    async with client(shop, database_url, tasks=[work]) as durable, durable.worker():
        assert (await Runner(durable).failure(work)).name == "InvalidState"
    assert shop.items() == []


async def test_a_scoped_session_as_sync_bind_is_used_the_same_way(shop: Shop, database_url: URL):
    """Without the hooks the tasks push the context themselves."""
    db, order = shop.db, shop.Order

    def place(session: Session) -> None:
        assert db.session() is session
        db.session.add(order(item="c"))

    @task("async")
    async def first(ctx: TaskContext) -> None:
        with shop.app.app_context():
            await ctx.transaction("place", place)

    @task("sync")
    def second(ctx: SyncTaskContext) -> None:
        with shop.app.app_context():
            ctx.transaction("place", place)

    async with Durable(database_url, sync_bind=db.session, tasks=[first, second]) as durable, durable.worker():
        await Runner(durable)(first)
        await Runner(durable)(second)
    assert shop.items() == ["c", "c"]


async def test_asyncpg_alone_is_refused(shop: Shop, database_url: URL, monkeypatch: pytest.MonkeyPatch):
    hooks = [FlaskTasks(shop.app, shop.db)]
    with pytest.raises(InvalidConfiguration, match="psycopg"):
        Durable(database_url, hooks=hooks)
    monkeypatch.setenv("DURABLE_DATABASE_URL", database_url.render_as_string(hide_password=False))
    # A web process need not have a database of its own, so it is refused when a worker starts.
    durable = Durable(hooks=hooks)
    with pytest.raises(InvalidConfiguration, match="psycopg"):
        await durable.start_worker()
    assert Durable(database_url, hooks=[FlaskTasks(shop.app)]).tasks == {}
    durable = Durable(database_url, hooks=hooks, sync_bind=shop.db.session, tasks=tasks_of(shop))
    async with durable, durable.worker():
        assert await Runner(durable)(durable.tasks["in sync"], "d") == "shopshop"
    assert shop.items() == ["d"]


def test_run_spawned_uses_the_session_of_the_test(shop: Shop, database_url: URL):
    first, second = tasks_of(shop)
    durable = client(shop, database_url, tasks=[first, second])
    engine = create_engine(database_url.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection, connection.begin() as transaction:
        session = sessionmaker(connection, join_transaction_mode="create_savepoint")()
        durable.spawn_with(session, first, "a")
        durable.spawn_with(session, second, "b")
        session.commit()
        assert [info.output for info in run_spawned(session, durable)] == ["shop", "shopshop"]
        assert session.scalars(select(shop.Order.item)).all() == ["a", "b"]
        assert [info.status for info in spawned(session)] == ["completed", "completed"]
        session.close()
        transaction.rollback()
    engine.dispose()
    assert shop.items() == []
