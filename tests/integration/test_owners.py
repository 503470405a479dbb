"""Other users of the host: what they own, or have open, in a mirror that syncd keeps as root."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import syncd.mirror.mirror as mirror_module
import syncd.mirror.share as share_module
from syncd.errors import DiskProblem
from syncd.mirror import Mirror
from syncd.mirror.owner import Owner
from syncd.model import Problem
from syncd.modes import ModePolicy
from syncd.outlet import PublishOptions
from syncd.plan import DirMeta, MirrorPlan
from syncd.publisher import Publisher as Outgoing
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support import mirror as small
from tests.support.generations import Publisher, Tree, file, folder, link
from tests.support.stranger import HOLD, REPLACE, UID, WRITE, Stranger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.upstream import PullResult

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root has other users to fear for")

TOOL = "#!/bin/sh\necho a fine tool\n"


class World:
    """A bucket of generations and a mirror of it where other users can reach it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mirror = base / "m"
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.options: dict[str, Any] = {}

    async def publish(self, tree: Tree) -> None:
        await self.publisher.commit(tree)

    async def pull(self) -> PullResult:
        status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
        options = SubscribeOptions("app", self.mirror, Rules(), **self.options)
        return await Subscriber(options, self.store, self.base / "index.db", status=status).pull()

    async def rests(self) -> None:
        """Check that nothing is left to be done or said."""
        result = await self.pull()
        assert (result.placed, result.removed, result.drifted, result.problems) == (0, 0, 0, [])

    def stat(self, path: str) -> tuple[int, str]:
        found = (self.mirror / path).lstat()
        return found.st_uid, f"{stat.S_IMODE(found.st_mode):04o}"


@pytest.fixture
def world() -> Iterator[World]:
    base = Path(tempfile.mkdtemp(prefix="syncd-test-"))
    base.chmod(0o755)
    yield World(base)
    shutil.rmtree(base)


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as other:
        yield other


# files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [None, (0, 0), (4321, 4321)])
@pytest.mark.fault("L3 M1")
async def test_a_twin_that_somebody_planted_never_becomes_ours(
    world: World, stranger: Stranger, owner: tuple[int, int] | None
) -> None:
    """Another user replaces a mirrored set-id file by one of the same content that is his own, and maps it.

    A copy takes its place at the next pull, and what he writes into his is lost.
    """
    world.options["owner"] = owner
    await world.publish({"shared": folder({"tool": file(TOOL, mode=0o4755)}, mode=0o777)})
    await world.pull()
    tool = world.mirror / "shared/tool"
    assert stranger.does(REPLACE, path=tool) == ""
    result = await world.pull()
    assert (result.drifted, result.problems) == (1, [])
    assert stranger.does(WRITE) == ""
    assert tool.read_text() == TOOL
    assert world.stat("shared/tool") == ((owner or (0, 0))[0], "4755")
    assert result.downloaded_bytes < len(TOOL) + 500  # the nodes at most: what he left there is copied
    await world.rests()


@pytest.mark.parametrize("mode", [0o644, 0o4755, 0o2666, 0o600])
@pytest.mark.fault("L9 M2")
async def test_who_could_write_to_a_file_cannot_when_he_may_not_any_more(
    world: World, stranger: Stranger, mode: int
) -> None:
    """Another user maps a file that was published with mode 0666; then it gets mode 0644, 4755, 2666 or 0600.

    Another mode is another inode: what he writes is lost.
    """
    await world.publish({"tool": file(TOOL, mode=0o666)})
    await world.pull()
    assert stranger.does(HOLD, path=world.mirror / "tool") == ""
    await world.publish({"tool": file(TOOL, mode=mode)})
    result = await world.pull()
    assert (result.drifted, result.problems) == (0, [])
    assert stranger.does(WRITE) == ""
    assert (world.mirror / "tool").read_text() == TOOL
    assert world.stat("tool") == (0, f"{mode:04o}")
    await world.rests()


async def test_what_nobody_else_could_write_keeps_its_inode(world: World) -> None:
    """Nothing is copied for a mode or a time alone, nor for the time of a file that stays as writable as it was."""
    world.options["owner"] = (4321, 4321)
    await world.publish({"a": file("a", mode=0o640), "b": file("b", mode=0o664)})
    await world.pull()
    before = {name: (world.mirror / name).stat().st_ino for name in "ab"}
    await world.publish({"a": file("a", mode=0o755, mtime_ns=5), "b": file("b", mode=0o664, mtime_ns=5)})
    await world.pull()
    assert {name: (world.mirror / name).stat().st_ino for name in "ab"} == before
    assert (world.stat("a"), world.stat("b")) == ((4321, "0755"), (4321, "0664"))
    await world.rests()


@pytest.mark.fault("C2")
async def test_a_copy_is_durable_before_it_takes_the_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file goes from mode 0666 to 0644, which takes a copy; syncfs and rename are noted in order, no power is cut.

    The copy is synced before its rename: a power cut right after it leaves no name without content.
    """
    await world.publish({"tool": file(TOOL, mode=0o666)})
    await world.pull()
    events: list[str] = []
    sync, rename = mirror_module.sync_filesystem, os.rename

    def noted(old: str, new: str, **where: int) -> None:
        events.append(new)
        rename(old, new, **where)

    def synced(fd: int) -> None:
        events.append("sync")
        sync(fd)

    monkeypatch.setattr(mirror_module, "sync_filesystem", synced)
    monkeypatch.setattr(os, "rename", noted)
    await world.publish({"tool": file(TOOL, mode=0o644)})
    await world.pull()
    assert events == ["journal", "sync", "tool", "sync"]


@pytest.mark.fault("M2")
@pytest.mark.parametrize("owner", [(UID, UID), None])
async def test_what_was_staged_for_another_owner_is_staged_again(
    world: World, monkeypatch: pytest.MonkeyPatch, owner: tuple[int, int] | None
) -> None:
    """A pull for uid 65534 fails with all staged; the next is for the same owner, or for root, and renames are watched.

    For the same owner nothing is fetched; for root it is fetched again, and is root's before it is visible.
    """

    def fail(*_: Any, **__: Any) -> None:
        raise DiskProblem("not now")

    rename = os.rename
    seen: list[int] = []

    def noted(old: str, new: str, **where: int) -> None:
        if new == "f":
            seen.append(os.stat(old, dir_fd=where["src_dir_fd"]).st_uid)
        rename(old, new, **where)

    world.options["owner"] = (UID, UID)
    await world.publish({"f": file(TOOL)})
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "commit", fail)
        with pytest.raises(DiskProblem):
            await world.pull()
    (staged,) = (world.mirror / ".syncd/stage").iterdir()
    assert staged.stat().st_uid == UID
    world.options["owner"] = owner
    monkeypatch.setattr(os, "rename", noted)
    result = await world.pull()
    monkeypatch.undo()
    assert result.problems == []
    assert (result.downloaded_bytes > 0) is (owner is None)
    assert seen == [(owner or (0, 0))[0]]
    assert world.stat("f") == (seen[0], "0644")
    await world.rests()


def found(uid: int, mode: int, nlink: int = 1, gid: int = 0) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 1, 1, nlink, uid, gid, 1, 0, 0, 0))


@pytest.mark.parametrize(
    ("there", "mode", "ids", "stays"),
    [
        (found(0, 0o644), 0o600, None, True),
        (found(0, 0o600), 0o755, None, True),
        (found(0, 0o644), 0o644, (33, 33), True),
        (found(33, 0o644), 0o600, (33, -1), True),
        (found(0, 0o4755), 0o4711, None, True),
        (found(0, 0o644), 0o4755, None, False),
        (found(0, 0o755), 0o2755, None, False),
        (found(0, 0o644, nlink=2), 0o644, None, False),
        (found(33, 0o644), 0o644, None, False),
        (found(33, 0o644), 0o644, (34, 34), False),
        (found(0, 0o664), 0o644, None, False),
        (found(0, 0o646), 0o644, None, False),
        (found(0, 0o664), 0o664, None, True),
        (found(0, 0o664), 0o664, (33, 33), False),
        (found(0, 0o664), 0o664, (-1, 33), False),
        (found(0, 0o664, gid=33), 0o664, (-1, 33), True),
    ],
)
def test_an_inode_is_changed_only_where_nobody_else_can_write_to_it(
    there: os.stat_result, mode: int, ids: tuple[int, int] | None, stays: bool
) -> None:
    """Made-up stats of files are judged: links, owner, group, old and new mode.

    An inode stays only with one name, ours or the owner's, not writable for others, and without a new set-id bit.
    """
    assert Owner(ids).may_stay(there, mode) is stays


@pytest.mark.parametrize("drift", ["repair", "report", "keep"])
@pytest.mark.parametrize("layout", ["generations", "objects"])
@pytest.mark.fault("L3")
async def test_what_was_there_before_becomes_ours(world: World, stranger: Stranger, drift: str, layout: str) -> None:
    """Before the first pull a file with the published content lies there that another user owns and has mapped.

    It is recognised and not fetched, but copied, as he could write to it; what he writes is lost.
    """
    if layout == "objects":
        source = world.base / "source"
        source.mkdir()
        (source / "f").write_text(TOOL)
        await publish_objects(world, source)
    else:
        await world.publish({"f": file(TOOL)})
    world.options["drift"] = drift
    world.mirror.mkdir()
    (world.mirror / "f").write_text(TOOL)
    os.chown(world.mirror / "f", UID, UID)
    assert stranger.does(HOLD, path=world.mirror / "f") == ""
    result = await world.pull()
    assert (result.drifted, result.problems) == (0, [])
    assert result.reused_bytes == len(TOOL)
    assert stranger.does(WRITE) == ""
    assert (world.mirror / "f").read_text() == TOOL
    assert world.stat("f") == (0, "0644")
    await world.rests()
    world.options["owner"] = (4321, 4321)
    result = await world.pull()
    assert (result.drifted, result.downloaded_bytes, result.problems) == (0, 0, [])
    assert world.stat("f") == (4321, "0644")


async def publish_objects(world: World, source: Path) -> None:
    status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
    spec = BucketSpec(layout="objects")
    options = PublishOptions("app", source, Rules(), "here:/source", layout="objects", bucket=spec)
    await Outgoing(options, world.store, world.base / "outgoing.db", status=status).push()


@pytest.mark.parametrize("drift", ["report", "keep"])
async def test_what_somebody_took_is_left_where_drift_is_left(world: World, drift: str) -> None:
    """A file that belongs to another user is drift like any other: reported with his number, or kept."""
    await world.publish({"f": file("mine")})
    await world.pull()
    os.chown(world.mirror / "f", UID, UID)
    world.options["drift"] = drift
    result = await world.pull()
    assert result.drifted == 1
    assert world.stat("f")[0] == UID
    told = [problem.text for problem in result.problems]
    assert len(told) == (drift == "report")
    assert all(f"of uid {UID} found" in text for text in told)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.fault("M1")
async def test_a_new_owner_gets_what_is_there(world: World, kind: str) -> None:
    """A file, directory or symlink is mirrored as root's; then owner 4321:4322, unknown here, is configured.

    What is there is given to it and is nobody's drift; nothing is fetched, and the next round has nothing to do.
    """
    await world.publish({"x": {"file": file("x"), "folder": folder({"y": file("y")}), "link": link("x")}[kind]})
    await world.pull()
    world.options["owner"] = (4321, 4322)
    result = await world.pull()
    assert (result.drifted, result.downloaded_bytes, result.problems) == (0, 0, [])
    for path in [world.mirror / "x", *(world.mirror / "x").glob("*")]:
        assert (path.lstat().st_uid, path.lstat().st_gid) == (4321, 4322)
    await world.rests()


async def test_a_filesystem_that_ignores_owners_is_not_written_to_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network filesystems say yes to chown(2) and do nothing: that is noticed, and nobody's drift."""
    await world.publish({"d": folder({"f": file("f")})})
    await world.pull()
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    owner = Owner((4321, 4321))
    fd = os.open(world.mirror / "d/f", os.O_RDONLY)
    try:
        assert not owner.is_settled(0, 0)
        owner.give(fd)
    finally:
        os.close(fd)
    assert owner.is_settled(0, 0)
    assert not owner.is_settled(UID, 0)


# directories -------------------------------------------------------------------------------------------------------


def acl(uid: int) -> bytes:
    """u::rwx,u:UID:rwx,g::rwx,m::rwx,o::rwx, as the kernel takes it."""
    entries = [(1, 7, 0xFFFFFFFF), (2, 7, uid), (4, 7, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 7, 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize("owner", [None, (4321, 4321)])
@pytest.mark.parametrize("mode", [0o755, 0o775])
@pytest.mark.fault("L3 L4")
async def test_a_planted_directory_is_taken_over(
    world: World, stranger: Stranger, owner: tuple[int, int] | None, mode: int
) -> None:
    """Another user makes a directory with files where the next generation has one, holds it open, and has an ACL on it.

    It gets our owner and mode and loses the ACL: he can neither unlink in it, by path or descriptor, nor chmod it.
    """
    world.options["owner"] = owner
    await world.publish({"shared": folder({"a": file("a")}, mode=0o1777)})
    await world.pull()
    planted = world.mirror / "shared/conf.d"
    assert stranger.does("os.mkdir({path!r}); fd = os.open({path!r}, os.O_RDONLY)", path=planted) == ""
    assert stranger.does("open({path!r} + '/site.conf', 'w').write('evil')", path=planted) == ""
    assert stranger.does("open({path!r} + '/extra', 'w').write('evil')", path=planted) == ""
    with_acls = True
    try:
        for name in ("access", "default"):
            os.setxattr(planted, f"system.posix_acl_{name}", acl(UID))
    except OSError:
        with_acls = False
    conf = folder({"site.conf": file("safe")}, mode=mode)
    await world.publish({"shared": folder({"a": file("a"), "conf.d": conf}, mode=0o755)})
    result = await world.pull()
    assert result.problems == []
    assert (world.stat("shared/conf.d"), world.stat("shared/conf.d/site.conf")[0]) == (
        ((owner or (0, 0))[0], f"{mode:04o}"),
        (owner or (0, 0))[0],
    )
    if with_acls:
        assert not [name for name in os.listxattr(planted) if "acl" in name]
    assert stranger.does("os.unlink({path!r} + '/site.conf')", path=planted) == "Permission denied"
    assert stranger.does("os.unlink('site.conf', dir_fd=fd)") == "Permission denied"
    assert stranger.does("os.chmod({path!r}, 0o777)", path=planted) == "Operation not permitted"
    assert (planted / "site.conf").read_text() == "safe"
    assert (planted / "extra").exists()  # nobody's, as anywhere
    await world.rests()


@pytest.mark.fault("L2 L3")
async def test_a_directory_in_the_place_of_ours_is_drift_once(world: World, stranger: Stranger) -> None:
    """Another user renames a mirrored directory away and puts his own there, with its mode, its time and a file.

    It is drift once, as it has nothing else to be known by: taken over, files and all.
    """
    inner = folder({"f": file("safe")}, mode=0o755)
    await world.publish({"shared": folder({"d": inner, "e": folder()}, mode=0o777)})
    await world.pull()
    path = world.mirror / "shared/d"
    told = path.stat().st_mtime_ns
    assert stranger.does("os.rename({path!r}, {path!r} + '.old'); os.mkdir({path!r}, 0o755)", path=path) == ""
    assert stranger.does("open({path!r} + '/f', 'w').write('evil')", path=path) == ""
    assert stranger.does(f"os.utime({{path!r}}, ns=({told}, {told}))", path=path) == ""
    result = await world.pull()
    assert result.drifted == 2  # the directory and the file
    assert result.problems == []
    assert world.stat("shared/d") == (0, "0755")
    assert (path / "f").read_text() == "safe"
    await world.rests()


@pytest.mark.fault("L2")
async def test_a_directory_swapped_right_before_it_is_written_into_is_taken_over_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before the commit, after the look, a mirrored directory is moved away for a real one of another user.

    It is root's and closed before a file is renamed into it; the one that was moved is not written to.
    """
    await world.publish({"d": folder({"f": file("old")})})
    await world.pull()
    commit, rename = Mirror.commit, os.rename
    seen: list[tuple[int, str]] = []

    def noted(old: str, new: str, **where: int) -> None:
        if new == "f":
            seen.append(world.stat("d"))
        rename(old, new, **where)

    def swap_and_commit(mirror: Mirror, *arguments: Any, **words: Any) -> Any:
        path = world.mirror / "d"
        if path.stat().st_uid == 0:
            path.rename(world.base / "moved")
            path.mkdir()
            os.chown(path, UID, UID)
        return commit(mirror, *arguments, **words)

    monkeypatch.setattr(Mirror, "commit", swap_and_commit)
    monkeypatch.setattr(os, "rename", noted)
    await world.publish({"d": folder({"f": file("new")})})
    await world.pull()
    monkeypatch.undo()
    assert seen == [(0, "0700")]
    assert world.stat("d") == (0, "0755")
    assert (world.mirror / "d/f").read_text() == "new"
    assert (world.base / "moved/f").read_text() == "old"
    await world.rests()


@pytest.mark.fault("L2")
def test_a_directory_swapped_before_it_gets_its_mode_is_taken_over(world: World) -> None:
    """A mirrored directory is moved away for one of another user; then it gets a mode and time, and no file.

    Those are not set on his: it is made root's first.
    """
    with Mirror.open(world.mirror) as mirror:
        keeper = small.Keeper(mirror)
        keeper.go({"d": small.folder(), "d/f": small.file("f")})
        (world.mirror / "d").rename(world.base / "moved")
        (world.mirror / "d").mkdir()
        os.chown(world.mirror / "d", UID, UID)
        outcome = mirror.commit(MirrorPlan(dir_meta=(DirMeta("d", 0o775, 1),)), drift="repair")
    assert outcome.problems == []
    assert world.stat("d") == (0, "0775")


@pytest.mark.fault("L3")
def test_a_directory_that_cannot_be_taken_over_is_a_problem(world: World) -> None:
    """In a mirror that an unprivileged user keeps, a directory belongs to uid 4321 and is writable for all.

    It is a problem that says whose it is, and the rest of the batch is applied.
    """
    world.mirror.mkdir()
    os.chown(world.mirror, UID, UID)
    (world.mirror / "theirs").mkdir()
    os.chown(world.mirror / "theirs", 4321, 4321)
    (world.mirror / "theirs").chmod(0o777)
    told = small.as_nobody(
        """
with Mirror.open(Path(sys.argv[1])) as mirror:
    outcome = Keeper(mirror).go({"theirs": folder(), "theirs/f": file("f"), "b": file("b")})
    print([(p.path, p.code) for p in outcome.problems], sorted(d.path for d in outcome.placed))
    print(outcome.problems[0].text)
""",
        world.mirror,
    )
    first, second = told.splitlines()
    assert first == "[('theirs', 'foreign_directory')] ['b', 'theirs/f']"
    assert second.startswith("uid 4321 owns it")


# releases ----------------------------------------------------------------------------------------------------------

REWRITE = """
found = os.stat({path!r})
os.chmod({path!r}, 0o644)
fd = os.open({path!r}, os.O_WRONLY)
os.write(fd, b"EVIL code")
os.close(fd)
os.chmod({path!r}, found.st_mode & 0o7777)
os.utime({path!r}, ns=(found.st_atime_ns, found.st_mtime_ns))
"""


@pytest.mark.parametrize("share", ["auto", "clone", "reflink", "hardlink", "copy"])
@pytest.mark.parametrize("who", ["owner", "everybody"])
@pytest.mark.fault("L9")
async def test_what_the_owner_wrote_is_not_taken_into_the_next_release(
    world: World, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, share: str, who: str
) -> None:
    """The owner, or anybody where its mode is 0666, rewrites a release's file; its size and time are as before.

    Files are shared only after they were read, in every way to share: the next release has the published content.
    """
    if share == "clone":
        monkeypatch.setattr(share_module, "clone", lambda old, new: os.sendfile(new, old, 0, 1 << 20))
    world.options["owner"] = (UID, UID) if who == "owner" else None
    how = "auto" if share == "clone" else share
    modes = ModePolicy(read_only=who == "owner")
    world.options["rollout"] = RolloutOptions(mode="release", modes=modes, share=how)  # type: ignore[arg-type]
    mode = 0o644 if who == "owner" else 0o666
    await world.publish({"app.py": file("good code", mode=mode), "b": file("1"), "same": file("same", mode=mode)})
    await world.pull()
    app = world.mirror / "current/app.py"
    if who == "owner":
        assert stranger.does(REWRITE, path=app) == ""
    else:
        times = app.stat()
        assert stranger.does("open({path!r}, 'r+').write('EVIL code')", path=app) == ""
        os.utime(app, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = (world.mirror / "current/same").stat().st_ino
    await world.publish({"app.py": file("good code", mode=mode), "b": file("2"), "same": file("same", mode=mode)})
    result = await world.pull()
    assert result.problems == []
    assert app.read_text() == "good code"
    assert (world.mirror / "current/same").stat().st_ino != before
    await world.rests()


# what an unprivileged process can do -------------------------------------------------------------------------------


def test_another_users_file_is_drift_without_root_too(world: World) -> None:
    """Somebody who may write to a directory put his own there; it is replaced like any other."""
    os.chown(world.base, UID, UID)
    told = small.as_nobody(
        """
from dataclasses import replace
with Mirror.open(Path(sys.argv[1])) as mirror:
    (mirror.root / "f").write_text("x")
    disk = mirror.look("f")
    print(mirror.is_foreign(disk), mirror.is_settled(disk))
    print(mirror.is_foreign(replace(disk, uid=4321)), mirror.is_foreign(replace(disk, uid=0)))
""",
        world.mirror,
    )
    assert told.split() == ["False", "True", "True", "False"]


def test_a_problem_of_a_foreign_directory_has_a_place_in_the_manual() -> None:
    """Its code is one of the table's."""
    assert Problem("d", "foreign_directory", "").code in (small.REPOSITORY / "docs/operations.md").read_text()
