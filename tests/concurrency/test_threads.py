"""The threads that `def` steps run in."""

import threading
import time
from collections.abc import Generator
from concurrent.futures import CancelledError, Future

import pytest

from durable_sa.concurrency.threads import StepThreads


class Gate:
    """A call that waits to be let through, and tells that it has begun."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.open.wait(10)
        return threading.current_thread().name


@pytest.fixture
def threads() -> Generator[StepThreads]:
    threads = StepThreads(2)
    yield threads
    threads.shutdown()


def through(gate: Gate, call: "Future[str]") -> str:
    gate.open.set()
    return call.result(10)


def test_no_more_calls_are_made_at_once_than_there_may_be_threads(threads: StepThreads) -> None:
    gates = [Gate() for _ in range(3)]
    calls = [threads.submit(gate) for gate in gates]
    assert gates[0].begun.wait(10)
    assert gates[1].begun.wait(10)
    assert not gates[2].begun.is_set()
    first = through(gates[0], calls[0])
    assert gates[2].begun.wait(10)
    assert through(gates[2], calls[2]) == first
    assert through(gates[1], calls[1]) != first


def test_a_thread_takes_one_call_after_another_before_there_is_a_second(threads: StepThreads) -> None:
    names = {threads.submit(lambda: threading.current_thread().name).result(10)}
    while threads._idle < 1:  # it has told the result, and is about to take the next
        pass
    names.add(threads.submit(lambda: threading.current_thread().name).result(10))
    assert len(names) == 1


def test_what_a_call_raises_is_told_and_ends_no_thread(threads: StepThreads) -> None:
    def leave() -> None:
        raise SystemExit(3)

    for _ in range(5):
        with pytest.raises(SystemExit):
            threads.submit(leave).result(10)
    assert threads.submit(len, "abc").result(10) == 3


def test_calls_that_nobody_waits_for_keep_no_others_waiting(threads: StepThreads) -> None:
    """As steps that time out: nothing can interrupt them, and they may last for ever."""
    stuck = [Gate() for _ in range(6)]
    for gate in stuck:
        call = threads.submit(gate)
        assert gate.begun.wait(10)
        assert not call.cancel()
    assert threads.submit(len, "abc").result(10) == 3
    before = threading.active_count()
    for gate in stuck:
        gate.open.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before - 6:  # their threads end with them
        assert time.monotonic() < deadline
    gates = [Gate(), Gate(), Gate()]
    calls = [threads.submit(gate) for gate in gates]
    assert gates[1].begun.wait(10)
    assert not gates[2].begun.is_set()
    for gate, call in zip(gates, calls, strict=True):
        through(gate, call)


def test_a_call_that_has_not_begun_is_not_made_when_it_is_cancelled_or_the_worker_ends(threads: StepThreads) -> None:
    gates = [Gate() for _ in range(4)]
    calls = [threads.submit(gate) for gate in gates]
    assert gates[0].begun.wait(10)
    assert gates[1].begun.wait(10)
    assert calls[2].cancel()
    threads.shutdown()
    with pytest.raises(CancelledError):
        calls[3].result(10)
    with pytest.raises(RuntimeError, match="the worker has ended"):
        threads.submit(len, "abc")
    for gate, call in zip(gates[:2], calls[:2], strict=True):
        through(gate, call)
    assert not gates[2].begun.is_set()
    assert not gates[3].begun.is_set()
