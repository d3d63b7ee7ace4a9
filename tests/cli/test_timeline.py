"""A long timeline is grouped to fit a screen; a short one shows every entry."""

from datetime import UTC, datetime, timedelta

from durable_sa.cli.timeline import GROUPED_FROM, MOST_ENTRIES, Moment, entries

BEGIN = datetime(2026, 1, 31, 8, tzinfo=UTC)


def moments(*names: str, failed: tuple[int, ...] = ()) -> list[Moment]:
    return [
        Moment(BEGIN + timedelta(seconds=number), name, "", 1.0 if number else None, failed=number in failed)
        for number, name in enumerate(names)
    ]


def shown(found: list[Moment], *, everything: bool = False) -> list[tuple[str, float | None]]:
    rows = [(entry.row()["what"], entry.took) for entry in entries(found, everything=everything)]
    assert everything or len(rows) < GROUPED_FROM
    return rows


def test_a_short_one_is_not_grouped() -> None:
    assert len(shown(moments(*["step 'a'"] * (GROUPED_FROM - 1)))) == GROUPED_FROM - 1


def test_repetitions_are_one_line_for_each_of_their_parts() -> None:
    names = [name for number in range(100) for name in (f"step 'fetch-{number}'", "step 'store'")]
    assert shown(moments("spawned", *names, "attempt 1 completed")) == [
        ("spawned", None),
        ("step 'fetch-#', 100 times", 100.0),
        ("step 'store', 100 times", 100.0),
        ("attempt 1 completed", 1.0),
    ]
    assert len(shown(moments(*names), everything=True)) == 200


def test_what_failed_is_not_hidden_among_what_did_not() -> None:
    found = shown(moments(*["step 'a'"] * 200, failed=(120,)))
    assert found == [("step 'a', 120 times", 119.0), ("step 'a'", 1.0), ("step 'a', 79 times", 79.0)]


def test_without_repetitions_the_middle_is_counted() -> None:
    names = [f"step '{chr(97 + number // 26)}{chr(97 + number % 26)}'" for number in range(200)]
    found = shown(moments(*names))
    assert len(found) == MOST_ENTRIES
    assert found[0] == ("step 'aa'", None)
    assert found[-1][0] == names[-1]
    assert any(what == "189 entries (--all)" for what, _ in found)
