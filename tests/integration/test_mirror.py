"""Staging, committing and looking: a mirror on a real disk."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from syncd.errors import BadName, DiskProblem, FileChanged, Locked, ObjectCorrupt
from syncd.mirror import Mirror
from syncd.mirror.root import Dirs
from syncd.mirror.staging import Stage
from syncd.model import Entry, Kind
from syncd.plan import DirMeta, MakeDir, MirrorPlan, Place, Remove, SetMeta
from tests.support.mirror import (
    T0,
    Keeper,
    Tree,
    as_nobody,
    expected,
    file,
    folder,
    link,
    litter,
    lstat,
    run,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.model import Problem


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


@pytest.fixture
def mirror(root: Path) -> Iterator[Mirror]:
    with Mirror.open(root) as opened:
        yield opened


@pytest.fixture
def keeper(mirror: Mirror) -> Keeper:
    return Keeper(mirror)


OLD: Tree = {
    "a": folder(mode=0o750, mtime_ns=T0 - 10),
    "a/deep": folder(),
    "a/deep/x": file("old x", mode=0o640, mtime_ns=T0 + 123_456_789),
    "a/deep/gone": file("gone"),
    "becomes_dir": file("a file"),
    "becomes_file": folder(),
    "becomes_file/inner": folder(),
    "becomes_file/inner/f": file("f"),
    "becomes_link": file("soon a link"),
    "empty": file(""),
    "link": link("a/deep/x"),
    "link2": link("nowhere"),
    "run.sh": file("#!/bin/sh\n", mode=0o755),
    "same": file("same"),
}
NEW: Tree = {
    "a": folder(mode=0o751, mtime_ns=T0 + 77),
    "a/deep": folder(mtime_ns=-1_000_000_007),
    "a/deep/x": file("new x", mode=0o600, mtime_ns=5_000_000_000_000_000_001),  # the year 2128
    "a/new": folder(mode=0o700),
    "a/new/n": file(b"\x00\xff" * 70_000),
    "becomes_dir": folder(),
    "becomes_dir/in": file("in"),
    "becomes_file": file("a file now"),
    "becomes_link": link("run.sh"),
    "empty": file("", mtime_ns=T0 + 9),
    "link": link("same"),
    "link2": link("nowhere", mtime_ns=T0 + 5),
    "run.sh": file("#!/bin/sh\n", mode=0o4755),
    "same": file("same"),
    "zoë\n\u202e'$(x)": file("strange name"),
}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def open_descriptors() -> int:
    return len(names(Path("/proc/self/fd")))


def code_of(problems: list[Problem]) -> dict[str, str]:
    return {problem.path: problem.code for problem in problems}


@pytest.mark.fault("D4 M1 M3 M5 P8")
def test_a_mirror_goes_from_one_tree_to_another_and_back(root: Path, keeper: Keeper) -> None:
    """A mirror goes to and fro between trees: kinds swap, set-id bits, times of 1969 and 2128, a name with quotes.

    Content, kinds, modes and times, those of directories included, are exactly the target's each time.
    """
    for tree in (OLD, NEW, OLD, {}):
        outcome = keeper.go(tree)
        assert (outcome.problems, outcome.drifted) == ([], [])
        assert snapshot(root) == expected(tree)
        assert keeper.index.keys() == tree.keys()
        assert keeper.stale() == []
        assert litter(root) == []


def test_going_where_it_is_does_nothing(root: Path, keeper: Keeper) -> None:
    """An empty plan writes nothing, not even a journal."""
    keeper.go(OLD)
    before = lstat(root / ".syncd")
    assert not keeper.plan(OLD)
    assert keeper.mirror.commit(MirrorPlan(), drift="repair").placed == []
    assert lstat(root / ".syncd") == before


@pytest.mark.fault("M1")
def test_modes_come_from_the_entry_and_never_from_the_umask(root: Path, keeper: Keeper) -> None:
    """Under a umask of 077, files and directories are placed with set-id and sticky bits and with modes like 0666.

    Each has exactly the mode of its entry, and a set-id bit goes with the next version.
    """
    tree = {
        "d": folder(mode=0o2775),
        "d/f": file("x", mode=0o666),
        "d/s": file("x", mode=0o6711),
        "d/t": folder(mode=0o1777),
    }
    before = os.umask(0o077)
    try:
        keeper.go(tree)
    finally:
        os.umask(before)
    assert snapshot(root) == expected(tree)
    plain = {**tree, "d/s": file("y", mode=0o711)}
    keeper.go(plain)
    assert stat.S_IMODE((root / "d/s").stat().st_mode) == 0o711


@pytest.mark.fault("M2")
def test_a_directory_is_closed_to_others_until_it_is_complete(
    root: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a file is placed into a new directory of mode 0755, that directory is looked at before the rename.

    Nobody else can enter it then (0700); in the end it has its mode.
    """
    seen = []
    rename = os.rename

    def watching(*arguments: object, **keywords: object) -> None:
        if (root / "d").exists():
            seen.append(stat.S_IMODE((root / "d").stat().st_mode))
        rename(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", watching)
    Keeper(mirror).go({"d": folder(mode=0o755), "d/f": file("x")})
    assert seen == [0o700]
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o755


def test_a_directory_that_nobody_describes_gets_the_usual_mode_and_is_remembered(root: Path, keeper: Keeper) -> None:
    """Objects of other clients have no directory objects."""
    keeper.go({"x/y/f": file("x")})
    assert stat.S_IMODE((root / "x/y").stat().st_mode) == 0o755
    assert set(keeper.index) == {"x", "x/y", "x/y/f"}
    assert keeper.stale() == []


# staging ---------------------------------------------------------------------------------------------------------


def test_content_is_staged_in_pieces(root: Path, mirror: Mirror) -> None:
    """A Sink: private while it grows, then with mode and time."""
    node = file(os.urandom(3_000_000), mode=0o640, mtime_ns=T0 + 4)
    staged = mirror.stage(node.entry)
    staged.write(node.data[:1_000_000])
    (name,) = names(root / ".syncd/stage")
    assert stat.S_IMODE((root / ".syncd/stage" / name).stat().st_mode) == 0o600
    staged.write(node.data[1_000_000:])
    assert staged.finish() == name
    found = (root / ".syncd/stage" / name).stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o640, T0 + 4)
    staged.discard()  # after finish: nothing
    assert (root / ".syncd/stage" / name).read_bytes() == node.data


@pytest.mark.fault("O7")
def test_what_is_verified_is_the_staged_file_and_not_the_stream(root: Path, mirror: Mirror) -> None:
    """A byte that changes on the disk before finish() is found, and the file is gone."""
    node = file(b"a" * 100_000)
    staged = mirror.stage(node.entry)
    staged.write(node.data)
    (name,) = names(root / ".syncd/stage")
    with (root / ".syncd/stage" / name).open("r+b") as damaged:
        damaged.seek(50_000)
        damaged.write(b"b")
    with pytest.raises(DiskProblem, match="does not read back"):
        staged.finish()
    assert litter(root) == []


@pytest.mark.fault("O7")
@pytest.mark.parametrize("lie", ["flip", "longer"])
def test_small_content_is_read_back_too(root: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """A disk that lies: os.write is replaced by one that changes the first byte, or stores one more than it was given.

    What is staged is a disk problem, and the file is gone.
    """
    write = os.write

    def lying(fd: int, data: bytes) -> int:
        raw = bytes(data)
        write(fd, raw + b"!" if lie == "longer" else b"?" + raw[1:])
        return len(raw)

    monkeypatch.setattr(os, "write", lying)
    node = file("small")
    (result,) = mirror.stage_bytes([(node.entry, node.data)])
    monkeypatch.undo()
    assert isinstance(result, DiskProblem)
    assert litter(root) == []


def test_short_writes_are_continued(root: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write(2) that takes only some bytes loses none."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    node = file(os.urandom(100))
    (name,) = mirror.stage_bytes([(node.entry, node.data)])
    staged = mirror.stage(node.entry)
    staged.write(node.data)
    other = staged.finish()
    monkeypatch.undo()
    for one in (name, other):
        assert (root / ".syncd/stage" / str(one)).read_bytes() == node.data


@pytest.mark.fault("O1 O5")
def test_content_that_is_not_what_its_entry_says_is_refused(root: Path, mirror: Mirror) -> None:
    """Contents with a wrong digest, a byte too few or a byte too many are staged, whole and in pieces.

    Each is refused by itself as corrupt; the good one beside them is staged.
    """
    good = file("good")
    wrong = Entry(Kind.FILE, 0o644, 1, 4, blake3(b"evil").hexdigest())
    results = mirror.stage_bytes(
        [(wrong, b"good"), (good.entry, b"goo"), (good.entry, b"goodd"), (good.entry, b"good")]
    )
    assert [type(result) for result in results] == [ObjectCorrupt, ObjectCorrupt, ObjectCorrupt, str]
    for entry, data in ((wrong, b"good"), (good.entry, b"goo")):
        staged = mirror.stage(entry)
        staged.write(data)
        with pytest.raises(ObjectCorrupt):
            staged.finish()
    endless = mirror.stage(good.entry)
    endless.write(b"good")
    with pytest.raises(ObjectCorrupt, match="longer"):
        endless.write(b"!")
    assert names(root / ".syncd/stage") == [results[3]]
    mirror.discard_staged()
    assert litter(root) == []


def test_times_that_no_disk_can_hold_are_refused(mirror: Mirror) -> None:
    """The wire can say any number."""
    far = 2**100
    (result,) = mirror.stage_bytes([(Entry(Kind.FILE, 0o644, far, 1), b"x")])
    assert isinstance(result, ObjectCorrupt)
    with pytest.raises(ObjectCorrupt):
        mirror.stage_symlink(Entry(Kind.SYMLINK, 0o777, -far, target="x"))
    outcome = mirror.commit(MirrorPlan(make_dirs=(MakeDir("d"),), dir_meta=(DirMeta("d", 0o755, far),)), drift="repair")
    assert code_of(outcome.problems) == {"d": "bad_time"}


@pytest.mark.parametrize("target", ["", "a\0b", "x" * 5000])
def test_link_texts_that_no_disk_can_hold_are_refused(root: Path, mirror: Mirror, target: str) -> None:
    """Empty, with a NUL, too long."""
    with pytest.raises(BadName):
        mirror.stage_symlink(Entry(Kind.SYMLINK, 0o777, T0, target=target))
    assert litter(root) == []


def test_a_copy_within_the_mirror_is_checked_against_either_digest(root: Path, keeper: Keeper) -> None:
    """BLAKE3 where known, else SHA-256; content that is not the expected one, or gone, is refused."""
    mirror = keeper.mirror
    data = os.urandom(200_000)
    keeper.go({"f": file(data)})
    by_sha = Entry(Kind.FILE, 0o600, T0, len(data), "", hashlib.sha256(data).hexdigest())
    for entry in (file(data, mode=0o600, mtime_ns=T0).entry, by_sha):
        name = mirror.stage_copy("f", entry)
        found = root / ".syncd/stage" / name
        assert found.read_bytes() == data
        assert (found.stat().st_mtime_ns, stat.S_IMODE(found.stat().st_mode)) == (T0, 0o600)
    mirror.discard_staged()
    (root / "d").mkdir()
    (root / "l").symlink_to("f")
    with (root / "f").open("r+b") as changed:
        changed.write(b"changed")
    for path in ("f", "gone", "d", "l", "f/below"):
        with pytest.raises(FileChanged):
            mirror.stage_copy(path, by_sha)
    assert litter(root) == []


def test_a_copy_falls_back_to_reading_and_writing(root: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem without copy_file_range, found out after half of it."""
    data = os.urandom(3_000_000)
    keeper.go({"f": file(data)})
    copy = os.copy_file_range
    calls = []

    def failing(source: int, target: int, count: int, **offsets: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(95, "not supported")
        return copy(source, target, 1_000_000, **offsets)

    monkeypatch.setattr(os, "copy_file_range", failing)
    name = keeper.mirror.stage_copy("f", file(data).entry)
    assert len(calls) == 2
    assert (root / ".syncd/stage" / name).read_bytes() == data


@pytest.mark.fault("P1 P6")
def test_no_path_leads_out_of_the_root_or_into_our_own_files(tmp_path: Path, root: Path, keeper: Keeper) -> None:
    """The steps of a plan name paths that climb out, are absolute, doubled, too long, hold a NUL or are .syncd's.

    Every step and every look refuses the name; the good path of the same plan is placed.
    """
    mirror = keeper.mirror
    node = file("x")
    bad = ["../out", "a/../../out", "/etc/out", "a//b", "./a", "a/", ".syncd/lock", ".syncd", "a\0b", "x" * 256, ""]
    staged = mirror.stage_bytes([(node.entry, node.data)] * (len(bad) + 1))
    places = tuple(Place(path, node.entry, str(name), None) for path, name in zip(["good", *bad], staged, strict=True))
    plan = MirrorPlan(
        place=places,
        make_dirs=(MakeDir("../made"),),
        set_meta=(SetMeta(".syncd/lock", node.entry, None),),
        remove=(Remove("../mirror/.syncd/lock", Kind.FILE, None),),
        dir_meta=(DirMeta("..", 0o777, 1), DirMeta(".syncd", 0o777, 1)),
    )
    outcome = mirror.commit(plan, drift="repair")
    assert [done.path for done in outcome.placed] == ["good"]
    assert {problem.code for problem in outcome.problems} == {"bad_name"}
    assert {problem.path for problem in outcome.problems} >= {*bad, "../made", ".."}
    assert names(tmp_path) == ["mirror"]
    assert litter(root) == []
    for path in bad:
        with pytest.raises(BadName):
            mirror.look(path)


def test_a_staged_name_that_is_none_is_refused(root: Path, mirror: Mirror) -> None:
    """It could lead out of the staging directory."""
    (root / "victim").write_text("x")
    wrong = ("../../victim", "../lock", "", "gone")
    plan = MirrorPlan(place=tuple(Place(f"f{n}", file("x").entry, name, None) for n, name in enumerate(wrong)))
    outcome = mirror.commit(plan, drift="repair")
    assert set(code_of(outcome.problems).values()) == {"bad_name"}
    assert names(root) == [".syncd", "victim"]


def test_a_staged_file_that_is_gone_is_a_problem_of_its_path(root: Path, keeper: Keeper) -> None:
    """It says that the content has to be fetched again; what is at the path stays."""
    keeper.go({"f": file("old")})
    plan = keeper.plan({"f": file("new"), "g": file("g")})
    for step in plan.place:
        if step.path == "f":
            (root / ".syncd/stage" / step.staged).unlink()
    outcome = keeper.mirror.commit(plan, drift="repair")
    assert code_of(outcome.problems) == {"f": "staged_missing"}
    assert ((root / "f").read_text(), (root / "g").read_text()) == ("old", "g")


# drift -----------------------------------------------------------------------------------------------------------


def plant(path: Path, what: str, outside: Path) -> None:
    """Put something else at a path."""
    path.unlink(missing_ok=True)
    if what == "file":
        path.write_text("local edit")
    elif what == "symlink":
        path.symlink_to(outside)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name has at most 108 bytes
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)
    elif what == "hardlink":
        os.link(outside, path)
    elif what == "empty_dir":
        path.mkdir()
    elif what == "full_dir":
        path.mkdir()
        (path / "theirs").write_text("precious")


PLANTS = ["file", "symlink", "dangling", "fifo", "socket", "hardlink", "empty_dir"]


@pytest.mark.fault("L3 L9 D4")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("what", PLANTS)
def test_repair_replaces_what_drifted_and_never_follows_it(
    tmp_path: Path, root: Path, keeper: Keeper, what: str, known: bool
) -> None:
    """Where a file belongs another one, a symlink, fifo, socket, hard link to outside or empty directory is planted.

    Under repair each is replaced, known to the index before or not; what it leads to is untouched.
    """
    outside = tmp_path / "outside"
    outside.write_text("outside")
    if known:
        keeper.go({"d": folder(), "d/f": file("old")})
    else:
        keeper.go({"d": folder()})
    plant(root / "d/f", what, outside)
    before = (outside.read_text(), outside.stat().st_mtime_ns, outside.stat().st_mode)
    tree = {"d": folder(), "d/f": file("new", mode=0o600)}
    outcome = keeper.go(tree)
    assert (outcome.drifted, outcome.problems) == (["d/f"], [])
    assert snapshot(root) == expected(tree)
    assert keeper.stale() == []
    assert (outside.read_text(), outside.stat().st_mtime_ns, outside.stat().st_mode) == before
    assert outside.stat().st_nlink == 1


@pytest.mark.fault("L3")
@pytest.mark.parametrize("what", [*PLANTS, "full_dir"])
@pytest.mark.parametrize("policy", ["report", "keep"])
def test_report_and_keep_leave_what_drifted(tmp_path: Path, root: Path, keeper: Keeper, what: str, policy: str) -> None:
    """A mirrored file is replaced by another, a link, fifo, socket or directory; then it changes upstream.

    It stays: a problem under report, listed as drifted under both; the rest of the batch is applied.
    """
    outside = tmp_path / "outside"
    outside.write_text("outside")
    keeper.go({"f": file("old"), "g": file("old")})
    plant(root / "f", what, outside)
    before = snapshot(root)["f"]
    outcome = keeper.go({"f": file("new"), "g": file("new")}, drift=policy)
    assert outcome.drifted == ["f"]
    assert code_of(outcome.problems) == ({"f": "drift"} if policy == "report" else {})
    assert [done.path for done in outcome.placed] == ["g"]
    assert snapshot(root)["f"] == before
    assert (root / "g").read_text() == "new"
    assert litter(root) == []


@pytest.mark.fault("D3 D5")
@pytest.mark.parametrize("known", [True, False])
def test_a_directory_with_files_of_others_is_never_replaced(root: Path, keeper: Keeper, known: bool) -> None:
    """A file is to be placed where a directory, ours or not, holds somebody else's file.

    His file stays, and the path that wants its place is a problem; the others are placed.
    """
    if known:
        keeper.go({"f": folder(), "f/ours": file("ours")})
    else:
        (root / "f").mkdir()
    (root / "f/theirs").write_text("precious")
    outcome = keeper.go({"f": file("new"), "g": file("g")})
    assert code_of(outcome.problems) == {"f": "directory_in_the_way"}
    assert (root / "f/theirs").read_text() == "precious"
    assert (root / "g").read_text() == "g"
    assert litter(root) == []


@pytest.mark.fault("D3 D5")
def test_a_removed_directory_that_holds_files_of_others_stays(root: Path, keeper: Keeper) -> None:
    """Somebody puts a file into a mirrored directory, and all of that directory is removed upstream.

    What syncd wrote in it is removed; the directory is listed and goes once it is empty.
    """
    keeper.go({"d": folder(), "d/ours": file("x"), "d/sub": folder()})
    (root / "d/theirs").write_text("precious")
    outcome = keeper.go({})
    assert code_of(outcome.problems) == {"d": "directory_not_empty"}
    assert names(root / "d") == ["theirs"]
    assert set(keeper.index) == {"d"}
    (root / "d/theirs").unlink()
    assert keeper.go({}).problems == []
    assert snapshot(root) == {}


@pytest.mark.parametrize(("policy", "stays"), [("repair", False), ("report", True), ("keep", True)])
def test_a_file_edited_here_and_removed_upstream_follows_the_policy(
    root: Path, keeper: Keeper, policy: str, stays: bool
) -> None:
    """Removed under repair, kept under report (a problem) and keep."""
    keeper.go({"f": file("old"), "gone": file("x")})
    (root / "f").write_text("edited")
    (root / "gone").unlink()
    outcome = keeper.go({}, drift=policy)
    assert outcome.drifted == ["f"]
    assert (root / "f").exists() is stays
    assert code_of(outcome.problems) == ({"f": "drift"} if policy == "report" else {})
    assert [done.path for done in outcome.placed] == (["gone"] if stays else ["gone", "f"])


@pytest.mark.fault("D4")
@pytest.mark.parametrize("policy", ["report", "keep"])
def test_a_file_edited_here_that_became_a_directory_upstream_is_kept(root: Path, keeper: Keeper, policy: str) -> None:
    """A file is edited in the mirror and becomes a directory with a file upstream, under report or keep.

    The edit stays, told once under report; what belongs below it has no place and says so, the rest is placed.
    """
    keeper.go({"f": file("old")})
    (root / "f").write_text("edited")
    outcome = keeper.go({"f": folder(), "f/g": file("g"), "h": file("h")}, drift=policy)
    told = {"f": "drift"} if policy == "report" else {}
    assert {path: code for path, code in code_of(outcome.problems).items() if path != "f/g"} == told
    assert code_of(outcome.problems)["f/g"] == "parent_not_directory"
    assert ((root / "f").read_text(), (root / "h").read_text()) == ("edited", "h")


@pytest.mark.parametrize("what", ["symlink", "fifo", "full_dir", "empty_dir"])
@pytest.mark.parametrize("policy", ["repair", "report", "keep"])
def test_what_took_the_place_of_a_removed_file_is_not_ours_to_remove(
    tmp_path: Path, root: Path, keeper: Keeper, policy: str, what: str
) -> None:
    """Remove takes only the kind that syncd wrote; repair forgets the path."""
    outside = tmp_path / "outside"
    outside.write_text("outside")
    keeper.go({"f": file("old")})
    plant(root / "f", what, outside)
    before = snapshot(root)
    outcome = keeper.go({}, drift=policy)
    assert snapshot(root) == before
    assert outcome.drifted == ["f"]
    assert code_of(outcome.problems) == ({"f": "drift"} if policy == "report" else {})
    assert ("f" in keeper.index) is (policy != "repair")


@pytest.mark.fault("L1")
@pytest.mark.parametrize("policy", ["repair", "report", "keep"])
@pytest.mark.parametrize("planted", ["symlink", "file"])
def test_nothing_is_written_through_a_planted_parent(
    tmp_path: Path, root: Path, keeper: Keeper, planted: str, policy: str
) -> None:
    """A mirrored directory is replaced by a symlink to one outside, or by a file; then a plan changes all below it.

    Placing, modes, times, removal and new directories touch nothing outside, under any policy; each path says why.
    """
    outside = tmp_path / "outside"
    (outside / "e").mkdir(parents=True)
    for name in ("f", "meta", "gone", "e/x"):
        (outside / name).write_text("outside")
    tree = {
        "d": folder(), "d/e": folder(), "d/f": file("f"), "d/gone": file("g"), "d/meta": file("m"), "d/e/x": file("x"),
        "z": file("z"),
    }  # fmt: skip
    keeper.go(tree)
    (root / "d").rename(tmp_path / "moved")
    if planted == "symlink":
        (root / "d").symlink_to(outside)
    else:
        (root / "d").write_text("a file")
    before = snapshot(outside)
    after = {
        "d": folder(mode=0o700), "d/e": folder(mode=0o700), "d/e/x": file("xx"), "d/f": file("ff"),
        "d/meta": file("m", mode=0o600), "d/new": folder(), "d/new/n": file("n"), "z": file("zz"),
    }  # fmt: skip
    outcome = keeper.go(after, drift=policy)
    assert snapshot(outside) == before
    assert (root / "z").read_text() == "zz"
    code = "parent_is_symlink" if planted == "symlink" else "parent_not_directory"
    told = code_of(outcome.problems)
    assert {path: told[path] for path in ("d", "d/e", "d/f", "d/meta", "d/e/x", "d/new", "d/new/n")} == dict.fromkeys(
        ("d", "d/e", "d/f", "d/meta", "d/e/x", "d/new", "d/new/n"), code
    )
    assert "d" in outcome.drifted
    assert keeper.mirror.look("d/f") is None
    with pytest.raises(FileChanged):
        keeper.mirror.read_digests("d/f")


def test_a_fifo_where_a_directory_belongs_is_replaced_under_repair(root: Path, keeper: Keeper) -> None:
    """Such a thing is never in an index, so no plan could clear it."""
    os.mkfifo(root / "d")
    tree = {"d": folder(), "d/f": file("x")}
    outcome = keeper.mirror.commit(keeper.plan(tree), drift="report")
    assert code_of(outcome.problems) == {"d": "parent_not_directory", "d/f": "parent_not_directory"}
    outcome = keeper.go(tree)
    assert (outcome.problems, outcome.drifted) == ([], ["d"])
    assert snapshot(root) == expected(tree)


@pytest.mark.fault("P7")
def test_a_file_wanted_together_with_a_path_below_it_leaves_the_file(root: Path, keeper: Keeper) -> None:
    """A plan wants `a` as a file and `a/b` as a file, and is tried twice.

    `a` is placed, `a/b` is a problem each time, and the rest is placed.
    """
    tree = {"a": file("a"), "a/b": file("b"), "c": file("c")}
    for told in ({"a/b"}, {"a", "a/b"}):  # once "a" is there, it is in the way of the directory that "a/b" needs
        outcome = keeper.go(tree)
        assert code_of(outcome.problems) == dict.fromkeys(told, "parent_not_directory")
        assert ((root / "a").read_text(), (root / "c").read_text()) == ("a", "c")


# metadata in place -------------------------------------------------------------------------------------------------


@pytest.mark.fault("L4 L9")
def test_mode_and_time_of_a_file_with_other_names_do_not_reach_those(
    tmp_path: Path, root: Path, keeper: Keeper
) -> None:
    """Somebody gives a mirrored file a second hard link outside; then another mode (4755) and time come for it.

    The inode is left to the other name, unchanged; the mirror gets a copy.
    """
    keeper.go({"f": file("shared")})
    os.link(root / "f", tmp_path / "twin")
    keeper.index["f"] = (keeper.index["f"][0], lstat(root / "f"))  # making the link changed the ctime
    before = snapshot(tmp_path)["twin"]
    tree = {"f": file("shared", mode=0o4755, mtime_ns=T0 + 50)}
    assert keeper.go(tree).problems == []
    assert snapshot(root) == expected(tree)
    assert snapshot(tmp_path)["twin"] == before
    assert keeper.stale() == []
    assert litter(root) == []


@pytest.mark.fault("L4")
@pytest.mark.parametrize("policy", ["repair", "report", "keep"])
@pytest.mark.parametrize("what", ["symlink", "hardlink", "fifo", "empty_dir", "file"])
def test_mode_and_time_are_not_given_to_something_else(
    tmp_path: Path, root: Path, keeper: Keeper, what: str, policy: str
) -> None:
    """A mirrored file is replaced by a link, fifo, directory or other content; then mode 4777 and a time come for it.

    None of them gets either, under every policy, nor does what it leads to; the path has drifted.
    """
    outside = tmp_path / "outside"
    outside.write_text("outside")
    keeper.go({"f": file("content")})
    plant(root / "f", what, outside)
    before = (snapshot(root), snapshot(tmp_path)["outside"])
    outcome = keeper.go({"f": file("content", mode=0o4777, mtime_ns=T0 + 50)}, drift=policy)
    assert (snapshot(root), snapshot(tmp_path)["outside"]) == before
    assert outcome.drifted == ["f"]
    assert outcome.placed == []
    assert code_of(outcome.problems) == ({} if policy == "keep" else {"f": "drift"})


def test_mode_and_time_are_given_to_the_same_content_that_was_only_touched(root: Path, keeper: Keeper) -> None:
    """Under repair the content is read again before it is believed."""
    keeper.go({"f": file("content")})
    (root / "f").chmod(0o777)
    tree = {"f": file("content", mode=0o600, mtime_ns=T0 + 50)}
    outcome = keeper.go(tree)
    assert (outcome.drifted, outcome.problems) == (["f"], [])
    assert snapshot(root) == expected(tree)
    assert keeper.stale() == []


def test_a_symlink_that_leads_elsewhere_by_now_keeps_its_time(root: Path, keeper: Keeper) -> None:
    """Its text is compared, not only its size."""
    keeper.go({"l": link("aaa")})
    (root / "l").unlink()
    (root / "l").symlink_to("bbb")
    outcome = keeper.go({"l": link("aaa", mtime_ns=T0 + 50)})
    assert code_of(outcome.problems) == {"l": "drift"}
    assert (root / "l").lstat().st_mtime_ns != T0 + 50


# looking -----------------------------------------------------------------------------------------------------------


def test_looking_tells_what_is_there(tmp_path: Path, root: Path, keeper: Keeper) -> None:
    """Kinds, modes, targets; nothing below a symlink or file, nothing where nothing is."""
    keeper.go({"d": folder(mode=0o711), "d/f": file("abc", mode=0o640), "l": link("d")})
    os.mkfifo(root / "p")
    look = keeper.mirror.look
    seen = {path: look(path) for path in ("d", "d/f", "l", "p")}
    assert {path: disk and (disk.kind, disk.target) for path, disk in seen.items()} == {
        "d": (Kind.DIR, ""), "d/f": (Kind.FILE, ""), "l": (Kind.SYMLINK, "d"), "p": (None, ""),
    }  # fmt: skip
    file_seen = look("d/f")
    assert file_seen is not None
    assert (file_seen.mode, file_seen.stat) == (0o640, lstat(root / "d/f"))
    assert [look(path) for path in ("nothing", "d/f/x", "l/f", "d/no/x")] == [None] * 4
    assert keeper.mirror.read_digests("d/f")[:2] == (blake3(b"abc").hexdigest(), hashlib.sha256(b"abc").hexdigest())
    for path in ("p", "d", "l", "nothing"):
        with pytest.raises(FileChanged):
            keeper.mirror.read_digests(path)


@pytest.mark.fault("P4")
def test_walking_goes_in_component_order_and_follows_nothing(root: Path, keeper: Keeper) -> None:
    """A mirror with symlinks to `/` and to itself, a foreign .syncd and a name that is not UTF-8 is walked.

    No link is followed, .syncd is left out, that name is a problem; children come directly behind their directory.
    """
    tree = {
        "a": folder(), "a/z": file("x"), "a-b": file("x"), "b": folder(), "b/é": file("x"), "b/z": file("x"),
        "b/loop": link("."), "ü": link("/"),
    }  # fmt: skip
    keeper.go(tree)
    (root / "a/.syncd").mkdir()
    (root / "a/.syncd/f").write_text("x")
    (root / "b/\udcff").write_text("not UTF-8")
    problems: list[Problem] = []
    walked = [path for path, _ in keeper.mirror.walk(problems.append)]
    assert walked == ["a", "a/z", "a-b", "b", "b/loop", "b/z", "b/é", "ü"]
    assert code_of(problems) == {"b/\udcff": "bad_name"}


def test_a_walk_deeper_than_the_descriptors_kept_comes_back(root: Path, keeper: Keeper) -> None:
    """A thousand levels need neither a thousand descriptors nor a deep stack."""
    deep = "/".join(["d"] * 1000)
    tree = {f"{deep}/f": file("x"), f"{deep}/g": file("x"), "d/e": file("x"), "/".join(["d"] * 500) + "/m": file("x")}
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 100, hard))
    try:
        assert keeper.go(tree).problems == []
        assert open_descriptors() == before
        walked = [path for path, _ in keeper.mirror.walk()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(walked) == 1004
    assert walked[-4:] == [f"{deep}/f", f"{deep}/g", "/".join(["d"] * 500) + "/m", "d/e"]
    assert keeper.go({}).problems == []
    assert snapshot(root) == {}


def test_a_walk_leaves_out_what_vanishes_under_it(root: Path, keeper: Keeper) -> None:
    """Directories removed and swapped for symlinks while it is on its way."""
    keeper.go({"a/f": file("x"), "b/f": file("x"), "c/f": file("x"), "d": file("x")})
    walked = []
    for path, _ in keeper.mirror.walk():
        walked.append(path)
        if path == "a":
            (root / "b/f").unlink()
            (root / "b").rmdir()
        if path == "c":
            (root / "c").rename(root / ".syncd/c")
            (root / "c").symlink_to("/")
    assert walked == ["a", "a/f", "c", "d"]


@pytest.mark.fault("U4")
def test_peeking_creates_nothing_and_needs_no_lock(tmp_path: Path, root: Path, keeper: Keeper) -> None:
    """A mirror is read by Mirror.peek() while its lock is held; so is a directory that never was a mirror.

    It reads the one and finds nothing in the other, and creates nothing.
    """
    keeper.go(OLD)
    with Mirror.peek(root) as view:
        assert {path for path, _ in view.walk()} == set(OLD)
        assert view.read_digests("same")[0] == OLD["same"].entry.digest
    plain = tmp_path / "plain"
    plain.mkdir()
    with Mirror.peek(plain) as view:
        assert list(view.walk()) == []
    assert names(plain) == []
    with pytest.raises(DiskProblem):
        Mirror.peek(tmp_path / "missing")


# opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C5")
def test_a_second_process_is_refused_and_told_who_holds_the_mirror(root: Path) -> None:
    """A mirror is opened while another process holds it, and again after that was killed (SIGKILL).

    The first is refused with the process's number; the lock goes with its process, so the second gets it.
    """
    holder = run("hold", root, wait=False)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Locked, match=f"in use by process {holder.pid}"):
            Mirror.open(root)
    finally:
        holder.kill()
        holder.communicate()
    Mirror.open(root).close()


def test_a_mirror_is_made_only_where_that_is_wanted(tmp_path: Path) -> None:
    """A missing root without create, a root that is a file, a root below a file: each says so."""
    with pytest.raises(DiskProblem, match="ENOENT"):
        Mirror.open(tmp_path / "missing", create=False)
    assert not (tmp_path / "missing").exists()
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/below"):
        with pytest.raises(DiskProblem):
            Mirror.open(tmp_path / path)
    Mirror.open(tmp_path / "a/b/c").close()
    assert stat.S_IMODE((tmp_path / "a/b/c/.syncd").stat().st_mode) == 0o700


@pytest.mark.fault("L5")
@pytest.mark.parametrize("name", [".syncd", ".syncd/stage"])
@pytest.mark.parametrize("how", ["symlink", "file", "writable", "foreign"])
def test_a_private_directory_that_others_prepared_is_refused(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    """`.syncd` or its `stage` is there already: a symlink, a file, writable for all, or of another owner.

    Opening is a disk problem, and no descriptor leaks.
    """
    target = root / name
    target.parent.mkdir(parents=True)
    target.parent.chmod(0o700)
    if how == "symlink":
        (tmp_path / "theirs").mkdir()
        target.symlink_to(tmp_path / "theirs")
    elif how == "file":
        target.write_text("")
    else:
        target.mkdir()
        target.chmod(0o777 if how == "writable" else 0o700)
    before = open_descriptors()
    if how == "foreign":
        if os.getuid() == 0:
            os.chown(target, 65534, 65534)
            with pytest.raises(DiskProblem, match="belongs to uid 65534"):
                Mirror.open(root)
        else:  # somebody else than the owner looks
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
            with pytest.raises(DiskProblem, match="belongs to uid"):
                Mirror.open(root)
    else:
        with pytest.raises(DiskProblem):
            Mirror.open(root)
    assert open_descriptors() == before


def test_a_private_directory_of_ours_that_others_could_read_is_closed(root: Path) -> None:
    """Mended without a word."""
    (root / ".syncd").mkdir(parents=True)
    (root / ".syncd").chmod(0o755)
    Mirror.open(root).close()
    assert stat.S_IMODE((root / ".syncd").stat().st_mode) == 0o700


@pytest.mark.fault("L10")
@pytest.mark.parametrize("what", ["root", "private", "stage", "gone"])
def test_a_root_that_was_replaced_while_running_is_not_written_to(tmp_path: Path, root: Path, what: str) -> None:
    """The root, `.syncd` or `stage` of an open mirror is renamed away and made anew, or not; then a plan is committed.

    Commit and recovery refuse: nothing is applied, neither to the old nor to the new directory.
    """
    with Mirror.open(root) as mirror:
        keeper = Keeper(mirror)
        keeper.go({"f": file("old")})
        plan = keeper.plan({"f": file("new")})
        victim = {"root": root, "gone": root, "private": root / ".syncd", "stage": root / ".syncd/stage"}[what]
        victim.rename(tmp_path / "moved")
        if what != "gone":
            victim.mkdir(mode=0o700)
        for call in (lambda: mirror.commit(plan, drift="repair"), mirror.recover):
            with pytest.raises(DiskProblem, match=r"replaced|cannot find"):
                call()
    kept = tmp_path / "moved/f" if what in {"root", "gone"} else root / "f"
    assert kept.read_text() == "old"
    if what == "root":
        assert names(root) == []


def test_an_unknown_policy_is_a_mistake_of_the_caller(mirror: Mirror) -> None:
    """Refused before anything happens."""
    with pytest.raises(ValueError, match="policy"):
        mirror.commit(MirrorPlan(make_dirs=(MakeDir("d"),)), drift="whatever")
    with pytest.raises(ValueError, match="no content"):
        mirror.stage(Entry(Kind.DIR, 0o755, 0))
    with pytest.raises(ValueError, match="no link text"):
        mirror.stage_symlink(Entry(Kind.FILE, 0o755, 0))


def test_held_directories_are_forgotten_when_they_are_replaced(tmp_path: Path) -> None:
    """The stack shares what consecutive paths have in common, and drops what is told to it."""
    (tmp_path / "a/b").mkdir(parents=True)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with Dirs(fd, one_filesystem=True) as dirs:
            held = dirs.open("a")
            assert dirs.open("a/b") != held
            assert dirs.open("a") == held
            dirs.open("a/b")
            dirs.forget("a/b")
            (tmp_path / "a/b").rmdir()
            with pytest.raises(FileNotFoundError):
                dirs.open("a/b")
            assert dirs.open("") == fd
    finally:
        os.close(fd)


# without privileges ------------------------------------------------------------------------------------------------


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory that an unprivileged process can reach and owns."""
    path = Path(tempfile.mkdtemp(prefix="syncd-test-"))
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", path], check=True)
    shutil.rmtree(path)


@pytest.mark.fault("M1")
def test_read_only_directories_are_opened_up_for_a_moment_without_root(nobodys: Path) -> None:
    """An unprivileged process changes files below its own directories of modes 0555, 0311, 0500 and 0000.

    All changes are made, and the directories closed again as the tree says.
    """
    as_nobody(
        """
root = Path(sys.argv[1]) / "m"
old = {"d": folder(mode=0o555), "d/e": folder(mode=0o311), "d/e/f": file("old", mode=0o400), "d/s": folder(mode=0o000),
       "d/s/g": file("g"), "d/e/unreadable": file("u", mode=0o000), "n": folder(mode=0o500), "n/x": file("x")}
new = {"d": folder(mode=0o555), "d/e": folder(mode=0o311, mtime_ns=T0 + 9), "d/e/f": file("new", mode=0o400),
       "d/s": folder(mode=0o000), "d/s/g": file("g2"), "d/e/unreadable": file("u", mode=0o200, mtime_ns=T0 + 8),
       "d/e/added": folder(mode=0o555), "d/e/added/h": file("h"), "n": folder(mode=0o550),
       "n/y": file("y")}
with Mirror.open(root) as mirror:
    keeper = Keeper(mirror)
    for tree in (old, new, old, new):
        outcome = keeper.go(tree)
        assert (outcome.problems, outcome.drifted) == ([], []), outcome
    # a directory without a DirMeta in the plan gets back what it had
    plan = keeper.plan({**new, "d/e/f": file("newer"), "d/s/g": file("g3")})
    outcome = mirror.commit(MirrorPlan(place=plan.place), drift="repair")
    assert not outcome.problems, outcome.problems
print("fine")
""",
        nobodys,
    )
    found = {path: (nobodys / "m" / path).stat() for path in ("d", "d/e", "d/s", "d/e/added", "n", "d/e/unreadable")}
    modes = {path: stat.S_IMODE(it.st_mode) for path, it in found.items()}
    assert modes == {"d": 0o555, "d/e": 0o311, "d/s": 0, "d/e/added": 0o555, "n": 0o550, "d/e/unreadable": 0o200}
    assert found["d/e/unreadable"].st_mtime_ns == T0 + 8
    assert (nobodys / "m/d/e/f").read_text() == "newer"
    (nobodys / "m/d/s").chmod(0o700)
    assert (nobodys / "m/d/s/g").read_text() == "g3"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can leave a directory of another user's in a mirror")
def test_one_path_without_permission_is_its_own_problem(nobodys: Path) -> None:
    """An unprivileged process is to place a file and a directory into a directory of root's in its mirror.

    Both are problems of their own; the rest of the batch is applied, and nothing is left staged.
    """
    root = nobodys / "m"
    root.mkdir()
    (root / "theirs").mkdir()
    (root / "theirs/f").write_text("theirs")
    os.chown(root, 65534, 65534)
    told = as_nobody(
        """
with Mirror.open(Path(sys.argv[1])) as mirror:
    tree = {"theirs/f": file("ours"), "theirs/new": folder(), "b": file("b")}
    outcome = Keeper(mirror).go(tree)
    print(sorted((p.path, p.code) for p in outcome.problems), sorted(d.path for d in outcome.placed))
""",
        root,
    )
    assert told == "[('theirs/f', 'not_permitted'), ('theirs/new', 'not_permitted')] ['b']"
    assert (root / "theirs/f").read_text() == "theirs"
    assert litter(root) == []
    with Mirror.peek(root) as view:
        assert "theirs/f" in [path for path, _ in view.walk()]


def test_a_directory_that_cannot_be_listed_is_told_and_the_walk_goes_on(nobodys: Path) -> None:
    """What is below it is unknown, not gone."""
    told = as_nobody(
        """
root = Path(sys.argv[1]) / "m"
with Mirror.open(root) as mirror:
    keeper = Keeper(mirror)
    keeper.go({"a": folder(mode=0o300), "a/f": file("x"), "b": file("x")})
    problems = []
    print([path for path, _ in mirror.walk(problems.append)], [(p.path, p.code) for p in problems])
    assert mirror.look("a/f") is not None
""",
        nobodys,
    )
    if os.getuid() == 0:
        assert told.splitlines()[-1] == "['a', 'b'] [('a', 'unreadable_dir')]"


def test_staged_names_never_repeat(root: Path, mirror: Mirror) -> None:
    """Two runs have different names; the absence of a name means that it was renamed into place."""
    fd = os.open(root / ".syncd/stage", os.O_RDONLY)
    try:
        made = [stage.new_name() for stage in (Stage(fd), Stage(fd)) for _ in range(1000)]
    finally:
        os.close(fd)
    assert len(set(made)) == len(made)
