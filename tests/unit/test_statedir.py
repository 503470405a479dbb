"""Small files of the state directory that hold a person's word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from syncd.errors import DiskProblem
from syncd.statedir import StateDir

if TYPE_CHECKING:
    from pathlib import Path


def test_a_pin_is_what_was_said(tmp_path: Path) -> None:
    """Nothing said is no pin; the last word counts."""
    state = StateDir(tmp_path)
    state.prepare()
    pin = state.pin("app")
    assert pin.number() == 0
    for number in (7, 8, 0, 0):
        pin.set(number)
        assert pin.number() == number


@pytest.mark.fault("R8")
@pytest.mark.parametrize("damage", [b"", b"zz", b"\xff\xfe", b"-1", b"1" * 30, None], ids=repr)
def test_a_damaged_pin_does_not_let_go(tmp_path: Path, damage: bytes | None) -> None:
    """Nobody said that the channel may be followed again; what to say is in the hint."""
    state = StateDir(tmp_path)
    state.prepare()
    if damage is None:
        (tmp_path / "pin" / "app").mkdir()
    else:
        (tmp_path / "pin" / "app").write_bytes(damage)
    with pytest.raises(DiskProblem) as told:
        state.pin("app").number()
    assert told.value.hint
    if damage is not None:
        state.pin("app").set(3)
        assert state.pin("app").number() == 3
