"""Small files of the state directory: a person's word, and what is told of a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


@pytest.mark.fault("C3")
def test_drafts_of_killed_processes_are_swept_at_the_next_start(tmp_path: Path) -> None:
    """A process is killed (SIGKILL) between writing and renaming a status file; of a running one a draft lies there.

    The next start removes what the dead one left, and nothing else.
    """
    state = StateDir(tmp_path)
    state.prepare()
    code = (
        "import os, signal, sys; from pathlib import Path; from syncd.statedir import StateDir;"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "StateDir(Path(sys.argv[1])).write_status('app.json', {})"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    [left] = (tmp_path / "status").iterdir()
    names = ["status/app.json", "pin/.keep.me", f"pin/.app.{os.getppid()}"]
    theirs = [tmp_path / name for name in names]
    for file in theirs:
        file.touch()
    with state.lock():
        assert not left.exists()
        assert [file for file in theirs if not file.exists()] == []


@pytest.mark.fault("R8")
@pytest.mark.parametrize("damage", [b"", b"zz", b"\xff\xfe", b"-1", b"1" * 30, None], ids=repr)
def test_a_damaged_pin_does_not_let_go(tmp_path: Path, damage: bytes | None) -> None:
    """The pin file is empty, text, no UTF-8, negative, a number of 30 digits, or a directory.

    Reading it is a DiskProblem with a hint, not a host without a pin; a file is put right by setting it anew.
    """
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
    """`syncd status` reads a folder's status in each state, and with problems such as `stale`.

    It exits with a failure where somebody has to look, and shows what the host is pinned to.
    """
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
