"""What becomes of a mirror's paths that somebody else, or the disk, has changed."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from syncd import drift as drift_module
from syncd import reread
from syncd.drift import DriftCheck, evidence, keep_auditing, told
from syncd.errors import DiskProblem
from syncd.mirror import Disk
from syncd.model import Entry, Kind, Stat
from syncd.reread import BLOCK, FILE_COST, ROW_COST, Audited
from tests.support.drift import Mirrored, as_nobody, nobodys
from tests.support.mirror import T0, file, folder, link, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TREE = {
    "d": folder(),
    "d/a": file("aaaa", mode=0o640),
    "d/b": file("bbbb"),
    "d/e": folder(),
    "d/e/x": file("xxxx"),
    "d/e/y": file("yyyy"),
    "f": file("ffff"),
    "l": link("d/a"),
}
DIGEST_A = TREE["d/a"].entry.digest[:12]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Mirrored]]:
    made: list[Mirrored] = []

    def build(tree: Any = TREE, policy: str = "repair") -> Mirrored:
        made.append(Mirrored(tmp_path / str(len(made)), tree, policy))
        return made[-1]

    yield build
    for each in made:
        each.close()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)
    path.chmod(0o700)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/\x1b[31mpasswd")


# evidence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "found", "text"),
    [
        (
            lambda path: path.write_text("AAAAA"),
            {"kind": "file", "mode": "0640", "size": 5, "digest": file("AAAAA").entry.digest[:12]},
            f"file 0640 of 5 bytes ({file('AAAAA').entry.digest[:12]}) found",
        ),
        (lambda path: path.unlink(), {"kind": "nothing"}, "nothing found"),
        (replace_by_directory, {"kind": "dir", "mode": "0700"}, "dir 0700 found"),
        (replace_by_fifo, {"kind": "special", "mode": "0600"}, "special 0600 found"),
        (
            replace_by_link,
            {"kind": "symlink", "target": r"/etc/\x1b[31mpasswd"},
            r"symlink to /etc/\x1b[31mpasswd found",
        ),
    ],
)
@pytest.mark.fault("L3 P3")
def test_a_drift_is_told_with_what_was_expected_and_what_was_found(
    make: Callable[..., Mirrored], spoil: Callable[[Path], None], found: dict[str, Any], text: str
) -> None:
    """A mirror's file is rewritten, removed, or becomes a directory, a fifo or a symlink with an escape sequence.

    Under each policy log and problem tell both sides, safe in a terminal; nothing special is opened.
    """
    expected = {"kind": "file", "mode": "0640", "size": 4, "digest": DIGEST_A}
    for policy in ("repair", "report", "keep"):
        kept = make(policy=policy)
        spoil(kept.root / "d/a")
        _, lines = kept.check()
        assert [(line["path"], line["policy"], line["expected"], line["found"]) for line in lines] == [
            ("d/a", policy, expected, found)
        ]
        sentence = ("drift", f"file 0640 of 4 bytes ({DIGEST_A}) expected, {text}")
        assert kept.problems() == ({"d/a": sentence} if policy == "report" else {})
        assert ("d/a" in kept.drift.held) == (policy != "repair")
        assert ("d/a" in kept.differences()) == (policy == "repair")


def test_evidence_of_what_is_known_by_another_digest_and_of_one_byte() -> None:
    entry = Entry(Kind.FILE, 0o4755, 0, 1, sha256="12" * 32)
    assert told(evidence(entry)) == "file 4755 of 1 byte (121212121212)"
    unread = Disk(Kind.FILE, 0o600, Stat(7, 1, 2, 3))
    assert evidence(None, unread) == {"kind": "file", "mode": "0600", "size": 7}


@pytest.mark.parametrize("policy", ["repair", "report", "keep"])
def test_what_still_has_its_content_is_no_drift(make: Callable[..., Mirrored], policy: str) -> None:
    """A changed mode or time is set right by the next plan, under every policy."""
    kept = make(policy=policy)
    (kept.root / "d/a").chmod(0o666)
    os.utime(kept.root / "f", ns=(T0, T0))
    (kept.root / "d/e").chmod(0o700)
    assert kept.check() == (None, [])
    assert (kept.differences(), kept.problems()) == ({"d/a", "f", "d/e"}, {})


@pytest.mark.parametrize("policy", ["report", "keep"])
def test_what_is_held_is_told_once_and_let_go_when_it_is_mended(make: Callable[..., Mirrored], policy: str) -> None:
    """The log has one line for each new state of a path; a problem lasts as long as the state."""
    kept = make(policy=policy)
    (kept.root / "f").write_text("FFFF")
    assert len(kept.check()[1]) == 1
    before = kept.problems()
    for _ in range(2):
        assert kept.check() == (None, [])
        assert (kept.problems(), set(kept.drift.held)) == (before, {"f"})
    (kept.root / "f").write_text("FF")
    assert len(kept.check()[1]) == 1
    (kept.root / "f").write_text("ffff")
    assert kept.check() == (None, [])
    assert (kept.problems(), kept.drift.held) == ({}, {})
    assert kept.differences() == {"f"}  # its time


@pytest.mark.fault("S3")
@pytest.mark.parametrize("policy", ["repair", "report"])
def test_a_directory_that_may_not_be_searched_hides_nothing_and_loses_nothing(policy: str) -> None:
    """A directory of the mirror gets mode 0, and a process without privileges checks for drift.

    What is below is unknown, not gone: a problem each, and only the directory itself differs.
    """
    with nobodys() as tmp:
        said = as_nobody(
            """
kept = Mirrored(Path(sys.argv[1]), TREE, sys.argv[2])
(kept.root / "d/e").chmod(0)
for paths in (None, ["d/e/x", "d/e/y"], ["d/e"]):
    kept.check(paths)
    assert sorted(kept.problems()) == ["d/e/x", "d/e/y"], kept.problems()
    assert kept.differences() == {"d/e"}, kept.differences()
assert kept.drift.suspects(["d/e/x"]) == set()
(kept.root / "d/e").chmod(0o755)
assert kept.drift.check(["d/e/x", "d/e/y", "d/e"]) == {"d/e"}
print(kept.problems(), kept.drift.held, kept.differences())
(kept.root / "d/e").chmod(0)
kept.check()
(kept.root / "d/e").chmod(0o755)
(kept.root / "d/e/x").unlink()
kept.drift.check()
print(kept.problems().get("d/e/x", ("", ""))[1] or "d/e/x" in kept.differences())
""",
            tmp,
            policy,
        )
    gone = f"file 0644 of 4 bytes ({TREE['d/e/x'].entry.digest[:12]}) expected, nothing found"
    assert said == "{} {} set()\n" + ("True" if policy == "repair" else gone)


# some paths ----------------------------------------------------------------------------------------------------------


def test_only_the_named_paths_are_looked_at(make: Callable[..., Mirrored]) -> None:
    """What they touch is returned; what somebody changed elsewhere waits for its own hint."""
    kept = make()
    (kept.root / "d/a").write_text("AAAA")
    (kept.root / "f").write_text("FFFF")
    found, lines = kept.check(["d/a"])
    assert (found, [line["path"] for line in lines]) == ({"d/a"}, ["d/a"])
    assert kept.differences() == {"d/a"}
    assert kept.check(["d/a", "d/b", "l"]) == (set(), [])
    assert kept.check(["f"])[0] == {"f"}


def test_a_change_within_a_directory_touches_its_time(make: Callable[..., Mirrored]) -> None:
    """A file that came or went at a known path brings the directory's own row along."""
    kept = make()
    (kept.root / "d/b").unlink()
    assert kept.check(["d/b"])[0] == {"d/b", "d"}
    assert kept.differences() == {"d/b", "d"}


def move_away(root: Path) -> None:
    (root / "d/e").rename(root / "elsewhere")


def put_another_there(root: Path) -> None:
    move_away(root)
    (root / "d/e").mkdir()
    (root / "d/e/x").write_text("xxxx")
    os.utime(root / "d/e/x", ns=(T0 + 1, T0 + 1))


def put_a_file_there(root: Path) -> None:
    move_away(root)
    (root / "d/e").write_text("file")


@pytest.mark.parametrize(
    ("spoil", "drifted"),
    [
        (move_away, {"d/e", "d/e/x", "d/e/y"}),
        (put_another_there, {"d/e/y"}),
        (put_a_file_there, {"d/e", "d/e/x", "d/e/y"}),
    ],
)
def test_a_hint_for_a_directory_means_all_below_where_it_is_another_one(
    make: Callable[..., Mirrored], spoil: Callable[[Path], None], drifted: set[str]
) -> None:
    """The kernel names a directory that is moved, not what it holds."""
    kept = make()
    spoil(kept.root)
    found, lines = kept.check(["d/e", "d/e/x", "elsewhere"])
    assert sorted(line["path"] for line in lines) == sorted(drifted)
    assert found is not None
    assert drifted <= found
    once = kept.differences()
    kept.check()
    assert kept.differences() == once


def test_hints_that_cannot_be_paths_of_ours_are_nothing(make: Callable[..., Mirrored]) -> None:
    kept = make()
    odd = ["", "..", "../x", "/etc/passwd", ".syncd/lock", "a" * 300, "unknown", "d/unknown", "\udcff"]
    assert kept.check(odd) == (set(), [])
    assert kept.drift.suspects(odd) == set()


def test_too_much_to_name_is_everything(make: Callable[..., Mirrored], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = make()
    monkeypatch.setattr(drift_module, "MAX_TOUCHED", 3)
    (kept.root / "d").rename(kept.root / "gone")
    found, lines = kept.check(["d"])
    assert (found, len(lines)) == (None, 6)
    assert kept.differences() == {path for path in TREE if path.startswith("d")}


@pytest.mark.parametrize("policy", ["report", "keep"])
def test_a_hinted_path_that_is_held_is_told_again_only_if_it_changed(
    make: Callable[..., Mirrored], policy: str
) -> None:
    """A problem that is over is over at the next hint, not only at the next full check."""
    kept = make(policy=policy)
    (kept.root / "f").write_text("FFFF")
    assert [line["path"] for line in kept.check(["f"])[1]] == ["f"]
    before = kept.problems()
    assert kept.check(["f", "d/a"]) == (set(), [])
    assert (kept.problems(), set(kept.drift.held)) == (before, {"f"})
    (kept.root / "f").write_text("ffff")
    os.utime(kept.root / "f", ns=(T0 + 1, T0 + 1))
    assert kept.check(["f"]) == ({"f"}, [])
    assert (kept.problems(), kept.drift.held, kept.differences()) == ({}, {}, set())


# suspects ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "path", "expected"),
    [
        (lambda _: None, "f", False),  # what syncd just placed
        (lambda root: (root / "f").write_text("FFFF"), "f", True),
        (lambda root: (root / "f").chmod(0o600), "f", True),
        (lambda root: (root / "f").unlink(), "f", True),
        (lambda root: (root / "d/stranger").write_text("x"), "d/stranger", False),
        (lambda root: (root / "d/stranger").write_text("x"), "d", False),  # its time only
        (lambda root: (root / "d").chmod(0o700), "d", True),
        (move_away, "d/e", True),
        (put_another_there, "d/e", True),
        (lambda root: (root / "l").unlink(), "l", True),
    ],
)
def test_suspects_are_what_is_not_as_syncd_left_it(
    make: Callable[..., Mirrored], spoil: Callable[[Path], None], path: str, expected: bool
) -> None:
    """Nothing is read and nothing is changed."""
    kept = make()
    spoil(kept.root)
    rows = list(kept.index.iter_local())
    assert kept.drift.suspects([path]) == ({path} if expected else set())
    assert list(kept.index.iter_local()) == rows


def test_what_is_held_is_no_suspect_until_it_changes_again(make: Callable[..., Mirrored]) -> None:
    kept = make(policy="report")
    (kept.root / "f").write_text("FFFF")
    (kept.root / "d/b").unlink()
    kept.check()
    assert kept.drift.suspects(["f", "d/b"]) == set()
    (kept.root / "f").write_text("FF")
    (kept.root / "d/b").write_text("back")
    assert kept.drift.suspects(["f", "d/b"]) == {"f", "d/b"}


# the audit -----------------------------------------------------------------------------------------------------------


def test_silent_corruption_is_found_and_repaired(make: Callable[..., Mirrored]) -> None:
    """The quick check is blind to it; the audit changes nothing, the check that follows makes it a difference."""
    kept = make()
    kept.rot("d/b", b"bbBb")
    assert kept.check() == (None, [])
    assert kept.differences() == set()
    assert kept.audit_all() == {"d/b"}
    assert kept.differences() == set()
    found, [line] = kept.check(["d/b"])
    assert (found, kept.differences()) == ({"d/b"}, {"d/b"})
    assert (line["event"], line["expected"]["digest"], line["found"]["digest"]) == (
        "silent_corruption",
        TREE["d/b"].entry.digest[:12],
        file("bbBb").entry.digest[:12],
    )
    row = kept.index.local("d/b")
    assert row is not None
    kept.keeper.index["d/b"] = (row.entry, row.stat)
    kept.go(TREE)
    assert (kept.root / "d/b").read_bytes() == b"bbbb"
    assert (kept.audit_all(), kept.check()) == (set(), (None, []))


@pytest.mark.parametrize("policy", ["report", "keep"])
def test_silent_corruption_is_held_under_the_other_policies(make: Callable[..., Mirrored], policy: str) -> None:
    """Told once, a problem under report as long as it lasts, gone when the file is written anew."""
    kept = make(policy=policy)
    kept.rot("d/b", b"bbBb")
    kept.audit_all()
    assert len(kept.check()[1]) == 1
    for paths in (None, ["d/b"], None):
        assert kept.check(paths)[1] == []
        assert (set(kept.drift.held), kept.differences()) == ({"d/b"}, set())
        assert {path: code for path, (code, _) in kept.problems().items()} == (
            {"d/b": "drift"} if policy == "report" else {}
        )
        assert kept.audit_all() == {"d/b"}
    assert kept.drift.suspects(["d/b"]) == set()
    kept.go(TREE | {"d/b": file("new")})
    assert kept.check(["d/b"]) == (set(), [])
    assert (kept.problems(), kept.drift.held) == ({}, {})


def test_a_file_known_by_another_digest_only_is_audited_by_that(make: Callable[..., Mirrored]) -> None:
    """An object of another client has a SHA-256; what has no digest at all cannot be judged."""
    kept = make()
    for path, data in (("d/a", b"AAAA"), ("d/b", b"bbbb"), ("f", b"FFFF")):
        row = kept.index.local(path)
        assert row is not None
        _, sha256, _ = kept.mirror.read_digests(path)
        entry = row.entry._replace(digest="", sha256="" if path == "f" else sha256)
        kept.index.put_local([row._replace(entry=entry)])
        kept.rot(path, data)
    assert kept.audit_all() == {"d/a"}
    kept.check()
    row = kept.index.local("d/a")
    assert row is not None
    assert (row.entry.digest, row.entry.sha256) == ("", kept.mirror.read_digests("d/a")[1])


def test_in_a_release_the_audit_sees_what_the_quick_check_cannot(make: Callable[..., Mirrored]) -> None:
    """Releases share files, so the index knows no change times there: a time that is set back hides an edit."""
    kept = make()
    rows = list(kept.index.iter_local())
    kept.index.put_local(row._replace(stat=row.stat._replace(ctime_ns=0)) for row in rows)
    assert kept.audit_all() == set()
    (kept.root / "f").write_text("FFFF")
    assert kept.audit_all() == {"f"}
    assert kept.drift._findings == {}  # its modification time tells
    os.utime(kept.root / "f", ns=(T0 + 1, T0 + 1))
    assert kept.audit_all() == {"f"}
    assert list(kept.drift._findings) == ["f"]


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("other"), lambda path: path.unlink(), replace_by_fifo])
def test_what_the_quick_check_sees_is_left_to_it(make: Callable[..., Mirrored], spoil: Callable[[Path], None]) -> None:
    """The audit names the path and judges nothing."""
    kept = make()
    spoil(kept.root / "f")
    assert kept.audit_all() == {"f"}
    found, [line] = kept.check(["f"])
    assert (found, line["event"]) == ({"f"}, "drift")


def test_the_audit_keeps_to_its_budget_and_its_place(make: Callable[..., Mirrored]) -> None:
    """A large file is read over several slices; a restart goes on with the file after the last one that was read."""
    big = os.urandom(3 * BLOCK + 5)
    tree = {"a": file("a"), "big": file(big), "c": file("c"), "d": folder(), "d/z": file("z")}
    kept = make(tree)
    read: list[str] = []

    def slices(budget: int, stop: str) -> int:
        for count in range(1, 100):
            done = kept.drift.audit(budget)
            read.extend(done.sound)
            assert done.cost < budget + BLOCK + FILE_COST
            if done.wrapped or stop in read:
                return count
        raise AssertionError

    assert slices(FILE_COST, "big") >= 5
    assert read[:2] == ["a", "big"]
    kept.restart()
    slices(FILE_COST, "")
    assert read == ["a", "big", "c", "d/z"]
    slices(1 << 30, "")
    assert read[4:] == ["a", "big", "c", "d/z"]
    kept.restart()
    kept.rot("big", big[:-1] + bytes([big[-1] ^ 1]))  # the last byte
    assert kept.audit_all(BLOCK // 3) == {"big"}


def test_a_file_that_is_written_anew_while_it_is_audited_is_not_mixed_up(make: Callable[..., Mirrored]) -> None:
    """Half of the old one and half of the new one are no finding, in either order of rename and index."""
    kept = make({"big": file(os.urandom(3 * BLOCK))})
    done = kept.drift.audit(BLOCK)
    assert (done.sound, done.found) == ([], set())
    kept.go({"big": file(os.urandom(3 * BLOCK))})
    assert kept.audit_all() == {"big"}  # the quick check is to look at it
    assert kept.check(["big"]) == (set(), [])
    assert kept.audit_all() == set()


def test_a_file_that_is_written_to_while_it_is_audited_is_no_finding(
    make: Callable[..., Mirrored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of one slice, and between two: then nothing more of it is read."""
    kept = make({"big": file(os.urandom(3 * BLOCK))})
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if offset == BLOCK:
            with (kept.root / "big").open("r+b") as opened:
                opened.seek(2 * BLOCK)
                opened.write(b"meanwhile")
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(reread.os, "preadv", preadv)
        done = kept.drift.audit(1 << 30)
    assert (done.changed, done.findings) == (["big"], [])
    kept.check()
    assert kept.drift.audit(BLOCK).cost >= BLOCK
    (kept.root / "big").write_bytes(os.urandom(3 * BLOCK))
    done = kept.drift.audit(1 << 30)
    assert (done.changed, done.findings, done.cost) == (["big"], [], 0)


@pytest.mark.parametrize(
    ("number", "code", "repaired"),
    [
        (errno.EIO, "", True),
        (errno.ESTALE, "unreadable", False),
        (errno.EACCES, "", False),
        (errno.EMFILE, "", False),
    ],
)
@pytest.mark.fault("X2")
def test_a_file_that_cannot_be_read_is_its_own_problem(
    make: Callable[..., Mirrored], monkeypatch: pytest.MonkeyPatch, number: int, code: str, repaired: bool
) -> None:
    """`os.preadv` is made to fail for one file in an audit: EIO, ESTALE, EACCES or EMFILE.

    EIO is repaired, ESTALE is a problem of the path; the other two are nothing. Readable again, it is over.
    """
    kept = make()
    real = os.preadv
    wrong = (kept.root / "d/b").stat().st_ino

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino == wrong:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(reread.os, "preadv", preadv)
        seen = [path for _ in range(3) for path in sorted(kept.drift.audit(1 << 30).found)]
    assert set(seen) == ({"d/b"} if code or repaired else set())
    for paths in (["d/b"], None):
        kept.check(paths)
        assert {path: told for path, (told, _) in kept.problems().items()} == ({"d/b": code} if code else {})
    assert kept.differences() == ({"d/b"} if repaired else set())
    if number != errno.EIO:
        assert kept.audit_all() == set()  # readable again: over, also where it stopped
        kept.check()
        assert kept.problems() == {}


def test_findings_are_bounded_and_forgotten_with_their_paths(
    make: Callable[..., Mirrored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough is enough; what is gone from the index does not fill the list for ever."""
    kept = make(policy="report")
    monkeypatch.setattr(drift_module, "MAX_FINDINGS", 2)
    for path in ("d/a", "d/b", "f"):
        kept.rot(path, b"????")
    small = ROW_COST + FILE_COST
    for _ in range(20):
        kept.drift.audit(small)
    assert sorted(kept.drift._findings) == ["d/a", "d/b"]
    monkeypatch.setattr(drift_module, "MAX_FINDINGS", 100)
    kept.index.drop_local(["d/a", "d/b"])
    kept.audit_all()
    assert sorted(kept.drift._findings) == ["f"]


async def test_the_audit_keeps_to_its_rate_and_rests_after_a_pass(make: Callable[..., Mirrored]) -> None:
    """Bytes per second over any time, a pass an hour for a small mirror, and no end because of an error."""
    kept = make({f"f{number}": file(os.urandom(300_000)) for number in range(8)})
    kept.rot("f3", bytes(300_000))
    clock, cost, told_of = 0.0, 0, set()
    passes: list[float] = []
    rate = 100_000

    class Enough(Exception):
        pass

    async def sleep(seconds: float) -> None:
        nonlocal clock
        assert seconds >= 0
        clock += seconds

    async def run(function: Callable[[], Audited]) -> Audited:
        nonlocal cost
        done = function()
        assert cost <= rate * clock + 1
        cost += done.cost
        if done.wrapped:
            passes.append(clock)
            if len(passes) == 2:
                raise DiskProblem("the index is in trouble")
            if len(passes) == 3:
                raise Enough
        return done

    with pytest.raises(Enough):
        await keep_auditing(kept.drift, run, told_of.update, rate=rate, sleep=sleep, now=lambda: clock)
    assert told_of == {"f3"}
    assert 20 < passes[0] < 60  # 2.4 MB
    assert 3600 <= passes[1] < 3660
    assert 3600 < passes[2] < 3720
    assert cost >= 3 * 8 * 300_000


# after a crash -------------------------------------------------------------------------------------------------------


NEXT = {
    "d": TREE["d"],
    "d/a": file("AAAA"),
    "d/e": file("was a directory"),
    "f": file("ffff", mode=0o600),
    "n": folder(),
    "n/link": link("new"),
    "n/new": file("new"),
}
"""One file changed, one of another mode, a directory that becomes a file, two paths gone, and three more."""


def cut_off(kept: Mirrored, tree: Any = NEXT, *, before: bool = False) -> None:
    """Die once a commit is done and before it is in the index, or just before the commit; start again."""
    plan = kept.keeper.plan(tree)
    kept.drift.expect(plan)
    if not before:
        assert kept.mirror.commit(plan, drift="repair").problems == []
    kept.index.drop_remote(kept.tree.keys() - tree.keys())
    kept.index.put_remote(kept.remote(path, node) for path, node in tree.items())
    kept.restart()


def rows_of(kept: Mirrored) -> dict[str, Entry]:
    """What the index has of each path; a second digest of the same content tells nothing more."""
    return {row.path: row.entry._replace(sha256="") for row in kept.index.iter_local()}


@pytest.mark.fault("C1")
def test_what_a_commit_did_before_the_crash_is_ours_at_the_next_start(make: Callable[..., Mirrored]) -> None:
    """A commit is done and all that would follow left out, as by a kill before the index is written; then a new start.

    What is there and what is gone is taken in, and told to nobody.
    """
    kept = make()
    cut_off(kept)
    kept.drift.settle()
    assert rows_of(kept).keys() == NEXT.keys()
    assert rows_of(kept)["f"].mode == 0o600
    assert kept.check() == (None, [])
    assert kept.differences() == set()
    # Deleted upstream before that start, it goes: without the note it would be a stranger's, and stay for ever.
    kept.index.drop_remote(["n", "n/new", "n/link"])
    assert kept.differences() == {"n", "n/new", "n/link"}


@pytest.mark.fault("C1")
def test_a_commit_that_never_came_to_be_leaves_the_index_as_it_was(make: Callable[..., Mirrored]) -> None:
    """A note of what is to come is written and its commit left out, as by a kill between them; then a new start.

    What was to go is still there, and still ours.
    """
    kept = make()
    before = rows_of(kept)
    cut_off(kept, before=True)
    kept.drift.settle()
    assert rows_of(kept) == before
    assert kept.check() == (None, [])
    assert kept.differences() >= {"d/a", "d/b", "l", "n", "n/new", "n/link"}


@pytest.mark.fault("C1")
def test_what_somebody_did_between_the_crash_and_the_start_is_drift(make: Callable[..., Mirrored]) -> None:
    """A commit is done and not in the index, as by a kill; files of it are then removed, edited and replaced.

    The next start takes in what the commit did, and what others did is drift.
    """
    kept = make()
    cut_off(kept)
    before = rows_of(kept)
    (kept.root / "d/a").unlink()
    (kept.root / "n/new").write_text("NEW")
    (kept.root / "n/link").unlink()
    (kept.root / "n/link").symlink_to("elsewhere")
    kept.drift.settle()
    after = rows_of(kept)
    assert after.keys() == before.keys() - {"d/b", "d/e/x", "d/e/y", "l"} | {"n"}
    assert after["d/a"] == before["d/a"]
    assert [line["path"] for line in kept.check()[1]] == ["d/a"]
    assert kept.differences() >= {"d/a", "n/new", "n/link"}


def test_nothing_is_read_where_another_kind_of_thing_was_put(
    make: Callable[..., Mirrored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of any size in the place of a link: a start does not read it to know that it is none of ours."""
    kept = make()
    cut_off(kept)
    for path in ("n/link", "n/new"):
        (kept.root / path).unlink()
    (kept.root / "n/link").write_text("large")
    (kept.root / "n/new").mkdir()
    read: list[str] = []
    real = kept.mirror.read_digests

    def spy(path: str) -> tuple[str, str, Stat]:
        read.append(path)
        return real(path)

    monkeypatch.setattr(kept.mirror, "read_digests", spy)
    kept.drift.settle()
    assert set(read) == {"d/a", "d/e", "f"}
    assert not {"n/link", "n/new"} & rows_of(kept).keys()


@pytest.mark.fault("P6")
def test_a_note_of_an_older_version_may_name_what_no_path_is(make: Callable[..., Mirrored]) -> None:
    """`../x`, `.syncd/lock`, `a//b` and an empty name are put into the note of an unfinished commit.

    The next start passes over them, and takes in the rest.
    """
    kept = make()
    cut_off(kept)
    lines = json.loads(kept.index.note(drift_module.IN_FLIGHT))
    odd = [[path, None] for path in (".syncd/lock", "../x", "", "a//b", "d/.syncd")]
    kept.index.set_note(drift_module.IN_FLIGHT, json.dumps(odd + lines))
    kept.drift.settle()
    assert rows_of(kept).keys() == NEXT.keys()


def test_what_was_settled_is_settled_once(make: Callable[..., Mirrored]) -> None:
    """The note is gone with what it told: a later start does not take a stranger's file for what once was ours."""
    kept = make()
    cut_off(kept)
    kept.drift.settle()
    kept.restart()
    kept.index.drop_local(["n/new"])
    kept.drift.settle()
    assert "n/new" not in rows_of(kept)
    assert kept.index.note(drift_module.IN_FLIGHT) == ""


def test_the_note_tells_of_what_is_not_remembered_yet_and_of_nothing_else(make: Callable[..., Mirrored]) -> None:
    """Several commits may be on their way to one transaction; what was remembered does not make the note grow."""
    kept = make()

    def noted() -> set[str]:
        return {path for path, _ in json.loads(kept.index.note(drift_module.IN_FLIGHT) or "[]")}

    for path, known in (("one", {"one"}), ("two", {"one", "two"})):
        kept.drift.expect(kept.keeper.plan(TREE | {path: file(path)}))
        assert noted() == known
    kept.drift.remembered()
    assert noted() == set()
    kept.drift.expect(kept.keeper.plan(TREE | {"three": file("three")}))
    assert noted() == {"three"}


@pytest.mark.fault("C1 S3")
def test_a_directory_that_may_not_be_searched_does_not_keep_a_start_from_settling() -> None:
    """A commit is done and not in the index, as by a kill; then a directory of it gets mode 0, without privileges.

    What is below is unknown, everything else is taken in, and later all of it fits.
    """
    with nobodys() as tmp:
        said = as_nobody(
            """
from tests.unit.test_drift import cut_off, rows_of
kept = Mirrored(Path(sys.argv[1]), TREE)
cut_off(kept, {path: node for path, node in TREE.items() if path != "d/b"} | {"d/e/x": file("X"), "f": file("F")})
(kept.root / "d/e").chmod(0)
kept.drift.settle()
rows = rows_of(kept)
print(rows["f"].size, rows["d/e/x"].size, "d/b" in rows)
(kept.root / "d/e").chmod(0o755)
kept.check()
print(kept.differences())
""",
            tmp,
        )
    assert said == "1 4 False\nset()"


def test_another_device_number_is_no_change(make: Callable[..., Mirrored], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows have the one that the disk had before the machine started again: nothing is read, nothing is found."""
    kept = make()
    kept.index.put_local(row._replace(stat=row.stat._replace(dev=row.stat.dev + 1)) for row in kept.index.iter_local())
    read: list[str] = []
    monkeypatch.setattr(kept.mirror, "read_digests", lambda path, **_: read.append(path))
    assert kept.drift.suspects(TREE) == set()
    assert kept.check() == (None, [])
    assert kept.check(TREE) == (set(), [])
    assert kept.audit_all() == set()
    assert (read, kept.differences()) == ([], set())


# bookkeeping ---------------------------------------------------------------------------------------------------------


def test_a_check_of_an_untouched_mirror_changes_nothing(make: Callable[..., Mirrored]) -> None:
    kept = make()
    before = snapshot(kept.root), list(kept.index.iter_local())
    assert kept.check() == (None, [])
    assert kept.check(TREE) == (set(), [])
    assert kept.audit_all() == set()
    assert (snapshot(kept.root), list(kept.index.iter_local())) == before


def test_a_check_that_is_to_stop_stops(make: Callable[..., Mirrored]) -> None:
    kept = make()
    (kept.root / "f").unlink()
    kept.drift.stopping = True
    assert kept.check() == (None, [])
    assert kept.check(["f"]) == (set(), [])


def test_the_check_works_on_a_half_of_its_own(tmp_path: Path) -> None:
    """The constructor takes what the subscriber has, and nothing is looked at before it is asked for."""
    kept = Mirrored(tmp_path, {})
    assert isinstance(kept.drift, DriftCheck)
    assert (kept.drift.held, kept.drift.problems.all()) == ({}, [])
    kept.close()
