"""A worker's options: what they come to, and those that cannot work."""

import os
import socket
from datetime import timedelta
from typing import Any

import pytest

from durable_sa import DurableError, InvalidConfiguration, InvalidName
from durable_sa.worker.settings import Settings


def resolve(**options: Any) -> Settings:
    return Settings.resolve(options, "mails")  # type: ignore[arg-type]


def test_without_options_it_serves_the_clients_queue_ten_tasks_at_a_time() -> None:
    assert resolve() == Settings(
        queue_names=("mails",),
        concurrency=10,
        batch_size=None,
        claim_timeout=120.0,
        poll_interval=0.25,
        name=f"{socket.gethostname()}:{os.getpid()}",
        fatal_on_lease_timeout=False,
        shutdown_timeout=30.0,
        listen=True,
        listen_url=None,
        health_port=None,
        queue_concurrency={},
    )
    assert resolve(queue_names=None, batch_size=None, worker_id=None, health_port=None, listen_url=None) == resolve()


def test_durations_are_seconds_or_timedeltas_with_their_fractions() -> None:
    half = timedelta(milliseconds=1500)
    settings = resolve(claim_timeout=half, poll_interval=half, shutdown_timeout=half)
    assert settings == resolve(claim_timeout=1.5, poll_interval=1.5, shutdown_timeout=1.5)
    assert resolve(claim_timeout=1, shutdown_timeout=0, poll_interval=0.001).claim_timeout == 1.0


def test_queues_keep_their_order_and_are_served_once() -> None:
    assert resolve(queue_names=["b", "a", "b"]).queue_names == ("b", "a")
    assert resolve(queue_names=("é" * 100,)).queue_names == ("é" * 100,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"claim_timeout": 0.999}, InvalidConfiguration, r"claim_timeout \(seconds\): 0.999 is not between 1 and"),
        ({"claim_timeout": timedelta(days=36_526)}, InvalidConfiguration, "claim_timeout"),
        ({"claim_timeout": True}, InvalidConfiguration, "claim_timeout: .*not bool"),
        ({"poll_interval": 0}, InvalidConfiguration, "poll_interval"),
        ({"poll_interval": float("nan")}, InvalidConfiguration, "poll_interval"),
        ({"shutdown_timeout": -1}, InvalidConfiguration, "shutdown_timeout"),
        ({"shutdown_timeout": "30"}, InvalidConfiguration, "shutdown_timeout: .*not str"),
        ({"concurrency": 0}, InvalidConfiguration, "concurrency: 0 is not between 1 and"),
        ({"concurrency": True}, InvalidConfiguration, "concurrency: it must be an int, not bool"),
        ({"concurrency": None}, InvalidConfiguration, "concurrency"),
        ({"batch_size": 0}, InvalidConfiguration, "batch_size"),
        ({"batch_size": 1.0}, InvalidConfiguration, "batch_size: it must be an int, not float"),
        ({"queue_names": "mails"}, InvalidConfiguration, r"queue_names: .*Write queue_names=\['mails'\]"),
        ({"queue_names": []}, InvalidConfiguration, "queue_names: there is no queue in it"),
        ({"queue_names": ["a", ""]}, InvalidName, "queue name '' is not valid: it is empty"),
        ({"queue_names": [5]}, InvalidName, "queue name of type int"),
        ({"worker_id": ""}, InvalidName, "worker name '' is not valid: it is empty"),
        ({"worker_id": "é" * 101}, InvalidName, "worker name .*202 bytes of UTF-8 and at most 200"),
        ({"worker_id": "a\n"}, InvalidName, r"U\+000A"),
        ({"worker_id": 7}, InvalidName, "worker name of type int"),
        ({"health_port": 65536}, InvalidConfiguration, "health_port"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], error: type[DurableError], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(**options)


def test_an_option_there_is_not_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'concurency'"):
        resolve(concurency=2)
