"""The index: what is remembered per path, and what happens to a file that cannot be trusted."""

from __future__ import annotations

import hashlib
import signal
import sqlite3
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.errors import DiskProblem, Locked
from syncd.index import KEPT_BROKEN, Index, LocalRow, RemoteRow
from syncd.model import Entry, Kind, Stat
from syncd.paths import sort_key
from syncd.store.base import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ZERO = Stat(0, 0, 0, 0)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file(content: str = "x", mode: int = 0o644, mtime_ns: int = 1) -> Entry:
    return Entry(Kind.FILE, mode, mtime_ns, len(content), digest(content))


def folder(mode: int = 0o755, mtime_ns: int = 1) -> Entry:
    return Entry(Kind.DIR, mode, mtime_ns)


def link(target: str, mode: int = 0o777, mtime_ns: int = 1) -> Entry:
    return Entry(Kind.SYMLINK, mode, mtime_ns, target=target)


def local(path: str, entry: Entry | None = None, problem: str = "") -> LocalRow:
    return LocalRow(path, entry or file(), ZERO, problem=problem)


def remote(path: str, entry: Entry | None = None, *, seq: int = 1, via: str = "", bucket: str = "b") -> RemoteRow:
    return RemoteRow(path, entry or file(), bucket, path, f"syncd-{path}", 1, 131072, seq, "me", via)


def children(index: Index, path: str) -> list[str]:
    return [row.path for row in index.local_children(path)]


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index(None)
    yield index
    index.close()


def test_a_row_comes_back_as_it_was_written(index: Index) -> None:
    """Every field survives, also negative times, 64-bit inode numbers and texts that are not digests."""
    entry = Entry(Kind.FILE, 0o4755, -5, 1 << 40, digest("a"), digest("b"))
    row = LocalRow("d/ü\n\\x", entry, Stat(1 << 40, -5, 7, (1 << 64) - 2, (1 << 63) + 9), 123, "unreadable")
    odd = RemoteRow("o", entry._replace(digest="DEADBEEF" * 8, sha256="?"), "b", "o", "n", 3, 9, 1 << 60, "p", "v")
    index.put_local([row, local("l", link("../ü"))])
    index.put_remote([odd])
    assert index.local(row.path) == row
    assert index.local("l") == local("l", link("../ü"))
    assert index.remote("o") == odd
    assert index.local("missing") is None
    assert index.remote("missing") is None
    assert list(index.iter_local()) == [row, local("l", link("../ü"))]


def test_notes_have_a_default_and_are_overwritten(index: Index) -> None:
    """A note is "" or the given default until it is set."""
    assert (index.note("k"), index.note("k", "d")) == ("", "d")
    index.set_note("k", "1")
    index.set_note("k", "2")
    assert index.note("k", "d") == "2"


def test_iteration_is_in_component_order_and_within_the_subtree(index: Index) -> None:
    """A directory's descendants follow it at once, whatever characters its siblings' names have."""
    paths = ["a", "a/b", "a/b/c", "a!", "a.txt", "a0", "a\x01", "b", "é/x"]
    ordered = sorted(paths, key=sort_key)
    index.put_local(local(path) for path in reversed(paths))
    index.put_remote(remote(path) for path in paths)
    assert [row.path for row in index.iter_local()] == ordered
    assert [row.path for row in index.iter_remote()] == ordered
    assert [row.path for row in index.iter_local("a")] == ["a", "a/b", "a/b/c"]
    assert [row.path for row in index.iter_remote("a/b")] == ["a/b", "a/b/c"]
    assert ordered[:3] == ["a", "a/b", "a/b/c"]


def test_children_are_direct_and_by_base_name(index: Index) -> None:
    """Deeper rows are jumped over, also where the directory between has no row."""
    index.put_local(local(path) for path in ("a", "a/b", "a/b/c/d", "a/e", "a!", "f/g/h", "z"))
    assert children(index, "") == ["a", "a!", "z"]
    assert children(index, "a") == ["a/b", "a/e"]
    assert next(iter(index.local_children("a"))) == local("a/b")
    assert children(index, "f") == []
    assert children(index, "f/g") == ["f/g/h"]
    assert children(index, "nowhere") == []


def test_children_come_page_by_page_in_order(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies below one of them, or has a name that begins like it, at the end of a page or not."""
    monkeypatch.setattr("syncd.index.index._FIRST_CHILDREN", 1)
    monkeypatch.setattr("syncd.index.index.PAGE", 3)
    names = [f"{number:02}" for number in range(20)]
    paths = [f"d/{name}" for name in names]
    paths += [f"d/{name}\x01" for name in names[::3]]
    deeper = [f"d/{name}/{below}" for name in names[::2] for below in ("x", "x/y", "z")]
    index.put_local(local(path) for path in [*paths, *deeper, "d", "d/no-row/f", "d!", "e/f"])
    assert children(index, "d") == sorted(paths, key=sort_key)


def test_rows_may_be_written_while_children_are_read(index: Index) -> None:
    """As a scan does with what it has passed: nothing comes twice, and nothing that was ahead is missed."""
    paths = [f"d/{number:04}" for number in range(3000)]
    index.put_local(local(path) for path in paths)
    seen = []
    with index.transaction():
        for row in index.local_children("d"):
            seen.append(row.path)
            index.put_local([row._replace(problem="unreadable"), local(f"{row.path}/below")])
            if len(seen) == 1500:
                index.drop_local_tree("d/2000")
    assert seen == [path for path in paths if path != "d/2000"]


def test_a_tree_is_dropped_without_its_neighbours(index: Index) -> None:
    """drop_local removes single rows, drop_local_tree a path and everything below it."""
    index.put_local(local(path) for path in ("a", "a/b", "a/b/c", "a!", "ab", "d", "d/e"))
    index.drop_local_tree("a")
    index.drop_local(["d", "missing"])
    assert [row.path for row in index.iter_local()] == ["a!", "ab", "d/e"]
    index.drop_local_tree("")
    assert index.count_local() == 0


def test_rows_may_be_written_while_iterating(index: Index) -> None:
    """Pages are read by key: rows behind the position do not come again, rows ahead are as they are now."""
    index.put_local(local(f"{number:05}") for number in range(2500))
    seen = []
    for row in index.iter_local():
        seen.append(row.path)
        index.drop_local([row.path])
        if row.path == "01200":
            index.put_local([local("00000"), local("02400x")])
    assert len(seen) == 2501
    assert seen == sorted(set(seen))
    assert [row.path for row in index.iter_local()] == ["00000"]


# -- scans ---------------------------------------------------------------------------------------------


def test_rows_that_a_scan_did_not_see_are_dropped(index: Index) -> None:
    """Written, marked, and marked as a whole tree: all count as seen; only rows below the given path go."""
    index.put_local(local(path) for path in ("a", "a/gone", "a/marked", "a/u", "a/u/x", "b"))
    scan = index.next_scan()
    index.put_local([local("a/new")], scan=scan)
    index.mark_seen(["a", "a/marked"], scan)
    index.mark_tree_seen("a/u", scan)
    assert index.drop_unseen(scan, "a") == ["a/gone"]
    assert index.drop_unseen(scan, "a") == []
    assert [row.path for row in index.iter_local()] == ["a", "a/marked", "a/new", "a/u", "a/u/x", "b"]
    assert index.drop_unseen(scan) == ["b"]


def test_a_row_written_during_a_scan_is_not_unseen(index: Index) -> None:
    """A hint may bring a file behind the scan's back: the scan must not take it for deleted."""
    index.put_local([local("old")])
    first = index.next_scan()
    index.put_local([local("hinted")])
    second = index.next_scan()
    index.put_local([local("later")], scan=second)
    assert index.drop_unseen(first) == ["old"]
    assert index.drop_unseen(second) == ["hinted"]


def test_a_scan_number_of_another_run_drops_nothing(tmp_path: Path) -> None:
    """Numbers grow across restarts; the marks of a run end with it, so its numbers are refused afterwards."""
    first = Index(tmp_path / "i")
    number = first.next_scan()
    first.put_local([local("a")], scan=number)
    first.close()
    second = Index(tmp_path / "i")
    with pytest.raises(ValueError, match="not begun"):
        second.drop_unseen(number)
    assert second.next_scan() == number + 1
    assert second.count_local() == 1
    second.close()


# -- contents ------------------------------------------------------------------------------------------


def test_content_is_found_under_another_name(index: Index) -> None:
    """By BLAKE3, else by SHA-256; never a row with a problem, of another size, or by an empty digest."""
    entry = file("hello")._replace(sha256=digest("sha"))
    index.put_local(
        [local("bad", entry, "unreadable"), local("d", folder()), local("empty", entry._replace(digest=""))]
    )
    assert index.find_local_content(entry.digest, "", 5) is None
    assert index.find_local_content("", "", 5) is None
    assert index.find_local_content("", "", 0) is None
    index.put_local([local("good", entry)])
    found = index.find_local_content(entry.digest, "", 5)
    assert found is not None
    assert found.path == "good"
    by_sha = index.find_local_content(digest("other"), digest("sha"), 5)
    assert by_sha is not None
    assert by_sha.path in {"good", "empty"}
    assert index.find_local_content(entry.digest, "", 6) is None
    index.put_remote([remote("r", entry)])
    announced = index.find_remote_content(entry.digest, 5)
    assert announced is not None
    assert announced.path == "r"
    assert index.find_remote_content("", 5) is None
    assert index.find_remote_content(entry.digest, 4) is None


def test_an_older_announcement_never_replaces_a_newer_one(index: Index) -> None:
    """Sequences are compared within one path, way and bucket; a different way or bucket always replaces."""
    index.put_remote([remote("p", file("new"), seq=9)])
    index.put_remote([remote("p", file("old"), seq=8)])
    assert index.remote("p") == remote("p", file("new"), seq=9)
    index.put_remote([remote("p", file("again"), seq=9)])
    assert index.remote("p") == remote("p", file("again"), seq=9)
    index.put_remote([remote("p", file("linked"), seq=2, via="l")])
    assert index.remote("p") == remote("p", file("linked"), seq=2, via="l")
    index.put_remote([remote("p", file("elsewhere"), seq=1, via="l", bucket="other")])
    assert index.remote("p") == remote("p", file("elsewhere"), seq=1, via="l", bucket="other")


def test_remote_rows_are_counted_and_known_by_nuid(index: Index) -> None:
    """More nuids than fit one statement are asked in pieces."""
    index.put_remote(remote(str(number)) for number in range(1200))
    index.put_remote([remote("theirs")._replace(publisher="", nuid="")])
    assert (index.count_remote(), index.count_remote(ours="me"), index.count_remote(ours="")) == (
        1201,
        1200,
        1,
    )
    asked = [f"syncd-{number}" for number in range(1150, 2500)] + [""]
    assert index.nuids(asked) == {f"syncd-{number}" for number in range(1150, 1200)}
    index.drop_remote(["0", "missing"])
    assert index.count_remote() == 1200
    index.clear_remote()
    assert index.count_remote() == 0


def test_garbage_waits_and_can_be_taken_back(index: Index) -> None:
    """The earlier time is kept; due ones come oldest first; content taken back is garbage no more."""
    young, old = (Stored(nuid, 2, 5, digest("c"), digest("s"), 77) for nuid in ("young", "old"))
    index.add_garbage("young", 20.0, young)
    index.add_garbage("old", 10.0, old)
    index.add_garbage("old", 30.0, None)
    index.add_garbage("unknown", 5.5, None)
    assert index.due_garbage(10.0) == ["unknown", "old"]
    assert index.due_garbage(99.0, limit=1) == ["unknown"]
    assert index.take_garbage(digest("c"), 6) is None
    assert index.take_garbage("", 0) is None
    assert index.take_garbage(digest("c"), 5) == young
    assert index.garbage_nuids(["young", "old", "unknown", "z"]) == {"old", "unknown"}
    index.drop_garbage(["unknown"])
    assert index.take_garbage(digest("c"), 5) == old
    assert index.due_garbage(99.0) == []


def test_freed_garbage_is_known_until_it_is_gone(index: Index) -> None:
    """Its content is forgotten first; freed, it is due no more, and forgotten some time after; by any clock."""
    index.add_garbage("one", 10.0, Stored("one", 2, 5, digest("c"), digest("s"), 77))
    index.forget_content(["one"])
    assert (index.take_garbage(digest("c"), 5), index.due_garbage(10.0)) == (None, ["one"])
    for until, now, left in [(20.0, 19.0, {"one"}), (20.0, 20.0, set()), (1000.0, 20.0, set())]:
        index.add_garbage("one", 10.0, None)
        index.leave_garbage(["one"], until)
        assert index.due_garbage(99.0) == []
        index.drop_left(now, 5.0)
        assert index.garbage_nuids(["one"]) == left


# -- diff ----------------------------------------------------------------------------------------------


def differing(index: Index, paths: list[str] | None = None) -> list[str]:
    return [path for path, _, _ in index.diff(paths)]


SHA_ONLY = Entry(Kind.FILE, 0o644, 1, 1, "", digest("x"))


@pytest.mark.parametrize(
    ("ours", "theirs", "differs"),
    [
        pytest.param(file(), file(), False, id="equal files"),
        pytest.param(file("a"), file("b"), True, id="other content of the same size"),
        pytest.param(file("a"), file("a")._replace(size=2), True, id="other size"),
        pytest.param(file(), file(mode=0o600), True, id="other mode"),
        pytest.param(file(), file(mtime_ns=2), True, id="other time"),
        pytest.param(file()._replace(sha256=digest("x")), SHA_ONLY, False, id="equal by sha256 alone"),
        pytest.param(file()._replace(sha256=digest("y")), SHA_ONLY, True, id="other sha256"),
        pytest.param(file(), SHA_ONLY, True, id="no digest in common"),
        pytest.param(file()._replace(digest=""), file()._replace(digest=""), True, id="nothing known of content"),
        pytest.param(folder(), folder(), False, id="equal directories"),
        pytest.param(folder(), folder(0o700), True, id="directory mode"),
        pytest.param(link("a"), link("a", mode=0o600), False, id="a symlink has no mode"),
        pytest.param(link("a"), link("b"), True, id="other target"),
        pytest.param(link("a"), link("a", mtime_ns=2), True, id="symlink time"),
        pytest.param(folder(), link("a"), True, id="other kind"),
        pytest.param(file(), None, True, id="only here"),
        pytest.param(None, file(), True, id="only there"),
    ],
)
def test_the_diff_is_what_the_model_says(index: Index, ours: Entry | None, theirs: Entry | None, differs: bool) -> None:
    """SQL and Entry.same agree, in the whole diff and in the diff of some paths."""
    if ours:
        index.put_local([local("p", ours)])
    if theirs:
        index.put_remote([remote("p", theirs)])
    expected = [("p", local("p", ours) if ours else None, remote("p", theirs) if theirs else None)] * differs
    assert list(index.diff()) == expected
    assert list(index.diff(["p", "q"])) == expected
    assert list(index.diff([])) == []
    if ours and theirs:
        assert ours.same(theirs) is not differs


def test_a_path_with_a_problem_is_neither_published_nor_deleted(index: Index) -> None:
    """Nothing at or below it is in the diff: an unreadable directory's children are unknown, not gone."""
    index.put_local(
        [local("dir", folder(), "unreadable_dir"), local("dir/stale", file("old")), local("f", problem="x")]
    )
    index.put_local([local("dir!", file("changed"))])
    index.put_remote(remote(path) for path in ("dir", "dir/stale", "dir/sub/gone", "dir!", "f", "z"))
    assert differing(index) == ["dir!", "z"]
    assert differing(index, ["dir", "dir/sub/gone", "dir!", "f", "z"]) == ["dir!", "z"]


def test_a_diff_goes_on_while_its_rows_are_settled(index: Index) -> None:
    """More than a page of differences, each settled while the next is being read, in component order."""
    paths = [f"d{number % 7}/{number:05}" for number in range(3300)]
    index.put_local(local(path) for path in paths[:2200])
    index.put_remote(remote(path, file("other")) for path in paths[1100:])
    seen = []
    for path, ours, _ in index.diff():
        seen.append(path)
        with index.transaction():
            if ours:
                index.put_remote([remote(path, seq=5)])
            else:
                index.drop_remote([path])
    assert seen == sorted(paths, key=sort_key)
    assert differing(index) == []
    index.put_local(local(path, file("third")) for path in paths)
    assert differing(index, paths[::-1] + paths) == sorted(paths, key=sort_key)


_ENTRIES = st.one_of(
    st.builds(
        Entry,
        st.just(Kind.FILE),
        st.sampled_from([0o644, 0o600]),
        st.integers(1, 2),
        st.integers(0, 1),
        st.sampled_from(["", digest("1"), digest("2")]),
        st.sampled_from(["", digest("3"), digest("4")]),
    ),
    st.builds(folder, st.sampled_from([0o755, 0o700]), st.integers(1, 2)),
    st.builds(link, st.sampled_from(["a", "b"]), st.sampled_from([0o777, 0]), st.integers(1, 2)),
)
_PATHS = st.lists(st.sampled_from(["a", "b", "a!", "é", "\x01"]), min_size=1, max_size=3).map("/".join)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_PATHS, _ENTRIES), st.dictionaries(_PATHS, _ENTRIES))
def test_any_two_trees_differ_where_their_entries_do(ours: dict[str, Entry], theirs: dict[str, Entry]) -> None:
    """For arbitrary trees the diff equals the one written down in three lines of Python."""
    index = Index(None)
    index.put_local(local(path, entry) for path, entry in ours.items())
    index.put_remote(remote(path, entry) for path, entry in theirs.items())
    paths = sorted(ours | theirs, key=sort_key)
    expected = [path for path in paths if path not in ours or path not in theirs or not ours[path].same(theirs[path])]
    assert differing(index) == expected
    assert differing(index, paths) == expected
    index.close()


def test_a_diff_can_begin_behind_a_path(index: Index) -> None:
    """In component order, for all paths and for some."""
    paths = ["a", "a/b", "a!", "b"]
    index.put_local(local(path) for path in paths)
    assert [path for path, _, _ in index.diff(after="a/b")] == ["a!", "b"]
    assert [path for path, _, _ in index.diff(paths, after="a")] == ["a/b", "a!", "b"]


# -- listings and links --------------------------------------------------------------------------------


def test_what_a_listing_does_not_bring_is_forgotten(index: Index) -> None:
    """Only of the bucket itself, and only against the listing begun last."""
    index.put_remote([remote("gone"), remote("stays"), remote("linked", via="l")])
    index.begin_listing()
    index.put_remote([remote("gone")], listed=True)
    index.begin_listing()
    index.put_remote([remote("stays"), remote("new")], listed=True)
    index.drop_unlisted()
    assert [row.path for row in index.iter_remote()] == ["linked", "new", "stays"]
    assert index.vias() == {"l"}


def test_what_a_link_brings_is_replaced_as_a_whole(index: Index) -> None:
    """Objects of the bucket itself go before; the paths of before and after are told."""
    index.put_remote([remote("own"), remote("l/old", via="l"), remote("l/kept", via="l", seq=9), remote("m", via="m")])
    rows = [remote("own", via="l"), remote("l/kept", via="l", seq=2), remote("l/new", via="l")]
    assert index.replace_via("l", rows) == {"l/old", "l/kept", "l/new"}
    assert [(row.path, row.via, row.seq) for row in index.iter_remote()] == [
        ("l/kept", "l", 2),
        ("l/new", "l", 1),
        ("m", "m", 1),
        ("own", "", 1),
    ]
    assert index.replace_via("l", ()) == {"l/kept", "l/new"}
    assert index.vias() == {"m"}


def test_bytes_and_descendants_are_counted(index: Index) -> None:
    """Sizes of local files, rows of any syncd publisher, and whether anything is announced below a path."""
    assert index.local_bytes() == 0
    index.put_local([local("a", file("12345")), local("b", file("123")), local("d", folder())])
    index.put_remote([remote("d"), remote("d!/x"), remote("theirs/a")._replace(publisher="")])
    assert (index.local_bytes(), index.count_ours()) == (8, 2)
    assert [index.has_remote_below(path) for path in ("d", "d!", "theirs", "theirs/a")] == [False, True, True, False]


# -- transactions and failures -------------------------------------------------------------------------


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    """What an exception interrupts leaves no trace, rows and notes and marks alike; the next one works."""
    index = Index(tmp_path / "i")

    def interrupted() -> None:
        with index.transaction():
            index.put_local([local("a")])
            index.set_note("k", "v")
            with index.transaction():
                index.put_remote([remote("b")])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with pytest.raises(KeyError):
        index.put_local(local(("a", "b")[number]) if number < 2 else {}[number] for number in range(3))
    assert (index.count_local(), index.count_remote(), index.note("k")) == (0, 0, "")
    with index.transaction():
        index.put_local([local("a")])
    index.close()
    index.close()
    again = Index(tmp_path / "i")
    assert (again.count_local(), again.recovered) == (1, "")
    again.close()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """Two daemons on one state would overwrite each other's memory."""
    index = Index(tmp_path / "i")
    with pytest.raises(Locked, match="in use"):
        Index(tmp_path / "i")
    index.put_local([local("a")])
    index.close()
    assert not list(tmp_path.glob("*.broken-*"))


@pytest.mark.fault("X1")
def test_a_full_disk_is_named_and_survived(tmp_path: Path) -> None:
    """SQLite's page limit is lowered, so that a write of 5,000 rows finds no room in the middle.

    It ends with DiskProblem and leaves none of its rows; with room again the same index goes on.
    """
    index = Index(tmp_path / "i")
    index.put_local([local("before")])
    pages = index._db.execute("PRAGMA page_count").fetchone()[0]
    index._db.execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(DiskProblem, match="full"):
        index.put_local(local(f"{number:0200}") for number in range(5000))
    assert [row.path for row in index.iter_local()] == ["before"]
    index._db.execute("PRAGMA max_page_count = 1000000")
    index.put_local([local("after")])
    assert index.count_local() == 2
    index.close()


@pytest.mark.fault("X1")
def test_an_error_swallowed_inside_a_transaction_still_dooms_it(tmp_path: Path) -> None:
    """A write runs into a lowered page limit of SQLite, inside a transaction that swallows the error and goes on.

    Its later writes and its end fail, too, and nothing of it is there.
    """
    index = Index(tmp_path / "i")
    pages = index._db.execute("PRAGMA page_count").fetchone()[0]
    index._db.execute(f"PRAGMA max_page_count = {pages + 3}")

    def swallowing() -> None:
        with index.transaction():
            try:
                index.put_local(local(f"{number:0200}") for number in range(5000))
            except DiskProblem:
                with pytest.raises(DiskProblem):
                    index.set_note("k", "v")

    with pytest.raises(DiskProblem):
        swallowing()
    assert (index.note("k"), index.count_local()) == ("", 0)
    index.close()


@pytest.mark.fault("X1 X2")
def test_a_write_that_the_kernel_refuses_is_a_disk_problem(tmp_path: Path) -> None:
    """A file size limit makes write(2) fail for real; lifted, the same index goes on."""
    code = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from syncd.errors import DiskProblem
        from syncd.index import Index, LocalRow
        from syncd.model import Entry, Kind, Stat
        rows = [LocalRow(f"{n:0200}", Entry(Kind.DIR, 0, 0), Stat(0, 0, 0, 0)) for n in range(5000)]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        index = Index(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        try:
            index.put_local(rows)
        except DiskProblem as exc:
            print("refused", exc.transient, index.count_local(), end=" ")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        index.put_local(rows)
        print(index.count_local())
    """)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "i")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (run.stdout.split(), run.stderr) == (["refused", "True", "0", "5000"], "")


def test_a_place_that_cannot_hold_an_index_is_named(tmp_path: Path) -> None:
    """An index is opened where a directory stands in its place, and below a plain file.

    Both end with DiskProblem.
    """
    (tmp_path / "d").mkdir()
    (tmp_path / "f").touch()
    with pytest.raises(DiskProblem):
        Index(tmp_path / "d")
    with pytest.raises(DiskProblem):
        Index(tmp_path / "f" / "i")


def filled(path: Path) -> None:
    index = Index(path)
    index.put_local(local(f"dir/{number:05}", file(str(number))) for number in range(3000))
    index.close()


def overwrite_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8192:-4096] = b"\xa5" * (len(data) - 12288)
    path.write_bytes(data)


def truncate_half(path: Path) -> None:
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size // 2)


def no_database(path: Path) -> None:
    path.write_bytes(b"hello " * 1000)


def newer_version(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


def somebody_elses(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs(x)")
    db.commit()
    db.close()


@pytest.mark.fault("C6")
@pytest.mark.parametrize("spoil", [overwrite_middle, truncate_half, no_database, newer_version, somebody_elses])
def test_a_file_that_cannot_be_trusted_is_set_aside(tmp_path: Path, spoil: object) -> None:
    """The index file is overwritten in the middle, cut in half, replaced by text, of version 99, or somebody else's.

    A new index begins, says why, and keeps the old file as it was beside it.
    """
    path = tmp_path / "state" / "i"
    filled(path)
    spoil(path)
    path.with_name("i-wal").write_bytes(b"stale log")
    spoiled = path.read_bytes()
    index = Index(path)
    assert index.recovered
    assert (index.count_local(), index.next_scan()) == (0, 1)
    index.put_local([local("a")])
    index.close()
    assert path.with_name("i.broken-1").read_bytes() == spoiled
    again = Index(path)
    assert (again.recovered, again.count_local()) == ("", 1)
    again.close()


@pytest.mark.fault("C6")
def test_a_deleted_or_empty_file_begins_anew(tmp_path: Path) -> None:
    """The index file is deleted, and later emptied, as a crash at the very first start leaves it.

    A new index begins each time, and nothing is set aside.
    """
    path = tmp_path / "i"
    filled(path)
    path.unlink()
    for _ in range(2):
        index = Index(path)
        assert (index.recovered, index.count_local()) == ("", 0)
        index.close()
        path.write_bytes(b"")
    assert not list(tmp_path.glob("*.broken-*"))


@pytest.mark.fault("C6")
def test_only_the_newest_broken_files_are_kept(tmp_path: Path) -> None:
    """The index file is overwritten with garbage before each of six openings.

    Only the last three broken files are kept, so that they do not fill the disk.
    """
    path = tmp_path / "i"
    for number in range(KEPT_BROKEN + 3):
        path.write_bytes(b"garbage %d " % number * 500)
        Index(path).close()
    assert sorted(found.name for found in tmp_path.glob("*.broken-*")) == [
        "i.broken-4",
        "i.broken-5",
        "i.broken-6",
    ]


@pytest.mark.fault("C6")
def test_damage_found_in_use_is_a_disk_problem_and_the_next_opening_is_clean(tmp_path: Path) -> None:
    """Pages overwritten under a running index: it is set aside at once, and every later call says so."""
    path = tmp_path / "i"
    filled(path)
    index = Index(path)
    overwrite_middle(path)
    index._db.execute("PRAGMA shrink_memory")
    with pytest.raises(DiskProblem, match="damaged"):
        list(index.iter_local())
    assert index.broken
    with pytest.raises(DiskProblem, match="set aside"):
        index.put_local([local("a")])
    with pytest.raises(DiskProblem, match="set aside"):
        index.local("a")
    index.close()
    again = Index(path)
    assert (again.count_local(), again.recovered, again.broken) == (0, "", False)
    assert path.with_name("i.broken-1").exists()
    again.close()


@pytest.mark.fault("C6")
def test_a_killed_process_leaves_whole_transactions(tmp_path: Path) -> None:
    """SIGKILL in the middle of a transaction: what was committed is there and nothing else, without repair."""
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from syncd.index import Index, LocalRow
        from syncd.model import Entry, Kind, Stat
        def rows(prefix):
            stat = Stat(0, 0, 0, 0)
            return (LocalRow(f"{prefix}{n:0200}", Entry(Kind.DIR, 0, 0), stat) for n in range(3000))
        index = Index(Path(sys.argv[1]))
        index.put_local(rows("a"))
        with index.transaction():
            index.put_local(rows("b"))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "i")], timeout=30, check=False)
    assert run.returncode == -signal.SIGKILL
    index = Index(tmp_path / "i")
    assert (index.recovered, index.count_local()) == ("", 3000)
    assert next(index.iter_local()).path.startswith("a")
    index.close()


@pytest.mark.fault("X3")
def test_memory_is_bounded_whatever_the_number_of_rows(tmp_path: Path) -> None:
    """100,000 rows written, scanned, marked, compared and dropped grow the process by less than 50 MB."""
    code = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from syncd.index import Index, LocalRow, RemoteRow
        from syncd.model import Entry, Kind, Stat
        N = 100_000
        def path(n): return f"directory-{n // 1000}/some-longer-name-{n}"
        def entry(n): return Entry(Kind.FILE, 0o644, n, n, f"{n:064x}")
        index = Index(Path(sys.argv[1]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scan = index.next_scan()
        index.put_local((LocalRow(path(n), entry(n), Stat(n, n, n, n)) for n in range(N)), scan=scan)
        index.put_remote(RemoteRow(path(n), entry(n), "b", path(n), f"n{n}", 1, 1, n) for n in range(N))
        index.mark_seen(map(path, range(N)), scan)
        assert index.drop_unseen(scan) == []
        assert sum(1 for _ in index.iter_local()) == N
        assert list(index.diff()) == []
        index.clear_remote()
        assert sum(1 for _ in index.diff()) == N
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "i")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.stderr == ""
    assert int(run.stdout) < 50
