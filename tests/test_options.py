import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable_sa.decorators import task
from durable_sa.errors import DurableError, InvalidConfiguration, InvalidName, PayloadTooLarge, SerializationError
from durable_sa.options import (
    MAX_HEADERS_BYTES,
    ResolvedSpawn,
    SpawnOptions,
    TaskOptions,
    encode_headers,
    resolve_spawn_options,
)
from durable_sa.policies import CancellationPolicy, RetryStrategy
from durable_sa.spawns import Spawn
from durable_sa.validation import MAX_DURATION

defaults = TaskOptions(5, RetryStrategy.fixed(5), None, "default")


unset = TaskOptions()


def resolve(own: TaskOptions = unset, /, **options: Any) -> ResolvedSpawn:
    return resolve_spawn_options(cast(SpawnOptions, options), own, defaults)


def test_without_options_all_comes_from_the_client() -> None:
    assert resolve() == ResolvedSpawn(
        max_attempts=5,
        retry_strategy=RetryStrategy.fixed(5),
        cancellation=CancellationPolicy(),
        queue_name="default",
        headers="{}",
        idempotency_key=None,
        available_at=None,
        delay=None,
        priority=0,
    )


def test_a_spawns_options_come_over_the_tasks_over_the_clients() -> None:
    own = TaskOptions(2, RetryStrategy.none(), CancellationPolicy(1), "mail")
    resolved = resolve(own)
    assert (resolved.max_attempts, resolved.retry_strategy, resolved.cancellation, resolved.queue_name) == (
        2,
        RetryStrategy.none(),
        CancellationPolicy(1),
        "mail",
    )
    resolved = resolve(
        own, max_attempts=9, retry_strategy=RetryStrategy.fixed(1), cancellation=CancellationPolicy(), queue_name="q"
    )
    assert (resolved.max_attempts, resolved.retry_strategy, resolved.cancellation, resolved.queue_name) == (
        9,
        RetryStrategy.fixed(1),
        CancellationPolicy(),
        "q",
    )


def test_none_is_as_good_as_absent() -> None:
    assert resolve(**dict.fromkeys(SpawnOptions.__annotations__)) == resolve()


def test_times_and_priorities() -> None:
    when = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert resolve(available_at=when).available_at == datetime(2030, 1, 1, 10, tzinfo=UTC)
    assert resolve(delay=timedelta(milliseconds=1.5)).delay == 0.0015
    assert resolve(delay=0).delay == 0
    assert [resolve(priority=value).priority for value in (-32768, 0, 32767)] == [-32768, 0, 32767]


def test_the_largest_legal_values() -> None:
    resolved = resolve(
        max_attempts=2**31 - 1,
        retry_strategy=RetryStrategy.exponential(MAX_DURATION, 1000, MAX_DURATION, 1),
        cancellation=CancellationPolicy(MAX_DURATION, MAX_DURATION),
        queue_name="q" * 200,
        idempotency_key="k" * 255,
        delay=MAX_DURATION,
    )
    assert resolved.max_attempts == 2**31 - 1
    assert resolved.delay == MAX_DURATION


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_attempts": 0}, InvalidConfiguration, "max_attempts: 0 is not between 1 and 2147483647"),
        ({"max_attempts": 2**31}, InvalidConfiguration, "max_attempts"),
        ({"max_attempts": 1.5}, InvalidConfiguration, "max_attempts: it must be an int, not float"),
        ({"max_attempts": True}, InvalidConfiguration, "max_attempts: it must be an int, not bool"),
        ({"retry_strategy": "fixed"}, InvalidConfiguration, "retry_strategy: it must be a RetryStrategy, not str"),
        ({"cancellation": 5}, InvalidConfiguration, "cancellation: it must be a CancellationPolicy, not int"),
        ({"queue_name": ""}, InvalidName, "The queue name '' is not valid"),
        ({"queue_name": 5}, InvalidName, "it must be a str, not int"),
        ({"idempotency_key": ""}, InvalidName, "The idempotency key '' is not valid"),
        ({"idempotency_key": "k" * 256}, InvalidName, "at most 255"),
        ({"idempotency_key": "é" * 128}, InvalidName, "it has 256 bytes"),
        ({"available_at": datetime(2030, 1, 1)}, InvalidConfiguration, "available_at: .* has no time zone"),
        ({"delay": -1}, InvalidConfiguration, "delay"),
        ({"delay": float("nan")}, InvalidConfiguration, "delay"),
        ({"delay": MAX_DURATION + 1}, InvalidConfiguration, "delay"),
        ({"delay": timedelta.max}, InvalidConfiguration, "delay"),
        ({"delay": 1, "available_at": datetime.now(UTC)}, InvalidConfiguration, "both are given. Give one of them"),
        ({"priority": 32768}, InvalidConfiguration, "priority: 32768 is not between -32768 and 32767"),
        ({"priority": "high"}, InvalidConfiguration, "priority"),
        ({"headers": [1]}, InvalidConfiguration, "headers: it must be a Mapping, not list"),
        ({"headers": {"": 1}}, InvalidName, "The header name '' is not valid"),
        ({"headers": {5: 1}}, InvalidName, "it must be a str, not int"),
        ({"headers": {"durable::x": 1}}, InvalidName, "'durable::' are reserved"),
        ({"headers": {"x": float("inf")}}, SerializationError, "at x: NaN and infinities"),
        ({"headers": {"x": object()}}, SerializationError, "at x: a value of type object has no JSON form"),
        ({"headers": {"x": [{"a\x00": 1}]}}, SerializationError, r"U\+0000"),
        ({"headers": {"x": "x" * MAX_HEADERS_BYTES}}, PayloadTooLarge, "at most 16384"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], error: type[DurableError], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(**options)


def test_an_option_there_is_not_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"spawn\(\) got an unexpected keyword argument 'max_attemps'"):
        resolve(max_attemps=3)


def test_a_missing_default_is_named() -> None:
    with pytest.raises(InvalidConfiguration, match="queue_name: neither the spawn, nor the task, nor the client"):
        resolve_spawn_options({}, TaskOptions(), TaskOptions(5, RetryStrategy.none()))


@pytest.mark.parametrize(
    "options", [{"max_attempts": 0}, {"retry_strategy": 1}, {"cancellation": 1}, {"queue_name": ""}]
)
def test_a_tasks_own_options_are_checked_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises((InvalidConfiguration, InvalidName)):
        TaskOptions(**options)


header_names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(str.strip)
header_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text("ab\\u0", max_size=6), children, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.slow
@given(st.dictionaries(header_names.filter(lambda name: not name.startswith("durable::")), header_values, max_size=3))
def test_headers_are_stored_exactly(headers: dict[str, Any]) -> None:
    assert json.loads(encode_headers(headers)) == headers


def test_the_engines_own_headers_come_on_top() -> None:
    assert json.loads(encode_headers({"a": 1}, {"durable::schedule": "x", "a": 2})) == {
        "durable::schedule": "x",
        "a": 2,
    }
    assert json.loads(encode_headers(None, {"durable::schedule": "x"})) == {"durable::schedule": "x"}
    assert encode_headers(None) == encode_headers({}) == "{}"
    resolved = resolve_spawn_options({}, TaskOptions(), defaults, internal_headers={"durable::schedule": "x"})
    assert resolved.headers == '{"durable::schedule":"x"}'


def test_a_spawn_shows_its_task_and_not_its_params() -> None:
    @task
    async def mail(ctx: Any, params: str) -> None: ...

    spawn = Spawn(mail, "hunter2", priority=5)
    assert (spawn.task, spawn.params, spawn.options) == (mail, "hunter2", {"priority": 5})
    assert "hunter2" not in repr(spawn)
    assert "mail" in repr(spawn)
