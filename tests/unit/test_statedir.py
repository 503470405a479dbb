"""Small files of the state directory: a person's word, and what is told of a folder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from syncd import cli as command_line
from syncd.errors import EXIT_FAILED, EXIT_OK, DiskProblem
from syncd.model import Problem
from syncd.statedir import DAEMON_FILE, StateDir
from syncd.status import FolderState, FolderStatus

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


@pytest.mark.fault("K4")
@pytest.mark.parametrize(
    ("state", "codes", "healthy"),
    [
        *((state, [], state not in {"failed", "halted", "stopped"}) for state in FolderState),
        *((FolderState.IN_SYNC, ["unreadable", code], False) for code in ("stale", "channel_behind", "not_gone_back")),
        (FolderState.IN_SYNC, ["unreadable", "drift"], True),
    ],
)
def test_who_has_to_be_looked_at_is_told_by_the_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], state: FolderState, codes: list[str], healthy: bool
) -> None:
    """A monitor hears of a freeze, too; and sees what a host follows."""
    place = StateDir(tmp_path)
    place.prepare()
    problems = tuple(Problem("", code, code) for code in codes)
    one = FolderStatus("subscribe", "app", "/m", state=state, channel="stable", pinned=7, problems=problems)
    place.write_status("one.json", one.to_json())
    place.write_status(DAEMON_FILE, {"beat": time.time()})
    with pytest.MonkeyPatch.context() as patch, place.lock():
        patch.setenv("SYNCD_DAEMON__STATE_DIR", str(tmp_path))
        assert command_line.run(["status"]) == (EXIT_OK if healthy else EXIT_FAILED)
    assert "pin 7" in capfd.readouterr().out
