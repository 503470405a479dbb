"""SIGKILL at every named point and at random moments; then another process recovers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3
from structlog.testing import capture_logs

import syncd.mirror.mirror as mirror_module
from syncd.mirror import Mirror
from syncd.mirror.journal import ForeignJournalError, TornJournalError, decode, encode
from syncd.mirror.staging import STAGED_NAME
from syncd.model import Entry, Kind, Stat
from syncd.plan import DirMeta, MakeDir, MirrorPlan, Place, Remove, SetMeta
from tests.support.mirror import T0, Keeper, Tree, dump, expected, file, folder, link, litter, lstat, run, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD: Tree = {
    "a": folder(mtime_ns=T0 - 5),
    "a/changed": file("old content"),
    "a/gone": file("gone"),
    "a/touched": file("touched", mode=0o644),
    "d": folder(),
    "d/inner": folder(),
    "d/inner/f": file("f"),
    "f": file("becomes a directory"),
    "l": link("a/changed"),
    "l2": link("a"),
    "m": file("becomes a link"),
    "old_dir": folder(mode=0o700),
    "old_dir/x": file("x"),
}
NEW: Tree = {
    "a": folder(mode=0o750, mtime_ns=T0 + 55),
    "a/added": file("added"),
    "a/changed": file("new content, longer", mode=0o600),
    "a/touched": file("touched", mode=0o755, mtime_ns=T0 + 66),
    "d": file("was a directory"),
    "f": folder(mtime_ns=T0 + 77),
    "f/g": file("below what was a file"),
    "l": link("f/g"),
    "l2": link("a", mtime_ns=T0 + 88),
    "m": link("a/added"),
    "new_dir": folder(mode=0o711, mtime_ns=T0 + 99),
    "new_dir/n": file("n"),
}
BEFORE_THE_JOURNAL = ("stage_write", "stage_write:3", "stage_finished", "before_journal", "journal_torn")
AFTER_THE_JOURNAL = ("journal_durable", "before_dir_meta", "before_journal_removed", "done")


class Prepared:
    """A mirror at OLD, and a process that will be killed on its way to NEW."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "mirror"
        self.state = directory / "state"
        self.pristine = directory / "pristine"
        with Mirror.open(self.root) as mirror:
            keeper = Keeper(mirror)
            assert not keeper.go(OLD).problems
            self.steps = sum(len(getattr(keeper.plan(NEW), name)) for name in MirrorPlan.__slots__)
            mirror.discard_staged()
        self.index = keeper.index
        dump(self.state, self.index, NEW)

    def crash(self, point: str, drift: str = "repair") -> None:
        died = run("apply", self.root, self.state, drift, crash=point)
        assert died.returncode == -signal.SIGKILL, died.stdout

    def recover(self) -> Keeper:
        with Mirror.open(self.root) as mirror:
            keeper = Keeper(mirror, dict(self.index))
            keeper.remember(mirror.recover())
            assert litter(self.root) == []
            self.fresh = keeper.stale()
        return keeper


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


def check_between(root: Path) -> None:
    """What is a file or symlink before and after is there at every instant, whole, as the one or the other."""
    now, old, new = snapshot(root), expected(OLD), expected(NEW)
    for path in ("a/changed", "l", "m"):
        assert now[path] in (old[path], new[path])
    assert now["a/touched"][3] == b"touched"
    assert now["l2"][2] == "a"


@pytest.mark.fault("C1")
@pytest.mark.parametrize("point", BEFORE_THE_JOURNAL)
def test_killed_before_the_commit_point_nothing_has_happened(prepared: Prepared, point: str) -> None:
    """A process that applies a batch is killed (SIGKILL) while it stages, or with half of its journal written.

    The old tree is there to the nanosecond; after recovery there is no litter, and the next batch goes through.
    """
    prepared.crash(point)
    assert snapshot(prepared.root) == expected(OLD)
    keeper = prepared.recover()
    assert snapshot(prepared.root) == expected(OLD)
    assert prepared.fresh == []
    with Mirror.open(prepared.root) as mirror:
        keeper.mirror = mirror
        assert keeper.go(NEW).problems == []
    assert snapshot(prepared.root) == expected(NEW)


@pytest.mark.fault("C1")
@pytest.mark.parametrize("drift", ["repair", "report"])
@pytest.mark.parametrize("point", AFTER_THE_JOURNAL)
def test_killed_after_the_commit_point_the_batch_is_completed(prepared: Prepared, point: str, drift: str) -> None:
    """The process is killed (SIGKILL) with its journal durable, before directories get their times, or at the end.

    Recovery makes the new tree to the nanosecond, no litter; what it returns is what the index needs.
    """
    prepared.crash(point, drift)
    check_between(prepared.root)
    keeper = prepared.recover()
    assert snapshot(prepared.root) == expected(NEW)
    if point != "done":  # the journal was gone: the next reconcile finds what was not remembered
        assert keeper.index.keys() == NEW.keys()
        assert prepared.fresh == []


@pytest.mark.slow
@pytest.mark.fault("C1")
def test_killed_after_any_step_the_batch_is_completed(prepared: Prepared) -> None:
    """The process is killed (SIGKILL) after each of its steps in turn, and the one that recovers after one, too.

    The third one completes the batch, and the index agrees with the disk.
    """
    assert prepared.steps >= 20
    shutil.copytree(prepared.root, prepared.pristine, symlinks=True)
    for number in range(1, prepared.steps + 1):
        prepared.crash(f"after_each_step:{number}")
        check_between(prepared.root)
        again = run("recover", prepared.root, crash=f"after_each_step:{prepared.steps + 1 - number}")
        assert again.returncode == -signal.SIGKILL
        check_between(prepared.root)
        keeper = prepared.recover()
        assert snapshot(prepared.root) == expected(NEW), number
        assert keeper.index.keys() == NEW.keys()
        assert prepared.fresh == []
        with Mirror.open(prepared.root) as mirror:  # back to OLD for the next step
            keeper.mirror = mirror
            assert keeper.go(OLD).problems == []
        prepared.index = keeper.index
        dump(prepared.state, prepared.index, NEW)


@pytest.mark.fault("C1")
def test_killed_at_random_moments_of_an_endless_to_and_fro(prepared: Prepared) -> None:
    """Twelve times a process that goes to and fro between two trees is killed (SIGKILL) after up to 80 ms.

    Always the one tree or the other after recovery, never a mixture, never litter.
    """
    dump(prepared.state, prepared.index, NEW, OLD)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(12):
        process = run("flip", prepared.root, prepared.state, wait=False)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(rng.random() * 0.08)
        process.kill()
        process.communicate()
        check_between(prepared.root)
        keeper = prepared.recover()
        assert snapshot(prepared.root) in (expected(OLD), expected(NEW)), f"seed {seed}"
        with Mirror.open(prepared.root) as mirror:  # what was applied and not remembered is adopted as by a reconcile
            target = NEW if snapshot(prepared.root) == expected(NEW) else OLD
            keeper.index.clear()
            for path in target:
                disk = mirror.look(path)
                assert disk is not None
                keeper.index[path] = (target[path].entry, disk.stat)
            keeper.mirror = mirror
            assert not keeper.go(OLD).problems
        dump(prepared.state, keeper.index, NEW, OLD)


@pytest.mark.fault("C1 C2")
def test_a_torn_journal_was_never_committed(prepared: Prepared) -> None:
    """The process is killed (SIGKILL) with its journal durable; that is emptied, cut at three places, or a bit flipped.

    Recovery takes it for torn: the old tree, and nothing is left of what was staged.
    """
    prepared.crash("journal_durable")
    journal = prepared.root / ".syncd/journal"
    whole = journal.read_bytes()
    shutil.copytree(prepared.root, prepared.pristine, symlinks=True)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (b"", whole[:10], whole[: len(whole) // 2], whole[:-10], bytes(flipped)):
        shutil.rmtree(prepared.root)
        shutil.copytree(prepared.pristine, prepared.root, symlinks=True)
        assert list((prepared.root / ".syncd/stage").iterdir())
        journal.write_bytes(data)
        with capture_logs() as logs:
            prepared.recover()
        assert "journal_torn" in [line["event"] for line in logs]
        assert snapshot(prepared.root) == expected(OLD)


@pytest.mark.fault("C6")
@pytest.mark.parametrize("wrong", ["version", "step"])
def test_a_journal_of_another_version_is_set_aside_and_reported(prepared: Prepared, wrong: str) -> None:
    """After a SIGKILL the journal's version is raised, or a journal with an unknown step put in its place.

    It is set aside and reported, nothing of it is guessed at; the next batch goes through.
    """
    prepared.crash("journal_durable")
    journal = prepared.root / ".syncd/journal"
    if wrong == "version":
        journal.write_bytes(journal.read_bytes().replace(b'"syncd_journal": 1', b'"syncd_journal": 2'))
    else:
        step = (b'{"syncd_journal": 1, "drift": "repair", "steps": 1}\n', b'["transmute","a"]\n')
        journal.write_bytes(b"".join(step) + b'{"blake3": "%s"}\n' % blake3(b"".join(step)).hexdigest().encode())
    with Mirror.open(prepared.root) as mirror, capture_logs() as logs:
        keeper = Keeper(mirror, prepared.index)
        assert mirror.recover() == []
        assert [line["log_level"] for line in logs if line["event"] == "journal_refused"] == ["error"]
        assert litter(prepared.root) == ["journal.refused"]
        assert snapshot(prepared.root) == expected(OLD)
        assert keeper.go(NEW).problems == []


@pytest.mark.parametrize("policy", ["repair", "report", "keep"])
@pytest.mark.fault("C1")
def test_what_somebody_changed_after_the_crash_is_not_remembered_as_it_is(prepared: Prepared, policy: str) -> None:
    """After a SIGKILL two applied files get other bytes, with size, mode and time as they were, and a link is removed.

    Recovery reads what it cannot be certain of: those are not remembered, or, as ours under repair, count as drifted.
    """
    prepared.crash("before_dir_meta", policy)
    victim = prepared.root / "a/changed"
    found = victim.stat()
    victim.write_text("NEW content, longer")
    os.utime(victim, ns=(found.st_mtime_ns, found.st_mtime_ns))
    touched = prepared.root / "a/touched"
    found = touched.stat()
    touched.write_text("TOUCHED")
    os.utime(touched, ns=(found.st_mtime_ns, found.st_mtime_ns))
    (prepared.root / "m").unlink()
    with Mirror.open(prepared.root) as mirror:
        placed = {done.path: done for done in mirror.recover()}
    assert {"a/added", "new_dir/n", "l"} <= set(placed)
    assert not {"a/touched", "m"} & set(placed)
    assert ("a/changed" in placed) == (policy == "repair")
    if policy == "repair":
        assert placed["a/changed"].stat not in {None, lstat(victim)}
    assert victim.read_text() == "NEW content, longer"


@pytest.mark.fault("C1 L9")
def test_a_copy_taken_for_a_shared_inode_is_recognised_after_a_crash(prepared: Prepared, tmp_path: Path) -> None:
    """A file whose mode changes has a hard link outside; the process is killed (SIGKILL) after it put a copy in place.

    It has another inode than the plan assumed, and recovery takes it for ours all the same.
    """
    os.link(prepared.root / "a/touched", tmp_path / "twin")
    prepared.index["a/touched"] = (prepared.index["a/touched"][0], lstat(prepared.root / "a/touched"))
    dump(prepared.state, prepared.index, NEW)
    prepared.crash("before_dir_meta", "report")
    keeper = prepared.recover()
    assert snapshot(prepared.root) == expected(NEW)
    assert keeper.index["a/touched"][0] == NEW["a/touched"].entry
    assert prepared.fresh == []


@pytest.mark.fault("C1")
def test_a_batch_that_was_cut_off_keeps_its_drift_policy(prepared: Prepared) -> None:
    """A file is edited, and a process that applies a batch under drift = "keep" killed (SIGKILL) after its journal.

    Recovery leaves the edited file and places the rest.
    """
    (prepared.root / "a/changed").write_text("edited here")
    prepared.crash("journal_durable", "keep")
    assert not (prepared.root / "a/added").exists()
    prepared.recover()
    assert (prepared.root / "a/changed").read_text() == "edited here"
    assert (prepared.root / "a/added").read_text() == "added"


def test_the_staged_content_of_a_batch_to_be_completed_is_not_discarded(prepared: Prepared) -> None:
    """discard_staged() and the next commit() both leave it; the commit completes the earlier batch first."""
    with Mirror.open(prepared.root) as mirror:
        keeper = Keeper(mirror, prepared.index)
        mirror._journal.write(keeper.plan(NEW), "report")
        (orphan,) = mirror.stage_bytes([(file("o").entry, b"o")])
        mirror.discard_staged()
        assert not (prepared.root / ".syncd/stage" / str(orphan)).exists()
        more = {**NEW, "a/changed": file("newer still"), "z": file("z")}
        node = more["a/changed"]
        (newer,) = mirror.stage_bytes([(node.entry, node.data)])
        old = prepared.index["a/changed"][1]
        a = more["a"].entry
        plan = MirrorPlan(
            place=(Place("a/changed", node.entry, str(newer), old),), dir_meta=(DirMeta("a", a.mode, a.mtime_ns),)
        )
        outcome = mirror.commit(plan, drift="report")
        assert (outcome.problems, outcome.drifted) == ([], [])
        keeper.remember(outcome.placed)
        assert len({done.path for done in outcome.placed}) == len(outcome.placed)
        assert keeper.go(more).problems == []
        assert keeper.stale() == []
    assert snapshot(prepared.root) == expected(more)
    assert litter(prepared.root) == []


@pytest.mark.fault("C2")
def test_everything_is_durable_before_what_depends_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of rename, unlink, fsync and syncfs are noted in order while a batch is committed; no power is cut.

    Content before the journal, the journal before the first rename, all renames before the journal goes.
    """
    done: list[str] = []

    def noted(call: Callable[..., Any], word: str) -> Callable[..., Any]:
        def note(*arguments: Any, **keywords: Any) -> Any:
            names = [name for name in arguments if isinstance(name, str)]
            done.append(" ".join([word, *(name for name in names if not STAGED_NAME.fullmatch(name))]))
            return call(*arguments, **keywords)

        return note

    with Mirror.open(tmp_path / "m") as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old"), "g": file("g")})
        plan = keeper.plan({"f": file("new")})
        for name in ("rename", "unlink", "fsync"):
            monkeypatch.setattr(os, name, noted(getattr(os, name), name))
        monkeypatch.setattr(mirror_module, "sync_filesystem", noted(mirror_module.sync_filesystem, "syncfs"))
        assert mirror.commit(plan, drift="repair").problems == []
    assert done == [
        "syncfs",  # the staged content
        "unlink journal.new",
        "fsync",  # the journal's content
        "rename journal.new journal",
        "fsync",  # its name: the commit point
        "rename f",
        "unlink g",
        "syncfs",  # all of that
        "unlink journal",
        "fsync",
    ]


def test_a_journal_holds_any_name_and_every_field() -> None:
    """Line breaks, quotes, escapes, lone surrogates; in pieces that break nowhere."""
    entry = Entry(Kind.FILE, 0o4755, -(2**62), 2**40, "d" * 64, "s" * 64)
    stat = Stat(1, -2, 3, 2**63, 5)
    names = ["a\nb", 'q"\\', "\x1b[31m", "\u2028", "\udcff", "ü/😀"]
    plan = MirrorPlan(
        clear=tuple(Remove(name, Kind.SYMLINK, stat) for name in names),
        make_dirs=tuple(MakeDir(name) for name in names),
        place=tuple(Place(name, entry._replace(size=n), f"s{n}", stat) for n in range(800) for name in names),
        set_meta=tuple(SetMeta(name, Entry(Kind.SYMLINK, 0o777, 1, target=name), None) for name in names),
        remove=tuple(Remove(name, Kind.DIR, None) for name in names),
        dir_meta=tuple(DirMeta(name, 0o1777, -5) for name in names),
    )
    data = b"".join(encode(plan, "keep"))
    assert data.isascii()
    read = decode(data)
    assert (read.plan, read.drift) == (plan, "keep")
    assert decode(b"".join(encode(MirrorPlan(), "repair"))).plan == MirrorPlan()
    for cut in range(0, len(data), 5003):
        with pytest.raises(TornJournalError):
            decode(data[:cut])
    with pytest.raises(ForeignJournalError):
        decode(b'{"syncd_journal": "one"}\n')


def test_a_reader_never_finds_a_file_missing_empty_or_partial(tmp_path: Path) -> None:
    """One file is replaced a thousand times while another thread opens it as fast as it can."""
    versions = [bytes([65 + n]) * (20_000 + n) for n in range(2)]
    errors: list[str] = []
    reads = 0
    stop = threading.Event()
    with Mirror.open(tmp_path / "m") as mirror:
        keeper = Keeper(mirror)
        keeper.go({"d/f": file(versions[0])})
        path = tmp_path / "m/d/f"

        def read() -> None:
            nonlocal reads
            while not stop.is_set():
                try:
                    data = path.read_bytes()
                except OSError as exc:
                    errors.append(repr(exc))
                    continue
                if data not in versions:
                    errors.append(f"{len(data)} bytes")
                reads += 1

        reader = threading.Thread(target=read)
        reader.start()
        deadline = time.monotonic() + 60
        try:
            for count in range(1000):
                kind = {"d/f": file(versions[count % 2], mtime_ns=T0 + count)}
                assert not keeper.go(kind).problems
                assert time.monotonic() < deadline
        finally:
            stop.set()
            reader.join()
    assert errors == []
    assert reads > 100
