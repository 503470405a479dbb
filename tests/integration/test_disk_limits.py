"""Disks that end: no room, no inodes, a quota, and files that have holes or cannot be changed; for both sides' state.

Where a fault can hit any of many writes, room is given back bit by bit: each bit lets one more write through, so that
every one of them is the last straw once.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from syncd.daemon import _Board
from syncd.errors import EXIT_TEMPFAIL, DiskProblem
from syncd.mirror import Mirror
from syncd.settings import load
from syncd.signatures import Signer, generate
from syncd.statedir import DAEMON_FILE, StateDir
from syncd.status import FolderStatus
from syncd.trust import Trust
from tests.support.daemon import Daemon
from tests.support.disks import MIB, WAYS, Folder, attributes, filesystem, fill, leave, quota, tmpfs, use_up_inodes
from tests.support.mirror import Keeper, expected, file, litter
from tests.support.mirror import snapshot as tree_of
from tests.support.trees import difference, equal_trees, eventually, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from syncd.upstream import PullResult
    from tests.support.server import NatsServer

MAX_STEPS = 120


# -- sparse files (M6) -------------------------------------------------------------------------------------------------


def sparse(path: Path, size: int, *, data: bytes = b"", at: int = 0) -> None:
    """Make a file that is all hole but for some data."""
    with path.open("wb") as out:
        out.truncate(size)
        out.seek(at)
        out.write(data)
    assert path.stat().st_blocks * 512 < size // 2, "this filesystem knows no holes"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.fault("M6")
async def test_a_sparse_file_arrives_with_all_its_zeros(tmp_path: Path, how: str) -> None:
    """The source has 64 MiB with 4 KiB of data in the middle, and 8 MiB of hole alone; the mirror's are solid.

    Generations send the zeros once, as one chunk; the objects layout sends all of them.
    """
    folder = Folder(tmp_path, how)
    sparse(folder.source / "middle", 64 * MIB, data=random.Random(1).randbytes(4096), at=32 * MIB + 100)
    sparse(folder.source / "hole", 8 * MIB)
    (folder.source / "beside").write_text("small")
    started = time.monotonic()
    pulled = await folder.go()
    assert time.monotonic() - started < 60
    assert folder.litter() == []
    if folder.layout == "generations":
        assert pulled.downloaded_bytes < 2 * MIB
        (folder.source / "hole").chmod(0o600)
        assert (await folder.go()).downloaded_bytes < 2 * MIB


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.fault("M6 X1")
async def test_a_sparse_file_wants_the_room_of_its_size(tmp_path: Path, how: str) -> None:
    """A hole of 64 MiB goes to a mirror with 8 MiB: refused, the mirror stays; without it all goes on."""
    with tmpfs(tmp_path / "disk", "8m") as disk:
        folder = Folder(tmp_path, how, mirror=disk / "mirror")
        (folder.source / "f").write_text("old")
        await folder.go()
        before = snapshot(folder.tree)
        sparse(folder.source / "hole", 64 * MIB)
        (folder.source / "f").write_text("new")
        await folder.push()
        told = await refused(folder)
        assert "space" in told.lower()
        assert "hole" not in snapshot(folder.tree)
        if how != "objects":  # there each file is announced for itself
            assert snapshot(folder.tree) == before
        (folder.source / "hole").unlink()
        await folder.go()
        await folder.rests()


async def refused(folder: Folder) -> str:
    """Pull, which the disk refuses: as a whole, or one path; return what is told."""
    try:
        result = await folder.pull()
    except DiskProblem as problem:
        return str(problem)
    assert result.problems
    return " ".join(problem.text for problem in result.problems)


# -- a quota (M6) ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("M6")
def test_a_quota_that_is_used_up_refuses_content_and_leaves_nothing(tmp_path: Path) -> None:
    """A subvolume of btrfs may hold 4 MiB: content of 6 MiB is staged in pieces, at once and as a copy."""
    with quota(tmp_path / "disk", "4M") as limited, Mirror.open(limited.path / "m") as mirror:
        keeper = Keeper(mirror)
        have, big = file(os.urandom(2 * MIB + 4096)), file(os.urandom(6 * MIB))
        keeper.go({"f": have})
        staged = mirror.stage(big.entry)
        with pytest.raises(DiskProblem, match="EDQUOT") as refused:
            staged.write(big.data)
        assert refused.value.transient
        assert refused.value.hint == "the disk quota is used up"
        (result,) = mirror.stage_bytes([(big.entry, big.data)])
        assert isinstance(result, DiskProblem)
        assert "EDQUOT" in str(result)
        assert litter(limited.path / "m") == []
        assert tree_of(limited.path / "m") == expected({"f": have})
        limited.limit("none")
        assert keeper.go({"f": have, "big": big}).problems == []


@pytest.mark.fault("M6")
def test_a_journal_beyond_the_quota_commits_nothing(tmp_path: Path) -> None:
    """All content is staged when the quota is used up to the last byte: nothing changes until it is raised."""
    with quota(tmp_path / "disk", "8M") as limited, Mirror.open(limited.path / "m") as mirror:
        root = limited.path / "m"
        keeper = Keeper(mirror)
        before = {"f": file("old")}
        keeper.go(before)
        tree = {"f": file("new"), **{f"{n:03}{'x' * 200}": file("") for n in range(300)}}
        plan = keeper.plan(tree)
        limited.settle()
        fill(limited.path, errno.EDQUOT)
        with pytest.raises(DiskProblem, match=r"journal.*EDQUOT"):
            mirror.commit(plan, drift="repair")
        assert tree_of(root) == expected(before)
        assert sorted(path.name for path in (root / ".syncd").iterdir()) == ["lock", "stage"]
        limited.limit("32M")
        assert mirror.commit(plan, drift="repair").problems == []
        assert tree_of(root) == expected(tree)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.fault("M6")
async def test_a_mirror_beyond_its_quota_stays_as_it_is_and_goes_on_when_that_is_raised(
    tmp_path: Path, how: str
) -> None:
    """A subvolume of btrfs may hold 8 MiB of a disk with much more, and a generation of 12 MiB arrives."""
    with quota(tmp_path / "disk", "8M") as limited:
        folder = Folder(tmp_path, how, mirror=limited.path / "mirror")
        (folder.source / "d").mkdir()
        (folder.source / "d/f").write_text("old")
        await folder.go()
        before = snapshot(folder.tree)
        (folder.source / "d/f").write_text("new")
        for name in ("one", "two"):
            (folder.source / name).write_bytes(os.urandom(6 * MIB))
        await folder.push()
        assert os.statvfs(folder.mirror).f_bavail * os.statvfs(folder.mirror).f_frsize > 16 * MIB  # it does not tell
        assert "EDQUOT" in await refused(folder)
        if how == "objects":
            assert not {"one", "two"} <= snapshot(folder.tree).keys()
        else:
            assert snapshot(folder.tree) == before
        limited.limit("64M")
        await folder.go()
        await folder.rests()


# -- files that cannot be changed (M6) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("how", ["objects", "generations"])
@pytest.mark.fault("M6")
async def test_what_an_administrator_fixed_is_a_problem_of_its_path_until_he_lets_go(
    tmp_path: Path, how: str, flag: str
) -> None:
    """Files and a directory of a mirror are made immutable (or append-only) with chattr, all of them to be changed."""
    with filesystem(tmp_path / "disk", "ext4") as disk:
        folder = Folder(tmp_path, how, mirror=disk / "mirror")
        for name in ("content", "mode", "gone", "fine", "d/inside"):
            (folder.source / name).parent.mkdir(exist_ok=True)
            (folder.source / name).write_text("old")
        await folder.go()
        for name in ("content", "fine", "d/inside"):
            (folder.source / name).write_text("new")
        (folder.source / "mode").chmod(0o600)
        (folder.source / "gone").unlink()
        await folder.push()
        fixed = ["content", "mode", "gone", "d"]
        with attributes(flag, *(folder.mirror / name for name in fixed)):
            told = {problem.path: problem.code for problem in (await folder.pull()).problems}
            assert told.keys() >= {"content", "mode", "gone", "d/inside"}
            assert set(told.values()) == {"not_permitted"}
            assert [(folder.mirror / name).read_text() for name in ("content", "gone", "d/inside")] == ["old"] * 3
            assert (folder.mirror / "fine").read_text() == "new"
        await folder.go()
        await folder.rests()


@pytest.mark.fault("M6")
async def test_a_fixed_file_of_a_release_holds_up_neither_the_next_one_nor_for_ever_its_own_removal(
    tmp_path: Path,
) -> None:
    """A file of the current release is made immutable: it is copied instead of linked; it goes once that is over."""
    with filesystem(tmp_path / "disk", "ext4") as disk:
        folder = Folder(tmp_path, "release", mirror=disk / "mirror", rollout={"keep_releases": 1})
        (folder.source / "f").write_text("1")
        (folder.source / "same").write_text("same")
        await folder.go()
        first = folder.tree.resolve()
        with attributes("i", first / "same"):
            (folder.source / "f").write_text("2")
            await folder.go()
            (left,) = (folder.mirror / "releases").glob(".*")
            assert (left / "same").read_text() == "same"
            assert (left / "same").stat().st_ino != (folder.tree / "same").stat().st_ino
            subprocess.run(["chattr", "-i", left / "same"], check=True)
        (folder.source / "f").write_text("3")
        await folder.go()
        assert [path.name for path in (folder.mirror / "releases").iterdir()] == [folder.tree.resolve().name]
        await folder.rests()


# -- the last inode, the last page (X1) --------------------------------------------------------------------------------


@contextmanager
def no_inodes(disk: Path, but: int) -> Iterator[None]:
    heap = use_up_inodes(disk, but)
    try:
        yield
    finally:
        shutil.rmtree(heap)


@contextmanager
def no_pages(disk: Path, but: int) -> Iterator[None]:
    leave(disk, but)
    try:
        yield
    finally:
        (disk / "filler").unlink()


SQUEEZES = {"inodes": no_inodes, "pages": no_pages}


def plant(source: Path) -> None:
    """The first generation."""
    for number in range(3):
        (source / f"d{number}").mkdir()
        (source / f"d{number}/f").write_text("old" * 1000)


def grow(source: Path) -> None:
    """The second one: changed files, new ones, and more new directories than those leave inodes for."""
    for number in range(3):
        (source / f"d{number}/f").write_text("new" * 1000)
        (source / f"n{number}").mkdir()
        (source / f"n{number}/g").write_text("n" * 9000)
    for number in range(12):
        (source / f"empty{number}").mkdir()


def whole(tree: Path, *allowed: dict[str, tuple[Any, ...]]) -> None:
    """Check that each file is one of those it may be; nothing is cut off, or mixed."""
    for path, seen in snapshot(tree, times=False).items():
        if seen[0] == "file":
            assert seen in [one.get(path) for one in allowed], path


async def bit_by_bit(
    disk: Path, squeeze: str, action: Callable[[], Any], check: Callable[[], None]
) -> tuple[list[str], int]:
    """Do something with a bit more room each time until it goes through; return what was told before, and how often."""
    told: list[str] = []
    for free in range(MAX_STEPS):
        with SQUEEZES[squeeze](disk, free):
            try:
                result = await action()
            except DiskProblem as problem:
                told.append(str(problem))
            else:
                if not result.problems:
                    return told, free
                told += [f"{problem.path}: {problem.code}" for problem in result.problems]
            check()
    raise AssertionError(f"never went through: {told}")


def heard(told: list[str], *wanted: str) -> None:
    """Check that each of these was told by some line."""
    for text in wanted:
        assert any(text in line for line in told), (text, told)


MET = {
    "objects": ("cannot stage content", "cannot write the journal", "empty9: no_space"),
    "generations": ("cannot stage content", "cannot write the journal", "empty9: no_space"),
    "release": ("cannot stage content", "cannot make the release 2-", "cannot make d2:", "cannot make n2/g:"),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.fault("X1")
async def test_a_mirror_without_inodes_is_brought_up_as_far_as_they_go_and_wholly_once_they_are_back(
    tmp_path: Path, how: str
) -> None:
    """The mirror's disk has room but inodes for 0, 1, 2 … more files: staging, journal, directories, release."""
    with tmpfs(tmp_path / "disk", "8m", 200) as disk:
        folder = Folder(tmp_path, how, mirror=disk / "mirror")
        plant(folder.source)
        await folder.go()
        old = snapshot(folder.tree, times=False)
        grow(folder.source)
        await folder.push()
        new = snapshot(folder.source, times=False)

        def check() -> None:
            whole(folder.tree, old, new)
            if how == "release":
                assert snapshot(folder.tree, times=False) in (old, new)

        told, _ = await bit_by_bit(disk, "inodes", folder.pull, check)
        heard(told, *MET[how], "inodes")
        assert difference(folder.source, folder.tree) == {}
        await folder.rests()


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.fault("X1")
async def test_a_subscriber_whose_state_has_no_room_never_mixes_anything_up(
    tmp_path: Path, how: str, squeeze: str
) -> None:
    """The disk of the state database (and of what is known of releases) has 0, 1, 2 … pages or inodes left."""
    with tmpfs(tmp_path / "disk", "8m", 100) as disk:
        folder = Folder(tmp_path, how, state=disk / "state")
        plant(folder.source)
        await folder.go()
        old = snapshot(folder.tree, times=False)
        grow(folder.source)
        await folder.push()
        new = snapshot(folder.source, times=False)
        told, _ = await bit_by_bit(disk, squeeze, folder.pull, lambda: whole(folder.tree, old, new))
        heard(told, "full" if squeeze == "pages" else "unable to open database file")
        if how == "release":
            heard(told, "cannot save what is known of a release")
        assert difference(folder.source, folder.tree) == {}
        await folder.rests()


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("how", ["objects", "generations"])
@pytest.mark.fault("X1")
async def test_a_publisher_whose_state_has_no_room_announces_nothing_that_is_not_whole(
    tmp_path: Path, how: str, squeeze: str
) -> None:
    """The disk of the publisher's state database has 0, 1, 2 … pages or inodes left; a mirror is made each time."""
    with tmpfs(tmp_path / "disk", "8m", 100) as disk:
        folder = Folder(tmp_path, how, published=disk / "state")
        plant(folder.source)
        await folder.go()
        old = snapshot(folder.source, times=False)
        grow(folder.source)
        for number in range(30):
            (folder.source / f"more{number}").write_text(f"{number}" * 100)
        new = snapshot(folder.source, times=False)
        pushed = 0

        async def push_and_pull() -> PullResult:
            nonlocal pushed
            try:
                await folder.push()
            except DiskProblem:
                assert (await folder.pull()).problems == []
                raise
            pushed += 1
            return await folder.pull()

        told, tries = await bit_by_bit(disk, squeeze, push_and_pull, lambda: whole(folder.tree, old, new))
        heard(told, "full" if squeeze == "pages" else "unable to open database file")
        assert (len(told), pushed) == (tries, 1)
        assert difference(folder.source, folder.tree) == {}
        await folder.rests()


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.fault("X1 K2")
async def test_nothing_is_followed_that_could_not_be_written_down_as_seen(tmp_path: Path, squeeze: str) -> None:
    """The disk of trust.json has 0, 1, 2 … pages or inodes left while a newer signed generation is there."""
    with tmpfs(tmp_path / "disk", "8m", 100) as disk:
        seed, public = generate()
        folder = Folder(tmp_path, "generations", state=disk / "state", trust=Trust(frozenset({public}), 1))
        folder.signer = Signer(seed)
        (folder.source / "f").write_text("old")
        await folder.go()
        note = folder.state / "trust.json"
        first = note.read_text()
        (folder.source / "f").write_text("new")
        await folder.push()

        def check() -> None:
            seen = json.loads(note.read_text())  # whole, whatever happened
            assert seen["step"] >= json.loads(first)["step"]
            if note.read_text() == first:
                assert (folder.tree / "f").read_text() == "old"

        await bit_by_bit(disk, squeeze, folder.pull, check)
        assert note.read_text() != first
        await folder.rests()


# -- the small files of a state directory (X1) -------------------------------------------------------------------------


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.fault("X1")
def test_small_files_keep_what_they_said_on_a_full_disk(tmp_path: Path) -> None:
    """Pin and status are to be replaced on a disk without a free page: the old ones stay, whole, and nothing beside."""
    with tmpfs(tmp_path / "state", "1m") as disk:
        state = StateDir(disk)
        state.prepare()
        pin = state.pin("app")
        pin.set(7)
        status = FolderStatus("subscribe", "app", "/m", generation=7)
        state.write_status("one.json", status.to_json())
        filler = fill(disk)
        with pytest.raises(DiskProblem, match="No space left on device") as refused:
            pin.set(8)
        assert refused.value.transient
        assert refused.value.exit_code == EXIT_TEMPFAIL
        assert "space" in refused.value.hint
        with pytest.raises(OSError, match="No space left"):
            state.write_status("one.json", {"role": "x" * 5000})
        assert pin.number() == 7
        assert state.read_status() == (None, [status])
        assert (names(disk / "pin"), names(disk / "status")) == (["app"], ["one.json"])
        pin.set(0)  # letting go needs no room
        assert pin.number() == 0
        filler.unlink()
        pin.set(8)
        assert pin.number() == 8


@pytest.mark.fault("X1")
def test_small_files_that_need_an_inode_are_refused_without_one(tmp_path: Path) -> None:
    """A word on a halt, a pin, a status and a whole state directory, on a disk without a free inode."""
    with tmpfs(tmp_path / "state", "1m", 60) as disk:
        state = StateDir(disk)
        state.prepare()
        word, pin = state.allowance("subscribe", "app"), state.pin("app")
        with no_inodes(disk, 0):
            for action in (word.give, lambda: pin.set(8), StateDir(disk / "other").prepare):
                with pytest.raises(DiskProblem, match="No space left on device") as refused:
                    action()
                assert "inodes" in refused.value.hint
            with pytest.raises(OSError, match="No space left"):
                state.write_status("one.json", {})
            assert not word.given()
            assert pin.number() == 0
        word.give()
        pin.set(8)
        assert word.given()
        assert pin.number() == 8


@pytest.mark.fault("X1")
def test_a_state_directory_is_taken_although_the_lock_cannot_be_signed(tmp_path: Path) -> None:
    """A daemon starts on a full disk: its process id in the lock is for people; what holds it is the lock itself."""
    with tmpfs(tmp_path / "state", "1m") as disk:
        state = StateDir(disk)
        state.prepare()
        fill(disk)
        assert not state.daemon_runs()
        with state.lock():
            assert state.daemon_runs()
        assert not state.daemon_runs()


@pytest.mark.fault("X1")
async def test_the_board_catches_up_when_there_is_room_again(tmp_path: Path) -> None:
    """Two folders change, and one is taken out of the configuration, while the disk of the status files is full."""
    with tmpfs(tmp_path / "state", "1m") as disk:
        state = StateDir(disk)
        state.prepare()
        board = _Board(state, load(None, {}))
        statuses = [FolderStatus("subscribe", name, "/m") for name in ("a", "b", "c")]
        for one in statuses:
            board.report(one)
        board.write()
        before = (names(disk / "status"), state.read_status()[1])
        filler = fill(disk)
        changed = [FolderStatus("subscribe", name, "/m", generation=2, hint="x" * 5000) for name in ("a", "b")]
        for one in changed:
            board.report(one)
        board.forget(statuses[2].key)
        board.write()
        assert (names(disk / "status"), state.read_status()[1]) == before
        filler.unlink()
        board.write()
        daemon, folders = state.read_status()
        assert daemon is not None
        assert folders == changed
        assert names(disk / "status") == sorted([DAEMON_FILE, *(f"{one.key}.json" for one in changed)])


@pytest.mark.fault("X1")
async def test_a_folder_that_is_forgotten_while_statuses_are_written_disturbs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload takes two folders out of the configuration between the writes of two statuses, on a full disk."""
    state = StateDir(tmp_path)
    state.prepare()
    board = _Board(state, load(None, {}))
    keys = [FolderStatus("subscribe", name, "/m").key for name in "abc"]
    for name in "abc":
        board.report(FolderStatus("subscribe", name, "/m"))
    write = state.write_status

    def forgetful(name: str, data: dict[str, Any]) -> None:
        for key in keys[:2]:
            board.forget(key)
        if name == DAEMON_FILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(name, data)

    monkeypatch.setattr(state, "write_status", forgetful)
    board.write()
    monkeypatch.undo()
    board.write()
    assert names(tmp_path / "status") == [DAEMON_FILE, f"{keys[2]}.json"]


# -- a whole daemon (X1) -----------------------------------------------------------------------------------------------


@contextmanager
def daemon_on(disk: Path, server: NatsServer, tmp: Path) -> Iterator[Daemon]:
    """A daemon that publishes ``source`` and mirrors it, its state on a disk."""
    (tmp / "source").mkdir()
    (tmp / "source/f").write_text("1")
    folders = (
        f'[nats]\nservers = ["{server.url}"]\n'
        f'[[publish]]\nfolder = "app"\npath = "{tmp}/source"\nsettle_ms = 10\nrescan_seconds = 1\n'
        f'[[subscribe]]\nfolder = "app"\npath = "{tmp}/mirror"\nrescan_seconds = 1\n'
    )
    (tmp / "daemon").mkdir()
    (tmp / "daemon/state").symlink_to(disk)
    daemon = Daemon(tmp / "daemon", folders)
    try:
        yield daemon
        assert daemon.events("folder_crashed") == []
    finally:
        daemon.kill()


@pytest.mark.fault("X1")
async def test_a_daemon_lives_through_a_full_state_directory(tmp_path: Path, nats_server: NatsServer) -> None:
    """The disk of the state directory gets full while the daemon runs: rounds and a command are refused, then go on."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    with tmpfs(tmp_path / "disk", "8m") as disk, daemon_on(disk, nats_server, tmp_path) as daemon:
        daemon.start()
        await equal_trees(source, mirror)
        filler = fill(disk)
        for number in range(400):
            (source / f"file {number} with a name that takes its room in any index").write_text(str(number))
        await eventually(lambda: any("full" in event["error"] for event in daemon.events("round_failed")), 30)
        await eventually(lambda: daemon.events("status_not_written"), 30)
        for file in (disk / "status").glob("[!.]*.json"):
            assert json.loads(file.read_text())
        said = daemon.run("pin", "app", "1")
        assert (said.returncode, said.stderr.count("\n")) == (EXIT_TEMPFAIL, 1)
        assert "No space left on device" in said.stderr
        assert names(disk / "pin") == []
        filler.unlink()
        await equal_trees(source, mirror)
        await eventually(lambda: {one["state"] for one in daemon.status().values()} == {"in_sync"})
        assert daemon.stop() == 0


@pytest.mark.fault("X1")
async def test_a_daemon_that_starts_on_a_full_disk_waits_for_room(tmp_path: Path, nats_server: NatsServer) -> None:
    """The disk of the state directory is full before the first start: both folders say so, and go on by themselves."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    with tmpfs(tmp_path / "disk", "8m") as disk, daemon_on(disk, nats_server, tmp_path) as daemon:
        filler = fill(disk)
        daemon.start()
        await eventually(
            lambda: {event["role"] for event in daemon.events("folder_failed")} == {"publish", "subscribe"}
        )
        assert all("full" in event["error"] for event in daemon.events("folder_failed"))
        filler.unlink()
        await equal_trees(source, mirror)
        assert daemon.stop() == 0


@pytest.mark.fault("X1")
async def test_a_full_disk_of_the_log_changes_nothing_but_the_log(tmp_path: Path, nats_server: NatsServer) -> None:
    """The daemon's log is a file on a disk without a free page: work goes on, and the loss is told afterwards."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    with (
        tmpfs(tmp_path / "logs", "1m") as logs,
        tmpfs(tmp_path / "disk", "8m") as disk,
        daemon_on(disk, nats_server, tmp_path) as daemon,
    ):
        daemon.log = logs / "syncd.log"
        daemon.start()
        await equal_trees(source, mirror)
        filler = fill(logs)
        fill(logs, name=daemon.log.name)  # its own last page
        before = daemon.log.stat().st_size
        (source / "f").write_text("2")
        await equal_trees(source, mirror)
        assert daemon.log.stat().st_size == before
        filler.unlink()
        (source / "f").write_text("3")
        await equal_trees(source, mirror)
        await eventually(lambda: daemon.events("log_lines_dropped"), 30)
        assert daemon.events("log_lines_dropped")[0]["count"] >= 1
        assert daemon.stop() == 0
