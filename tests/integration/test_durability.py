"""Power cuts: what was not synced may be lost, and a reader still finds old or new content, never less or a mixture.

Twice: on a model that loses everything a filesystem may lose (tests/support/recording.py), after every single system
call; and on real filesystems that are stopped by the kernel (tests/support/powercut.py), where this process may.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

import syncd.mirror.mirror as mirror_module
from syncd.mirror import Mirror, release_number
from tests.support import release
from tests.support.mirror import (
    T0,
    Keeper,
    Node,
    Tree,
    dump,
    expected,
    file,
    folder,
    link,
    litter,
    run,
    snapshot,
)
from tests.support.powercut import KINDS, LossyDisk, why_not
from tests.support.recording import Crash, Familiar, Recorder, Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from syncd.mirror import Mode

SEED = int(os.environ.pop("SYNCD_TEST_CUT_SEED", str(random.randrange(2**32))))
SAMPLES = int(os.environ.pop("SYNCD_TEST_CUT_SAMPLES", "3"))

OLD: Tree = {
    "a": folder(mtime_ns=T0 - 5),
    "a/changed": file("old content"),
    "a/gone": file("gone"),
    "a/touched": file("touched", mode=0o644),
    "d": folder(),
    "d/f": file("below what becomes a file"),
    "f": file("becomes a directory"),
    "l": link("a/changed"),
    "m": file("becomes a link"),
    "n": link("becomes a file"),
    "same": file("the same"),
}
NEW: Tree = {
    "a": folder(mode=0o750, mtime_ns=T0 + 55),
    "a/changed": file("new content, longer", mode=0o600),
    "a/copied": file("the same", mtime_ns=T0 + 4),
    "a/touched": file("touched", mode=0o755, mtime_ns=T0 + 66),
    "d": file("was a directory"),
    "f": folder(mtime_ns=T0 + 77),
    "f/large": file("assembled from chunks"),
    "l": link("f/g"),
    "m": link("a/added"),
    "n": file("streamed in pieces"),
    "same": file("the same"),
}
AND_BACK: Tree = {
    "a": folder(mtime_ns=T0 + 99),
    "a/changed": file("newest content"),
    "f": file("a file again"),
    "same": file("the same", mode=0o600),
}
TREES = (OLD, NEW, AND_BACK)


class Stager(Keeper):
    """Stages in every way there is."""

    def stage(self, node: Node) -> str:
        entry, data = node.entry, node.data
        if data == b"the same" and "same" in self.index:
            return self.mirror.stage_copy("same", entry)
        if data.startswith(b"streamed"):
            staged = self.mirror.stage(entry)
            staged.write(data[:5])
            staged.write(data[5:])
            return staged.finish()
        if data.startswith(b"assembled"):
            assembly = self.mirror.assemble(entry)
            assembly.write(10, data[10:])
            assembly.write(0, data[:10])
            return assembly.finish()
        return super().stage(node)


def recorded(where: Path, *trees: Tree, drift: str = "repair") -> Recording:
    """A mirror goes from the first tree to each of the others; what it did for it."""
    root = where / "recorded"
    with Mirror.open(root) as mirror:
        keeper = Stager(mirror)
        assert not keeper.go(trees[0]).problems
        with Recorder(root) as recorder:
            for tree in trees[1:]:
                assert not keeper.go(tree, drift=drift).problems
    assert snapshot(root) == expected(trees[-1])
    assert recorder.recording.check(root) == []
    return recorder.recording


@contextmanager
def rebuilt(crash: Crash, root: Path) -> Iterator[None]:
    """The tree that a crash left, as real files."""
    if root.exists():
        for path in [root, *root.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)  # releases are read-only
        shutil.rmtree(root)
    root.mkdir()
    numbers = crash.disk.build(root)
    with Familiar(crash.disk, numbers, root):
        yield


def recover(crash: Crash, root: Path, mode: Mode = "mirror") -> list[str]:
    """Recover what a crash left; nothing is synced for real. Returns what is left over."""
    with rebuilt(crash, root), pytest.MonkeyPatch.context() as patch, capture_logs() as logs:
        patch.setattr(mirror_module, "sync_filesystem", lambda fd: None)
        patch.setattr(os, "fsync", lambda fd: None)
        with Mirror.open(root, mode=mode) as mirror:
            mirror.recover()
    events = {line["event"] for line in logs if line["log_level"] in {"warning", "error"}}
    left = litter(root) if mode == "mirror" else release.litter(root)
    return [*left, *sorted(events - {"journal_torn"})]


def torn(crash: Crash, trees: tuple[Tree, ...]) -> list[str]:
    """Files of the mirror that a reader finds neither as they were nor as they are going to be."""
    found = []
    for path, number in crash.disk.walk():
        inode = crash.disk.inodes[number]
        if inode.kind == stat.S_IFREG and not path.startswith(".syncd/"):
            whole = {tree[path].data for tree in trees if path in tree}
            if bytes(inode.data) not in whole:
                found.append(f"{path} holds {bytes(inode.data)!r}")
    return found


def commits(recording: Recording, crash: Crash, name: str = "journal") -> int:
    """How many batches no power cut can undo any more: those whose journal has its name for certain."""
    renames = (at for at, op in enumerate(recording.ops) if op.word == "rename" and op.to and op.to[1] == name)
    return sum(at in crash.promised for at in renames)


def differences(found: dict[str, tuple[object, ...]], wanted: dict[str, tuple[object, ...]]) -> list[str]:
    paths = [path for path in sorted(found.keys() | wanted.keys()) if found.get(path) != wanted.get(path)]
    return [f"{path}: {found.get(path)}, not {wanted.get(path)}" for path in paths]


def verdict(recording: Recording, crash: Crash, root: Path, trees: tuple[Tree, ...]) -> list[str]:
    """What is wrong with the tree that a crash left, before and after its recovery."""
    wrong = torn(crash, trees)
    done = commits(recording, crash)
    left = recover(crash, root)
    wrong += [f"left over: {left}"] if left else []
    found, allowed = snapshot(root), [expected(tree) for tree in trees[done : done + 2]]
    if found not in allowed:
        wrong += ["a mixture after recovery:", *differences(found, allowed[0])]
    return wrong


def failures(recording: Recording, where: Path, trees: tuple[Tree, ...]) -> Iterator[str]:
    """Every crash that a mirror does not survive."""
    for crash in recording.crashes(seed=SEED, samples=SAMPLES):
        wrong = verdict(recording, crash, where / "rebuilt", trees)
        if wrong:
            last = recording.ops[crash.position - 1] if crash.position else "nothing"
            yield "\n".join(
                [f"SYNCD_TEST_CUT_SEED={SEED}: power cut after call {crash.position} ({last}), {crash.how}:", *wrong]
            )


# -- the tools have teeth ----------------------------------------------------------------------------------------------


def careless(root: Path, *, content: bool, name: bool) -> None:
    """Replace a file as programs do it, with or without the two syncs that it takes."""
    fd = os.open(root / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"new content")
    if content:
        os.fsync(fd)
    os.close(fd)
    (root / "new").rename(root / "file")
    if name:
        fd = os.open(root, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@pytest.mark.fault("C2")
@pytest.mark.parametrize(
    ("content", "name", "possible"),
    [
        (False, False, {b"old", b"", b"new c", bytes(11), b"new content"}),
        (False, True, {b"", b"new c", bytes(11), b"new content"}),
        (True, False, {b"old", b"new content"}),
        (True, True, {b"new content"}),
    ],
)
def test_the_model_loses_what_was_not_synced_and_nothing_else(
    tmp_path: Path, content: bool, name: bool, possible: set[bytes]
) -> None:
    """A file is replaced with or without its two syncs; of the recorded calls the unsynced ones are lost.

    It may then be old, empty, torn, zeros or new, exactly as far as its syncs leave that open.
    """
    (tmp_path / "file").write_bytes(b"old")
    with Recorder(tmp_path) as recorder:
        careless(tmp_path, content=content, name=name)
    recording = recorder.recording
    assert recording.check(tmp_path) == []
    left = {
        bytes(crash.disk.inodes[crash.disk.inodes[0].names["file"]].data)
        for crash in recording.crashes(seed=1, samples=20)
        if crash.promised == recording.durable(len(recording.ops))
    }
    assert left == possible


def test_what_the_recorder_misses_is_found_out(tmp_path: Path) -> None:
    """A file written by a way that is not recorded, a mode that was set behind its back."""
    (tmp_path / "file").write_bytes(b"old")
    with Recorder(tmp_path) as recorder:
        with open(tmp_path / "file", "wb") as other:  # noqa: PTH123 - the way that is not recorded
            other.write(b"unseen")
        (tmp_path / "made").mkdir()
    assert len(recorder.recording.check(tmp_path)) == 1
    (tmp_path / "made").rmdir()
    assert len(recorder.recording.check(tmp_path)) == 2


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("C2")
@pytest.mark.parametrize("drift", ["repair", "report"])
def test_a_power_cut_after_any_call_leaves_the_old_tree_or_the_new_one(
    tmp_path: Path, record_property: Callable[[str, object], None], drift: str
) -> None:
    """Two batches are recorded; after each system call what is not synced is lost: all, each alone, or some at random.

    No file is torn; after recovery the tree is the old or the new one, without litter.
    """
    recording = recorded(tmp_path, *TREES, drift=drift)
    crashes = 0
    for crash in recording.crashes(seed=SEED, samples=SAMPLES):
        crashes += 1
        wrong = verdict(recording, crash, tmp_path / "rebuilt", TREES)
        assert wrong == [], f"SYNCD_TEST_CUT_SEED={SEED}, call {crash.position}, {crash.how}"
    record_property("fault_runs", crashes)
    assert crashes > len(recording.ops)


@pytest.mark.slow
@pytest.mark.fault("C2")
def test_every_sync_of_a_commit_is_needed(tmp_path: Path) -> None:
    """One of a commit's first four syncs is taken out of its recording, and the power is cut after each call.

    For each of the four the check finds a cut that leaves a mixture; with all of them it finds none.
    """
    recording = recorded(tmp_path, OLD, NEW)
    assert [recording.ops[position].word for position in recording.syncs()] == [
        "syncfs",  # staged content
        "fsync",  # the journal's content
        "fsync",  # its name
        "syncfs",  # the new tree
        "fsync",  # the journal is gone: so that nothing is done again to what was changed since
    ]
    assert next(failures(recording, tmp_path, (OLD, NEW)), "") == ""
    for position in recording.syncs()[:4]:
        found = next(failures(recording.without(position), tmp_path, (OLD, NEW)), "")
        assert found, f"{recording.ops[position]} at {position} could go"


@pytest.mark.slow
@pytest.mark.fault("C2")
def test_a_power_cut_during_recovery_is_recovered_from(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two power cuts leave a journal; the recovery is recorded in its turn, and cut off after each of its system calls.

    A second recovery brings the new tree, without litter.
    """
    first = recorded(tmp_path, OLD, NEW)
    journaled = [crash for crash in first.crashes(seed=SEED, samples=0) if commits(first, crash) > 0]
    crashes = 0
    for crash in (journaled[0], journaled[len(journaled) // 2]):
        root = tmp_path / "recovered"
        with rebuilt(crash, root), Recorder(root) as recorder, Mirror.open(root) as mirror:
            mirror.recover()
        assert snapshot(root) == expected(NEW)
        again = recorder.recording
        assert again.check(root) == []
        for second in again.crashes(seed=SEED, samples=SAMPLES):
            crashes += 1
            assert torn(second, (OLD, NEW)) == []
            assert recover(second, tmp_path / "again") == []
            assert snapshot(tmp_path / "again") == expected(NEW), f"seed {SEED}, {second.position}, {second.how}"
    record_property("fault_runs", crashes)


# -- releases ----------------------------------------------------------------------------------------------------------

GENERATIONS = tuple(map(release.read_only, TREES))
NAMED = {release.name_of(number, tree): tree for number, tree in enumerate(GENERATIONS, 1)}


def recorded_releases(where: Path) -> Recording:
    """A mirror goes from its first release to two others; the third is one too many for the first."""
    root = where / "recorded"
    with release.opened(root, keep=2) as releaser:
        releaser.go(1, GENERATIONS[0])
        with Recorder(root) as recorder:
            for number, tree in enumerate(GENERATIONS[1:], 2):
                releaser.go(number, tree)
    assert release.seen(root) == expected(GENERATIONS[-1])
    assert recorder.recording.check(root) == []
    return recorder.recording


def broken_releases(root: Path) -> list[str]:
    """What is wrong with what a reader finds: each release is whole, and one of them is current."""
    wrong = []
    names = [path.name for path in (root / "releases").iterdir() if not path.name.startswith(".")]
    for name in names:
        wrong += [f"{name}: {line}" for line in differences(snapshot(root / "releases" / name), expected(NAMED[name]))]
    current = (root / "current").readlink().name
    return wrong if current in names else [*wrong, f"current is {current}, there are {names}"]


def broken_by(recording: Recording, crash: Crash, root: Path) -> list[str]:
    """What is wrong after a crash, before and after its recovery."""
    with rebuilt(crash, root):
        wrong = broken_releases(root)
    left = recover(crash, root, "release")
    wrong += broken_releases(root)
    wrong += [f"left over: {left}"] if left else []
    done = commits(recording, crash, "current")
    current, allowed = (root / "current").readlink().name, list(NAMED)[done : done + 2]
    return wrong if current in allowed else [*wrong, f"current is {current}, not of {allowed}"]


@pytest.mark.slow
@pytest.mark.fault("C2")
def test_a_power_cut_after_any_call_leaves_whole_releases_and_one_of_them_current(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Building, switching and removing releases is recorded; after each system call what is not synced is lost.

    Before and after recovery each release is whole, and the right one is current.
    """
    recording = recorded_releases(tmp_path)
    crashes = 0
    for crash in recording.crashes(seed=SEED, samples=SAMPLES):
        crashes += 1
        wrong = broken_by(recording, crash, tmp_path / "rebuilt")
        assert wrong == [], f"SYNCD_TEST_CUT_SEED={SEED}, call {crash.position}, {crash.how}"
    record_property("fault_runs", crashes)


@pytest.mark.slow
@pytest.mark.fault("C2")
def test_every_sync_of_a_release_is_needed(tmp_path: Path) -> None:
    """A sync of build, name, switch or removal is taken out of a recording, then the power is cut after each call.

    The check finds a cut that breaks a release, or undoes what was switched.
    """
    recording = recorded_releases(tmp_path)
    syncs = recording.syncs()
    assert [recording.ops[position].word for position in syncs] == [
        "syncfs",  # what was built
        "fsync",  # its name
        "fsync",  # the switch
        *("syncfs", "fsync", "fsync"),
        "fsync",  # an old one has lost its name
    ]
    for position in (*syncs[:3], syncs[-1]):
        other = recording.without(position)
        crashes = other.crashes(seed=SEED, samples=SAMPLES)
        found = any(broken_by(other, crash, tmp_path / "rebuilt") for crash in crashes)
        assert found, f"{recording.ops[position]} at {position} could go"


# -- real filesystems --------------------------------------------------------------------------------------------------

BEFORE_THE_JOURNAL = ("stage_write:3", "stage_finished:2", "before_journal", "journal_torn")
AFTER_THE_JOURNAL = ("journal_durable", "before_dir_meta", "before_journal_removed", "done")
STEPS = 16


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LossyDisk]:
    """A filesystem that can be stopped."""
    reason = why_not(request.param)
    if reason:
        pytest.skip(f"no filesystem to cut off: {reason}")
    disk = LossyDisk(tmp_path / "disk", request.param)
    try:
        yield disk.make()
    finally:
        disk.remove()


@pytest.mark.fault("C2")
def test_a_stopped_filesystem_loses_what_was_not_synced(disk: LossyDisk) -> None:
    """A file is replaced on ext4 and xfs, which the kernel then shuts down (ioctl) and mounts anew.

    Unsynced names and bytes are gone, synced ones are there: the rig really loses something.
    """
    root = disk.root
    (root / "file").write_bytes(b"old")
    os.sync()
    disk.save()
    careless(root, content=False, name=False)
    disk.cut(journal=False)
    assert (root / "file").read_bytes() == b"old"
    disk.restore()
    (root / "fresh").write_bytes(b"new content")
    disk.cut(journal=True)
    assert (root / "fresh").read_bytes() == b""
    disk.restore()
    careless(root, content=True, name=True)
    disk.cut(journal=False)
    assert (root / "file").read_bytes() == b"new content"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.fault("C2")
@pytest.mark.parametrize("drift", ["repair", "report"])
def test_a_filesystem_that_is_stopped_in_a_commit_has_the_old_tree_or_the_new_one(
    disk: LossyDisk, tmp_path: Path, drift: str, record_property: Callable[[str, object], None]
) -> None:
    """A commit dies (SIGKILL) at a named point, its real filesystem is shut down by the kernel and mounted anew.

    Each file is old or new; after recovery the tree is the old one, or the new one if the journal was durable.
    """
    root, state = disk.root / "mirror", tmp_path / "state"
    with Mirror.open(root) as mirror:
        keeper = Stager(mirror)
        assert not keeper.go(OLD).problems
    dump(state, keeper.index, NEW)
    disk.save()
    rng = random.Random(SEED)
    steps = [f"after_each_step:{number}" for number in rng.sample(range(1, STEPS), 3)]
    points = [*BEFORE_THE_JOURNAL, *AFTER_THE_JOURNAL, *steps]
    for point in points:
        for journal in (False, True):
            died = run("apply", root, state, drift, crash=point)
            assert died.returncode == -signal.SIGKILL, died.stdout
            disk.cut(journal=journal)
            old, new = expected(OLD), expected(NEW)
            now = snapshot(root)
            for path in ("a/changed", "l", "m", "n", "same"):
                assert now[path] in (old[path], new[path]), (point, journal)
            with Mirror.open(root) as mirror:
                mirror.recover()
            wanted = old if point in BEFORE_THE_JOURNAL else new
            assert differences(snapshot(root), wanted) == [], f"SYNCD_TEST_CUT_SEED={SEED}, {point}, {journal}"
            assert litter(root) == []
            disk.restore()
    record_property("fault_runs", 2 * len(points))


RELEASE_POINTS = (
    ("release_building:4", {1}),
    ("release_built", {1}),
    ("release_published", {1}),
    ("before_switch", {1}),
    ("after_switch", {1, 2}),
    ("release_pruned", {3}),
    ("release_removing:3", {3}),
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.fault("C2")
def test_a_filesystem_that_is_stopped_has_whole_releases_and_one_of_them_current(
    disk: LossyDisk, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A process dies (SIGKILL) building, switching or removing releases; the kernel shuts its filesystem down.

    Mounted anew, each release is whole and one of them current, before recovery and after it, without litter.
    """
    root, state = disk.root / "mirror", tmp_path / "state"
    with release.opened(root, keep=2, state=state / "index") as releaser:
        releaser.go(1, GENERATIONS[0])
    (state / "trees").write_bytes(pickle.dumps([GENERATIONS[2], *GENERATIONS[:2]]))
    shutil.copytree(state, tmp_path / "saved")
    disk.save()
    for point, allowed in RELEASE_POINTS:
        for journal in (False, True):
            died = release.run("go", root, state, "2", "3", crash=point)
            assert died.returncode == -signal.SIGKILL, died.stdout
            disk.cut(journal=journal)
            assert broken_releases(root) == [], (point, journal)
            with Mirror.open(root, mode="release") as mirror:
                mirror.recover()
                assert release_number(mirror.current()) in allowed, (point, journal)
            assert broken_releases(root) == [], (point, journal)
            assert release.litter(root) == [], (point, journal)
            disk.restore()
            shutil.rmtree(state)
            shutil.copytree(tmp_path / "saved", state)
    record_property("fault_runs", 2 * len(RELEASE_POINTS))
