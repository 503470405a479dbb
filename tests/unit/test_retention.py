"""Which generations may go."""

from __future__ import annotations

import pytest

from syncd.retention import Aged, expired

DAY = 86400.0
NOW = 1_000 * DAY


def aged(*days_ago: float | None) -> list[Aged]:
    """Generations 1.., each replaced so many days ago; ``None``: not replaced."""
    return [Aged(number, None if days is None else NOW - days * DAY) for number, days in enumerate(days_ago, 1)]


@pytest.mark.parametrize(
    ("sentence", "generations", "held", "keep", "days", "gone"),
    [
        ("the newest stays, whatever the numbers say", aged(None), set(), 1, 0.001, []),
        ("beyond the newest two goes", aged(3, 2, 1, None), set(), 2, 0, [1, 2]),
        ("no limit keeps all", aged(900, 800, 700, None), set(), 0, 0, []),
        ("replaced longer ago than the days goes", aged(40, 31, 29, None), set(), 50, 30, [1, 2]),
        ("an old release that was replaced yesterday stays", aged(400, 1, None), set(), 50, 30, [1]),
        ("what a channel points at stays", aged(400, 300, 1, None), {1}, 2, 30, [2]),
        ("replaced within the grace time stays", aged(3, 0.0001, None), set(), 1, 30, [1]),
        ("order does not matter", list(reversed(aged(3, 2, 1, None))), set(), 2, 0, [1, 2]),
    ],
)
def test_what_expires(sentence, generations, held, keep, days, gone):
    found = expired(generations, frozenset(held), keep=keep, days=days, grace=600, now=NOW)
    assert found == gone, sentence
