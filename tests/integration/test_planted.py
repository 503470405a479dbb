"""Things that root, or an accident, planted in a mirror: device nodes, and links that lead to files of others.

The kernel is the witness: inotify tells every open in a directory, nodes without a driver refuse to be opened, and what
a link leads to keeps its owner, mode and times, that of its last change (ctime) included.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

import pytest

from syncd.errors import FileChanged
from syncd.mirror import Mirror
from syncd.plan import DirMeta, MakeDir, MirrorPlan, Place, SetMeta
from tests.integration.test_mirror_races import SWAP
from tests.support.disks import WAYS, Folder
from tests.support.drift import Mirrored
from tests.support.mirror import T0, Keeper, file, folder
from tests.support.trees import difference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may make device nodes and give files away")

BUDGET_SECONDS = 1.0
OWNER = (4321, 4321)
NO_DRIVER = 4094
"""A major number that nobody has: opening such a node is ENXIO, before anything else can happen."""
NODES = {
    "null": (stat.S_IFCHR, os.makedev(1, 3)),  # as /dev/null: takes everything, and gives nothing
    "full": (stat.S_IFCHR, os.makedev(1, 7)),  # as /dev/full: gives zeros without end, and takes nothing
    "chars": (stat.S_IFCHR, os.makedev(NO_DRIVER, 7)),
    "blocks": (stat.S_IFBLK, os.makedev(NO_DRIVER, 7)),
}

# -- witnesses ---------------------------------------------------------------------------------------------------------

_IN_OPEN = 0x20
_IN_GONE = 0x40 | 0x80 | 0x200  # moved from, moved to (onto it), deleted


class Witness:
    """Hears who is opened, of device nodes in some directories, for as long as they are that."""

    def __init__(self, *nodes: Path) -> None:
        self._nodes = set(nodes)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._directories: dict[int, Path] = {}
        for directory in {node.parent for node in nodes}:
            watch = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _IN_OPEN | _IN_GONE)
            assert watch >= 0, os.strerror(ctypes.get_errno())
            self._directories[watch] = directory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    def heard(self) -> list[str]:
        """Return who was opened since the last time."""
        found: list[str] = []
        while select.select([self._fd], [], [], 0)[0]:
            data, at = os.read(self._fd, 65536), 0
            while at < len(data):
                watch, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
                at += 16 + length
                path = self._directories[watch] / name
                if path in self._nodes and mask & _IN_GONE:
                    self._nodes.discard(path)  # another thing has its name from now on
                elif path in self._nodes:
                    found.append(name)
        return found


def put_node(path: Path, what: str) -> None:
    """Put a device node in the place of what is there."""
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            inside.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    kind, device = NODES[what]
    try:
        os.mknod(path, kind | 0o666, device)
    except PermissionError as error:
        pytest.skip(f"no device nodes here: {error}")


def is_node(path: Path) -> bool:
    return stat.S_IFMT(path.lstat().st_mode) in {stat.S_IFCHR, stat.S_IFBLK}


def known(path: Path) -> tuple[int, ...]:
    """What would tell that somebody changed something about a file."""
    found = path.lstat()
    return found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def test_the_witness_hears(tmp_path: Path) -> None:
    """Else silence would prove nothing."""
    put_node(tmp_path / "null", "null")
    with Witness(tmp_path / "null") as witness:
        assert witness.heard() == []
        with suppress(PermissionError), (tmp_path / "null").open("wb", buffering=0):  # refused where mounted nodev
            assert witness.heard() == ["null"]
        (tmp_path / "null").unlink()
        (tmp_path / "null").write_text("a file")
        assert witness.heard() == []


# -- device nodes (L3) -------------------------------------------------------------------------------------------------


def source_of(folder: Folder) -> list[str]:
    """A source with something for each kind of node to take the place of; return those paths."""
    paths: list[str] = []
    for what in NODES:
        (folder.source / what / "inner").mkdir(parents=True)
        (folder.source / what / "file").write_text(f"file {what}")
        (folder.source / what / "other").write_text(f"other {what}")
        (folder.source / what / "inner/deep").write_text(f"deep {what}")
        (folder.source / what / "link").symlink_to("file")
        paths += [f"{what}/{name}" for name in ("file", "other", "inner", "link")]
    return paths


@contextmanager
def planted(folder: Folder, paths: list[str]) -> Iterator[None]:
    """Put nodes into the tree that readers see, and hear whether anybody opens them meanwhile."""
    tree = folder.tree.resolve()
    for path in paths:
        put_node(tree / path, path.partition("/")[0])
    with Witness(*(tree / path for path in paths)) as witness:
        yield
        assert witness.heard() == []


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.fault("L3")
async def test_a_device_in_the_place_of_anything_is_replaced_and_never_opened(tmp_path: Path, how: str) -> None:
    """Character and block nodes are made with mknod where files, directories and symlinks were; then upstream changes.

    In release mode the nodes are in the current release, which is mended, or from which the next one is built.
    """
    folder = Folder(tmp_path, how, rollout={"keep_releases": 1})
    paths = source_of(folder)
    await folder.go()
    with planted(folder, paths):
        assert (await folder.pull()).problems == []
    assert difference(folder.source, folder.tree) == {}
    with planted(folder, paths):
        for what in NODES:
            (folder.source / what / "file").write_text(f"changed {what}")
            (folder.source / what / "other").chmod(0o600)
            (folder.source / what / "inner/deep").write_text(f"changed deep {what}")
        await folder.go()
    await folder.rests()


@pytest.mark.parametrize("drift", ["report", "keep"])
@pytest.mark.parametrize("how", ["objects", "generations"])
@pytest.mark.fault("L3")
async def test_a_device_that_is_to_stay_is_never_opened_either(tmp_path: Path, how: str, drift: str) -> None:
    """The nodes are drift that is only reported, or kept, while upstream goes on; then they are removed by hand."""
    folder = Folder(tmp_path, how, drift=drift)
    paths = [path for path in source_of(folder) if not path.endswith("inner")]
    await folder.go()
    tree = folder.tree.resolve()
    with planted(folder, paths):
        told = {problem.path: problem.code for problem in (await folder.pull()).problems}
        assert told == (dict.fromkeys(paths, "drift") if drift == "report" else {})
        for what in NODES:
            (folder.source / what / "inner/deep").write_text(f"changed {what}")
            (folder.source / what / "file").write_text(f"changed {what}")
            (folder.source / what / "other").chmod(0o600)
        await folder.push()
        await folder.pull()
        assert all(is_node(tree / path) for path in paths)
    for path in paths:
        (tree / path).unlink()
    folder.options["drift"] = "repair"
    await folder.go()


@pytest.mark.fault("L3")
def test_no_look_at_a_device_opens_it(tmp_path: Path) -> None:
    """Hashing, copying, giving modes, removing and auditing meet nodes where files were, one of each kind."""
    tree = {what: file(f"file {what}") for what in NODES}
    mirrored = Mirrored(tmp_path, tree)
    for what in NODES:
        put_node(mirrored.root / what, what)
    with Witness(*(mirrored.root / what for what in NODES)) as witness:
        for what, node in tree.items():
            for look in (mirrored.mirror.read_digests, mirrored.mirror.open_source):
                with pytest.raises(FileChanged):
                    look(what)
            with pytest.raises(FileChanged):
                mirrored.mirror.stage_copy(what, node.entry)
            disk = mirrored.mirror.look(what)
            assert disk is not None
            assert disk.kind is None
        assert mirrored.audit_all() == set(NODES)
        plan = MirrorPlan(
            set_meta=tuple(SetMeta(what, file(f"file {what}", mode=0o4777).entry, None) for what in NODES)
        )
        outcome = mirrored.mirror.commit(plan, drift="repair")
        assert outcome.drifted == list(NODES)
        assert all(is_node(mirrored.root / what) for what in NODES)
        assert mirrored.check()[1] != []
        assert witness.heard() == []
    mirrored.close()


# -- owners (L4) -------------------------------------------------------------------------------------------------------


def owners(tree: Path) -> set[int]:
    return {path.lstat().st_uid for path in tree.rglob("*") if ".syncd" not in path.relative_to(tree).parts}


@pytest.mark.parametrize(
    ("how", "drift"), [*((how, "repair") for how in WAYS), ("objects", "keep"), ("generations", "keep")]
)
@pytest.mark.fault("L4")
async def test_an_owner_mode_or_time_is_never_given_to_what_a_link_leads_to(
    tmp_path: Path, how: str, drift: str
) -> None:
    """With ``owner`` set, links to root's files are planted for files, a directory and a link; one is published."""
    outside = tmp_path / "outside"
    (outside / "d/sub").mkdir(parents=True)
    for name in ("f", "mode", "d/f", "d/mode", "d/sub/x", "published"):
        (outside / name).write_text(name)  # the very content that the mirror has
        (outside / name).chmod(0o600)
    folder = Folder(tmp_path, how, owner=OWNER, drift=drift)
    (folder.source / "d/sub").mkdir(parents=True)
    for name in ("f", "mode", "d/f", "d/mode", "d/sub/x"):
        (folder.source / name).write_text(name)
    (folder.source / "link").symlink_to("f")
    before = {path: known(path) for path in [outside, *outside.rglob("*")]}
    await folder.go()
    assert owners(folder.tree) == {OWNER[0]}
    links: dict[Path, Path] = {}

    def plant() -> None:
        tree = folder.tree.resolve()
        for name in ("f", "mode", "link"):
            links[tree / name] = outside / name.replace("link", "published")
            (tree / name).unlink()
        links[tree / "d"] = outside / "d"
        (tree / "d").rename(tmp_path / f"aside{time.monotonic_ns()}")
        for link, target in links.items():
            link.symlink_to(target)

    def clear() -> None:
        for link, target in links.items():
            if link.is_symlink() and link.readlink() == target:
                link.unlink()
        links.clear()

    plant()
    await folder.pull()
    assert {path: known(path) for path in before} == before
    clear()
    folder.options["drift"] = "repair"
    await folder.go()
    folder.options["drift"] = drift
    plant()
    for name in ("mode", "d/mode"):
        (folder.source / name).chmod(0o750)
    for name in ("d", "d/sub"):
        (folder.source / name).chmod(0o711)
    os.utime(folder.source / "d/sub/x", ns=(T0, T0))
    for name in ("f", "d/f", "d/new"):
        (folder.source / name).write_text("changed")
    (folder.source / "absolute").symlink_to(outside / "published")
    await folder.push()
    await folder.pull()
    assert {path: known(path) for path in before} == before
    clear()
    folder.options["drift"] = "repair"
    await folder.go()
    assert {path: known(path) for path in before} == before
    assert owners(folder.tree) == {OWNER[0]}
    await folder.rests()


@pytest.mark.fault("L4 L9")
@pytest.mark.parametrize("how", WAYS)
async def test_an_owner_is_never_given_to_the_other_name_of_a_planted_file(tmp_path: Path, how: str) -> None:
    """A hard link to root's file with the very content is planted, while the owner of the whole mirror changes."""
    folder = Folder(tmp_path, how)
    (folder.source / "f").write_text("content")
    await folder.go()
    outside = tmp_path / "outside"
    outside.write_text("content")
    os.utime(outside, ns=(T0, T0))
    target = folder.tree.resolve() / "f"
    target.unlink()
    os.link(outside, target)
    before = known(outside)
    folder.options["owner"] = OWNER
    (folder.source / "f").chmod(0o750)
    await folder.go()
    after = known(outside)
    assert (after[:5], after[6]) == (before[:5], before[6])  # the link that was removed counts as a change
    assert (folder.tree / "f").stat().st_uid == OWNER[0]
    assert outside.stat().st_nlink == (2 if how == "release" else 1)  # the release before keeps what it has


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Exchange two names all the time."""
    command = [sys.executable, "-c", SWAP, str(one), str(other)]
    swapper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == "ready\n"
        yield
    finally:
        swapper.kill()
        swapper.communicate()


class Arena:
    """A mirror with an owner, where a path turns into a link to root's files and back all the time."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "mirror"
        self.outside = tmp_path / "outside"
        (self.outside / "sub").mkdir(parents=True)
        for name in ("f", "meta", "sub/x"):
            (self.outside / name).write_text(f"content {name}")
        self.mirror = Mirror.open(self.root, owner=OWNER)
        names = ("f", "meta", "sub/x")
        tree = {"d": folder(), "d/sub": folder(), **{f"d/{name}": file(f"content {name}") for name in names}}
        assert not Keeper(self.mirror).go(tree).problems
        self.before = self.seen()

    def seen(self) -> dict[Path, tuple[int, ...]]:
        return {path: known(path) for path in [self.outside, *self.outside.rglob("*")]}

    def take_back(self) -> None:
        """Give what is in the mirror to root, so that it is to be given away again: never through the link, either."""
        flags = os.O_RDONLY | os.O_NOFOLLOW
        with suppress(OSError):
            fd = os.open(self.root / "d", flags | os.O_DIRECTORY)
            try:
                for name in ("meta", "sub"):
                    os.chown(name, 0, 0, dir_fd=fd, follow_symlinks=False)
                os.fchown(fd, 0, 0)
            finally:
                os.close(fd)

    def plan(self, count: int) -> MirrorPlan:
        """Everything that gives something to an owner."""
        node = file(f"version {count}", mode=0o755)
        (staged,) = self.mirror.stage_bytes([(node.entry, node.data)])
        meta = file("content meta", mode=0o640 + count % 2, mtime_ns=T0 + count)
        new = f"d/new{count}"
        return MirrorPlan(
            make_dirs=(MakeDir("d"), MakeDir(new)),
            place=(Place("d/f", node.entry, str(staged), None),),
            set_meta=(SetMeta("d/meta", meta.entry, None),),
            dir_meta=(DirMeta(new, 0o750, 1), DirMeta("d/sub", 0o750, count), DirMeta("d", 0o750, count)),
        )


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena(tmp_path)
    yield made
    made.mirror.close()


def race(arena: Arena) -> None:
    """Give and take for a while."""
    end = time.monotonic() + BUDGET_SECONDS
    given = refused = 0
    while time.monotonic() < end:
        arena.take_back()
        outcome = arena.mirror.commit(arena.plan(given + refused), drift="repair")
        given += not outcome.problems
        refused += bool(outcome.problems or outcome.drifted)
    assert arena.seen() == arena.before
    assert given
    assert refused


@pytest.mark.fault("L2 L4")
def test_no_owner_is_given_through_a_parent_that_is_swapped_for_a_link(arena: Arena, tmp_path: Path) -> None:
    """A directory is exchanged with a link to root's in a loop while files, modes and directories get an owner."""
    (tmp_path / "link").symlink_to(arena.outside)
    with swapping(arena.root / "d", tmp_path / "link"):
        race(arena)


@pytest.mark.fault("L2 L4")
def test_no_owner_is_given_through_a_file_that_is_swapped_for_a_link(arena: Arena, tmp_path: Path) -> None:
    """A file is exchanged with a link to root's in a loop while it gets an owner, a mode and a time."""
    (tmp_path / "link").symlink_to(arena.outside / "meta")
    with swapping(arena.root / "d/meta", tmp_path / "link"):
        race(arena)
