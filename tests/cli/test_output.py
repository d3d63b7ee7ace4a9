"""Spans, points in time, and text on terminals."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer

from durable_sa.cli.arguments import duration, json_value, moment
from durable_sa.cli.output import clean, shown
from durable_sa.client.wording import span


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("1.5", 1.5),
        ("90s", 90),
        ("15m", 900),
        ("15min", 900),
        ("12h", 43200),
        ("7D", 604800),
        ("2 w", 1209600),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "soon", "-5s", "5 parsecs", "1h30m", "nan", "999999999999w", "300000w"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        duration(text)


def test_moments() -> None:
    assert moment("2026-01-31T08:00+02:00") == datetime(2026, 1, 31, 6, tzinfo=UTC)
    assert moment("2h") == timedelta(hours=2)
    with pytest.raises(typer.BadParameter, match=r"time zone.*2026-01-31T08:00:00Z"):
        moment("2026-01-31T08:00")
    with pytest.raises(typer.BadParameter, match=r"Add an offset: 2026-01-31T00:00:00Z"):
        moment("2026-01-31")
    for text in ("0001-01-01T00:00+05:00", "9999-12-31T23:59-05:00"):
        with pytest.raises(typer.BadParameter, match=re.escape(repr(text))):
            moment(text)


def test_json_of_files(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert json_value(f"@{path}") == {"a": "ä"}
    for content, problem in ((b'"\xff"', "because it is not UTF-8"), (b"{", r"valid JSON \(line 1, column 2\)\.$")):
        path.write_bytes(content)
        with pytest.raises(typer.BadParameter, match=f"value.json: it is not.*{problem}"):
            json_value(f"@{path}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (-0.2, "0.0 s"),
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (86400 * 400, "400 d"),
    ],
)
def test_spans(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


def test_text_is_shown_and_what_drives_terminals_is_not() -> None:
    assert clean("a\x1b[31m\x07\r\n\u202eß") == "a\\x1b[31m\\x07\\r\n\\u202eß"
    assert shown(None) == ""
    assert shown(True) == "yes"
    assert shown(["a", 1]) == "a, 1"
    assert shown(datetime(2026, 1, 31, 8, tzinfo=UTC)) == "2026-01-31 08:00:00Z"
