"""Reading a source directory: what takes part, what is a problem, and content that is never torn."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from syncd import scan
from syncd.errors import DiskProblem, FileChanged
from syncd.index import Index, LocalRow
from syncd.model import Entry, Kind, Problem
from syncd.paths import sort_key
from syncd.rules import Rules
from syncd.scan import MAX_DEPTH, RACY_NS, Found, Scanner, Unreadable, Vanished, is_racy, stays_inside

if TYPE_CHECKING:
    from collections.abc import Iterator

SECOND = 1_000_000_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def scanner(root: Path, *, symlinks: scan.SymlinkPolicy = "inside", rules: Rules | None = None) -> Scanner:
    return Scanner(root, rules or Rules(), symlinks=symlinks)


def nothing_known(_: str) -> tuple[LocalRow, ...]:
    return ()


def told(root: Path, below: str = "", **options: object) -> list[str]:
    """What a scan says, one line each: the path and a slash, an arrow or a code."""
    out = []
    for item in scanner(root, **options).scan(below, nothing_known):
        if isinstance(item, Problem):
            out.append(f"{item.path} {item.code}")
        elif isinstance(item, Vanished):
            out.append(f"{item.path} vanished")
        else:
            entry = item.row.entry
            mark = {Kind.DIR: "/", Kind.SYMLINK: f" -> {entry.target}", Kind.FILE: ""}[entry.kind]
            out.append(item.row.path + mark)
    return out


def age(path: Path, seconds: float = 10) -> None:
    """Give a file a time long ago; its ctime is then now, so wait until that is past, too."""
    then = time.time_ns() - int(seconds * SECOND)
    os.utime(path, ns=(then, then), follow_symlinks=False)
    settle()


def settle() -> None:
    """Let the coarse clock that stamps files go on, so that what comes now differs from what was."""
    until = time.monotonic_ns() + RACY_NS + 2_000_000
    while time.monotonic_ns() < until:
        time.sleep(0.001)


def as_nobody(root: Path, code: str) -> str:
    """Run code in a process without privileges; `scanner` and `told` are there."""
    for above in [root, *root.parents]:
        with contextlib.suppress(OSError):
            above.chmod(above.stat().st_mode | 0o055)
    program = (
        "import os, resource, sys\nfrom pathlib import Path\nfrom tests.unit.test_scan import *\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nroot = Path(sys.argv[1])\n" + textwrap.dedent(code)
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.stderr == ""
    return run.stdout.strip()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- the walk ------------------------------------------------------------------------------------------


def test_a_tree_is_told_parents_first_in_component_order(root: Path) -> None:
    """The order is that of the index; directories of syncd's own are not told, wherever they are."""
    for name in ("a", "a/b", "a!", "z/.syncd", ".syncd"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("a/b/c", "a!/x", "a.txt", "z/.syncd/f", ".syncd/lock", ".syncdignore"):
        (root / name).touch()
    (root / "z" / "l").symlink_to("../a/b")
    lines = told(root)
    assert lines == [
        ".syncdignore", "a/", "a/b/", "a/b/c", "a!/", "a!/x", "a.txt", "z/", "z/l -> ../a/b",
    ]  # fmt: skip
    paths = [line.split(" ->")[0].rstrip("/") for line in lines]
    assert paths == sorted(paths, key=sort_key)
    assert told(root, "a") == ["a/", "a/b/", "a/b/c"]
    assert told(root, "z/.syncd") == ["z/.syncd vanished"]


@pytest.mark.parametrize("below", ["missing", "a.txt", "a.txt/x", "link", "link/b", ".syncd", "a" * 300])
def test_below_something_that_is_no_directory_there_is_nothing(root: Path, below: str) -> None:
    """A file, a symlink to a directory, an impossible name: a single Vanished."""
    (root / "a").mkdir()
    (root / "a" / "b").mkdir()
    (root / ".syncd").mkdir()
    (root / "a.txt").touch()
    (root / "link").symlink_to("a")
    assert told(root, below) == [f"{below} vanished"]


def test_modes_times_and_sizes_are_those_of_the_disk(root: Path) -> None:
    """Setuid and sticky bits, negative times and nanoseconds; directories have no size, symlinks mode 0777."""
    (root / "f").write_bytes(b"12345")
    (root / "f").chmod(0o4751)
    os.utime(root / "f", ns=(0, -1_000_000_001))
    (root / "d").mkdir()
    (root / "d").chmod(0o1777)
    os.utime(root / "d", ns=(0, 5))
    (root / "l").symlink_to("nowhere")
    os.utime(root / "l", ns=(0, 4_294_967_297_123_456_789), follow_symlinks=False)
    rows = {item.row.path: item.row for item in scanner(root).scan("", nothing_known)}
    assert rows["f"].entry == Entry(Kind.FILE, 0o4751, -1_000_000_001, 5)
    assert rows["d"].entry == Entry(Kind.DIR, 0o1777, 5)
    link = os.lstat(root / "l")
    assert rows["l"].entry == Entry(Kind.SYMLINK, 0o777, link.st_mtime_ns, target="nowhere")
    assert rows["f"].stat == scan._stat(os.lstat(root / "f"))


@pytest.mark.fault("W5")
def test_a_root_that_cannot_be_scanned_is_a_disk_problem(tmp_path: Path, root: Path) -> None:
    """A root that is missing, a file or a dangling symlink is checked, scanned, looked into and read from.

    Each ends with DiskProblem, never as an empty scan; a symlink to a directory is a root.
    """
    (root / "f").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("root")
    for bad in ("missing", "file", "dangling"):
        candidate = scanner(tmp_path / bad)
        for action in (candidate.check_root, lambda c=candidate: list(c.scan("", nothing_known)),
                       lambda c=candidate: c.look("f", None), lambda c=candidate: c.open_file("f")):  # fmt: skip
            with pytest.raises(DiskProblem, match=bad):
                action()
    scanner(tmp_path / "link").check_root()
    assert told(tmp_path / "link") == ["f"]


@pytest.mark.fault("L10")
def test_a_root_that_was_replaced_is_opened_anew(tmp_path: Path, root: Path) -> None:
    """Between two scans the root is renamed away, and another directory is made in its place.

    While it is gone it is a DiskProblem; then only what the new one holds is found.
    """
    (root / "old").touch()
    watched = scanner(root)
    assert [item.row.path for item in watched.scan("", nothing_known)] == ["old"]
    root.rename(tmp_path / "aside")
    with pytest.raises(DiskProblem):
        watched.check_root()
    root.mkdir()
    (root / "new").touch()
    assert [item.row.path for item in watched.scan("", nothing_known)] == ["new"]
    assert watched.look("old", None) is None


@pytest.mark.fault("S3")
def test_what_cannot_be_read_is_a_problem_and_the_rest_goes_on(root: Path) -> None:
    """Without privileges: an unreadable file, directory, ignore file and root, each told for itself."""
    for name in ("closed", "open", "nosearch", "ignored"):
        (root / name).mkdir()
        (root / name / "f").touch()
    (root / "secret").touch(mode=0)
    (root / "ignored" / ".syncdignore").touch(mode=0)
    (root / "closed").chmod(0)
    (root / "nosearch").chmod(0o444)
    out = as_nobody(
        root,
        """
        print(told(root))
        print(scanner(root).look("closed/f", None).code, scanner(root).look("closed", None).code)
        try:
            scanner(root).hash_file("secret", keep=0)
        except Unreadable as exc:
            print(exc.transient, exc)
        """,
    )
    lines = out.splitlines()
    assert lines[0] == str([
        "closed unreadable_dir", "ignored unreadable_dir", "nosearch/", "nosearch/f unreadable", "open/",
        "open/f", "secret",
    ])  # fmt: skip
    assert lines[1] == "unreadable_dir unreadable_dir"
    assert lines[2] == "True secret: Permission denied"
    root.chmod(0)
    out = as_nobody(
        root.parent,
        """
        try:
            scanner(root / "root").check_root()
        except DiskProblem as exc:
            print("root", "Permission denied" in str(exc))
        """,
    )
    assert out == "root True"


@pytest.mark.fault("S3")
def test_an_unreadable_ignore_file_at_the_top_ends_the_scan(root: Path) -> None:
    """The root's `.syncdignore` is closed to a process without privileges, or a byte larger than what is read of one.

    Scan and look end with DiskProblem, as what it excludes is unknown; at the limit it is read.
    """
    (root / "f").touch()
    (root / ".syncdignore").touch(mode=0)
    code = """
        for action in (lambda: told(root), lambda: scanner(root).look("f", None)):
            try:
                print(action())
            except DiskProblem as exc:
                print("Permission denied" in str(exc), end=" ")
    """
    assert as_nobody(root, code) == "True True"
    (root / ".syncdignore").chmod(0o644)
    (root / ".syncdignore").write_bytes(b"#" * (scan.MAX_IGNORE_BYTES + 1))
    with pytest.raises(DiskProblem, match="larger than"):
        told(root)
    with pytest.raises(DiskProblem, match="larger than"):
        scanner(root).look("f", None)
    (root / ".syncdignore").write_bytes(b"#" * scan.MAX_IGNORE_BYTES)
    assert told(root) == [".syncdignore", "f"]


@pytest.mark.fault("P4")
def test_names_that_are_not_utf8_are_refused_by_name(root: Path) -> None:
    """A file's name, a directory's and a symlink's target hold bytes that are no UTF-8.

    Each is a problem of its own and the rest is found; excluded ones are not even mentioned.
    """
    (root / "bad\udcff").touch()
    (root / "dir\udcfe").mkdir()
    (root / "link").symlink_to("t\udcff")
    (root / "ok").touch()
    assert told(root) == ["bad\udcff not_utf8", "dir\udcfe not_utf8", "link not_utf8", "ok"]
    assert told(root, rules=Rules(exclude=["bad*", "dir*", "link"])) == ["ok"]
    looked = scanner(root).look("bad\udcff", None)
    assert isinstance(looked, Problem)
    assert looked.code == "not_utf8"


@pytest.mark.fault("P1 O5")
def test_paths_too_long_or_too_deep_are_refused_and_the_rest_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directories are nested beyond the depth limit, and by names of 240 bytes beyond the length of a path.

    Each branch is refused once, where it becomes too much, and the file beside them is found. A scan never has more
    descriptors open than the limit has levels; a look has one or two.
    """
    deep = os.open(root, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 3):
        os.mkdir("d", dir_fd=deep)
        inner = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = inner
    os.close(deep)
    wide = os.open(root, os.O_RDONLY)
    for _ in range(12):
        os.mkdir("é" * 120, dir_fd=wide)
        inner = os.open("é" * 120, os.O_RDONLY, dir_fd=wide)
        os.close(wide)
        wide = inner
    os.close(wide)
    (root / "z").touch()
    opened: list[int] = []
    real_stat, before = os.stat, descriptors()

    def stat(*arguments: Any, **options: Any) -> os.stat_result:
        opened.append(descriptors() - before)
        return real_stat(*arguments, **options)

    monkeypatch.setattr(scan.os, "stat", stat)
    lines = told(root)
    assert len(opened) > MAX_DEPTH
    assert MAX_DEPTH / 2 < max(opened) <= MAX_DEPTH + 1
    opened.clear()
    assert lines.count("/".join(["d"] * (MAX_DEPTH + 1)) + " loop_too_deep") == 1
    assert [line.rpartition(" ")[2] for line in lines if line.endswith("bad_name")] == ["bad_name"]
    assert "z" in lines
    limit = "/".join(["d"] * (MAX_DEPTH + 1))
    looked = scanner(root).look(limit, None)
    assert isinstance(looked, Problem)
    assert scanner(root).look(limit + "/d", None) is None
    assert 0 < max(opened) <= 2
    assert descriptors() == before


def test_special_files_are_told_and_never_opened(root: Path) -> None:
    """A fifo would block, a device could act: neither is opened, whoever asks."""
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "sock"))
    with contextlib.suppress(PermissionError):
        os.mknod(root / "zero", 0o600 | 0o020000, os.makedev(1, 5))
    expected = [f"{path.name} special_file" for path in sorted(root.iterdir())]
    assert told(root) == expected
    for path in root.iterdir():
        with pytest.raises(FileChanged):
            scanner(root).hash_file(path.name, keep=0)
    (root / ".syncdignore").unlink(missing_ok=True)
    os.mkfifo(root / ".syncdignore")
    assert told(root) == [".syncdignore special_file", ".syncdignore bad_ignore_file", *expected]


# -- symlinks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "target", "inside"),
    [
        ("l", "a", True),
        ("l", "..", False),
        ("l", "../root/a", False),
        ("a/l", "..", True),
        ("a/l", "../b/./../c", True),
        ("a/l", "../../x", False),
        ("a/l", "b/../../c", True),
        ("a/l", "b/../../../c", False),
        ("a/l", "/root/a", False),
        ("a/b/l", "..//../x/", True),
        ("a/l", "l", True),
    ],
)
@pytest.mark.fault("L6")
def test_a_link_stays_inside_as_its_text_says(path: str, target: str, inside: bool) -> None:
    """Targets of symlinks that lead up, down, to themselves, out of the root or are absolute are judged by their text.

    Inside is what never leaves the root on its way; nothing is followed.
    """
    assert stays_inside(path, target) is inside


@pytest.mark.fault("L6")
def test_each_symlink_policy_takes_its_share(root: Path) -> None:
    """Dangling, self-referring, cyclic, absolute and outward symlinks are scanned under each policy.

    Each is taken, refused or skipped as the policy says; none is followed, and no file is read through one.
    """
    (root / "d").mkdir()
    (root / "d" / "f").touch()
    for name, target in {
        "absolute": "/etc", "cycle1": "cycle2", "cycle2": "cycle1", "dangling": "nowhere",
        "dirlink": "d", "outside": "../../etc/passwd", "self": "self",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    benign = ["cycle1 -> cycle2", "cycle2 -> cycle1", "d/", "d/f", "dangling -> nowhere", "dirlink -> d"]
    assert told(root) == [
        "absolute symlink_outside", *benign, "outside symlink_outside", "self -> self"
    ]  # fmt: skip
    assert told(root, symlinks="skip") == ["d/", "d/f"]
    assert told(root, symlinks="all") == [
        "absolute -> /etc", *benign, "outside -> ../../etc/passwd", "self -> self"
    ]  # fmt: skip
    looked = scanner(root, symlinks="all")
    assert looked.look("dirlink/f", None) is None
    assert isinstance(looked.look("dirlink", None), Found)
    assert scanner(root, symlinks="skip").look("dirlink", None) is None
    with pytest.raises(FileChanged):
        looked.hash_file("dirlink/f", keep=0)
    with pytest.raises(FileChanged):
        looked.hash_file("dirlink", keep=0)


@pytest.mark.fault("L8 L2")
def test_a_directory_that_turns_into_a_symlink_and_back_is_never_followed(tmp_path: Path, root: Path) -> None:
    """A thread swaps a directory for a symlink to the outside and back, without pause, for 1.5 s of scans and reads.

    What is found and read is only ever of the root.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("outside")
    (outside / "only-outside").write_text("outside")
    (root / "d").mkdir()
    (root / "d" / "f").write_text("inside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            (root / "d").rename(root / "aside")
            (root / "d").symlink_to(outside)
            (root / "d").unlink()
            (root / "aside").rename(root / "d")

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        looking = scanner(root, symlinks="skip")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            seen |= {getattr(item, "path", "") or item.row.path for item in looking.scan("", nothing_known)}
            looked = looking.look("d/only-outside", None)
            assert looked is None
            with contextlib.suppress(FileChanged):
                _, data = looking.hash_file("d/f", keep=100)
                assert data == b"inside"
    finally:
        stop.set()
        swapper.join()
    assert seen <= {"d", "d/f", "aside", "aside/f"}
    assert {"d", "d/f"} <= seen


# -- rules ---------------------------------------------------------------------------------------------


def test_ignore_files_count_where_they_lie(root: Path) -> None:
    """Outer and nested ones, for a whole scan, a scan from below and a single look."""
    for name in ("a/keep.log", "a/x.log", "a/b/x.log", "a/b/y.txt", "build/out"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / ".syncdignore").write_text("*.log\nbuild/\n")
    (root / "a" / ".syncdignore").write_text("!keep.log\n/b/y.txt\n")
    assert told(root) == [".syncdignore", "a/", "a/.syncdignore", "a/b/", "a/keep.log"]
    assert told(root, "a/b") == ["a/b/"]
    assert told(root, "build") == ["build vanished"]
    looking = scanner(root)
    assert looking.look("a/x.log", None) is None
    assert looking.look("a/b/y.txt", None) is None
    assert looking.look("build/out", None) is None
    assert isinstance(looking.look("a/keep.log", None), Found)


def test_a_line_that_does_not_parse_is_told_and_the_others_count(root: Path) -> None:
    """A typing error must not publish what the next line excludes; a symlink is no ignore file."""
    (root / "f").touch()
    (root / "secret").touch()
    (root / ".syncdignore").write_text("a[\nsecret\n")
    assert told(root) == [".syncdignore", ".syncdignore bad_ignore_file", "f"]
    (root / ".syncdignore").unlink()
    (root / ".syncdignore").symlink_to("f")
    assert told(root) == [".syncdignore -> f", ".syncdignore bad_ignore_file", "f", "secret"]


def test_with_include_a_parent_is_told_only_once_something_below_takes_part(root: Path) -> None:
    """Lazily, right before it; also for a scan from below and for a look at the parent itself."""
    for name in ("a/b/x.py", "a/c/y.txt", "d/e/z.txt", "s/t/u/v.py", "s/w.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    rules = Rules(include=["*.py", "/d/e/"])
    assert told(root, rules=rules) == [
        "a/", "a/b/", "a/b/x.py", "d/", "d/e/", "d/e/z.txt", "s/", "s/t/", "s/t/u/", "s/t/u/v.py", "s/w.py",
    ]  # fmt: skip
    assert told(root, "a", rules=rules) == ["a/", "a/b/", "a/b/x.py"]
    assert told(root, "a/c", rules=rules) == []
    looking = scanner(root, rules=rules)
    assert isinstance(looking.look("a", None), Found)
    assert looking.look("a/c", None) is None
    assert looking.look("a/c/y.txt", None) is None
    assert isinstance(looking.look("d", None), Found)


# -- the quick check -----------------------------------------------------------------------------------


class Remembered:
    """A scanner and an index that remembers what was scanned and hashed."""

    def __init__(self, root: Path) -> None:
        self.index = Index(None)
        self.scanner = scanner(root)

    def changed(self) -> list[str]:
        """Scan, hash and remember; the paths that were not fresh."""
        out = []
        for item in self.scanner.scan("", self.index.local_children):
            assert isinstance(item, Found)
            looked = self.scanner.look(item.row.path, self.index.local(item.row.path))
            assert looked == item
            if not item.fresh:
                row = item.row
                if row.entry.kind is Kind.FILE:
                    row, _ = self.scanner.hash_file(row.path, keep=0)
                out.append(row.path)
                self.index.put_local([row])
        return out


@pytest.fixture
def remembered(root: Path) -> Iterator[Remembered]:
    remembered = Remembered(root)
    yield remembered
    remembered.index.close()


def test_each_name_meets_its_own_row(root: Path, remembered: Remembered) -> None:
    """Rows and names are merged in the order of bytes: whatever names there are, new, gone, or no names for us."""
    kept = ["a", "a!", "a\x01", "a.b", "b", "z", "\x7f", "é", "\ud7ff", "\ue000", "\U00010000", "\U0001f600"]
    gone = ["A", "a-", "bb", "zz", "ê", "\uffee", "\U00010001"]
    new = ["0", "a\x02", "c", "ë", "\ue001", "\U0001f601", "\U0010fffd"]
    for name in kept + gone:
        (root / name).write_text("x")
        (root / "d" / name).mkdir(parents=True)
    assert len(remembered.changed()) == 2 * len(kept + gone) + 1
    for name in gone:
        (root / name).unlink()
        (root / "d" / name).rmdir()
    for name in new:
        (root / name).write_text("x")
        (root / "d" / name).mkdir()
    for above in (root, root / "d"):
        (above / os.fsdecode(b"\xff")).touch()
        (above / os.fsdecode(b"\xed\xa0\x80")).touch()
    time.sleep(2 * RACY_NS / SECOND)
    items = list(remembered.scanner.scan("", remembered.index.local_children))
    fresh = [item.row.path for item in items if isinstance(item, Found) and item.fresh]
    stale = [item.row.path for item in items if isinstance(item, Found) and not item.fresh]
    assert fresh == sorted([*kept, *(f"d/{name}" for name in kept)], key=sort_key)
    assert stale == sorted(["d", *new, *(f"d/{name}" for name in new)], key=sort_key)
    assert len(items) == len(fresh) + len(stale) + 4


def test_a_link_to_a_known_file_is_another_path(root: Path, remembered: Remembered) -> None:
    """Its stat fields are those of its neighbour's row, which is not its own."""
    (root / "b").write_text("x")
    (root / "a").hardlink_to(root / "b")
    time.sleep(2 * RACY_NS / SECOND)
    assert remembered.changed() == ["a", "b"]
    remembered.index.drop_local(["a"])
    assert remembered.changed() == ["a"]


def test_what_did_not_change_is_fresh(root: Path, remembered: Remembered) -> None:
    """Files, directories and symlinks, as soon as they are older than the clock's tick."""
    (root / "d").mkdir()
    (root / "d" / "f").write_text("x")
    (root / "d" / "l").symlink_to("f")
    settle()
    assert remembered.changed() == ["d", "d/f", "d/l"]
    assert remembered.changed() == []


@pytest.mark.fault("W6")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(os.utime, id="touch only"),
        pytest.param(lambda p: p.chmod(0o600), id="mode only"),
        pytest.param(lambda p: p.write_text("abcd"), id="size and time"),
        pytest.param(
            lambda p: (s := p.stat(), p.write_text("zyx"), os.utime(p, ns=(0, s.st_mtime_ns))),
            id="content, with equal size and mtime",
        ),
        pytest.param(lambda p: (shutil.copy2(p, p.with_name("n")), p.with_name("n").rename(p)), id="another inode"),
    ],
)
def test_every_kind_of_change_is_seen(root: Path, remembered: Remembered, change: object) -> None:
    """A file is touched, chmodded, rewritten, rewritten with equal size and mtime, or replaced by a copy.

    The next scan sees it and hashes what it holds now; after that it is unchanged.
    """
    file = root / "f"
    file.write_text("abc")
    age(file)
    assert remembered.changed() == ["f"]
    assert remembered.changed() == []
    before = remembered.index.local("f")
    change(file)
    assert remembered.changed() == ["f"]
    after = remembered.index.local("f")
    assert before is not None
    assert after is not None
    assert after.entry.digest == blake3(file.read_bytes()).hexdigest()
    settle()
    assert remembered.changed() in (["f"], [])  # hashed within the tick of its change: once more
    assert remembered.changed() == []


@pytest.mark.fault("W6")
def test_a_time_in_the_future_is_always_racy(root: Path, remembered: Remembered) -> None:
    """A file's time is set one hour ahead.

    Whoever sets it can set it again, so the file is hashed at every scan.
    """
    (root / "f").write_text("x")
    os.utime(root / "f", ns=(0, time.time_ns() + 3600 * SECOND))
    settle()
    assert [remembered.changed() for _ in range(3)] == [["f"]] * 3


@pytest.mark.parametrize(
    ("hashed", "mtime", "ctime", "racy"),
    [
        pytest.param(100, 0, 0, False, id="long after"),
        pytest.param(0, 0, -100, True, id="at the same moment"),
        pytest.param(10, 0, -100, True, id="within the tick"),
        pytest.param(11, 0, -100, False, id="just after the tick"),
        pytest.param(100, 200, 0, True, id="mtime in the future"),
        pytest.param(100, 0, 95, True, id="changed within the tick, with an old mtime"),
        pytest.param(100, 0, 300, False, id="ctime of a clock that was set back"),
    ],
)
def test_racy_is_what_could_have_changed_unseen(hashed: int, mtime: int, ctime: int, racy: bool) -> None:
    """Times in milliseconds; the tick is 10."""
    ms = RACY_NS // 10
    assert is_racy(hashed * ms, mtime * ms, ctime * ms) is racy


def test_a_row_with_a_problem_or_without_a_digest_is_never_fresh(root: Path, remembered: Remembered) -> None:
    """What was unreadable is read as soon as it can be; other kinds in the index do not count."""
    (root / "f").write_text("x")
    age(root / "f")
    remembered.changed()
    row = remembered.index.local("f")
    assert row is not None
    for spoiled in (
        row._replace(problem="unreadable"),
        row._replace(entry=row.entry._replace(digest="")),
        row._replace(entry=Entry(Kind.SYMLINK, row.entry.mode, row.entry.mtime_ns, digest="x")),
        row._replace(entry=row.entry._replace(mode=0o600)),
    ):
        remembered.index.put_local([spoiled])
        assert remembered.changed() == ["f"]
    assert remembered.changed() == []


# -- content -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024 - 1, 1024 * 1024, 1024 * 1024 + 1, 3 * 1024 * 1024])
@pytest.mark.fault("O6")
def test_a_file_is_hashed_and_small_content_kept(root: Path, size: int) -> None:
    """Files of no byte, of one, of 1 MiB and one byte less or more, and of 3 MiB are hashed.

    Digest, size and times are right, and up to the given size the content comes along.
    """
    data = os.urandom(size)
    (root / "d").mkdir()
    (root / "d" / "f").write_bytes(data)
    row, kept = scanner(root).hash_file("d/f", keep=1024 * 1024)
    assert row.entry == Entry(Kind.FILE, 0o644, (root / "d" / "f").stat().st_mtime_ns, size, blake3(data).hexdigest())
    assert row.stat == scan._stat((root / "d" / "f").stat())
    assert kept == (data if size <= 1024 * 1024 else None)
    assert abs(row.hashed_ns - time.time_ns()) < 60 * SECOND


def grow(path: Path) -> None:
    with path.open("ab") as opened:
        opened.write(b"more")


def rewrite_same_size_and_time(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as opened:
        opened.seek(before.st_size - 1)
        opened.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


FOUL = [
    grow,
    lambda path: os.truncate(path, 10),
    lambda path: path.write_bytes(b"new"),
    rewrite_same_size_and_time,
    replace_file,
    Path.unlink,
    lambda path: (path.unlink(), path.symlink_to("nowhere")),
    lambda path: path.chmod(0o600),
]


@pytest.mark.fault("S1")
@pytest.mark.parametrize("foul", FOUL)
@pytest.mark.parametrize("block", [1, 3])
def test_a_file_that_changes_while_it_is_read_is_never_published_torn(
    root: Path, foul: object, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first or third block was read, a file of 3 MiB is grown, cut, rewritten, replaced, removed or chmodded.

    The read ends with FileChanged, to be done again later, and leaves no descriptor open.
    """
    (root / "d").mkdir()
    path = root / "d" / "f"
    path.write_bytes(os.urandom(3 * 1024 * 1024 - 5))
    real, blocks = os.read, itertools.count(1)

    def read(fd: int, size: int) -> bytes:
        data = real(fd, size)
        if next(blocks) == block:
            foul(path)
        return data

    monkeypatch.setattr(scan.os, "read", read)
    before = descriptors()
    with pytest.raises(FileChanged):
        scanner(root).hash_file("d/f", keep=10)
    assert descriptors() == before


@pytest.mark.fault("S1")
@pytest.mark.parametrize("foul", FOUL[4:7])
def test_a_file_that_goes_between_look_and_opening_is_never_misread(
    root: Path, foul: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is replaced, removed or turned into a symlink between its stat and its opening.

    A new file in its place is read as itself; nothing or a symlink is FileChanged.
    """
    (root / "f").write_bytes(b"content")
    real = os.stat
    fouled = []

    def stat(path: object, **options: object) -> os.stat_result:
        result = real(path, **options)
        if path == "f" and not fouled:
            fouled.append(foul(root / "f"))
        return result

    monkeypatch.setattr(scan.os, "stat", stat)
    if foul is replace_file:
        row, data = scanner(root).hash_file("f", keep=10)
        assert (data, row.stat.ino) == (b"content", real(root / "f").st_ino)
    else:
        with pytest.raises(FileChanged):
            scanner(root).hash_file("f", keep=10)


@pytest.mark.fault("S1 S2")
def test_whatever_is_read_under_a_constant_writer_was_there_at_one_moment(root: Path) -> None:
    """A thread rewrites the file piece by piece from the front, one letter a pass: no read mixes moments.

    A pass that is paused half way leaves new letters before old ones, and that is what the file then holds.
    """
    path = root / "f"
    path.write_bytes(b"a" * 800_000)
    stop = threading.Event()

    def write() -> None:
        with path.open("r+b", buffering=0) as opened:
            for letter in itertools.cycle(b"bcdefgha"):
                for offset in range(0, 800_000, 50_000):
                    os.pwrite(opened.fileno(), bytes([letter]) * 50_000, offset)
                if stop.is_set():
                    return

    writer = threading.Thread(target=write)
    writer.start()
    changed = 0
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            try:
                _, data = scanner(root).hash_file("f", keep=800_000)
            except FileChanged:
                changed += 1
            else:
                assert data is not None
                letters = [letter for letter, _ in itertools.groupby(data)]
                assert len(letters) == 1 or letters in [[new, old] for old, new in itertools.pairwise(b"abcdefgha")]
                # Where the letters meet is not claimed: one write(2) that is under way leaves no new stamp at its end.
    finally:
        stop.set()
        writer.join()
    assert changed
    settle()
    _, data = scanner(root).hash_file("f", keep=800_000)
    assert len(set(data or b"")) == 1


def test_a_source_reads_what_was_there_when_it_was_opened_and_no_more(root: Path) -> None:
    """An endless file ends; check fails before the end and passes after it."""
    (root / "f").write_bytes(b"0123456789")
    settle()
    with scanner(root).open_file("f") as source:
        assert (source.size, source.read(4)) == (10, b"0123")
        with pytest.raises(FileChanged):
            source.check()
        assert (source.read(100), source.read(100)) == (b"456789", b"")
        source.check()
        grow(root / "f")
        assert source.read(100) == b""
        with pytest.raises(FileChanged, match="changed"):
            source.check()
    source.close()
    with pytest.raises(FileChanged):
        scanner(root).open_file("missing")
    with pytest.raises(FileChanged):
        scanner(root).open_file("f/below")


# -- faults of the disk --------------------------------------------------------------------------------


@pytest.mark.fault("X2")
def test_running_out_of_descriptors_ends_the_scan_and_leaks_none(root: Path) -> None:
    """A process may open four files more than it has open, and scans a tree of eight levels.

    The scan ends with DiskProblem, no descriptor is leaked, and with more of them all is found.
    """
    deep = root / "/".join("abcdefgh")
    deep.mkdir(parents=True)
    (deep / "f").touch()
    code = """
        before = descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 4, 4096))
        for action in (lambda: told(root), lambda: scanner(root).hash_file("a/b/c/d/e/f/g/h/f", keep=0)):
            try:
                print(len(action()), end=" ")
            except DiskProblem as exc:
                print("open files" in str(exc), end=" ")
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        print(len(told(root)), descriptors() == before)
    """
    assert as_nobody(root, code) == "True 2 9 True"


@pytest.mark.fault("X2")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_directory_that_the_disk_refuses_is_a_problem_of_its_own(
    root: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing one directory is made to fail with EIO or ESTALE, then listing the root.

    The directory is a problem of its own and the rest is found; the root is a DiskProblem.
    """
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "f").touch()
    real, calls = os.listdir, itertools.count(1)

    def listdir(fd: int) -> list[str]:
        if next(calls) == failing:
            raise OSError(number, os.strerror(number))
        return real(fd)

    monkeypatch.setattr(scan.os, "listdir", listdir)
    failing = 2
    assert told(root) == ["a unreadable_dir", "b/", "b/f"]
    failing = next(calls) + 1
    with pytest.raises(DiskProblem):
        told(root)


@pytest.mark.fault("X2")
def test_a_read_error_belongs_to_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file of three blocks is made to fail with EIO in its middle.

    It ends with Unreadable by the file's name; what is read after it, from the same scanner, is whole.
    """
    (root / "f").write_bytes(b"x" * 3 * scan._BLOCK)
    (root / "g").write_bytes(b"y" * 3 * scan._BLOCK)
    real, asked, bad = os.read, [], (root / "f").stat().st_ino

    def read(fd: int, size: int) -> bytes:
        if os.fstat(fd).st_ino == bad:
            asked.append(size)
            if len(asked) == 2:
                raise OSError(errno.EIO, "Input/output error")
        return real(fd, size)

    monkeypatch.setattr(scan.os, "read", read)
    before, reading = descriptors(), scanner(root)
    with pytest.raises(Unreadable, match="f: Input/output error"):
        reading.hash_file("f", keep=0)
    assert len(asked) == 2
    row, _ = reading.hash_file("g", keep=0)
    assert row.entry.digest == blake3((root / "g").read_bytes()).hexdigest()
    assert descriptors() == before


@pytest.mark.fault("S1")
def test_a_directory_that_vanishes_during_the_walk_is_just_that(root: Path) -> None:
    """Directories are removed, or turned into a file, after they were listed and before they are entered.

    The scan finds what is there by then, and nothing is a problem.
    """
    for name in ("a", "b", "c", "d"):
        (root / name).mkdir()
        (root / name / "f").touch()

    def known(path: str) -> tuple[LocalRow, ...]:
        if path == "a":
            shutil.rmtree(root / "b")
            shutil.rmtree(root / "c")
            (root / "c").touch()
            (root / "a" / "f").unlink()
        return ()

    items = list(scanner(root).scan("", known))
    lines = [(type(item).__name__, getattr(item, "path", "") or item.row.path) for item in items]
    assert lines == [("Found", "a"), ("Found", "c"), ("Found", "d"), ("Found", "d/f")]


@pytest.mark.fault("S1")
def test_a_directory_that_vanishes_between_stat_and_opening_is_vanished(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory is removed between its stat and its opening.

    It is told as vanished, nothing else is told of it, and the rest is found.
    """
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "f").touch()
    real = os.open

    def opened(path: object, flags: int, **options: object) -> int:
        if path == "a":
            shutil.rmtree(root / "a")
        return real(path, flags, **options)

    monkeypatch.setattr(scan.os, "open", opened)
    assert told(root) == ["a vanished", "b/", "b/f"]


def test_a_scan_that_is_given_up_frees_its_descriptors(root: Path) -> None:
    """Closing the iterator anywhere closes every directory on the way."""
    (root / "a" / "b" / "c").mkdir(parents=True)
    (root / "a" / "b" / "c" / "f").touch()
    before = descriptors()
    for steps in range(6):
        for below in ("", "a"):
            items = scanner(root).scan(below, nothing_known)
            list(itertools.islice(items, steps))
            items.close()
            assert descriptors() == before
