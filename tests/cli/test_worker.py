"""`durable worker`: processes that run tasks, are told to stop, and start anew when files change."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from sqlalchemy import URL, text

from durable_sa import Durable, InvalidConfiguration, TaskStatus
from durable_sa.cli.loading import load
from tests.cli.support import process
from tests.support import eventually

APP = """
import asyncio
from durable_sa import Durable, TaskContext

durable = Durable()
class Holder:
    inner = durable
nothing = 1

@durable.task
async def answer(ctx: TaskContext) -> int:
    return ANSWER

@durable.task
async def long(ctx: TaskContext) -> int:
    await ctx.step("sleep", asyncio.sleep, 600)
    return 1
"""


@pytest.fixture
def url(database_url: URL) -> str:
    return database_url.render_as_string(hide_password=False)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP.replace("ANSWER", "42"))
    return tmp_path


async def run(durable: Durable, name: str) -> object:
    spawned = await durable.spawn_by_name(name, unchecked=True)
    return (await durable.wait_for_result(spawned, timeout=20)).output


async def state(durable: Durable, task_id: object) -> TaskStatus:
    result = await durable.get_task_result(task_id)  # type: ignore[call-overload]
    return result.status  # type: ignore[no-any-return]


@pytest.mark.slow
async def test_it_runs_tasks_until_it_is_told_to_stop(durable: Durable, url: str, app: Path) -> None:
    with process("worker", "app:durable", url=url, cwd=app) as worker:
        assert await run(durable, "answer") == 42
        worker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait) == 0, worker.said
    assert "is shutting down: no run is in progress" in worker.said
    assert "alembic" not in worker.said


@pytest.mark.slow
async def test_modules_are_not_searched_for_garbage(durable: Durable, url: str, app: Path) -> None:
    """A full collection walks through less than a quarter of the objects that the imports have made."""
    code = "return int(len(gc.get_objects()) < gc.get_freeze_count() / 4)"
    source = (app / "app.py").read_text().replace("return 42", code)
    (app / "app.py").write_text(f"import gc\n{source}")
    with process("worker", "app:durable", url=url, cwd=app):
        assert await run(durable, "answer") == 1


@pytest.mark.slow
async def test_options_reach_the_worker(durable: Durable, url: str, app: Path) -> None:
    await durable.create_queue("mail")
    options = ["-q", "mail", "-q", "default", "--concurrency", "3", "--claim-timeout", "7", "--worker-id", "w7"]
    options += ["--queue-concurrency", "mail=1"]
    with process("worker", "app:Holder.inner", *options, "--no-listen", url=url, cwd=app):
        assert await run(durable, "answer") == 42
        async with durable.engine.connect() as connection:
            row = (await connection.execute(text("SELECT * FROM durable.workers"))).one()
        assert (row.name, row.queue_names, row.claim_timeout.seconds) == ("w7", ["mail", "default"], 7)


@pytest.mark.slow
async def test_runs_are_given_back_when_it_is_told_twice(durable: Durable, url: str, app: Path) -> None:
    with process("worker", "app:durable", url=url, cwd=app) as worker:
        task_id = (await durable.spawn_by_name("long", unchecked=True)).task_id

        async def running() -> bool:
            return await state(durable, task_id) is TaskStatus.RUNNING

        await eventually(running)
        worker.signal(signal.SIGINT)
        await asyncio.sleep(0.2)
        assert worker.running
        worker.signal(signal.SIGINT)
        assert await asyncio.to_thread(worker.wait) == 0, worker.said
    assert await state(durable, task_id) is TaskStatus.PENDING


@pytest.mark.slow
async def test_it_says_what_it_serves(durable: Durable, url: str, app: Path) -> None:
    with process("worker", "app:durable", "--worker-id", "w7", url=url, cwd=app) as worker:
        await asyncio.to_thread(worker.until_said, "worker w7 has started (queues: default; tasks: 2)")
        worker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait) == 0, worker.said
        assert worker.said.endswith("worker w7 has ended\n")


@pytest.mark.slow
def test_it_warns_where_no_task_is_registered(url: str, app: Path) -> None:
    (app / "app.py").write_text("from durable_sa import Durable\ndurable = Durable()\n")
    with process("worker", "app:durable", url=url, cwd=app) as worker:
        worker.until_said("app:durable has no registered task and will run none: import the modules that define them")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("app", "'app' has another form. Write, for example, app.tasks:durable."),
        ("nowhere:durable", "the module 'nowhere' was not found. The search path is "),
        ("app.tasks:durable", "the module 'app.tasks' was not found. The search path is "),
        ("app:nothing", "'nothing' in app is not a Durable. Write app:durable."),
        ("app:missing.inner", "'missing.inner' in app is not a Durable. Write app:durable."),
        ("empty:durable", "'durable' in empty is not a Durable. The module contains none."),
    ],
)
def test_a_target_that_is_not_there(app: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str) -> None:
    (app / "empty.py").touch()
    monkeypatch.chdir(app)
    monkeypatch.setattr("sys.path", sys.path.copy())
    monkeypatch.setattr("sys.modules", sys.modules.copy())
    with pytest.raises(InvalidConfiguration) as caught:
        load(target)
    assert str(caught.value).startswith(f"MODULE:DURABLE: {message}")


@pytest.mark.slow
def test_a_target_that_is_not_there_is_a_usage_error(url: str, app: Path) -> None:
    with process("worker", "app:nothing", url=url, cwd=app) as worker:
        assert worker.wait() == 2
        assert worker.said == "error: MODULE:DURABLE: 'nothing' in app is not a Durable. Write app:durable.\n"


@pytest.mark.slow
def test_what_the_application_itself_misses_is_shown_with_its_place(url: str, app: Path) -> None:
    (app / "app.py").write_text("import a_module_that_is_not_there")
    with process("worker", "app:durable", url=url, cwd=app) as worker:
        assert worker.wait() == 1
        assert "Traceback" in worker.said
        assert "No module named 'a_module_that_is_not_there'" in worker.said


@pytest.mark.slow
def test_what_goes_wrong_in_the_lifespan_is_shown_with_its_place(url: str, app: Path) -> None:
    (app / "app.py").write_text(
        "from contextlib import asynccontextmanager\n"
        "from durable_sa import Durable\n"
        "@asynccontextmanager\n"
        "async def lifespan():\n"
        "    raise ConnectionRefusedError('the cache is away')\n"
        "    yield\n"
        "durable = Durable(lifespan=lifespan)\n"
    )
    with process("worker", "app:durable", url=url, cwd=app) as worker:
        assert worker.wait() == 1
        assert worker.said.splitlines()[-1] == "ConnectionRefusedError: the cache is away"
        assert "error: The database" not in worker.said


@pytest.mark.slow
def test_errors_of_the_worker_are_one_message(url: str, app: Path) -> None:
    for options, code, message in (
        (["--queue", "nope"], 1, "error: There is no queue named 'nope'."),
        (["--claim-timeout", "0.5"], 2, "error: claim_timeout (seconds): 0.5 is not between"),
    ):
        with process("worker", "app:durable", *options, url=url, cwd=app) as worker:
            assert worker.wait() == code
            announced, _, said = worker.said.partition("\n")
            assert announced.startswith("database: ")
            assert said.startswith(message)
            assert "Traceback" not in worker.said


@pytest.mark.slow
def test_the_url_to_listen_comes_from_the_environment(url: str, app: Path) -> None:
    with process("worker", "app:durable", url=url, cwd=app, DURABLE_LISTEN_URL="mysql://me:secret@host/x") as worker:
        assert worker.wait() == 2
        assert "listen_url: 'mysql' is no PostgreSQL driver" in worker.said
        assert "secret" not in worker.said


@pytest.mark.slow
async def test_uvloop_is_used_where_it_is_installed(durable: Durable, url: str, app: Path) -> None:
    (app / "uvloop.py").write_text(
        "import asyncio\n"
        "def new_event_loop():\n"
        "    print('a loop of uvloop', flush=True)\n"
        "    return asyncio.SelectorEventLoop()\n"
    )
    with process("worker", "app:durable", url=url, cwd=app) as worker:
        assert await run(durable, "answer") == 42
        assert "a loop of uvloop" in worker.said


@pytest.mark.slow
async def test_it_starts_anew_when_a_file_changes(durable: Durable, url: str, app: Path) -> None:
    with process("worker", "app:durable", "--reload", url=url, cwd=app) as worker:
        assert await run(durable, "answer") == 42
        (app / "app.py").write_text("this is no Python")
        await asyncio.to_thread(worker.until_said, "SyntaxError")
        (app / "app.py").write_text(APP.replace("ANSWER", "43"))
        assert await run(durable, "answer") == 43
        assert f"{app / 'app.py'} changed, restarting" in worker.said
        worker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait) == 0, worker.said
    async with durable.engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM durable.workers"))).scalar() == 0


@pytest.mark.slow
async def test_a_reload_gives_def_runs_back_first(durable: Durable, url: str, app: Path) -> None:
    blocking = """
import time
from durable_sa import Durable, SyncTaskContext

durable = Durable()

@durable.task
def blocked(ctx: SyncTaskContext) -> int:
    if ctx.attempt == 1:
        time.sleep(600)
    return ctx.attempt
"""
    (app / "app.py").write_text(blocking)
    with process("worker", "app:durable", "--reload", url=url, cwd=app) as worker:
        spawned = await durable.spawn_by_name("blocked", unchecked=True)

        async def running() -> bool:
            return await state(durable, spawned.task_id) is TaskStatus.RUNNING

        await eventually(running)
        (app / "app.py").write_text(f"{blocking}\n# changed")
        # Otherwise it goes on when the lease of 120 seconds is over.
        assert (await durable.wait_for_result(spawned, timeout=30)).output == 2
        assert "app.py changed" in worker.said
    async with durable.engine.connect() as connection:
        errors = await connection.execute(text("SELECT error->>'name' FROM durable.runs ORDER BY attempt"))
        assert list(errors.scalars()) == ["Released", None]


@pytest.mark.slow
async def test_a_link_that_leads_nowhere_hides_no_change(durable: Durable, url: str, app: Path) -> None:
    for name in "abcdefgh":
        (app / f"{name}.py").symlink_to("nowhere.py")
    with process("worker", "app:durable", "--reload", url=url, cwd=app) as worker:
        assert await run(durable, "answer") == 42
        (app / "app.py").write_text(APP.replace("ANSWER", "43"))
        await asyncio.to_thread(worker.until_said, "app.py changed")
        assert await run(durable, "answer") == 43


@pytest.mark.slow
async def test_only_the_directories_named_are_watched(durable: Durable, url: str, app: Path) -> None:
    (app / "watched").mkdir()
    with process("worker", "app:durable", "--reload", "--reload-dir", "watched", url=url, cwd=app) as worker:
        assert await run(durable, "answer") == 42
        (app / "other.py").touch()
        (app / "watched" / "new.py").touch()
        await asyncio.to_thread(worker.until_said, "new.py changed")
        assert "other.py" not in worker.said
