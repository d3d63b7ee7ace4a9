"""Times of schedules in words."""

import pytest

from durable_sa.dashboard.words import cron_in_words


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("*/15 * * * *", "every 15 minutes"),
        ("* * * * *", "every minute"),
        # The hour begins anew before these have passed a second time.
        ("*/45 * * * *", None),
        ("*/7 * * * *", None),
        ("*/0 * * * *", None),
        ("30 7 * * mon-fri", "Monday to Friday at 07:30"),
    ],
)
def test_words_say_what_an_expression_means(expression: str, words: str | None) -> None:
    assert cron_in_words(expression) == words
