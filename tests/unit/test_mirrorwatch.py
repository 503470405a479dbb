"""When a hinted path is looked at: soon, and ever later if somebody keeps changing it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from syncd import mirrorwatch
from syncd.mirrorwatch import Damper

if TYPE_CHECKING:
    import pytest


def drain(damper: Damper, now: float) -> set[str | None]:
    """Take what is due, all of it found changed."""
    due = damper.take(now)
    damper.found(due, now)
    return due


def test_a_path_is_due_a_settle_time_after_its_first_hint() -> None:
    """Later hints do not put it off; each path waits for itself."""
    damper = Damper(0.5)
    assert damper.wait(0) == math.inf
    damper.note(["a"], 10.0)
    damper.note(["a", "b"], 10.4)
    assert (damper.take(10.4), round(damper.wait(10.4), 6)) == (set(), 0.1)
    assert damper.take(10.5) == {"a"}
    assert damper.wait(11.0) == 0.0
    assert (damper.take(11.0), damper.wait(11.0)) == ({"b"}, math.inf)


def test_who_changes_a_path_for_ever_is_answered_ever_later() -> None:
    """The waits double up to the longest one; another path is not affected."""
    damper = Damper(0.5, 60.0)
    times = []
    for tick in range(40_000):
        now = tick / 100
        damper.note(["log"], now)
        if drain(damper, now):
            times.append(now)
    waits = [round(after - before, 1) for before, after in itertools.pairwise(times)]
    assert waits[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert set(waits[8:]) == {60.0}
    damper.note(["calm"], 400.0)
    assert damper.take(400.5) == {"calm"}


def test_a_path_that_is_left_in_peace_is_answered_quickly_again() -> None:
    """What was found unchanged never counted: syncd's own renames are hints, too."""
    damper = Damper(0.5, 60.0)
    now = 0.0
    for _ in range(12):
        damper.note(["f"], now)
        now += 60.5
        drain(damper, now)
    now += 200.0
    damper.note(["f"], now)
    assert drain(damper, now + 0.5) == {"f"}
    damper.note(["f"], now + 0.6)
    assert drain(damper, now + 1.1) == {"f"}
    for _ in range(10):
        now += 1.0
        damper.note(["own"], now)
        assert damper.take(now + 0.5) == {"own"}


def test_everything_takes_the_place_of_all_else_and_is_damped_as_well() -> None:
    damper = Damper(0.5, 60.0)
    damper.note(["a", None], 0.0)
    assert drain(damper, 0.5) == {None}
    assert damper.wait(0.5) == math.inf
    damper.note([None, "a"], 0.6)
    assert drain(damper, 1.1) == {None}
    damper.note([None, "a"], 1.2)
    assert drain(damper, 1.7) == {"a"}
    assert drain(damper, 2.1) == {None}


def test_too_many_paths_are_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither list grows without bounds."""
    monkeypatch.setattr(mirrorwatch, "MAX_PATHS", 100)
    damper = Damper(0.5)
    damper.note([str(number) for number in range(101)], 0.0)
    assert (len(damper._due), damper.take(0.5)) == (1, {None})
    for number in range(1000):
        damper.found([str(number)], float(number))
    assert len(damper._found) <= 102
    for number in range(300):
        damper.found([f"at once {number}"], 2000.0)
    assert len(damper._found) <= 102


def test_paths_in_peace_make_room_and_those_in_motion_stay_damped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrorwatch, "MAX_PATHS", 10)
    damper = Damper(0.5, 60.0)
    for number in range(9):
        damper.found(["busy"], float(number))
    damper.found([f"calm {number}" for number in range(10)], 9.0)
    damper.found(["busy", "new"], 70.0)
    assert set(damper._found) == {"busy", "new"}
    damper.note(["busy", "new"], 70.0)
    assert damper.take(70.5) == {"new"}
    assert damper.wait(70.5) == 59.5


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from(["a", "b"]), st.booleans()), max_size=60))
def test_no_hint_is_lost_and_none_waits_for_ever(steps: list[tuple[float, str, bool]]) -> None:
    """Whatever comes in which order, a path that was hinted is due within the longest wait and a settle time."""
    damper = Damper(0.5, 8.0)
    now = 0.0
    waiting: dict[str, float] = {}
    for pause, path, changed in steps:
        now += pause
        damper.note([path], now)
        waiting.setdefault(path, now)
        due = damper.take(now)
        if changed:
            damper.found(due, now)
        for each in due:
            del waiting[each]  # type: ignore[arg-type]
        assert all(now - since <= 8.5 + 5 for since in waiting.values())
    assert damper.take(now + 8.5) == set(waiting)
