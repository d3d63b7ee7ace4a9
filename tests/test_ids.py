"""Ids: distinct wherever they are drawn, and the same where a repetition has to meet the first time."""

import os
import subprocess
import sys
import uuid

import pytest

from durable_sa.ids import child_id, family, is_part, new_id, step_key, without_family

FORKING = """
import os, sys, time
from durable_sa.ids import new_id

new_id()
start = time.time() + 0.1
for _ in range(4):
    if os.fork() == 0:
        while time.time() < start:
            pass
        os.write(1, b"".join(new_id().bytes for _ in range(200)))
        os._exit(0)
for _ in range(4):
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.slow
def test_processes_that_were_forked_draw_ids_of_their_own() -> None:
    """As servers do that load the application first and fork their workers then."""
    drawn = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, check=True).stdout
    ids = [drawn[start : start + 16] for start in range(0, len(drawn), 16)]
    assert len(ids) == 800
    assert len(set(ids)) == 800
    # Not by their times alone.
    assert len({each[8:] for each in ids}) == 800


def test_a_step_has_the_same_key_in_every_run_and_no_other_has_it() -> None:
    calls = [
        ("step", "a", "[]", (), 0),
        ("sleep", "a", "[]", (), 0),
        ("step", "b", "[]", (), 0),
        ("step", "a", "[1]", (), 0),
        ("step", "a", "[]", (1,), 0),
        ("step", "a", "[]", ("1",), 0),
        ("step", "a", "[]", (), 1),
        ("step", "a\ud800", "[]", (), 0),
    ]
    keys = [step_key(*call) for call in calls]
    assert keys == [step_key(*call) for call in calls]
    parts = [step_key(*call, part=True) for call in calls]
    assert len({*keys, *parts}) == 2 * len(calls)
    assert [is_part(key) for key in [*keys, *parts]] == [False] * len(calls) + [True] * len(calls)
    assert keys[0] == uuid.UUID("86bc9a60-4049-2187-2aca-59d70a15d550"), "what is stored in databases is found by it"
    assert keys[1] == uuid.UUID("ea97cf03-821c-6951-7667-2aaa859c2cba")
    assert family(keys[0]) == family(keys[3]) == family(keys[6]), "other arguments, the next occurrence"
    assert len({family(keys[position]) for position in (0, 1, 2, 4, 5, 7)}) == 6, "another kind, name or branch"
    first = uuid.UUID("470956ef-4049-2187-2aca-59d70a15d550")
    assert without_family(keys[0]) == without_family(first), "as it was stored before keys had families"


def test_a_child_has_one_id_for_each_call_of_its_parent() -> None:
    parent, other = new_id(), new_id()
    key, another = step_key("spawn", "a", "", (), 0), step_key("spawn", "b", "", (), 0)
    child = child_id(parent, key)
    assert child == child_id(parent, key)
    assert len({child, child_id(parent, another), child_id(other, key), parent, other}) == 5
    assert child.version == 7
    assert child.bytes[:6] == parent.bytes[:6]
