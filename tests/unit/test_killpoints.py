"""The table of crash points is the program's: a point that nothing kills at is a failure."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.killpoints import POINTS

SOURCE = Path(__file__).parents[2] / "syncd"


def named() -> set[str]:
    """The names of all crash points in the program."""
    found: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "crash_point":
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{file.name}:{node.lineno}: a name that only a run tells"
                found.add(str(name.value))
    return found


def test_every_crash_point_is_killed_at() -> None:
    """A new one needs a line in tests/support/killpoints.py, and with it a kill."""
    assert named() - {point.name for point in POINTS} == set()


def test_every_point_of_the_table_is_in_the_program() -> None:
    """One that was removed or renamed goes from the table, too."""
    assert {point.name for point in POINTS} - named() == set()


def test_no_point_is_listed_twice() -> None:
    """A point has one role and one situation."""
    assert len({point.name for point in POINTS}) == len(POINTS)
