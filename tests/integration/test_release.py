"""Release mode: whole trees side by side, one symlink, on a real disk."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import syncd.mirror.mirror as mirror_module
import syncd.mirror.root as root_module
import syncd.mirror.share as share_module
import syncd.mirror.staging as staging_module
from syncd.errors import BadName, DiskProblem, FileChanged
from syncd.index import LocalRow
from syncd.mirror import BuildItem, ContentChanged, Mirror, release_name, release_number
from syncd.mirror.root import without_ctime
from syncd.mirror.staging import STAGED_NAME
from syncd.model import Entry, Kind
from syncd.plan import MirrorPlan, Place, SetMeta
from tests.support.mirror import T0, Keeper, Tree, expected, file, folder, link, lstat, snapshot
from tests.support.mirror import litter as mirror_litter
from tests.support.release import Releaser, as_nobody, in_order, litter, name_of, opened, read_only, seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from syncd.model import Problem

ONE: Tree = read_only(
    {
        "a": folder(mode=0o750, mtime_ns=T0 - 10),
        "a/changed": file("old content"),
        "a/deep": folder(),
        "a/deep/same": file("the same in both"),
        "a/run.sh": file("#!/bin/sh\n", mode=0o755),
        "a/touched": file("touched"),
        "big": file(b"0123456789" * 200_000),
        "empty": file(""),
        "gone": file("gone"),
        "link": link("a/changed"),
        "was_dir": folder(),
        "was_dir/f": file("f"),
        "was_file": file("a file"),
    }
)
TWO: Tree = read_only(
    {
        "a": folder(mode=0o700, mtime_ns=T0 + 77),
        "a/changed": file("new content", mode=0o600),
        "a/deep": folder(mtime_ns=-1_000_000_007),
        "a/deep/same": file("the same in both"),
        "a/new": folder(),
        "a/new/n": file("n", mtime_ns=5_000_000_000_000_000_001),
        "a/run.sh": file("#!/bin/sh\n", mode=0o700),
        "a/touched": file("touched", mtime_ns=T0 + 5),
        "big": file(b"0123456789" * 200_000),
        "empty": file(""),
        "link": link("a/new/n"),
        "was_dir": file("a file now"),
        "was_file": folder(mode=0o711),
        "was_file/in": file("in"),
        "zoë\n\u202e'$(x)": file("strange name"),
    }
)
NAME = "1-00000000"
OTHER = "2-00000000"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


@pytest.fixture
def releaser(root: Path) -> Iterator[Releaser]:
    with opened(root) as it:
        yield it


@pytest.fixture
def mirror(releaser: Releaser) -> Mirror:
    return releaser.mirror


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def staged_names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".syncd/stage").iterdir())


def exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass


def test_a_release_is_built_published_and_switched_to(root: Path, releaser: Releaser) -> None:
    """Content, kinds, modes and times are exactly the generation's; ``current`` is a relative symlink."""
    first = releaser.go(1, ONE)
    assert seen(root) == expected(ONE)
    assert (root / "current").readlink() == Path("releases") / first
    second = releaser.go(2, TWO)
    assert seen(root) == expected(TWO)
    assert snapshot(root / "releases" / first) == expected(ONE)
    assert releaser.mirror.releases() == [first, second]
    assert releaser.mirror.current() == releaser.mirror.release == second
    assert litter(root) == []
    assert releaser.drifted() == []
    assert {row.path for row in releaser.index.iter_local()} == TWO.keys()


def test_a_name_tells_generation_and_tree() -> None:
    """A second release of the same generation (other rules or modes) gets a name of its own."""
    assert release_name(7, "ab" * 32) == "7-abababab"
    assert release_name(7, "ab" * 32, ["7-abababab", "7-abababab-2"]) == "7-abababab-3"
    assert release_number("7-abababab-3") == 7
    for bad in ("", "7", "07-abababab", "7-ABABABAB", "7-abababab-0", "7-abababab/..", "7-abababab\n", "../7-abababab"):
        with pytest.raises(BadName):
            release_number(bad)
    with pytest.raises(ValueError, match="no name"):
        release_name(-1, "ab" * 32)


def test_releases_are_listed_by_the_number_of_their_generation(root: Path, mirror: Mirror) -> None:
    """Not as text; what is no release of ours is not among them."""
    for name in ("10-00000000", "9-00000000", "9-00000000-2", "9-00000000-10", "other", ".9-00000000.trash", "9-0"):
        (root / "releases" / name).mkdir()
    (root / "releases/8-00000000").write_text("no directory")
    (root / "releases/7-00000000").symlink_to("9-00000000")
    assert mirror.releases() == ["9-00000000", "9-00000000-2", "9-00000000-10", "10-00000000"]


@pytest.mark.fault("M1 M2")
@pytest.mark.parametrize("writable", [False, True])
def test_modes_are_the_entries_whatever_the_umask(root: Path, writable: bool) -> None:
    """Under a umask of 077 a release is built with set-id bits, and with directories that nobody describes.

    Modes are the entries'; those of the other directories, and of the release itself, follow ``read_only``.
    """
    tree = {"d": folder(mode=0o2555), "d/f": file("x", mode=0o6511), "x/y/f": file("x", mode=0o400)}
    before = os.umask(0o077)
    try:
        with opened(root) as releaser:
            releaser.go(1, tree, read_only=not writable)
            assert {row.path for row in releaser.index.iter_local()} == {*tree, "x", "x/y"}
            assert releaser.drifted() == []
    finally:
        os.umask(before)
    current = (root / "current").resolve()
    bare = 0o755 if writable else 0o555
    assert [mode_of(current / path) for path in ("d", "d/f", "x", "x/y", "x/y/f", "")] == [
        0o2555, 0o6511, bare, bare, 0o400, bare,
    ]  # fmt: skip
    assert mode_of(root / "releases") == 0o755


@pytest.mark.fault("M2 M3")
def test_a_directory_is_closed_to_others_until_all_below_it_is_done(root: Path, releaser: Releaser) -> None:
    """After each entry of a release's build, modes and times are looked at on the disk.

    What is not complete is closed to others (0700); a directory gets its time when all below it is there.
    """
    rows = releaser.mirror.build(NAME, releaser.items(ONE))
    building = root / f"releases/.{NAME}.building"
    for row in rows:
        assert mode_of(building) == 0o700
        if row.entry.kind is Kind.DIR:
            assert not [
                path for path in ONE if path.startswith(f"{row.path}/") and not os.path.lexists(building / path)
            ]
            assert (building / row.path).stat().st_mtime_ns == row.entry.mtime_ns
        for above in Path(row.path).parents[:-1]:
            assert mode_of(building / above) == 0o700
    assert mode_of(building) == 0o555


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_everything_belongs_to_the_owner_that_was_asked_for(root: Path) -> None:
    """The release, implied directories and the link that leads to it, too: web servers compare the two."""
    tree = {"d": folder(), "d/f": file("x"), "i/f": file("y"), "l": link("d")}
    with Mirror.open(root, mode="release", owner=(4321, 4321)) as mirror:
        releaser = Releaser(mirror, root.with_name("state") / "index")
        releaser.start()
        releaser.go(1, tree)
        releaser.index.close()
    current = (root / "current").resolve()
    owners = {path.lstat().st_uid for path in [root / "current", current, *current.rglob("*")]}
    assert owners == {4321}
    assert (root / "releases").stat().st_uid == 0


# sharing -----------------------------------------------------------------------------------------------------------


def numbers_of(root: Path, *names: str) -> list[list[int]]:
    return [[(root / "releases" / name / path).lstat().st_ino for path in ("a/deep/same", "big")] for name in names]


def clones(directory: Path) -> bool:
    """Whether this filesystem clones files."""
    with (directory / "one").open("w+b") as one, (directory / "other").open("w+b") as other:
        one.write(b"x")
        one.flush()
        try:
            fcntl.ioctl(other, 0x40049409, one.fileno())  # FICLONE
        except OSError:
            return False
    return True


def test_unchanged_files_are_hard_linked_where_nothing_better_is_possible(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" on a filesystem without clones asks once for one, and links."""
    asked = []

    def refuse(*fds: int) -> None:
        asked.append(fds)
        raise OSError(errno.EOPNOTSUPP, "no clones")

    monkeypatch.setattr(share_module, "clone", refuse)
    first, second = releaser.go(1, ONE), releaser.go(2, TWO)
    old, new = numbers_of(root, first, second)
    assert old == new
    assert len(asked) == 1
    assert releaser.shared > 3
    assert releaser.drifted() == []


@pytest.mark.fault("L9")
@pytest.mark.parametrize("share", ["hardlink", "copy", "reflink", "auto"])
def test_the_release_before_stays_as_it_was(root: Path, releaser: Releaser, share: str) -> None:
    """The next release has new contents, and old ones with the same or other modes and times; four ways to share.

    Unchanged files have the same inode where they are linked, else one of their own: the release before is as it was.
    """
    first = releaser.go(1, ONE, share=share)
    second = releaser.go(2, TWO, share=share)
    assert snapshot(root / "releases" / first) == expected(ONE)
    assert snapshot(root / "releases" / second) == expected(TWO)
    old, new = numbers_of(root, first, second)
    if share == "hardlink" or (share == "auto" and not clones(root)):
        assert old == new
    else:
        assert not set(old) & set(new)


def test_clones_are_made_where_the_filesystem_can(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mode, time and an inode of their own; other metadata is no reason to copy."""
    cloned = []

    def clone(source: int, target: int) -> None:
        cloned.append(Path(f"/proc/self/fd/{source}").readlink().name)
        os.sendfile(target, source, 0, os.fstat(source).st_size)

    first = releaser.go(1, ONE)
    monkeypatch.setattr(share_module, "clone", clone)
    second = releaser.go(2, TWO)
    assert seen(root) == expected(TWO)
    assert sorted(cloned) == ["big", "empty", "run.sh", "same", "touched"]
    old, new = numbers_of(root, first, second)
    assert not set(old) & set(new)


@contextmanager
def filesystem(where: Path, kind: str) -> Iterator[None]:
    """A filesystem of its own in a file; skips where this machine cannot."""
    image = where.with_name(f"{kind}.image")
    image.touch()
    os.truncate(image, 512 * 1024 * 1024)
    where.mkdir()
    maker = shutil.which(f"mkfs.{kind}")
    if maker is None or os.getuid() != 0:
        pytest.skip(f"no mkfs.{kind}, or not root")
    subprocess.run([maker, "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, where], check=False, capture_output=True).returncode != 0:
        pytest.skip(f"{kind} cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_real_clones_take_no_space(tmp_path: Path, kind: str) -> None:
    """On a filesystem that can; "hardlink" still links there."""
    with filesystem(tmp_path / "disk", kind):
        root = tmp_path / "disk/m"
        tree = {"big": file(os.urandom(64 * 1024 * 1024), mode=0o444)}
        with opened(root, state=tmp_path / "index") as releaser:
            names = [releaser.go(1, tree)]
            subprocess.run(["sync", "-f", root], check=True)
            before = releaser.mirror.free_bytes()
            names += [releaser.go(n, {**tree, "n": file(str(n))}) for n in (2, 3)]
            subprocess.run(["sync", "-f", root], check=True)
            assert releaser.mirror.free_bytes() > before - 16 * 1024 * 1024
            inodes = [(root / "releases" / name / "big").stat().st_ino for name in names]
            assert len(set(inodes)) == 3
            linked = releaser.go(4, tree, share="hardlink")
            assert (root / "releases" / linked / "big").stat().st_ino == inodes[-1]
            assert releaser.drifted() == []


def test_an_inode_with_too_many_names_is_copied(root: Path, releaser: Releaser, tmp_path: Path) -> None:
    """A file of the release gets hard links, up to 70,000, until the filesystem refuses one more.

    In the next release that file alone is copied; the others are linked.
    """
    first = releaser.go(1, ONE, share="hardlink")
    (tmp_path / "names").mkdir()
    with suppress(OSError):
        for number in range(70_000):
            os.link(root / "releases" / first / "empty", tmp_path / f"names/{number}")
        pytest.skip("no limit of names on this filesystem")
    second = releaser.go(2, TWO, share="hardlink")
    assert (root / "releases" / second / "empty").stat().st_nlink == 1
    old, new = numbers_of(root, first, second)
    assert old == new
    assert seen(root) == expected(TWO)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP])
def test_where_no_links_are_allowed_files_are_copied(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """And staged content is moved instead of linked, where that is the reason."""
    releaser.go(1, ONE)

    def refuse(source: str, *_: object, **__: object) -> None:
        raise OSError(errno.EPERM if STAGED_NAME.fullmatch(source) else number, "no links")

    monkeypatch.setattr(os, "link", refuse)
    releaser.go(2, TWO, share="hardlink")
    assert seen(root) == expected(TWO)
    assert litter(root) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_a_file_of_another_owner_is_not_linked(root: Path, releaser: Releaser) -> None:
    """The owner was changed in the configuration: the old release keeps the old one."""
    first = releaser.go(1, ONE)
    releaser.index.close()
    releaser.mirror.close()
    with Mirror.open(root, mode="release", owner=(4321, -1)) as mirror:
        again = Releaser(mirror, releaser.file)
        again.start()
        second = again.go(2, ONE)
        again.index.close()
    assert (root / "releases" / first / "big").stat().st_uid == 0
    assert {path.lstat().st_uid for path in (root / "releases" / second).rglob("*")} == {4321}
    (releaser.mirror, releaser.index) = (Mirror.open(root, mode="release"), again.index)  # for the fixture to close


# what is shared is what was known ------------------------------------------------------------------------------------


def replace_with_link(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


def edit(path: Path) -> None:
    found = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns + 1))


def replace_file(path: Path) -> None:
    """Another inode with the same size, mode and time."""
    found = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    other.chmod(found.st_mode)
    os.utime(other, ns=(found.st_mtime_ns, found.st_mtime_ns))
    other.rename(path)


@pytest.mark.fault("L1 L3")
@pytest.mark.parametrize("share", ["auto", "hardlink", "copy", "reflink"])
def test_a_file_that_is_not_as_it_was_is_not_shared(root: Path, releaser: Releaser, tmp_path: Path, share: str) -> None:
    """In the current release files are edited, lengthened, replaced, removed, made a symlink or fifo, or put below one.

    The next build names all of them at once and leaves nothing; what a link leads to is untouched.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    names = ["edited", "replaced", "gone", "link", "fifo", "d/f", "longer"]
    tree: Tree = {
        "d": folder(),
        **{name: file(f"content of {name}") for name in names},
        "fifo": file(""),
        "untouched": file("u"),
    }
    for name in ("f", "link"):
        (outside / name).write_text("outside")
    releaser.go(1, tree)
    current = (root / "current").resolve()
    edit(current / "edited")
    replace_file(current / "replaced")
    (current / "gone").unlink()
    replace_with_link(current / "link", outside / "link")
    was = (current / "fifo").stat()
    (current / "fifo").unlink()
    for number in range(200):
        os.mkfifo(tmp_path / f"{number}")
        if (tmp_path / f"{number}").stat().st_ino == was.st_ino:  # the number of the inode that went is given again
            break
    (tmp_path / f"{number}").rename(current / "fifo")
    (current / "fifo").chmod(was.st_mode)
    os.utime(current / "fifo", ns=(was.st_mtime_ns, was.st_mtime_ns))
    shutil.rmtree(current / "d")
    (current / "d").symlink_to(outside)
    with (current / "longer").open("a") as more:
        more.write("!")
    name = name_of(2, tree)
    with pytest.raises(ContentChanged) as caught:
        exhaust(releaser.mirror.build(name, releaser.items(tree), share=share))  # type: ignore[arg-type]
    assert sorted(caught.value.paths) == sorted(names)
    assert isinstance(caught.value, FileChanged)
    assert litter(root) == []
    assert releaser.mirror.releases() == [name_of(1, tree)]
    for path in caught.value.paths:  # what the caller does then
        releaser.index.drop_local([path])
    releaser.go(2, tree, share=share)
    assert seen(root) == expected(tree)
    assert [path.read_text() for path in sorted(outside.iterdir())] == ["outside", "outside"]


@pytest.mark.fault("L2")
@pytest.mark.parametrize("share", ["hardlink", "copy"])
def test_a_file_that_is_swapped_between_look_and_use_is_not_shared(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    """Right before the os.link or os.open of a file it is replaced by one of the same size, mode and time.

    The inode that was compared is the one that is shared, or none: the build is given up with its name.
    """
    releaser.go(1, ONE)
    current = (root / "current").resolve()
    word = "link" if share == "hardlink" else "open"
    use = getattr(os, word)

    def swapped(name: Any, *rest: Any, **keywords: Any) -> Any:
        if name == "same" and "same" not in done:
            done.append(name)
            replace_file(current / "a/deep/same")
        return use(name, *rest, **keywords)

    done: list[str] = []
    items = releaser.items(TWO)
    monkeypatch.setattr(os, word, swapped)
    with pytest.raises(ContentChanged) as caught:
        exhaust(releaser.mirror.build(OTHER, items, share=share))  # type: ignore[arg-type]
    assert caught.value.paths == ("a/deep/same",)
    assert done


@pytest.mark.fault("S1")
def test_a_file_that_is_written_to_while_it_is_cloned_is_not_shared(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that clones a file is replaced by one that copies it and then edits the original.

    What was cloned may be half of each: the build is given up with the file's name, and nothing of it stays.
    """
    first = releaser.go(1, ONE)
    items = releaser.items(TWO)
    staged = staged_names(root)

    def clone(source: int, target: int) -> None:
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        if os.fstat(source).st_size == ONE["big"].entry.size:
            edit((root / "current").resolve() / "big")

    monkeypatch.setattr(share_module, "clone", clone)
    with pytest.raises(ContentChanged) as caught:
        exhaust(releaser.mirror.build(OTHER, items, share="reflink"))
    assert caught.value.paths == ("big",)
    assert litter(root) == [f".syncd/stage/{name}" for name in staged]  # for the next try
    assert releaser.mirror.releases() == [first]


@pytest.mark.fault("O7")
def test_a_copy_is_compared_with_the_digest(root: Path, releaser: Releaser) -> None:
    """A byte of a release's file is changed, and its mode and time set back as if the disk had rotted.

    A build that copies reads it anyway, and names the file.
    """
    releaser.go(1, ONE)
    victim = (root / "current").resolve() / "big"
    found = victim.stat()
    edit(victim)
    victim.chmod(found.st_mode)
    os.utime(victim, ns=(found.st_mtime_ns, found.st_mtime_ns))
    with pytest.raises(ContentChanged) as caught:
        exhaust(releaser.mirror.build(OTHER, releaser.items(TWO), share="copy"))
    assert caught.value.paths == ("big",)


def test_staged_content_stays_until_the_release_is_published(root: Path, releaser: Releaser) -> None:
    """A build is given up after its first entry, another is dropped when it is whole, and both are begun again.

    Staged content stays until the release is published: it costs no second download.
    """
    items = releaser.items(ONE)
    staged = staged_names(root)
    assert len(staged) == 9
    half = releaser.mirror.build(NAME, items)
    next(half)
    half.close()  # type: ignore[attr-defined]
    assert litter(root) == [f".syncd/stage/{name}" for name in staged]
    exhaust(releaser.mirror.build(NAME, items))
    assert snapshot(releaser.mirror.build_path(NAME)) == expected(ONE)
    releaser.mirror.drop_build(NAME)
    assert litter(root) == [f".syncd/stage/{name}" for name in staged]
    exhaust(releaser.mirror.build(NAME, items))
    exhaust(releaser.mirror.build(NAME, items))  # again: what was there is replaced
    assert not (root / "current").exists()
    assert releaser.mirror.releases() == []
    releaser.mirror.publish_release(NAME)
    assert litter(root) == []
    assert snapshot(root / "releases" / NAME) == expected(ONE)


def test_staged_content_that_is_gone_is_named(root: Path, releaser: Releaser) -> None:
    """Swept by somebody, or cut off: it is asked for again."""
    items = {item.path: item for item in releaser.items(ONE)}
    (root / ".syncd/stage" / items["gone"].staged).unlink()
    (root / ".syncd/stage" / items["a/changed"].staged).write_text("other size")
    with pytest.raises(ContentChanged) as caught:
        exhaust(releaser.mirror.build(NAME, items.values()))
    assert "a/changed" in caught.value.paths
    assert "content of a/changed" in str(caught.value)


@pytest.mark.fault("P1 P7")
def test_paths_that_cannot_be_are_left_out_and_told(root: Path, releaser: Releaser) -> None:
    """A build is given names that climb out, are absolute, .syncd's, too long or below a file, and times of 2**100.

    With somebody to be told, each is a problem and the rest is made; with nobody, none of it is.
    """
    (staged, other) = releaser.mirror.stage_bytes([(file("x").entry, b"x")] * 2)
    entry = file("x").entry
    assert isinstance(staged, str)
    assert isinstance(other, str)
    bad = ["../x", "/x", ".syncd/x", "a//b", "b/../../x", "c" * 256, "d\0"]
    items = [BuildItem("a", entry, staged), BuildItem("a/b/c", entry, other), BuildItem("z", entry, other)]
    items += [BuildItem(path, entry, other) for path in bad]
    items += [
        BuildItem("l", Entry(Kind.SYMLINK, 0o777, 0)),
        BuildItem("t", Entry(Kind.SYMLINK, 0o777, 2**100, target="x")),
    ]
    items += [BuildItem("dir", Entry(Kind.DIR, 0o555, 2**100))]
    items.sort(key=lambda item: item.path.encode().replace(b"/", b"\0"))
    problems: list[Problem] = []
    rows = list(releaser.mirror.build(NAME, items, on_problem=problems.append))
    assert {row.path for row in rows} == {"a", "z", "dir"}
    assert {problem.path for problem in problems} == {"a/b/c", "l", "t", "dir", *bad}
    assert {problem.code for problem in problems} == {"parent_not_directory", "bad_name", "bad_time"}
    assert sorted(path.name for path in releaser.mirror.build_path(NAME).rglob("*")) == ["a", "dir", "z"]
    with pytest.raises((BadName, DiskProblem)):
        exhaust(releaser.mirror.build(NAME, items))
    assert [name for name in litter(root) if "stage" not in name] == []


def test_items_come_in_order_and_once(releaser: Releaser) -> None:
    """Anything else is a mistake of the caller."""
    entry = folder().entry
    for paths in (["a", "a"], ["b", "a"], ["a", "b", "a/c"], ["a.b", "a/b"]):
        with pytest.raises(ValueError, match="out of order"):
            exhaust(releaser.mirror.build(NAME, [BuildItem(path, entry) for path in paths]))
    exhaust(releaser.mirror.build(NAME, [BuildItem(path, entry) for path in ("a", "a/b", "a.b")]))


def test_what_was_not_built_to_the_end_is_not_published(root: Path, releaser: Releaser) -> None:
    """Nor is something that was never built, nor what is current already."""
    mirror = releaser.mirror
    with pytest.raises(ValueError, match="was not built"):
        mirror.publish_release(NAME)
    half = mirror.build(NAME, releaser.items(ONE))
    next(half)
    with pytest.raises(ValueError, match="was not built"):
        mirror.publish_release(NAME)
    half.close()  # type: ignore[attr-defined]
    mirror.discard_staged()
    name = releaser.go(1, ONE)
    exhaust(mirror.build(name, releaser.items(ONE)))
    with pytest.raises(ValueError, match="is current"):
        mirror.publish_release(name)
    mirror.drop_build(name)
    assert litter(root) == []
    for call in (mirror.drop_build, mirror.build_path, mirror.switch):
        with pytest.raises(BadName):
            call("../outside")
    with pytest.raises(ValueError, match="way to share"):
        exhaust(mirror.build(NAME, [], share="borrow"))  # type: ignore[arg-type]


def test_a_release_that_is_not_current_is_replaced_by_one_of_its_name(root: Path, releaser: Releaser) -> None:
    """What was known of it is lost, so it is built again."""
    first = releaser.go(1, ONE)
    releaser.go(2, TWO)
    (root / "releases" / first / "gone").unlink()
    releaser.build(first, ONE)
    releaser.mirror.publish_release(first)
    assert snapshot(root / "releases" / first) == expected(ONE)
    assert litter(root) == []


def test_a_mirror_without_releases_has_none(tmp_path: Path) -> None:
    """Mirror mode: nothing of it is made."""
    with Mirror.open(tmp_path / "m") as mirror:
        assert mirror.release == ""
        for call in (mirror.current, mirror.releases, lambda: mirror.switch(NAME), lambda: mirror.prune(1)):
            with pytest.raises(ValueError, match="no releases"):
                call()
    assert [path.name for path in (tmp_path / "m").iterdir()] == [".syncd"]


# the tree ------------------------------------------------------------------------------------------------------------


def test_before_the_first_release_the_tree_is_empty(root: Path, releaser: Releaser) -> None:
    """Looking finds nothing; changing is refused."""
    mirror = releaser.mirror
    (root / "f").write_text("beside the releases")
    assert mirror.current() == mirror.release == ""
    assert mirror.look("f") is None
    assert list(mirror.look_all(["f", "g"])) == [("f", None), ("g", None)]
    assert list(mirror.walk()) == []
    for call in (mirror.read_digests, mirror.open_source):
        with pytest.raises(FileChanged):
            call("f")
    assert list(mirror.look_all(["f", "../f", "g"])) == [("f", None), ("g", None)]
    for look in (mirror.look, mirror.open_source, mirror.holds_private):
        with pytest.raises(BadName):
            look("../f")
    (staged,) = mirror.stage_bytes([(file("x").entry, b"x")])
    with pytest.raises(DiskProblem, match="does not lead to a release"):
        mirror.commit(MirrorPlan(place=(Place("f", file("x").entry, str(staged), None),)), drift="repair")
    with pytest.raises(DiskProblem, match="no current release"):
        Mirror.peek(root, mode="release")
    assert (root / "f").read_text() == "beside the releases"


def test_the_tree_is_the_current_release(root: Path, releaser: Releaser) -> None:
    """Also after the next switch, for the next process, and for a reader without a lock."""
    mirror = releaser.mirror
    releaser.go(1, ONE)
    assert mirror.look("gone") is not None
    releaser.go(2, TWO)
    assert mirror.look("gone") is None
    found = mirror.look("a/changed")
    assert found is not None
    assert found.mode == 0o400
    assert [path for path, _ in mirror.walk()] == in_order(TWO)
    assert mirror.read_digests("a/changed")[0] == TWO["a/changed"].entry.digest
    fd = mirror.open_source("a/changed")
    assert os.read(fd, 100) == b"new content"
    os.close(fd)
    copy = mirror.stage_copy("a/changed", TWO["a/changed"].entry)
    assert (root / ".syncd/stage" / copy).read_bytes() == b"new content"
    with Mirror.peek(root, mode="release") as view:
        assert [path for path, _ in view.walk()] == in_order(TWO)
    releaser.index.close()
    mirror.close()
    with opened(root) as again:
        assert again.mirror.release == name_of(2, TWO)
        assert again.drifted() == []
        releaser.mirror = Mirror.open(root.with_name("unused"), mode="release")  # for the fixture to close


def test_no_ctime_comes_out_of_a_release(root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases that come and go change the ctime of what they share; that is no drift, and nothing is read again."""
    releaser.keep = 1
    releaser.go(1, ONE, share="hardlink")
    before = lstat((root / "current").resolve() / "big").ctime_ns
    for number in (2, 3, 4):
        releaser.go(number, [ONE, TWO][number % 2], share="hardlink")
    assert lstat((root / "current").resolve() / "big").ctime_ns != before
    monkeypatch.setattr(root_module, "hash_fd", lambda *_, **__: pytest.fail("read again"))
    assert releaser.drifted() == []
    found = releaser.mirror.look("big")
    assert found is not None
    assert found.stat.ctime_ns == 0
    assert without_ctime(lstat((root / "current").resolve() / "big")) == found.stat


def test_drift_in_a_release_is_mended_in_place_and_not_in_its_twin(root: Path, releaser: Releaser) -> None:
    """The file gets an inode of its own; the kept release has what somebody wrote into the shared one."""
    first = releaser.go(1, ONE, share="hardlink")
    releaser.go(2, {**ONE, "n": file("n", mode=0o444)}, share="hardlink")
    current = (root / "current").resolve()
    edit(current / "big")
    assert releaser.drifted() == ["big"]
    outcome = releaser.repair({**ONE, "n": file("n", mode=0o444)})
    assert outcome.problems == []
    assert outcome.drifted == ["big"]
    assert releaser.drifted() == []
    assert seen(root) == expected({**ONE, "n": file("n", mode=0o444)})
    assert (root / "releases" / first / "big").read_bytes() != ONE["big"].data
    releaser.switch(first)
    assert releaser.drifted() == ["big"]
    releaser.repair(ONE)
    assert seen(root) == expected(ONE)


@pytest.mark.fault("L9")
def test_a_change_of_mode_in_place_leaves_the_twin_alone(root: Path, releaser: Releaser) -> None:
    """A file that two releases share by a hard link gets another mode and time in the current one.

    It gets an inode of its own there; the kept release is as it was.
    """
    first = releaser.go(1, ONE, share="hardlink")
    releaser.go(2, {**ONE, "n": file("n", mode=0o444)}, share="hardlink")
    row = releaser.index.local("big")
    assert row is not None
    entry = row.entry._replace(mode=0o400, mtime_ns=T0 + 1234)
    outcome = releaser.mirror.commit(MirrorPlan(set_meta=(SetMeta("big", entry, row.stat),)), drift="report")
    assert (outcome.problems, outcome.drifted) == ([], [])
    releaser.remember(outcome)
    assert releaser.drifted() == []
    assert snapshot(root / "releases" / first) == expected(ONE)
    assert mode_of((root / "current").resolve() / "big") == 0o400


# switching -----------------------------------------------------------------------------------------------------------


def test_going_back_needs_no_content_and_reads_none(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rename, and what is known of that release is known again."""
    first, second = releaser.go(1, ONE), releaser.go(2, TWO)

    def never(*_: object, **__: object) -> None:
        pytest.fail("content was touched")

    for module in (root_module, share_module, staging_module):
        monkeypatch.setattr(module, "hash_fd", never)
    for name in (first, second, first, first):
        releaser.switch(name)
        assert releaser.drifted() == []
        assert seen(root) == expected(ONE if name == first else TWO)
        assert releaser.tables.loaded() == releaser.mirror.release == name
    assert releaser.index.note("applied") == first
    assert litter(root) == []


@pytest.mark.fault("L3 D5")
@pytest.mark.parametrize("what", ["file", "directory", "link out", "absolute link", "fifo", "link above", "bad name"])
def test_a_current_that_syncd_did_not_make_is_left_alone(root: Path, releaser: Releaser, what: str) -> None:
    """`current` is replaced by a file, a directory, a fifo, or a symlink to something else than a release.

    Switching, pruning, peeking and opening are refused with what to do, and nothing changes.
    """
    name = releaser.go(1, ONE)
    releaser.build(OTHER, TWO)
    releaser.mirror.publish_release(OTHER)
    current = root / "current"
    current.unlink()
    if what == "file":
        current.write_text("mine")
    elif what == "directory":
        current.mkdir()
        (current / "f").write_text("mine")
    elif what == "fifo":
        os.mkfifo(current)
    else:
        targets = {
            "link out": "/etc",
            "absolute link": str(root / "releases" / name),
            "link above": f"releases/../releases/{name}",
            "bad name": "releases/mine",
        }
        current.symlink_to(targets[what])
    before = current.lstat()
    mirror = releaser.mirror
    for call in (
        lambda: mirror.switch(OTHER),
        mirror.current,
        lambda: mirror.prune(1),
        lambda: Mirror.peek(root, mode="release"),
    ):
        with pytest.raises(DiskProblem, match=r"'current' in the mirror .* is .*, which syncd did not make") as caught:
            call()
        assert "releases/" in caught.value.hint
    assert current.lstat() == before
    assert mirror.releases() == [name, OTHER]
    assert mirror.release == name
    releaser.index.close()
    mirror.close()
    with pytest.raises(DiskProblem, match="which syncd did not make"):
        Mirror.open(root, mode="release")
    current.unlink() if what != "directory" else shutil.rmtree(current)
    releaser.mirror = Mirror.open(root, mode="release")  # the lock was let go
    releaser.mirror.switch(OTHER)
    assert seen(root) == expected(TWO)


def test_a_link_that_somebody_moved_is_seen_and_nothing_is_written_before_it_is_back(
    root: Path, releaser: Releaser
) -> None:
    """By hand to another release, to one that is gone, or away."""
    first, second = releaser.go(1, ONE), releaser.go(2, TWO)
    current, mirror = root / "current", releaser.mirror
    plan = MirrorPlan(place=(Place("f", file("x").entry, releaser.stage(file("x")), None),))
    for target in (f"releases/{first}", "releases/9-99999999", None):
        current.unlink()
        if target:
            current.symlink_to(target)
        assert mirror.release == second
        assert mirror.current() == (first if target and first in target else "")
        with pytest.raises(DiskProblem, match=f"does not lead to {second}"):
            mirror.commit(plan, drift="repair")
        mirror.switch(second)
        assert mirror.current() == second
        assert seen(root) == expected(TWO)
    assert snapshot(root / "releases" / first) == expected(ONE)
    with pytest.raises(DiskProblem, match="cannot open the release 9-99999999"):
        mirror.switch("9-99999999")


def test_a_current_release_that_was_removed_is_built_again(root: Path, releaser: Releaser) -> None:
    """``rm -r releases/1-…``: the next start has no tree, and does not stumble."""
    name = releaser.go(1, ONE)
    releaser.index.close()
    releaser.mirror.close()
    shutil.rmtree(root / "releases" / name)
    with opened(root, state=root.with_name("fresh") / "index") as again:
        assert again.mirror.current() == again.mirror.release == ""
        again.go(1, ONE)
        assert seen(root) == expected(ONE)
    releaser.mirror = Mirror.open(root.with_name("unused"), mode="release")


@pytest.mark.fault("L1 L5")
@pytest.mark.parametrize("what", ["symlink", "file", "writable", "owner", "filesystem"])
def test_a_releases_directory_that_others_prepared_is_refused(root: Path, tmp_path: Path, what: str) -> None:
    """`releases` is there already: a symlink, a file, writable for all, of uid 4321, or a mounted filesystem.

    The mirror is not opened, and nothing is written into it.
    """
    planted = root / "releases"
    planted.parent.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    if what == "symlink":
        planted.symlink_to(outside)
    elif what == "file":
        planted.write_text("x")
    else:
        planted.mkdir()
    if what == "writable":
        planted.chmod(0o777)
    mounted = False
    if what in {"owner", "filesystem"} and os.getuid() != 0:
        pytest.skip("needs root")
    if what == "owner":
        os.chown(planted, 4321, 4321)
    if what == "filesystem":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", planted], check=True)
        mounted = True
    try:
        with pytest.raises(DiskProblem, match="'releases' in the mirror"):
            Mirror.open(root, mode="release")
        if planted.is_dir():
            assert list(planted.iterdir()) == []
    finally:
        if mounted:
            subprocess.run(["umount", "-l", planted], check=True)


@pytest.mark.fault("L10")
def test_a_root_that_was_replaced_while_running_is_not_written_to(root: Path, releaser: Releaser) -> None:
    """The root of an open mirror, or only its ``releases``, is renamed away, and an empty directory put in its place.

    Building, publishing, switching and pruning are refused and write nothing; put back, it goes on.
    """
    name = releaser.go(1, ONE)
    items = releaser.items(TWO)
    exhaust(releaser.mirror.build(OTHER, items))
    calls: list[Callable[[], Any]] = [
        lambda: exhaust(releaser.mirror.build(OTHER, items)),
        lambda: releaser.mirror.publish_release(OTHER),
        lambda: releaser.mirror.switch(name),
        lambda: releaser.mirror.prune(1),
    ]
    for moved in (root / "releases", root):
        aside = root.with_name("aside")
        moved.rename(aside)
        for call in calls:
            with pytest.raises(DiskProblem):
                call()
        moved.mkdir()
        for call in calls:
            with pytest.raises(DiskProblem, match=r"was replaced|cannot find|does not lead"):
                call()
        assert list(moved.iterdir()) == []
        moved.rmdir()
        aside.rename(moved)
    releaser.mirror.publish_release(OTHER)
    releaser.mirror.switch(OTHER)
    assert seen(root) == expected(TWO)


@pytest.mark.fault("C2")
def test_everything_is_durable_before_what_depends_on_it(
    root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rename, unlink, rmdir, fsync and syncfs are noted in order from publishing to pruning; no power is cut.

    Content before the release's name, the name before the switch, the retirement before the first removal.
    """
    first = releaser.go(1, ONE)
    releaser.build(OTHER, TWO)
    done: list[str] = []
    names = {root.stat().st_ino: "root", (root / "releases").stat().st_ino: "releases"}

    def noted(call: Callable[..., Any], word: str) -> Callable[..., Any]:
        def note(*arguments: Any, **keywords: Any) -> Any:
            texts = [str(it) for it in arguments if isinstance(it, str)]
            if word in {"fsync", "syncfs"}:
                texts = [names[os.fstat(arguments[0]).st_ino]]
            if not (texts and STAGED_NAME.fullmatch(texts[0])):
                done.append(" ".join([word, *texts]))
            return call(*arguments, **keywords)

        return note

    for word in ("rename", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, word, noted(getattr(os, word), word))
    monkeypatch.setattr(mirror_module, "sync_filesystem", noted(mirror_module.sync_filesystem, "syncfs"))
    releaser.mirror.publish_release(OTHER)
    releaser.mirror.switch(OTHER)
    switched = len(done)
    releaser.mirror.prune(1)
    assert done[:switched] == [
        "syncfs root",
        f"rename .{OTHER}.building {OTHER}",
        "fsync releases",
        "unlink current.new",
        "rename current.new current",
        "fsync root",
    ]
    assert done[switched : switched + 2] == [f"rename {first} .{first}.trash", "fsync releases"]
    assert {line.partition(" ")[0] for line in done[switched + 2 :]} == {"unlink", "rmdir"}


@pytest.mark.fault("X2")
def test_a_failing_sync_gives_the_release_up(root: Path, releaser: Releaser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The syncfs that publishes a release is replaced by one that fails with EIO.

    Nobody knows what is on the disk: neither the tree nor the staged content is used, the release before stays.
    """
    name = releaser.go(1, ONE)
    releaser.build(OTHER, TWO)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(mirror_module, "sync_filesystem", fail)
    with pytest.raises(DiskProblem, match="EIO"):
        releaser.mirror.publish_release(OTHER)
    monkeypatch.undo()
    assert litter(root) == []
    assert releaser.mirror.releases() == [name]
    assert seen(root) == expected(ONE)
    with pytest.raises(ValueError, match="was not built"):
        releaser.mirror.publish_release(OTHER)
    releaser.go(2, TWO)
    assert seen(root) == expected(TWO)


@pytest.mark.skipif(os.getuid() != 0, reason="needs a filesystem of its own")
@pytest.mark.fault("X1")
def test_a_disk_without_room_leaves_the_release_before(tmp_path: Path) -> None:
    """On a tmpfs of 8 MB and 200 inodes, a copy of 5 MB is built beside the first, then 300 directories.

    Neither fits (ENOSPC), nothing is left of them, and the release before stays; one that fits is built.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=200", "none", disk], check=True)
    root = disk / "m"
    try:
        with opened(root, state=tmp_path / "index") as releaser:
            big = {"big": file(os.urandom(5_000_000), mode=0o444)}
            releaser.go(1, big)
            with pytest.raises(DiskProblem, match="ENOSPC"):
                releaser.go(2, big, share="copy")
            assert litter(root) == []
            dirs = [BuildItem(f"d{number}", folder().entry) for number in range(100, 400)]
            with pytest.raises(DiskProblem, match="ENOSPC"):
                exhaust(releaser.mirror.build(OTHER, dirs))
            assert litter(root) == []
            assert seen(root) == expected(big)
            releaser.go(2, {**big, "n": file("n")}, share="hardlink")
            assert len(seen(root)) == 2
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# removing ------------------------------------------------------------------------------------------------------------


def five(releaser: Releaser) -> list[str]:
    releaser.keep = 9
    return [releaser.go(number, [ONE, TWO][number % 2]) for number in range(1, 6)]


def test_the_newest_releases_are_kept(root: Path, releaser: Releaser) -> None:
    """The current one counts, and what is to be spared is spared."""
    names = five(releaser)
    mirror = releaser.mirror
    assert mirror.prune(9) == []
    assert mirror.prune(3, spare={names[0]}) == [names[1]]
    assert mirror.releases() == [names[0], *names[2:]]
    mirror.switch(names[2])
    assert mirror.prune(2) == [names[3], names[0]]
    assert mirror.releases() == [names[2], names[4]]
    assert mirror.prune(0) == [names[4]]
    assert mirror.releases() == [names[2]]
    assert litter(root) == []
    assert seen(root) == expected(TWO)


@pytest.mark.fault("D5")
def test_what_is_current_is_never_removed_and_neither_is_what_is_not_ours(root: Path, releaser: Releaser) -> None:
    """`current` is moved by hand to an old one of five releases, among which lie files and directories of others.

    Pruning to one spares that and the one we hold, and all that is not ours.
    """
    names = five(releaser)
    (root / "current").unlink()
    (root / "current").symlink_to(f"releases/{names[1]}")
    for name in ("notes", ".hidden", "backup-2024", "3-abcdefgh"):
        (root / "releases" / name).mkdir()
    (root / "releases/1-12345678").write_text("a file")
    (root / "releases/2-12345678").symlink_to(names[4])
    before = {path.name for path in (root / "releases").iterdir()}
    gone = releaser.mirror.prune(1)
    assert gone == [names[3], names[2], names[0]]
    releaser.mirror.recover()
    assert {path.name for path in (root / "releases").iterdir()} == before - set(gone)


@pytest.mark.fault("L1 L4 L9")
def test_removal_follows_nothing_and_changes_nothing_that_is_shared(
    root: Path, releaser: Releaser, tmp_path: Path
) -> None:
    """A release that is removed holds links to outside, a hard link, a closed directory, and files that another shares.

    Nothing outside changes, and neither does the current release.
    """
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (outside / "f").write_text("outside")
    before = snapshot(tmp_path / "outside")
    tree = {**ONE, "out": link(str(outside)), "out_file": link(str(outside / "f"))}
    first = releaser.go(1, tree, share="hardlink")
    top = root / "releases" / first
    (top / "a/mine").symlink_to(outside)
    (top / "a/deep/cache").mkdir(mode=0o000)
    (top / "nobody's \udcff".encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")).write_text("x")
    os.link(outside / "f", top / "linked")
    releaser.go(2, ONE, share="hardlink")
    assert releaser.mirror.prune(1) == [first]
    assert not top.exists()
    assert litter(root) == []
    assert snapshot(outside) == before
    assert (outside / "f").stat().st_nlink == 1
    assert seen(root) == expected(ONE)
    assert releaser.drifted() == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs to mount")
@pytest.mark.fault("D5")
def test_a_filesystem_mounted_into_a_release_is_not_emptied(root: Path, releaser: Releaser) -> None:
    """A tmpfs with a file in it is mounted into a release, which is pruned, and recovered.

    The file stays, and what leads to it under a hidden name, until it is unmounted.
    """
    first = releaser.go(1, ONE)
    releaser.go(2, TWO)
    where = root / "releases" / first / "was_dir"
    subprocess.run(["mount", "-t", "tmpfs", "none", where], check=True)
    inside = root / f"releases/.{first}.trash/was_dir"
    try:
        (where / "precious").write_text("x")
        assert releaser.mirror.prune(1) == [first]
        assert (inside / "precious").read_text() == "x"
        assert releaser.mirror.releases() == [name_of(2, TWO)]
        releaser.mirror.recover()
        assert (inside / "precious").read_text() == "x"
    finally:
        subprocess.run(["umount", "-l", inside if inside.exists() else where], check=True)
    releaser.mirror.recover()
    assert litter(root) == []


def test_removal_stops_when_asked_and_is_gone_on_with(root: Path, releaser: Releaser) -> None:
    """A daemon that is to end does not wait for a million files."""
    names = five(releaser)
    answers = itertools.chain([False] * 6, itertools.repeat(True))
    assert releaser.mirror.prune(1, stop=lambda: next(answers)) == [names[3]]
    assert releaser.mirror.releases() == [name for name in names if name != names[3]]
    assert litter(root) != []
    releaser.mirror.recover()
    assert litter(root) == []
    assert seen(root) == expected(TWO)


def test_a_reader_in_a_release_that_goes_keeps_what_it_has_open(root: Path, releaser: Releaser) -> None:
    """Open files stay readable; ``keep_releases`` is for those who open more."""
    releaser.go(1, ONE)
    with (root / "current/a/changed").open() as reader:
        releaser.keep = 1
        releaser.go(2, TWO)
        assert reader.read() == "old content"


# under others' eyes --------------------------------------------------------------------------------------------------

READER = """
import os, sys
root = sys.argv[1]
seen, opened, last = set(), 0, ""
print("ready", flush=True)
while os.getppid() != 1:
    top = os.open(root + "/current", os.O_RDONLY | os.O_DIRECTORY)
    said = set()
    for name in os.listdir(top):
        fd = os.open(name, os.O_RDONLY, dir_fd=top)
        said.add(os.read(fd, 100))
        os.close(fd)
    os.close(top)
    assert len(said) == 1, said
    seen |= said
    opened += 1
    if os.path.exists(root + ".stop"):
        break
print(len(seen), opened)
"""


def test_a_reader_sees_exactly_one_generation_in_each_directory_it_opens(root: Path) -> None:
    """In a tight loop through ``current``, while generations come, go and come back."""

    def tree(number: int) -> Tree:
        return {f"f{n:02}": file(f"generation {number}", mode=0o444) for n in range(30)}

    with opened(root, keep=10_000) as releaser:  # a reader that has to wait for its turn must not find its release gone
        names = [releaser.go(1, tree(1))]
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert reader.stdout is not None
        try:
            assert reader.stdout.readline() == "ready\n"
            end = time.monotonic() + 2.0
            for number in itertools.count(2):
                names.append(releaser.go(number, tree(number)))
                releaser.switch(names[-2])
                releaser.switch(names[-1])
                threading.Event().wait(0.003)
                if time.monotonic() > end:
                    break
            root.with_name(root.name + ".stop").touch()
            output, _ = reader.communicate(timeout=30)
        finally:
            reader.kill()
            reader.wait()
    assert reader.returncode == 0, output
    generations, directories = map(int, output.split())
    assert generations > 10
    assert directories > 100


def test_a_release_of_10_000_files_is_switched_to_in_one_step(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under 50 ms from the first visible change to the last: it is one rename."""

    def tree(number: int) -> Tree:
        files = {
            f"d{n // 100:02}/f{n % 100:02}": file(f"{number if n % 3 else 0} {n}", mode=0o444) for n in range(10_000)
        }
        return {**files, **{f"d{n:02}": folder() for n in range(100)}}

    with opened(root) as releaser:
        names = [releaser.go(number, tree(number)) for number in (1, 2)]
        times, changed = [], []
        for name in [*names, *names, *names]:
            begin = time.perf_counter()
            releaser.mirror.switch(name)
            times.append(time.perf_counter() - begin)
            changed.append((root / "current/d00/f01").read_text())
    with capsys.disabled():
        print(f"\n  switch of 10,000 files: {max(times) * 1000:.2f} ms at most, {min(times) * 1000:.2f} ms at least")
    assert changed == ["1 1", "2 1"] * 3
    assert max(times) < 0.05


SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
one, other = (os.fsencode(name) for name in sys.argv[1:3])
print("ready", flush=True)
while os.getppid() != 1:
    for _ in range(1000):
        libc.renameat2(-100, one, -100, other, 2)  # RENAME_EXCHANGE
"""


@pytest.mark.fault("L2")
@pytest.mark.parametrize("share", ["hardlink", "copy"])
def test_a_directory_that_is_swapped_for_a_symlink_all_the_time_leads_nowhere(
    root: Path, tmp_path: Path, share: str
) -> None:
    """Another process swaps a directory of the current release for a symlink to outside (RENAME_EXCHANGE) all the time.

    Builds have our content or are given up, it is mended, and removed when it is old: nothing outside changes.
    """
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("f", "sub/x"):
        (outside / name).write_text(f"outside {name}")
    (tmp_path / "link").symlink_to(outside)
    before = snapshot(outside)
    tree: Tree = {"d": folder(), "d/f": file("ours f"), "d/sub": folder(), "d/sub/x": file("ours x")}
    built = refused = 0
    with opened(root) as releaser:
        old = releaser.go(1, tree, read_only=False)
        known = {row.path: row for row in releaser.index.iter_local()}
        swapper = subprocess.Popen(
            [sys.executable, "-c", SWAP, "d", str(tmp_path / "link")],
            cwd=(root / "current").resolve(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert swapper.stdout is not None
            assert swapper.stdout.readline() == "ready\n"
            end = time.monotonic() + 30.0
            while min(built, refused) < 6 and time.monotonic() < end:
                items = [BuildItem(path, tree[path].entry, source=known[path]) for path in in_order(tree)]
                try:
                    exhaust(releaser.mirror.build(OTHER, items, share=share))  # type: ignore[arg-type]
                except ContentChanged:
                    refused += 1
                else:
                    built += 1
                    assert (releaser.mirror.build_path(OTHER) / "d/f").read_text() == "ours f"
                    assert (releaser.mirror.build_path(OTHER) / "d/sub/x").read_text() == "ours x"
                plan = MirrorPlan(
                    place=(Place("d/f", tree["d/f"].entry, releaser.stage(tree["d/f"]), known["d/f"].stat),)
                )
                for done in releaser.mirror.commit(plan, drift="repair").placed:
                    assert done.entry is not None
                    assert done.stat is not None
                    known[done.path] = LocalRow(done.path, done.entry, done.stat)
                releaser.mirror.drop_build(OTHER)
            items = [
                BuildItem(path, tree[path].entry, staged=releaser.stage(tree[path]) if tree[path].data else "")
                for path in in_order(tree)
            ]
            exhaust(releaser.mirror.build(OTHER, items))
            releaser.mirror.publish_release(OTHER)
            releaser.mirror.switch(OTHER)
            assert releaser.mirror.prune(1) == [old]
        finally:
            swapper.kill()
            swapper.communicate()
        releaser.mirror.recover()
        assert litter(root) == []
        assert releaser.mirror.releases() == [OTHER]
    assert built > 5
    assert refused > 5
    assert snapshot(outside) == before


def test_no_descriptor_is_left_open(root: Path, tmp_path: Path) -> None:
    """Builds, repairs, switches, peeks and opens, good ones and ones that fail (a missing file, a bad `current`).

    As many descriptors are open as before.
    """

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with opened(root) as releaser:
        releaser.go(1, ONE)
    before = count()
    with opened(root) as releaser:
        for number in range(2, 8):
            releaser.go(number, [ONE, TWO][number % 2])
            (root / "current").resolve().joinpath("big").unlink()
            with pytest.raises(ContentChanged):
                exhaust(releaser.mirror.build(OTHER, releaser.items(ONE)))
            releaser.repair([ONE, TWO][number % 2])
        with pytest.raises(DiskProblem):
            releaser.mirror.switch(OTHER)
        with pytest.raises(DiskProblem):
            Mirror.peek(tmp_path, mode="release")
    (root / "current").unlink()
    (root / "current").mkdir()
    for _ in range(3):
        with pytest.raises(DiskProblem):
            Mirror.open(root, mode="release")
    assert count() == before


def test_a_very_deep_tree_is_built_and_removed(root: Path, releaser: Releaser) -> None:
    """With few descriptors, and memory for one path."""
    deep = "/".join(["d"] * 1300)
    entry = file("deep", mode=0o444).entry
    rows = list(releaser.mirror.build(NAME, [BuildItem(f"{deep}/f", entry, releaser.stage(file("deep", mode=0o444)))]))
    assert len(rows) == 1301
    releaser.mirror.publish_release(NAME)
    assert releaser.mirror.prune(1) == [NAME]
    assert litter(root) == []


NOBODY = """
root = Path(sys.argv[1])
def tree(n):
    files = {"d/e/f": file("same"), "d/n": file(str(n)), "s": file("x", mode=0o400)}
    return read_only({"d": folder(), "d/e": folder(), **files})
with opened(root, keep=2) as releaser:
    for n in range(1, 6):
        releaser.go(n, tree(n))
    current = (root / "current").resolve()
    (current / "d/e/f").chmod(0o644)
    (current / "d/e/f").write_text("drift")
    (current / "d/e").chmod(0o755)
    (current / "d/e/f").unlink()
    (current / "d/e").chmod(0o555)
    assert releaser.drifted()
    outcome = releaser.repair(tree(5))
    assert not outcome.problems, outcome.problems
    mode = oct(current.stat().st_mode & 0o7777)
    print(seen(root) == expected(tree(5)), len(releaser.mirror.releases()), litter(root), mode)
"""


def test_read_only_releases_need_no_privileges(tmp_path: Path) -> None:
    """Built, switched to, mended and removed by somebody who may not write where there is no write permission."""
    base = tmp_path / "nobody"
    base.mkdir()
    os.chown(base, 65534, 65534)
    for above in base.parents:
        if above.stat().st_uid == os.getuid() and not above.stat().st_mode & stat.S_IXOTH:
            above.chmod(0o755)
    assert as_nobody(NOBODY, base / "m") == "True 2 [] 0o555"


# a tree to be checked, in mirror mode --------------------------------------------------------------------------------


def test_a_mirror_can_be_checked_before_it_changes(tmp_path: Path) -> None:
    """The whole wanted tree, unchanged files included; then the very same staged content is committed."""
    root = tmp_path / "m"
    tree: Tree = {path: node for path, node in TWO.items() if path != "was_file/in"}
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go(ONE)
        plan = keeper.plan(tree)
        staged = {step.path: step.staged for step in plan.place}
        before = {path: lstat(root / path) for path in ONE}
        items = [
            BuildItem(path, tree[path].entry, staged[path])
            if path in staged
            else BuildItem(path, tree[path].entry, source=LocalRow(path, *keeper.index[path]))
            for path in in_order(tree)
            if path in staged or tree[path].entry.kind is Kind.FILE
        ]
        items = sorted(
            items + [BuildItem(path, node.entry) for path, node in tree.items() if node.entry.kind is Kind.DIR],
            key=lambda item: item.path.encode().replace(b"/", b"\0"),
        )
        where = mirror.build_check(items)
        assert snapshot(where) == expected(tree)
        (where / "big").chmod(0o600)
        (where / "big").write_text("a check that scribbles")
        again = mirror.build_check(items)
        assert snapshot(again) == expected(tree)
        assert {path: lstat(root / path) for path in ONE} == before
        mirror.drop_check()
        mirror.drop_check()
        assert keeper.mirror.commit(plan, drift="report").problems == []
        assert snapshot(root) == expected(tree)
        assert mirror_litter(root) == []
        with pytest.raises(ContentChanged):
            mirror.build_check(items)
        assert mirror_litter(root) == []
        with pytest.raises(ValueError, match="not shared by 'hardlink'"):
            mirror.build_check(items, share="hardlink")
        mirror.build_check([BuildItem("d", folder().entry)])
    with Mirror.open(root) as mirror:
        mirror.recover()
        assert mirror_litter(root) == []
