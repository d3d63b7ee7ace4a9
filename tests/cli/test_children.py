"""Lines of a worker's process, as its watcher passes them on, and amounts of memory."""

import asyncio
import io
import os

import pytest
import typer

from durable_sa.cli.arguments import size
from durable_sa.cli.children import Lines, write_line
from tests.support import eventually


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"hello", b"[2] hello\n"),
        (b"", b"[2] \n"),
        (b'{"level": "INFO"}', b'{"worker_process": "2", "level": "INFO"}\n'),
        (b"{}", b"[2] {}\n"),
        (b'{"not": JSON', b'[2] {"not": JSON\n'),
    ],
)
def test_each_line_says_which_process(line: bytes, expected: bytes) -> None:
    log = io.BytesIO()
    write_line(log, "2", line)
    assert log.getvalue() == expected


async def test_lines_arrive_whole_and_the_last_without_its_end() -> None:
    read, write = os.pipe()
    found: list[bytes] = []
    lines = Lines(read, found.append)
    os.write(write, b"one\ntw")
    await eventually(lambda: found)
    assert found == [b"one"]
    os.write(write, b"o\nthree")
    lines.drain()
    assert found == [b"one", b"two", b"three"]
    with pytest.raises(BrokenPipeError):
        os.write(write, b"the pipe is closed")
    os.close(write)
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("512M", 512 * 2**20), ("2g", 2**31), ("1.5GiB", 3 * 2**29), ("100", 100), ("64 KB", 64 * 2**10)],
)
def test_amounts_of_memory(given: str, expected: int) -> None:
    assert size(given) == expected


@pytest.mark.parametrize("given", ["", "M", "-1M", "a lot"])
def test_what_is_no_amount_of_memory(given: str) -> None:
    with pytest.raises(typer.BadParameter, match="512M or 2G"):
        size(given)
