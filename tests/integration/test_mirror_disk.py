"""A disk that is full, read-only, failing or somebody else's; a process without descriptors."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import syncd.mirror.mirror as mirror_module
from syncd.errors import DiskProblem
from syncd.mirror import Mirror
from syncd.model import Entry, Kind
from syncd.plan import MirrorPlan, Place
from tests.support.disks import attributes, filesystem
from tests.support.mirror import Keeper, expected, file, folder, litter, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from syncd.model import Problem


def code_of(problems: list[Problem]) -> dict[str, str]:
    return {problem.path: problem.code for problem in problems}


@contextmanager
def tmpfs(where: Path, size: str = "2m") -> Iterator[bool]:
    """Mount a small filesystem of its own; ``False`` where this process may not."""
    where.mkdir(parents=True, exist_ok=True)
    options = f"size={size},mode=0700"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", where], check=False, capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", where], check=True)


@contextmanager
def limit(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@contextmanager
def full_disk(where: Path) -> Iterator[str]:
    """A disk on which one mebibyte more cannot be written; yields the errno's name."""
    with tmpfs(where) as mounted:
        if mounted:
            yield "ENOSPC"
        else:
            with limit(resource.RLIMIT_FSIZE, 1024 * 1024):
                yield "EFBIG"


@pytest.mark.fault("X1")
def test_content_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """3 MB are staged on a tmpfs of 2 MiB (or under a limit of 1 MiB per file): in pieces and at once.

    It is refused by its errno and leaves nothing, as does a copy that does not fit; when there is room again, it is
    staged.
    """
    root = tmp_path / "disk/m"
    with full_disk(tmp_path / "disk") as number, Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file(os.urandom(900_000))})
        before = snapshot(root)
        big = file(os.urandom(3_000_000))
        staged = mirror.stage(big.entry)
        with pytest.raises(DiskProblem, match=number):
            staged.write(big.data)
        assert litter(root) == []
        small = file("fits")
        first, second = mirror.stage_bytes([(big.entry, big.data), (small.entry, small.data)])
        assert isinstance(first, DiskProblem)
        assert first.transient
        assert isinstance(second, str)
        mirror.discard_staged()
        assert snapshot(root) == before
        if number == "ENOSPC":
            entry = keeper.index["f"][0]
            mirror.stage_copy("f", entry)
            with pytest.raises(DiskProblem, match="ENOSPC"):
                mirror.stage_copy("f", entry)
            mirror.discard_staged()
        assert keeper.go({"f": file(os.urandom(900_000))}).problems == []


@pytest.mark.fault("X1")
def test_a_journal_that_does_not_fit_commits_nothing(tmp_path: Path) -> None:
    """A tmpfs is filled to the brim (or the file size limited) before a commit of a thousand long names.

    The journal's failure is named, nothing has changed; with room again the same plan goes through.
    """
    root = tmp_path / "disk/m"
    with full_disk(tmp_path / "disk") as number, Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old")})
        tree = {"f": file("new"), **{f"{n:03}{'x' * 200}": file("") for n in range(1000)}}
        plan = keeper.plan(tree)
        filler = root / "filler"
        if number == "ENOSPC":
            with filler.open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space"):
                fill.writelines([bytes(4096)] * 1000)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(DiskProblem, match=f"journal.*{number}"):
            mirror.commit(plan, drift="repair")
        assert (root / "f").read_text() == "old"
        assert sorted(path.name for path in (root / ".syncd").iterdir()) == ["lock", "stage"]
        filler.unlink(missing_ok=True)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        outcome = mirror.commit(plan, drift="repair")
        assert outcome.problems == []
        assert snapshot(root) == expected(tree)


@pytest.mark.fault("X2 M6")
def test_a_disk_that_turned_read_only_is_named(tmp_path: Path) -> None:
    """The mirror's tmpfs is remounted read-only before a commit (or `os.open` raises EROFS, where we may not mount).

    Commit and staging name EROFS, nothing has changed; writable again, the same plan goes through.
    """
    root = tmp_path / "disk/m"
    with tmpfs(tmp_path / "disk") as mounted, Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old")})
        plan = keeper.plan({"f": file("new")})
        if not mounted:
            _read_only_by_pretence(mirror, plan)
            return
        # an administrator's remount waits for descriptors open for writing (our lock), that of a failing disk does not
        with (root / ".syncd/lock").open() as reader:
            os.dup2(reader.fileno(), mirror._fds[0], inheritable=False)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(DiskProblem, match="EROFS"):
            mirror.commit(plan, drift="repair")
        with pytest.raises(DiskProblem, match="EROFS"):
            mirror.stage(file("x").entry)
        assert (root / "f").read_text() == "old"
        subprocess.run(["mount", "-o", "remount,rw", tmp_path / "disk"], check=True)
        assert mirror.commit(plan, drift="repair").problems == []
        assert (root / "f").read_text() == "new"


def _read_only_by_pretence(mirror: Mirror, plan: MirrorPlan) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", _failing(os.open, errno.EROFS))
        with pytest.raises(DiskProblem, match="EROFS"):
            mirror.commit(plan, drift="repair")


def _failing(call: object, number: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.fault("L5")
def test_what_lies_on_another_filesystem_is_a_problem_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tmpfs is mounted on a directory of the mirror (or `os.rename` raises EXDEV) before a commit into it.

    Each path there is a problem, nothing is written into the mount, and the rest of the batch is applied.
    """
    root = tmp_path / "m"
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"n": folder(), "n/removed": file("x"), "a": file("a")})
        index = dict(keeper.index)
        with tmpfs(root / "n") as mounted:
            if mounted:
                (root / "n/removed").write_text("theirs")
            else:
                rename = os.rename

                def crossing(source: str, target: str, **keywords: int) -> None:
                    if target in {"f", "g"}:
                        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
                    rename(source, target, **keywords)

                monkeypatch.setattr(os, "rename", crossing)
            tree = {"n": folder(mode=0o711), "n/f": file("f"), "n/sub/g": file("g"), "a": file("aa")}
            outcome = keeper.go(tree)
            told = code_of(outcome.problems)
            assert {told["n/f"], told["n/sub/g"]} == {"other_filesystem"}
            assert (root / "a").read_text() == "aa"
            assert litter(root) == []
            if mounted:
                assert told["n/removed"] == told["n"] == told["n/sub"] == "other_filesystem"
                assert snapshot(root / "n").keys() == {"removed"}
        if mounted:
            keeper.index = {**index, "a": keeper.index["a"]}
            assert keeper.go(tree).problems == []
            assert (root / "n/f").read_text() == "f"


@pytest.mark.fault("L5")
def test_a_private_directory_on_another_filesystem_is_refused(tmp_path: Path) -> None:
    """A tmpfs is mounted on `.syncd`, then on its stage, and the mirror is opened.

    It is refused: a rename could not leave it.
    """
    root = tmp_path / "m"
    (root / ".syncd").mkdir(parents=True, mode=0o700)
    for name in (".syncd", ".syncd/stage"):
        with tmpfs(root / name) as mounted:
            if not mounted:
                pytest.skip("this process may not mount")
            with pytest.raises(DiskProblem, match="another filesystem"):
                Mirror.open(root)
    Mirror.open(root).close()


@pytest.mark.fault("L10")
def test_a_root_that_was_unmounted_while_running_is_not_written_to(tmp_path: Path) -> None:
    """The tmpfs that is the mirror's root is unmounted (or the root replaced) between plan and commit.

    The commit is refused, and the empty directory below stays empty.
    """
    root = tmp_path / "m"
    with tmpfs(root) as mounted:
        if not mounted:
            root.rename(tmp_path / "was")
            (tmp_path / "was").mkdir(exist_ok=True)
            root.mkdir()
        mirror = Mirror.open(root)
        plan = Keeper(mirror).plan({"f": file("x")})
        if mounted:
            subprocess.run(["umount", "-l", root], check=True)
        else:
            root.rename(tmp_path / "moved")
            root.mkdir()
        with pytest.raises(DiskProblem, match="replaced"):
            mirror.commit(plan, drift="repair")
        mirror.close()
        assert list(root.iterdir()) == []
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "none", root], check=True)


@pytest.mark.fault("X2")
def test_without_descriptors_the_batch_waits_and_is_completed_by_the_next(tmp_path: Path) -> None:
    """RLIMIT_NOFILE leaves five descriptors for a commit twelve directories deep, and later none.

    EMFILE is named; the journal and what is staged for it stay, and the next commit completes it.
    """
    root = tmp_path / "m"
    deep = "/".join("abcdefghijkl")
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({f"{deep}/f": file("old"), "a/x": file("old")})
        tree = {f"{deep}/f": file("new"), "a/x": file("new")}
        plan = keeper.plan(tree)
        free = os.open(root, os.O_RDONLY)
        os.close(free)
        with limit(resource.RLIMIT_NOFILE, free + 5):
            with pytest.raises(DiskProblem, match="EMFILE"):
                mirror.commit(plan, drift="report")
            mirror.discard_staged()  # as a caller would
        (root / "a/theirs").write_text("x")
        outcome = keeper.go({**tree, "z": file("z")}, drift="report")
        assert outcome.problems == []
        assert ((root / deep / "f").read_text(), (root / "a/x").read_text()) == ("new", "new")
        assert (root / "z").read_text() == "z"
        assert not {f"{deep}/f", "a/x", "z"} & set(keeper.stale())
        assert litter(root) == []
        fds = []
        with limit(resource.RLIMIT_NOFILE, free):
            with pytest.raises(DiskProblem, match="EMFILE"):
                fds.append(mirror.stage(file("x").entry))
            (result,) = mirror.stage_bytes([(file("x").entry, b"x")])
            assert isinstance(result, DiskProblem)
            with pytest.raises(DiskProblem, match="EMFILE"):
                mirror.look("a/x")


@pytest.mark.fault("X2")
def test_a_failed_sync_gives_up_what_was_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filesystem's sync is made to fail with EIO in a commit.

    What was staged is given up and the old file stays: a second sync would lie. Fetched again, it goes through.
    """
    root = tmp_path / "m"
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old")})
        plan = keeper.plan({"f": file("new")})
        monkeypatch.setattr(mirror_module, "sync_filesystem", _failing(None, errno.EIO))
        with pytest.raises(DiskProblem, match="EIO"):
            mirror.commit(plan, drift="repair")
        assert litter(root) == []
        assert (root / "f").read_text() == "old"
        monkeypatch.undo()
        assert keeper.go({"f": file("new")}).problems == []


@pytest.mark.fault("X2")
@pytest.mark.parametrize("call", ["rename", "mkdir", "unlink", "utime"])
def test_an_io_error_in_the_middle_ends_the_batch_and_it_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """rename, mkdir, unlink or utime is made to fail with EIO, but not for the journal, in a commit and its recovery.

    Once they work, recover() of the same process completes all of it.
    """
    root = tmp_path / "m"
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old"), "g": file("g"), "d": folder()})
        tree = {"f": file("new"), "e": folder(), "e/h": file("h")}
        plan = keeper.plan(tree)
        real = getattr(os, call)

        def failing(*arguments: object, **keywords: object) -> object:
            if arguments and arguments[0] in {"journal.new", "journal"}:
                return real(*arguments, **keywords)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, call, failing)
        with pytest.raises(DiskProblem, match="EIO"):
            mirror.commit(plan, drift="repair")
        with pytest.raises(DiskProblem, match="EIO"):
            mirror.recover()
        monkeypatch.undo()
        keeper.remember(mirror.recover())
        assert snapshot(root) == expected(tree)
        assert keeper.index.keys() == tree.keys()
        assert keeper.stale() == []
        assert litter(root) == []


@pytest.mark.fault("X2")
@pytest.mark.parametrize("which", [1, 2])
def test_a_journal_that_cannot_be_made_durable_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """fsync is made to fail with EIO for the journal's content, or for its name.

    The commit fails, and after a reopening nothing of it happens: the old file stays.
    """
    root = tmp_path / "m"
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old")})
        plan = keeper.plan({"f": file("new")})
        fsync, calls = os.fsync, iter(range(1, 10))

        def failing(fd: int) -> None:
            if next(calls) == which:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(DiskProblem, match="EIO"):
            mirror.commit(plan, drift="repair")
        monkeypatch.undo()
    with Mirror.open(root) as mirror:
        assert mirror.recover() == []
    assert (root / "f").read_text() == "old"
    assert litter(root) == []


@pytest.mark.fault("M6")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs", "btrfs"])
def test_an_immutable_file_is_a_problem_of_its_path(tmp_path: Path, kind: str) -> None:
    """Files immutable by chattr on tmpfs, ext4, xfs and btrfs are changed, removed or given a mode upstream.

    Each is a problem of its path, the rest is applied; without the attribute all of it is.
    """
    with filesystem(tmp_path / "disk", kind) as disk, Mirror.open(disk / "m") as mirror:
        root = disk / "m"
        keeper = Keeper(mirror)
        keeper.go({"f": file("old"), "g": file("old"), "r": file("r"), "t": file("t")})
        before = snapshot(root)
        with attributes("i", root / "f", root / "t", root / "r"):
            outcome = keeper.go({"f": file("new"), "g": file("new"), "t": file("t", mode=0o600)})
        assert code_of(outcome.problems) == dict.fromkeys("frt", "not_permitted")
        assert {**snapshot(root), "g": before["g"]} == before
        assert (root / "g").read_text() == "new"
        assert litter(root) == []
        tree = {"f": file("new"), "g": file("new"), "t": file("t", mode=0o600)}
        assert keeper.go(tree).problems == []
        assert snapshot(root) == expected(tree)


@pytest.mark.fault("X1 M6")
def test_no_room_for_a_directory_is_a_problem_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.mkdir` is made to fail with EDQUOT for one of two directories of a commit.

    It and what is below are problems of their paths; the other directory is there.
    """
    root = tmp_path / "m"
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        mkdir = os.mkdir

        def full(name: str, mode: int, *, dir_fd: int) -> None:
            if name == "d":
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            mkdir(name, mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "mkdir", full)
        outcome = keeper.go({"d": folder(), "d/f": file("f"), "e": folder(), "e/f": file("f")})
        assert code_of(outcome.problems)["d"] == "no_space"
        assert "d/f" in code_of(outcome.problems)
        assert (root / "e/f").read_text() == "f"
        assert litter(root) == []


def test_a_plan_of_many_small_files_is_quick(tmp_path: Path) -> None:
    """A floor that only a mistake breaks: an fsync per file, a listing per step."""
    import time  # noqa: PLC0415

    data = b"x" * 4096
    entry = Entry(Kind.FILE, 0o644, 1, len(data))
    with Mirror.open(tmp_path / "m") as mirror:
        start = time.monotonic()
        names = mirror.stage_bytes([(entry, data)] * 3000)
        staged = time.monotonic()
        plan = MirrorPlan(place=tuple(Place(f"f{n}", entry, str(name), None) for n, name in enumerate(names)))
        assert len(mirror.commit(plan, drift="repair").placed) == 3000
        done = time.monotonic()
    assert staged - start < 3
    assert done - staged < 6
