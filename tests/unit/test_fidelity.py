"""What a tree looks like on the other side: its times, names that look alike or like ours, and what stays behind."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import ObjectCorrupt
from syncd.outlet import PublishOptions
from syncd.paths import subject_token
from syncd.publisher import Publisher
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support import generations
from tests.support.generations import Forge, expected, folder, found
from tests.support.store import raw_meta
from tests.support.trees import difference, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.nodes import Child
    from syncd.outlet import PushResult
    from syncd.upstream import PullResult

T0 = 1_700_000_000_000_000_000
SECOND = 1_000_000_000


class Pair:
    """A source and a mirror of it on the memory twin.

    :param how: "objects", or a mode of a mirror of generations.
    """

    def __init__(self, tmp: Path, how: str, below: Path | None = None) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.how = how
        self.layout: Any = "objects" if how == "objects" else "generations"
        self.rollout = RolloutOptions(mode="release" if how == "release" else "mirror")
        self.source = (below or tmp) / "source"
        self.source.mkdir()
        self.mirror = (below or tmp) / "mirror"

    @property
    def tree(self) -> Path:
        """Where readers look."""
        return self.mirror / "current" if self.how == "release" else self.mirror

    async def push(self) -> PushResult:
        options = PublishOptions(
            "app",
            self.source,
            Rules(),
            "here:/source",
            layout=self.layout,
            bucket=BucketSpec(layout=self.layout),
            symlinks="all",
        )
        status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
        publisher = Publisher(options, self.store, self.tmp / "publish.db", status=status)
        return await publisher.push(allow_delete=True)

    async def pull(self) -> PullResult:
        options = SubscribeOptions("app", self.mirror, Rules(), rollout=self.rollout)
        status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
        index = self.tmp / "state" / "index.db"
        index.parent.mkdir(exist_ok=True)
        return await Subscriber(options, self.store, index, status=status).pull(allow_delete=True)

    async def go(self) -> tuple[PushResult, PullResult]:
        """Bring the mirror up to the source; they are equal, and nobody complains."""
        pushed, pulled = await self.push(), await self.pull()
        assert (pushed.problems, pushed.again, pulled.problems) == ([], set(), [])
        assert difference(self.source, self.tree) == {}
        return pushed, pulled

    async def rests(self) -> None:
        """A further round has nothing to do on either side."""
        pushed, pulled = await self.go()
        assert (pushed.puts, pushed.deletes, pushed.committed) == (0, 0, False)
        assert (pulled.placed, pulled.removed, pulled.drifted) == (0, 0, 0)


@pytest.fixture(params=["objects", "generations", "release"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(tmp_path, request.param)


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(directory: Path) -> set[str]:
    """What a directory holds, without our own."""
    return {path.name for path in directory.iterdir()} - {".syncd"}


def run(*command: str | Path) -> None:
    """Run a program of the system that may not be possible here."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")


def image(directory: Path, *options: str) -> Path:
    """A small ext2 filesystem in a file."""
    file = directory / "image"
    with file.open("wb") as data:
        data.truncate(16 << 20)
    run("mke2fs", "-q", "-F", *options, file)
    return file


@contextmanager
def mounted(where: Path, *what: str | Path) -> Iterator[Path]:
    """A filesystem of our own; the test is skipped where this process may not mount."""
    where.mkdir()
    run("mount", *what, where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


# -- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("M3")
async def test_directories_keep_their_times_whatever_happens_in_them(pair: Pair) -> None:
    """In nested directories files are written, added, removed, renamed and turned into links, and times set back.

    After each step the mirror's directories have the source's times, and a further round has nothing to do.
    """
    inner = pair.source / "a/b/c"
    for name in ("changed", "gone", "kind", "sub/x", "sub/y"):
        write(inner / name)
    directories = [inner / "sub", inner, inner.parent, inner.parent.parent]

    def settle() -> None:
        for number, directory in enumerate(each for each in directories if each.exists()):
            os.utime(directory, ns=(0, T0 + number * SECOND + number))

    def nothing() -> None:
        """Only times change."""
        for number, directory in enumerate(directories):
            os.utime(directory, ns=(0, T0 - number * SECOND))

    def within() -> None:
        write(inner / "changed", "longer")
        write(inner / "new")
        (inner / "gone").unlink()
        (inner / "kind").unlink()
        (inner / "kind").symlink_to("new")
        (inner / "sub/x").rename(inner / "sub/z")
        settle()

    def away() -> None:
        for path in (inner / "sub").iterdir():
            path.unlink()
        (inner / "sub").rmdir()
        settle()

    settle()
    await pair.go()
    for step in (within, nothing, settle, away):
        step()
        await pair.go()
        await pair.rests()


TIMES = {
    "before 1901": -(1 << 31) * SECOND - 1,
    "the first of 32 bits": -(1 << 31) * SECOND,
    "before 1970": -5 * SECOND - 1,
    "a nanosecond before 1970": -1,
    "1970": 0,
    "a nanosecond after 1970": 1,
    "all digits": 1_234_567_890_123_456_789,
    "the last nanosecond of a second": T0 + 999_999_999,
    "the last of 32 bits": ((1 << 31) - 1) * SECOND + 999_999_999,
    "2038": (1 << 31) * SECOND,
    "2106": (1 << 32) * SECOND + 1,
    "2262": (1 << 63) - 1,
}


@pytest.mark.fault("M5")
async def test_times_of_any_age_arrive_to_the_nanosecond(pair: Pair) -> None:
    """Files, directories and symlinks are given times from before 1901 to 2262, to the nanosecond.

    They arrive as they are, as far as this filesystem has them itself, and a further round has nothing to do.
    """
    kept = set()
    for name, when in TIMES.items():
        write(pair.source / name / "file", name)
        (pair.source / name / "link").symlink_to("file")
        for path in ("file", "link", "."):
            os.utime(pair.source / name / path, ns=(0, when), follow_symlinks=False)
        if (pair.source / name).stat().st_mtime_ns == when:
            kept.add(name)
    assert kept >= TIMES.keys() - {"before 1901", "2106", "2262"}
    await pair.go()
    seen = snapshot(pair.tree)
    for name in kept:
        assert {seen[f"{name}{below}"][2] for below in ("", "/file", "/link")} == {TIMES[name]}
    await pair.rests()


NEAREST = {
    -(1 << 63): -(1 << 31) * SECOND,
    -SECOND - 1: -2 * SECOND,
    T0 + 999_999_999: T0,
    (1 << 31) * SECOND: ((1 << 31) - 1) * SECOND,
    (1 << 63) - 1: ((1 << 31) - 1) * SECOND,
}
"""What a filesystem with 32 bits of whole seconds makes of times."""


@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.fault("M5")
async def test_a_filesystem_with_coarse_times_has_the_nearest_there_are(tmp_path: Path, mode: str) -> None:
    """The mirror lies on a mounted ext2 of 32-bit whole seconds; times are finer, before 1901 and after 2038.

    The nearest ones are set; that is no drift, and the next round places nothing.
    """
    tree = {
        f"d{number}": folder(
            {"f": generations.file("f", mtime_ns=when), "l": generations.link("f", mtime_ns=when)}, mtime_ns=when
        )
        for number, when in enumerate(NEAREST)
    }
    with mounted(tmp_path / "disk", "-o", "loop", image(tmp_path, "-I", "128")) as disk:
        pair = Pair(tmp_path, mode)
        pair.mirror = disk / "mirror"
        await generations.Publisher(pair.store).commit(tree)
        for _ in range(2):
            pulled = await pair.pull()
            assert (pulled.problems, pulled.drifted) == ([], 0)
            seen = snapshot(pair.tree)
            assert seen.keys() == expected(tree).keys()
            for number, when in enumerate(NEAREST.values()):
                assert {seen[f"d{number}{below}"][2] for below in ("", "/f", "/l")} == {when}
        assert pulled.placed == 0


# -- extended attributes -----------------------------------------------------------------------------------------------

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (0x01, 6, 0xFFFFFFFF), (0x02, 4, 65534), (0x04, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 4, 0xFFFFFFFF),
    )
)  # fmt: skip
"""rw for the owner, r for everybody else and for user 65534."""


def mark(path: Path, value: bytes = b"1") -> None:
    """Give a path extended attributes and an access list."""
    try:
        os.setxattr(path, "user.syncd.test", value)
        os.setxattr(path, "system.posix_acl_access", ACL)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        pytest.skip("needs extended attributes here")


async def test_extended_attributes_stay_behind_without_a_word(pair: Pair) -> None:
    """Files and directories of the source get extended attributes and an access list, the mirror's get others.

    The former do not arrive, the latter stay, and neither makes a generation or counts as drift.
    """
    marked = [write(pair.source / "d/file"), pair.source / "d"]
    for path in marked:
        mark(path)
    await pair.go()
    for path in marked:
        there = pair.tree / path.relative_to(pair.source)
        assert os.listxattr(there) == []
        mark(path, b"another")
        os.setxattr(there, "user.of.this.host", b"kept")
    await pair.rests()
    assert os.listxattr(pair.tree / "d/file") == ["user.of.this.host"]


@pytest.mark.parametrize("how", ["objects", "generations", "release"])
@pytest.mark.fault("M4")
async def test_a_filesystem_that_refuses_extended_attributes_is_as_good_as_any(tmp_path: Path, how: str) -> None:
    """Source and mirror lie on a mounted ramfs, which refuses extended attributes.

    Files, modes, links and later changes arrive, and nobody complains.
    """
    with mounted(tmp_path / "disk", "-t", "ramfs", "none") as disk:
        pair = Pair(tmp_path, how, disk)
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(pair.source, "user.syncd.test", b"1")
        write(pair.source / "d/file").chmod(0o640)
        write(pair.source / "d/large", "large" * 200_000)
        (pair.source / "link").symlink_to("d/file")
        await pair.go()
        write(pair.source / "d/file", "changed")
        (pair.source / "d/new").mkdir()
        await pair.go()
        await pair.rests()


@pytest.mark.parametrize("how", ["generations", "release"])
async def test_a_filesystem_that_does_not_tell_its_room_is_not_taken_for_full(tmp_path: Path, how: str) -> None:
    """Source and mirror lie on a mounted ramfs, whose statvfs says that it has no blocks at all.

    The file arrives all the same: writing shows whether there is room.
    """
    with mounted(tmp_path / "disk", "-t", "ramfs", "none") as disk:
        assert os.statvfs(disk).f_blocks == 0
        pair = Pair(tmp_path, how, disk)
        write(pair.source / "f")
        await pair.go()


# -- names that differ in form only ------------------------------------------------------------------------------------

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Ärger é Å ﬁ") for form in ("NFC", "NFD"))
TWINS = [
    (COMPOSED, DECOMPOSED),
    ("\u212b", "\u00c5"),  # Ångström: equal under NFC, two names all the same
    ("readme", "README"),
    ("straße", "STRASSE"),
    ("\u0131", "I"),  # the dotless i of Turkish
]


@pytest.mark.fault("P5")
async def test_twins_that_look_alike_are_two_names(pair: Pair) -> None:
    """Files and directories are made whose names differ in case or Unicode form only; one twin changes or goes.

    Both arrive as two names, and the other one stays as it was.
    """
    for twins in TWINS:
        for name in twins:
            write(pair.source / f"d{name}" / "inner", f"below {name}")
            write(pair.source / name, name)
    await pair.go()
    both = {name for twins in TWINS for name in twins}
    assert names(pair.tree) == both | {f"d{name}" for name in both}
    for one, other in TWINS:
        write(pair.source / other, "changed alone")
        (pair.source / f"d{one}/inner").unlink()
        (pair.source / f"d{one}").rmdir()
    await pair.go()
    for one, other in TWINS:
        assert ((pair.tree / one).read_text(), (pair.tree / f"d{other}/inner").read_text()) == (one, f"below {other}")
        (pair.source / one).unlink()
    await pair.go()
    assert {(pair.tree / other).read_text() for _, other in TWINS} == {"changed alone"}
    await pair.rests()


@pytest.mark.fault("P5")
async def test_a_rename_that_changes_the_form_only_is_a_rename(pair: Pair) -> None:
    """Files and full directories are renamed to names that differ in case or Unicode form only, and back.

    Only the new names are in the mirror, and no content is sent or fetched again.
    """
    for old, _ in TWINS:
        write(pair.source / old, os.urandom(20_000).hex())
        write(pair.source / f"d{old}" / old, os.urandom(20_000).hex())
    await pair.go()
    for renames in (TWINS, [twins[::-1] for twins in TWINS]):
        for old, new in renames:
            (pair.source / old).rename(pair.source / new)
            (pair.source / f"d{old}" / old).rename(pair.source / f"d{old}" / new)
            (pair.source / f"d{old}").rename(pair.source / f"d{new}")
        pushed, pulled = await pair.go()
        assert pushed.uploaded_bytes < 5000  # nodes
        assert pulled.downloaded_bytes < 5000
        assert names(pair.tree) == {name for _, new in renames for name in (new, f"d{new}")}
    await pair.rests()


# -- separators --------------------------------------------------------------------------------------------------------

HARMLESS = [
    "a\\b", "..\\..\\escape", "\\etc\\escape", "C:\\escape", "\\", "\\\\host\\share",
    "..%2f..%2fescape", "%2e%2e%2fescape", "..\u2215escape", "..\uff0fescape", "..\u2044escape", "\uff0e\uff0e",
]  # fmt: skip
"""Names that a decoder too many would take for a way out."""


@pytest.mark.fault("P2")
async def test_what_only_looks_like_a_separator_is_part_of_a_name(pair: Pair) -> None:
    """Names of the source hold backslashes, percent escapes and slashes of other scripts (`..%2f..%2fescape`).

    All arrive as they are, in one directory, and nothing lands elsewhere.
    """
    for name in HARMLESS:
        write(pair.source / name, name)
        write(pair.source / "d" / name, name)
    await pair.go()
    assert names(pair.tree / "d") == set(HARMLESS)
    assert {path.name for path in pair.tmp.rglob("*escape*")} <= {*HARMLESS}
    await pair.rests()


@pytest.mark.parametrize("way", ["escaped slashes", "escaped dots", "all escaped"])
@pytest.mark.fault("P1 P2")
async def test_a_name_is_judged_after_it_was_decoded(tmp_path: Path, way: str) -> None:
    """A metadata message spells `../../escape` in JSON escapes, under its own subject and an innocent one.

    Both are reported and nothing of them is written; a good object beside them arrives.
    """
    pair = Pair(tmp_path, "objects")
    name = "../../escape"
    meta = raw_meta(name, b"evil", "n1", bucket="app")
    escaped = {
        "escaped slashes": name.replace("/", "\\u002f"),
        "escaped dots": name.replace(".", "\\u002e"),
        "all escaped": "".join(f"\\u{ord(char):04x}" for char in name),
    }[way]
    meta = meta.replace(json.dumps(name).encode(), f'"{escaped}"'.encode())
    assert json.loads(meta)["name"] == name
    await pair.store.create_bucket("app", BucketSpec())
    for number, token in enumerate([subject_token(name), subject_token("innocent")]):
        pair.store.write_raw_meta("app", token, meta.replace(b'"n1"', f'"n{number}"'.encode()))
        pair.store.write_raw_chunks("app", f"n{number}", [b"evil"])
    pair.store.write_raw_meta("app", subject_token("good"), raw_meta("good", b"good", "n9", bucket="app"))
    pair.store.write_raw_chunks("app", "n9", [b"good"])
    result = await pair.pull()
    assert {problem.code for problem in result.problems} == {"bad_name", "bad_metadata"}
    assert names(pair.mirror) == {"good"}
    assert not list(tmp_path.parent.rglob("escape"))


def named(new: str, path: str = "f") -> Forge:
    """Give a path of a generation another name."""

    def child(where: str, one: Child) -> Child:
        return one._replace(name=new) if where == path else one

    return Forge(child=child)


@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.parametrize("name", ["../escape", "/escape", "d/escape", "escape/", "d//escape"])
@pytest.mark.fault("P1 P2")
async def test_a_component_with_a_slash_refuses_the_generation(tmp_path: Path, mode: str, name: str) -> None:
    """A directory's node is forged so that a file is called `../escape`, `/escape`, `d/escape` or the like.

    The generation is refused, nothing of it is written, and the next one is applied.
    """
    pair = Pair(tmp_path, mode)
    publisher = generations.Publisher(pair.store)
    tree = {"d": folder({"keep": generations.file("k")}), "f": generations.file("evil")}
    await publisher.commit(tree)
    await pair.pull()
    before = snapshot(pair.tree)
    await publisher.commit(tree | {"n": generations.file("new")}, named(name))
    with pytest.raises(ObjectCorrupt):
        await pair.pull()
    assert snapshot(pair.tree) == before
    assert not list(tmp_path.rglob("*escape*"))
    await publisher.commit(tree, Forge())
    assert (await pair.pull()).generation == 3


# -- names of our own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
@pytest.mark.fault("P6")
async def test_a_generation_that_holds_our_private_directory_is_refused(tmp_path: Path, mode: str, kind: str) -> None:
    """A generation's node is forged to hold `.syncd`: a file, a symlink to /tmp, or a directory with a journal.

    It is refused, and the mirror's tree and private directory stay as they were.
    """
    pair = Pair(tmp_path, mode)
    publisher = generations.Publisher(pair.store)
    tree = {"keep": generations.file("k")}
    await publisher.commit(tree)
    await pair.pull()
    evil = {
        "file": generations.file("evil"),
        "directory": folder({"journal": generations.file("evil"), "stage": folder(), "lock": generations.file("")}),
        "link": generations.link("/tmp"),
    }[kind]
    await publisher.commit(tree | {"zzz": evil}, named(".syncd", "zzz"))
    with pytest.raises(ObjectCorrupt, match=r"\.syncd"):
        await pair.pull()
    assert (pair.mirror / ".syncd").is_dir()
    assert not (pair.mirror / ".syncd").is_symlink()
    assert found(pair.tree) == expected(tree)
    assert {path.name for path in (pair.mirror / ".syncd").rglob("*")} <= {"lock", "stage"}


OURS = [
    "releases/1-0123abcd/f", "current", "journal", "stage/x", "trash/x", "build/1-0123abcd", "lock", "index.db",
    "trust.json", "releases/.1-0123abcd.building/f", "generations/0000000001", "channels/head", "keys/0000000001",
    ".syncd2", ".syncdx/y", "d/.syncd.d/journal", "syncd/stage/x",
]  # fmt: skip
"""Names that we use ourselves elsewhere (in releases, buckets, the state directory), and some that look like ours."""


@pytest.mark.fault("P6")
async def test_names_that_are_ours_elsewhere_are_anybodys(pair: Pair) -> None:
    """The source holds names that syncd uses elsewhere: `current`, `journal`, `channels/head`, `.syncd2` and more.

    All arrive, change and go as any others, and a further round has nothing to do.
    """
    for name in OURS:
        write(pair.source / name, name)
    await pair.go()
    write(pair.source / "channels/head", "changed")
    write(pair.source / "current", "changed")
    (pair.source / "generations/0000000001").unlink()
    await pair.go()
    await pair.rests()


@pytest.mark.parametrize("kind", ["a directory", "a file", "a symlink"])
@pytest.mark.fault("P6")
async def test_a_source_keeps_its_private_directory_to_itself(pair: Pair, kind: str) -> None:
    """The source holds `.syncd`, as a directory with a journal, as a file, or as a symlink to /etc.

    It is not published: the mirror gets the file beside it and nothing else.
    """
    private = pair.source / ".syncd"
    if kind == "a directory":
        write(private / "journal", "secret")
        write(private / "stage/x", "secret")
    elif kind == "a file":
        private.write_text("secret")
    else:
        private.symlink_to("/etc")
    write(pair.source / "f")
    pushed, pulled = await pair.push(), await pair.pull()
    assert (pushed.problems, pulled.problems) == ([], [])
    assert snapshot(pair.tree).keys() == {"f"}
    assert "secret" not in str([path.read_text() for path in pair.mirror.rglob("*") if path.is_file()])


@pytest.mark.parametrize("pair", ["generations", "release"], indirect=True)
@pytest.mark.fault("P6")
async def test_a_mirror_may_be_a_source(pair: Pair, tmp_path: Path) -> None:
    """A mirror, with its own `.syncd` in or above it, is published again and mirrored elsewhere.

    The second mirror equals the first source, after changes, too.
    """
    for name in ("a", "d/b", "current", "releases/x"):
        write(pair.source / name, name)
    await pair.go()
    (tmp_path / "further").mkdir()
    further = Pair(tmp_path / "further", "generations")
    further.source = pair.tree
    await further.go()
    write(pair.source / "d/b", "changed")
    (pair.source / "current").unlink()
    await pair.go()
    await further.go()
    await further.rests()
    assert difference(pair.source, further.mirror) == {}
