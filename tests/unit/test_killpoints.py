"""The table of crash points is the program's: a point that nothing kills at is a failure."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.killpoints import POINTS

SOURCE = Path(__file__).parents[2] / "syncd"


def named() -> set[str]:
    """Regular expressions for the names of all crash points in the program; ``f"{x}_done"`` stands for any x."""
    found: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "crash_point":
                continue
            (name,) = node.args
            if isinstance(name, ast.JoinedStr):
                found.add(
                    "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else "[a-z]+" for p in name.values)
                )
            else:
                assert isinstance(name, ast.Constant), f"{file.name}:{node.lineno}: a name that nobody can know"
                found.add(re.escape(str(name.value)))
    return found


def test_every_crash_point_is_killed_at() -> None:
    table = {point.name for point in POINTS}
    missing = {name for name in named() if not any(re.fullmatch(name, known) for known in table)}
    assert missing == set(), "add it to tests/support/killpoints.py"


def test_every_point_of_the_table_is_in_the_program() -> None:
    program = named()
    assert {point.name for point in POINTS if not any(re.fullmatch(name, point.name) for name in program)} == set()


def test_no_point_is_listed_twice() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS)
