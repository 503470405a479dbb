"""What a mirror holds although syncd never wrote it: what of it may go, and what stays whatever the policy."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from syncd import extraneous as extraneous_module
from syncd.errors import DiskProblem, SafetyHalt
from syncd.extraneous import Extraneous, extraneous_halt
from syncd.mirror import Outcome
from syncd.model import Entry, Kind
from syncd.plan import MirrorPlan, Remove
from syncd.rules import Rules
from tests.support.drift import Mirrored, as_nobody, nobodys
from tests.support.mirror import expected, file, folder, link, litter, lstat, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TREE = {
    "d": folder(),
    "d/a": file("aaaa"),
    "d/e": folder(),
    "d/e/x": file("xxxx"),
    "f": file("ffff"),
    "l": link("d"),
    **{f"many/{number}": file(str(number)) for number in range(40)},
    "many": folder(),
}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Mirrored]:
    mirrored = Mirrored(tmp_path, TREE)
    yield mirrored
    mirrored.close()


def watcher(kept: Mirrored, **rules: Any) -> Extraneous:
    return Extraneous(kept.mirror, kept.index, Rules(**rules), "app")


def write(path: Path, text: str = "theirs") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(strangers: Extraneous, **options: Any) -> list[str]:
    return [path for path, _ in strangers.find(**options)]


def test_strangers_are_found_children_first_and_removed(kept: Mirrored) -> None:
    """Files, symlinks and directories of nothing else go, one log line each; directories get their times back."""
    root = kept.root
    outside = write(root.parent / "outside/precious")
    for path in ("a", "d/b", "d/e.x", "d/n/o/p", "d/n/q", "zz/y"):
        write(root / path)
    (root / "d/e/link").symlink_to(outside)
    (root / "dirlink").symlink_to(outside.parent)
    (root / "empty/nested").mkdir(parents=True)
    strangers = watcher(kept)
    assert found(strangers) == [
        "a", "d/b", "d/e/link", "d/e.x", "d/n/o/p", "d/n/o", "d/n/q", "d/n", "dirlink", "empty/nested", "empty",
        "zz/y", "zz",
    ]  # fmt: skip
    with capture_logs() as lines:
        assert strangers.remove(allow_delete=False) == 13
    assert snapshot(root) == expected(TREE)
    assert (strangers.problems, litter(root), outside.read_text()) == ([], [], "theirs")
    gone = {line["path"]: line["found"] for line in lines if line["event"] == "extraneous_removed"}
    assert len(gone) == 13
    assert gone["a"] == {"kind": "file", "mode": "0644", "size": 6}
    assert gone["d/e/link"] == {"kind": "symlink", "target": str(outside)}
    assert kept.check() == (None, [])
    assert kept.differences() == set()
    assert (strangers.remove(allow_delete=False), snapshot(root)) == (0, expected(TREE))


def in_the_way(kept: Mirrored) -> list[str]:
    """Announced, and not here yet: something else is at its path."""
    kept.index.put_remote([kept.remote("wanted", file("w")), kept.remote("implied/below", file("b"))])
    write(kept.root / "wanted", "not what is wanted")
    (kept.root / "implied").mkdir()
    return []


def special(kept: Mirrored) -> list[str]:
    os.mkfifo(kept.root / "d/fifo")
    os.mkfifo(write(kept.root / "own/deep/x").parent / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(kept.root, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    return ["own/deep/x"]


def odd_names(kept: Mirrored) -> list[str]:
    write(kept.root / "own/x")
    with open(os.fsencode(kept.root) + b"/own/\xff", "wb"):  # noqa: PTH123
        pass
    (kept.root / "own2").mkdir()
    with open(os.fsencode(kept.root) + b"/own2/\xfe", "wb"):  # noqa: PTH123
        pass
    return ["own/x"]


def private(kept: Mirrored) -> list[str]:
    write(kept.root / ".syncd/stage/x")
    write(kept.root / "d/.syncd")
    write(kept.root / "another/mirror/.syncd/lock")
    write(kept.root / "another/mirror/deep/x")
    write(kept.root / "another/x")
    return ["another/x"]


@pytest.mark.parametrize("arrange", [in_the_way, special, odd_names, private])
@pytest.mark.fault("D3 D5 P4 P6")
def test_what_is_not_certainly_strange_stays(kept: Mirrored, arrange: Callable[[Mirrored], list[str]]) -> None:
    """Fifos, a socket, names that are no UTF-8, `.syncd`, and files where others are announced are put into a mirror.

    They stay, and so does every directory above them; nothing is a problem.
    """
    goes = arrange(kept)
    before = set(snapshot_names(kept.root))
    strangers = watcher(kept)
    assert found(strangers) == goes
    assert strangers.remove(allow_delete=True) == len(goes)
    assert strangers.problems == []
    assert before - set(snapshot_names(kept.root)) == set(goes)


def snapshot_names(root: Path) -> Iterator[str]:
    for top, dirs, files in os.walk(os.fsencode(root)):
        for name in dirs + files:
            yield os.fsdecode(os.path.relpath(os.path.join(top, name), os.fsencode(root)))  # noqa: PTH118


@pytest.mark.parametrize(
    ("rules", "ignore", "stays"),
    [
        ({"exclude": ["*.log"]}, "", {"a.log", "own/b.log", "own"}),
        ({"exclude": ["/own/"]}, "", {"own", "own/b.log", "own/c", "own/deep", "own/deep/d"}),
        ({"include": ["/d/"]}, "", {"a.log", "b", "own", "own/b.log", "own/c", "own/deep", "own/deep/d"}),
        ({"include": ["/own/deep/"]}, "", {"a.log", "b", "own", "own/b.log", "own/c", "d/own"}),
        ({}, "*.log\n", {"a.log", "own/b.log", "own"}),
        ({}, "/own/*\n!/own/c\n", {"own", "own/b.log", "own/deep", "own/deep/d"}),
        ({}, "#" + "x" * extraneous_module.MAX_IGNORE_BYTES, None),
    ],
)
@pytest.mark.fault("D3")
def test_what_rules_cover_stays(
    kept: Mirrored, rules: dict[str, list[str]], ignore: str, stays: set[str] | None
) -> None:
    """Strange files are planted that a mirror's rules or a mirrored .syncdignore cover, also one too large to be read.

    What is covered stays, and all of it where the file might say anything.
    """
    everything = {"a.log", "b", "own", "own/b.log", "own/c", "own/deep", "own/deep/d", "d/own"}
    if ignore:
        kept.go(TREE | {".syncdignore": file(ignore)})
    for path in ("a.log", "b", "own/b.log", "own/c", "own/deep/d", "d/own"):
        write(kept.root / path)
    assert set(found(watcher(kept, **rules))) == everything - (everything if stays is None else stays)


def test_an_ignore_file_of_a_stranger_protects_nothing(kept: Mirrored) -> None:
    write(kept.root / ".syncdignore", "*\n")
    write(kept.root / "own/.syncdignore", "*\n")
    assert found(watcher(kept)) == [".syncdignore", "own/.syncdignore", "own"]


def test_what_the_caller_spares_stays(kept: Mirrored) -> None:
    """For example what the bucket announces and cannot be a file."""
    write(kept.root / "own/x")
    write(kept.root / "own/y")
    assert found(watcher(kept), spare=lambda path: path == "own/x") == ["own/y"]


@pytest.mark.fault("D5 L10")
def test_another_filesystem_is_left_alone(kept: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the mirror is given another device number (walk replaced); later the root is renamed away.

    What is mounted is left alone; a root that is gone is an error, not an empty mirror.
    """
    write(kept.root / "mounted/x")
    write(kept.root / "near/x")
    strangers = watcher(kept)
    walk = kept.mirror.walk

    def mounted(on_problem: Any) -> Iterator[Any]:
        for path, disk in walk(on_problem):
            if path.startswith("mounted"):
                disk = type(disk)(disk.kind, disk.mode, disk.stat._replace(dev=disk.stat.dev + 1), disk.target)  # noqa: PLW2901
            yield path, disk

    monkeypatch.setattr(kept.mirror, "walk", mounted)
    assert found(strangers) == ["near/x", "near"]
    kept.root.rename(kept.root.parent / "moved")
    with pytest.raises(DiskProblem, match="cannot look at the mirror directory"):
        found(strangers)


@pytest.mark.fault("S3")
def test_a_directory_that_cannot_be_listed_stays() -> None:
    """Directories in a mirror get mode 0 or 0300, and a process without privileges removes what is strange.

    They stay with what is around them, and only one that can be looked into goes.
    """
    with nobodys() as tmp:
        said = as_nobody(
            """
from syncd.extraneous import Extraneous
from syncd.rules import Rules
kept = Mirrored(Path(sys.argv[1]), TREE)
for name in ("own", "open", "blind"):
    (kept.root / name / "in").mkdir(parents=True)
(kept.root / "own/in").chmod(0)
(kept.root / "blind/in").chmod(0o300)
(kept.root / "d/e").chmod(0)
strangers = Extraneous(kept.mirror, kept.index, Rules(), "app")
print(strangers.remove(allow_delete=True), strangers.problems, sorted(os.listdir(kept.root)))
""",
            tmp,
        )
    assert said == "2 [] ['.syncd', 'blind', 'd', 'f', 'l', 'own']"


# safety --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extraneous", "mirrored", "held"),
    [(0, 0, False), (1, 0, True), (1, 1, True), (1, 2, False), (50, 100, False), (51, 100, True), (0, 5, False)],
)
def test_more_than_half_of_what_is_kept_is_held(extraneous: int, mirrored: int, held: bool) -> None:
    assert bool(extraneous_halt(extraneous, mirrored)) == held


@pytest.mark.fault("D5")
def test_a_mirror_in_the_wrong_place_removes_nothing_unasked(kept: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty strange files are planted in a mirror, more than fit one page.

    All of them are counted and none removed; with a person's word they go, page by page.
    """
    monkeypatch.setattr(extraneous_module, "MAX_STRANGERS", 7)
    for number in range(30):
        write(kept.root / f"home/{number % 4}/{number}")
    strangers = watcher(kept)
    with pytest.raises(SafetyHalt, match="would remove 30 paths that syncd never wrote, beside 44") as caught:
        strangers.remove(allow_delete=False)
    assert "syncd allow app" in caught.value.hint
    assert len(found(strangers)) == 35
    assert strangers.remove(allow_delete=True) == 35
    assert snapshot(kept.root) == expected(TREE)


def test_pages_go_on_under_one_word_and_end_where_nothing_moves(
    kept: Mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was few at first is not held half-way; what cannot go is tried once."""
    monkeypatch.setattr(extraneous_module, "MAX_STRANGERS", 3)
    for number in range(20):
        write(kept.root / f"x{number}")
    strangers = watcher(kept)
    assert strangers.remove(allow_delete=False) == 20
    for number in range(20):
        write(kept.root / f"x{number}")
    monkeypatch.setattr(kept.mirror, "commit", lambda plan, *, drift: Outcome())
    assert strangers.remove(allow_delete=False) == 0


def changed(root: Path) -> None:
    (root / "own/x").write_text("written since")


def replaced(root: Path) -> None:
    (root / "own/x").unlink()
    (root / "own/x").symlink_to("/etc/passwd")


def added(root: Path) -> None:
    write(root / "own/new")


def swapped(root: Path) -> None:
    (root / "own").rename(root.parent / "own")
    (root / "own").symlink_to(root.parent / "own")


@pytest.mark.parametrize("meanwhile", [changed, replaced, added, swapped])
@pytest.mark.fault("L1 L2 D5")
def test_what_changed_since_it_was_seen_stays(
    kept: Mirrored, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Path], None]
) -> None:
    """Just before its removal, a strange file is written or becomes a symlink, or its directory is filled or swapped.

    What came meanwhile stays, and nothing that a link leads to is touched.
    """
    write(kept.root / "own/x")
    commit = kept.mirror.commit

    def late(plan: MirrorPlan, *, drift: str) -> Any:
        meanwhile(kept.root)
        return commit(plan, drift=drift)

    monkeypatch.setattr(kept.mirror, "commit", late)
    strangers = watcher(kept)
    strangers.remove(allow_delete=False)
    if meanwhile is added:
        assert [path.name for path in (kept.root / "own").iterdir()] == ["new"]
    elif meanwhile is swapped:
        assert (kept.root.parent / "own/x").read_text() == "theirs"
        assert (kept.root / "own").is_symlink()
    else:
        assert (kept.root / "own/x").exists() or (kept.root / "own/x").is_symlink()
        assert [problem.code for problem in strangers.problems] == ["directory_not_empty"]
    assert kept.check() == (None, [])


def test_a_directorys_time_is_right_on_disk_and_in_the_index(kept: Mirrored) -> None:
    """A check that saw the stranger's traces is no reason for another round."""
    write(kept.root / "d/x")
    kept.check()
    assert kept.differences() == {"d"}
    watcher(kept).remove(allow_delete=False)
    assert kept.differences() == set()
    assert kept.check() == (None, [])
    assert kept.differences() == set()


def test_the_removal_of_nothing_known_leaves_the_index_alone(kept: Mirrored) -> None:
    write(kept.root / "d/x")
    before = list(kept.index.iter_local())
    watcher(kept).remove(allow_delete=False)
    after = list(kept.index.iter_local())
    assert [row.path for row in after] == [row.path for row in before]
    assert [row for row in after if row.entry.kind is not Kind.DIR] == [
        row for row in before if row.entry.kind is not Kind.DIR
    ]


def test_a_removal_that_was_cut_off_is_completed(kept: Mirrored) -> None:
    """The journal has it: the next start goes on, and what changed meanwhile stays."""
    (one, two) = (write(kept.root / "one"), write(kept.root / "two"))
    plan = MirrorPlan(remove=tuple(Remove(path.name, Kind.FILE, lstat(path)) for path in (one, two)))
    kept.mirror._journal.write(plan, "keep")
    two.write_text("changed since")
    kept.mirror.recover()
    assert (one.exists(), two.read_text()) == (False, "changed since")


def test_it_stops_when_it_is_told_to(kept: Mirrored) -> None:
    write(kept.root / "x")
    strangers = watcher(kept)
    strangers.stopping = True
    assert strangers.remove(allow_delete=True) == 0


PATHS = st.lists(st.sampled_from(["a", "b", "a.b", "a-"]), min_size=1, max_size=3).map("/".join)


@given(st.sets(PATHS, max_size=6), st.sets(PATHS, max_size=6), st.sets(PATHS, max_size=6))
def test_a_path_is_strange_if_nobody_knows_it_or_anything_below(
    local: set[str], remote: set[str], disk: set[str]
) -> None:
    """The merge of three sorted lists against the plain definition."""

    class Half:
        def __init__(self, paths: set[str]) -> None:
            self.rows = [type("Row", (), {"path": path}) for path in sorted(paths, key=lambda it: it.split("/"))]

    index: Any = type(
        "Index", (), {"iter_local": lambda _: iter(Half(local).rows), "iter_remote": lambda _: iter(Half(remote).rows)}
    )()
    known = extraneous_module._Known(index)
    for path in sorted(disk, key=lambda it: it.split("/")):
        plain = any(each == path or each.startswith(path + "/") for each in local | remote)
        assert known.has(path) == plain


def test_rows_of_any_kind_are_known(kept: Mirrored) -> None:
    """A row that says directory keeps what is a file by now: that is drift, not a stranger."""
    row = kept.index.local("d/e/x")
    assert row is not None
    kept.index.put_local([row._replace(path="ghost", entry=Entry(Kind.DIR, 0o755, 0))])
    write(kept.root / "ghost")
    assert found(watcher(kept)) == []
