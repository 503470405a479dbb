"""What editors and tools do to save a file, call by call: the mirror ends with what they saved, and never lacks it.

A publisher and a subscriber as services of this process (:mod:`tests.support.pair`), with the real watcher. After the
start full rounds are left out, so that nothing but a hint can bring a change.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random
import re
import shutil
import subprocess
import threading
import time
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import Mock

import pytest

from syncd import agenda, publisher
from syncd.agenda import Agenda
from syncd.history import History
from syncd.index import Index
from syncd.rules import Rules
from syncd.scan import Scanner
from syncd.source import LOOK_LIMIT, Source
from syncd.status import FolderState
from tests.support.pair import Pair, pair
from tests.support.trees import difference, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from tests.support.server import NatsServer

    Wait = Callable[[], None]
    Save = Callable[[Path, bytes, Wait], None]

NEVER = 3600.0
SETTLE = 0.2
PAUSE = 0.02
"""Between two calls of an editor that takes its time: all of them together take less than the settle time."""
OLD = b"an old line\n" * 50
NEW = b"a new line\n" * 60
MODE = 0o640
FUTURE = 4_000_000_000 * 10**9
LAYOUTS = pytest.mark.parametrize("layout", ["generations", "objects"])
IGNORED = "*~\n.*.swp\n.#*\n#*#\n[#]*#\n4913\n"


# -- what an editor does -----------------------------------------------------------------------------------------------


def write(path: Path, data: bytes, wait: Wait, *, flags: int = os.O_CREAT | os.O_EXCL, sync: bool = False) -> None:
    """Write in two calls; the state between any two calls is there to be seen."""
    fd = os.open(path, os.O_WRONLY | flags, 0o600)
    try:
        wait()
        os.write(fd, data[:100])
        wait()
        os.write(fd, data[100:])
        if sync:
            os.fsync(fd)
        wait()
        os.fchmod(fd, MODE)
    finally:
        os.close(fd)
    wait()


def beside(path: Path, before: str = "", after: str = "") -> Path:
    return path.with_name(f"{before}{path.name}{after}")


def aside(path: Path) -> Path:
    """A place outside of the source, on its filesystem."""
    return path.parents[2] / "aside"


def in_place(path: Path, data: bytes, wait: Wait) -> None:
    """VS Code, nano, a shell's ``>``."""
    write(path, data, wait, flags=os.O_TRUNC)


def in_place_synced(path: Path, data: bytes, wait: Wait) -> None:
    write(path, data, wait, flags=os.O_TRUNC, sync=True)


def overwritten_then_cut(path: Path, data: bytes, wait: Wait) -> None:
    """Without O_TRUNC: for a moment the new beginning has the old end."""
    write(path, data, wait, flags=0)
    os.truncate(path, len(data))


def vim(path: Path, data: bytes, wait: Wait) -> None:
    """'backupcopy=no': the file is renamed to its backup and written anew."""
    swap, probe, backup = beside(path, ".", ".swp"), path.with_name("4913"), beside(path, after="~")
    swap.write_bytes(b"b0VIM 9.0")
    probe.touch()
    probe.unlink()
    path.rename(backup)
    wait()
    write(path, data, wait, sync=True)
    backup.unlink()
    swap.unlink()


def vim_copying(path: Path, data: bytes, wait: Wait) -> None:
    """'backupcopy=yes': the backup is a copy, the file is written in place."""
    backup = beside(path, after="~")
    shutil.copy2(path, backup)
    write(path, data, wait, flags=os.O_TRUNC, sync=True)
    backup.unlink()


def emacs(path: Path, data: bytes, wait: Wait) -> None:
    """A lock that is a link to nowhere, an auto-save file, and a backup that stays."""
    lock, auto = beside(path, ".#"), beside(path, "#", "#")
    lock.symlink_to("someone@host.4711:1700000000")
    auto.write_bytes(data[:200])
    wait()
    path.rename(beside(path, after="~"))
    wait()
    write(path, data, wait)
    auto.unlink()
    lock.unlink()


def replaced(path: Path, data: bytes, wait: Wait, *, by: Callable[[Path], Path]) -> None:
    """Write another file, sync it, rename it over this one."""
    other = by(path)
    other.parent.mkdir(exist_ok=True)
    write(other, data, wait, sync=True)
    other.rename(path)


def jetbrains(path: Path, data: bytes, wait: Wait) -> None:
    """'Safe write': for a moment there is no file of this name."""
    new, old = beside(path, after="___jb_tmp___"), beside(path, after="___jb_old___")
    write(new, data, wait)
    path.rename(old)
    wait()
    new.rename(path)
    old.unlink()


def unnamed(path: Path, data: bytes, wait: Wait) -> None:
    """Qt and GLib where the filesystem can: a file without a name, which gets one and is renamed over."""
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError as error:
        pytest.skip(f"no files without a name here: {error.strerror}")
    try:
        os.write(fd, data)
        os.fchmod(fd, MODE)
        other = beside(path, ".", ".XXXXXX")
        os.link(f"/proc/self/fd/{fd}", other, src_dir_fd=fd, follow_symlinks=True)  # without src_dir_fd it follows none
    finally:
        os.close(fd)
    wait()
    other.rename(path)


def linked(path: Path, data: bytes, wait: Wait) -> None:
    """Where rename would not do: removed, then linked under its name."""
    other = beside(path, after=".new")
    write(other, data, wait)
    path.unlink()
    wait()
    os.link(other, path)
    wait()
    other.unlink()


def linked_backup(path: Path, data: bytes, wait: Wait) -> None:
    """The backup is another link of the old file."""
    backup = beside(path, after=".bak")
    os.link(path, backup)
    replaced(path, data, wait, by=partial(beside, after=".new"))
    backup.unlink()


def renameat2(one: Path, other: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


def exchange(one: Path, other: Path) -> None:
    renameat2(one, other, 2)


def exchanged(path: Path, data: bytes, wait: Wait) -> None:
    other = beside(path, after=".new")
    write(other, data, wait)
    exchange(path, other)
    other.unlink()


def made_anew(path: Path, data: bytes, wait: Wait) -> None:
    """git, tar, install: removed, then created."""
    path.unlink()
    wait()
    write(path, data, wait)


EDITORS: dict[str, Save] = {
    "in place": in_place,
    "in place, synced": in_place_synced,
    "in place, then cut": overwritten_then_cut,
    "vim": vim,
    "vim, backupcopy=yes": vim_copying,
    "emacs": emacs,
    "renamed over": partial(replaced, by=partial(beside, before=".goutputstream-")),
    "renamed over from another directory": partial(replaced, by=lambda path: path.parents[1] / "tmp" / path.name),
    "renamed over from outside": partial(replaced, by=lambda path: aside(path) / path.name),
    "renamed over, by JetBrains": jetbrains,
    "renamed over, unnamed before": unnamed,
    "linked": linked,
    "linked backup": linked_backup,
    "exchanged": exchanged,
    "made anew": made_anew,
}

COMMANDS = {
    "vim backupcopy=no": "vim -es -u NONE -c 'set backup backupcopy=no' -c '%s/an old/a new/' -c wq f",
    "vim backupcopy=yes": "vim -es -u NONE -c 'set backup backupcopy=yes' -c '%s/an old/a new/' -c wq f",
    "vim backupcopy=auto": "vim -es -u NONE -c '%s/an old/a new/' -c wq f",
    "ed": "printf ',s/an old/a new/\\nw\\nq\\n' | ed -s f",
    "sed -i": "sed -i 's/an old/a new/' f",
    "sed -i.bak": "sed -i.bak 's/an old/a new/' f",
    "perl -pi": "perl -pi -e 's/an old/a new/' f",
    "patch": "sed 's/an old/a new/' f | diff -u f - | patch -s f",
    "install": "sed 's/an old/a new/' f > ../../new && install -m 640 ../../new f",
    "cp": "sed 's/an old/a new/' f > ../../new && cp ../../new f",
    "cp --reflink": "sed 's/an old/a new/' f > ../../new && cp --reflink=auto --remove-destination ../../new f",
    "cp -p": "sed 's/an old/a new/' f > ../../new && cp -p ../../new f",
    "mv": "sed 's/an old/a new/' f > ../../new && mv ../../new f",
    "rsync": "sed 's/an old/a new/' f > ../../new && rsync -I ../../new f",
    "dd conv=notrunc": "printf 'another' | dd of=f bs=1 seek=30 conv=notrunc status=none",
    "append": "echo more >> f",
    "truncate": "truncate -s 30 f",
    "tee": "printf 'a new line\\n' | tee f > ../../out",
}


# -- what everybody sees -----------------------------------------------------------------------------------------------


class Witness:
    """Looks at one file of the mirror all the time.

    :ivar seen: its contents in the order that they came in; ``None``: it was not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._over = threading.Event()
        self.seen: list[bytes | None] = []
        self._thread = threading.Thread(target=self._watch, name="witness")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            try:
                now = self._path.read_bytes()
            except FileNotFoundError:
                now = None
            if self.seen[-1:] != [now]:
                self.seen.append(now)


def folder_of(directory: Path) -> str:
    """A bucket for this test alone on a server that is shared."""
    return re.sub(r"\W+", "-", f"editors-{directory.name}")


class Hinted(Agenda):
    """A publisher's agenda that can be told to leave out full rounds: then nothing but a hint brings a change."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hints_only = False
        self.noted: list[str] = []
        AGENDAS.append(self)

    def hint(self, paths: Iterable[str]) -> None:
        paths = tuple(paths)
        self.noted += paths
        super().hint(paths)

    def begin_noting(self) -> list[str]:
        """Note all paths that are hinted at from now on."""
        self.noted = []
        return self.noted

    def full(self) -> None:
        if not self.hints_only:
            super().full()

    @property
    def is_full_due(self) -> bool:
        return self._full_at < time.monotonic() + NEVER / 2


AGENDAS: list[Hinted] = []
"""Of the publishers that the test has started."""


@asynccontextmanager
async def hinted(
    directory: Path, server: NatsServer, monkeypatch: pytest.MonkeyPatch, *, settle: float = SETTLE, **options: Any
) -> AsyncIterator[Pair]:
    """Run a pair that has ``d/f`` on both sides; from then on only hints tell its publisher anything."""
    (directory / "source/d").mkdir(parents=True, exist_ok=True)
    (directory / "source/d/f").write_bytes(OLD)
    (directory / "source/d/f").chmod(MODE)
    (directory / "aside").mkdir()
    monkeypatch.setattr(agenda, "MIN_QUIET_SECONDS", NEVER)
    monkeypatch.setattr(publisher, "Agenda", Hinted)
    AGENDAS.clear()
    async with pair(directory, server.url, folder=folder_of(directory), rescan=NEVER, **options) as two:
        await two.equal()
        await two.publisher.is_(lambda now: now.watching == "events")
        hints = AGENDAS[-1]
        hints.hints_only = True
        await two.publisher.is_(lambda now: now.state is FolderState.IN_SYNC and not hints.is_full_due)
        hints.settle = settle
        scans = Mock(return_value=[])
        monkeypatch.setattr(Source, "scan", scans)
        yield two
        assert not scans.called


async def versions(two: Pair, path: str) -> list[str | None]:
    """What each generation has of a path: its content's digest, or ``None``."""
    history = await History.open(two.subscriber.store.bucket(two.folder))
    found: list[str | None] = []
    for one in sorted(await history.log(), key=lambda one: one.number):
        entries = {name: child.entry async for name, child in history.entries(one.number)}
        found.append(entries[path].digest if path in entries else None)
    return found


def deleted(two: Pair) -> int:
    return sum(one["deletes"] for one in two.events("published"))


def changes(contents: list[Any]) -> list[Any]:
    """Without what is equal to the one before."""
    return [one for number, one in enumerate(contents) if number == 0 or one != contents[number - 1]]


# -- W6: saved ---------------------------------------------------------------------------------------------------------

IN_OBJECTS = ["in place", "vim", "emacs", "renamed over", "linked", "exchanged"]
SAVES = [(name, "generations") for name in EDITORS] + [(name, "objects") for name in IN_OBJECTS]


@pytest.mark.parametrize(("editor", "layout"), SAVES)
@pytest.mark.fault("W6")
async def test_what_an_editor_saves_arrives_and_nothing_else(
    editor: str, layout: str, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved as editors save, as fast as it goes and with pauses within the settle time; nobody sees a state between."""
    took = 0.0

    def pause() -> None:
        time.sleep(PAUSE)

    async with hinted(tmp_path, shared_server, monkeypatch, layout=layout) as two:
        path = two.source / "d/f"
        with Witness(two.mirror / "d/f") as witness:
            for data, wait in ((NEW, lambda: None), (OLD, pause)):
                began = time.monotonic()
                await asyncio.to_thread(EDITORS[editor], path, data, wait)
                took = max(took, time.monotonic() - began)
                await two.equal()
                assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == MODE
        if took < SETTLE:  # else the machine stood still in the middle of a save
            assert witness.seen == [OLD, NEW, OLD]
            assert deleted(two) == 0
            if layout == "generations":
                one, other, last = changes(await versions(two, "d/f"))
                assert one == last
                assert None not in {one, other}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.fault("W6")
async def test_what_a_command_does_to_a_file_arrives(
    command: str, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real program edits, replaces or cuts the file; what it leaves beside it arrives as well."""
    program = command.split(maxsplit=1)[0]
    if program != "append" and shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    async with hinted(tmp_path, shared_server, monkeypatch) as two:
        with Witness(two.mirror / "d/f") as witness:
            run = ["sh", "-c", f"umask 022; {COMMANDS[command]}"]
            began = time.monotonic()
            await asyncio.to_thread(subprocess.run, run, cwd=two.source / "d", check=True, stdin=subprocess.DEVNULL)
            took = time.monotonic() - began
            after = (two.source / "d/f").read_bytes()
            assert after != OLD
            await two.equal()
        assert witness.seen == [OLD, after] or took > SETTLE


@pytest.mark.fault("W6")
async def test_what_editors_leave_about_is_ignored_where_it_is_to_be(
    tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editor stays open, with lock, swap file and auto-save, and leaves a backup; a .syncdignore names them."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/.syncdignore").write_text(IGNORED)
    async with hinted(tmp_path, shared_server, monkeypatch) as two:
        path = two.source / "d/f"
        beside(path, ".", ".swp").write_bytes(b"b0VIM 9.0")
        beside(path, ".#").symlink_to("someone@host.4711")
        beside(path, "#", "#").write_bytes(NEW[:100])
        emacs_save = EDITORS["emacs"]
        beside(path, ".#").unlink()
        emacs_save(path, NEW, lambda: None)
        beside(path, ".#").symlink_to("someone@host.4711")
        await eventually(lambda: (two.mirror / "d/f").read_bytes() == NEW)
        only_here = {"d/f~", "d/.f.swp", "d/.#f"}
        await eventually(lambda: difference(two.source, two.mirror).keys() == only_here)
        for left in only_here:
            assert set(await versions(two, left)) == {None}


# -- W6: renamed in, out, over -----------------------------------------------------------------------------------------


def tree(directory: Path, text: str) -> Path:
    """Directories in a directory, and files at each depth."""
    for number, at in enumerate(("", "e", "e/deep")):
        (directory / at).mkdir(parents=True, exist_ok=True)
        (directory / at / f"n{number}").write_text(text)
    return directory


def in_again(source: Path, outside: Path) -> None:
    (source / "t").rename(outside / "t")
    (outside / "t/e/n1").write_text("changed out there")
    (outside / "t").rename(source / "t")


def over_an_empty_one(source: Path, _outside: Path) -> None:
    (source / "empty").mkdir()
    (source / "t").rename(source / "empty")


def below_another(source: Path, _outside: Path) -> None:
    (source / "u/v").mkdir(parents=True)
    (source / "t").rename(source / "u/v/t")


def the_other_way_round(source: Path, _outside: Path) -> None:
    """The child becomes the parent of its parent."""
    (source / "t/e").rename(source / "e")
    (source / "t").rename(source / "e/t")


def by_a_link(source: Path, outside: Path) -> None:
    (source / "t").rename(outside / "t")
    (source / "t").symlink_to("other/e")


RENAMES: dict[str, Callable[[Path, Path], object]] = {
    "in": lambda source, outside: tree(outside / "new", "in").rename(source / "new"),
    "out": lambda source, outside: (source / "t").rename(outside / "t"),
    "out and in again": in_again,
    "to another name": lambda source, _: (source / "t").rename(source / "renamed"),
    "over an empty one": over_an_empty_one,
    "below another": below_another,
    "the other way round": the_other_way_round,
    "exchanged": lambda source, _: exchange(source / "t", source / "other"),
    "exchanged with a file": lambda source, _: exchange(source / "t", source / "d/f"),
    "a link in its place": by_a_link,
}


@pytest.mark.parametrize("how", RENAMES)
@pytest.mark.fault("W6")
async def test_a_directory_that_is_renamed_is_followed(
    how: str, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the source, out of it, over another, within; what is written to it afterwards, deep inside, is seen too."""
    tree(tmp_path / "source/t", "one")
    tree(tmp_path / "source/other", "other")
    async with hinted(tmp_path, shared_server, monkeypatch, settle=0.02) as two:
        await asyncio.to_thread(RENAMES[how], two.source, tmp_path / "aside")
        await two.equal()
        for path in sorted(two.source.rglob("n2")):
            path.write_text("written afterwards")
            beside(path, "new-").write_text("made afterwards")
        await two.equal()


@LAYOUTS
@pytest.mark.fault("W6")
async def test_a_directory_that_is_swapped_behind_a_link_is_followed(
    layout: str, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes updates a mounted ConfigMap: a new directory, a new link renamed over the old one by ``mv -T``."""

    def swap(number: int) -> None:
        (source / f"..{number}").mkdir()
        for name in ("one", "two"):
            (source / f"..{number}" / name).write_text(f"{name} {number}")
        (source / "..data_tmp").symlink_to(f"..{number}")
        subprocess.run(["mv", "-T", "..data_tmp", "..data"], cwd=source, check=True)
        shutil.rmtree(source / f"..{number - 1}", ignore_errors=True)

    source = tmp_path / "source"
    source.mkdir()
    swap(1)
    for name in ("one", "two"):
        (source / name).symlink_to(f"..data/{name}")
    async with hinted(tmp_path, shared_server, monkeypatch, layout=layout) as two:
        with Witness(two.mirror / "two") as witness:
            for number in (2, 3):
                await asyncio.to_thread(swap, number)
                await two.equal()
        assert witness.seen == [b"two 1", b"two 2", b"two 3"]


# -- W6: times ---------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.fault("W6")
async def test_a_touch_brings_the_time_and_no_content(
    layout: str, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``touch`` of two files, one of many chunks: the times arrive, nothing of their content goes either way."""
    data = random.Random(6).randbytes(900_000)
    (tmp_path / "source/t").mkdir(parents=True)
    for name, size in (("small", 60_000), ("large", len(data))):
        (tmp_path / "source/t" / name).write_bytes(data[:size])
    async with hinted(tmp_path, shared_server, monkeypatch, settle=0.02, layout=layout) as two:
        two.logs.clear()
        for times in ((1e9, 1e9), (4e9, 4e9), (-1.5, -1.5)):
            for name in ("small", "large"):
                os.utime(two.source / "t" / name, times)
            await two.equal()
        sent = sum(one["uploaded_bytes"] for one in two.events("published"))
        fetched = sum(one["downloaded_bytes"] for one in two.events("mirrored"))
        assert (sent < 5_000, fetched) == (True, 0)
        assert two.events("published")


def has(path: Path, data: bytes) -> bool:
    return path.read_bytes() == data


@LAYOUTS
@pytest.mark.parametrize("when", [10**18, FUTURE], ids=["in the past", "in the future"])
@pytest.mark.fault("W6")
async def test_content_that_changes_with_size_and_time_as_they_were_is_sent(
    when: int, layout: str, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in place, or renamed over, and the time of modification put back each time, also to one to come."""

    def written(data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(when, when))

    def exchanged_with(data: bytes) -> None:
        other = tmp_path / "aside/f"
        other.write_bytes(data)
        other.chmod(MODE)
        os.utime(other, ns=(when, when))
        other.rename(path)

    async with hinted(tmp_path, shared_server, monkeypatch, settle=0.02, layout=layout) as two:
        path, there = two.source / "d/f", two.mirror / "d/f"
        for number in range(3):
            for act in (written, exchanged_with):
                data = f"{number} {act.__name__[:7]}".encode()
                act(data)
                await eventually(partial(has, there, data))
                await two.equal()
                assert there.stat().st_mtime_ns == when


# -- W6: what no event tells -------------------------------------------------------------------------------------------


@asynccontextmanager
async def looking(
    directory: Path, server: NatsServer, monkeypatch: pytest.MonkeyPatch, rescan: float, **options: Any
) -> AsyncIterator[Pair]:
    """Run a pair that has ``d/f`` on both sides, and looks at everything now and then."""
    (directory / "source/d").mkdir(parents=True)
    (directory / "source/d/f").write_bytes(b"x" * 3 * mmap.PAGESIZE)
    monkeypatch.setattr(agenda, "MIN_QUIET_SECONDS", 0.1)
    monkeypatch.setattr(publisher, "Agenda", Hinted)
    AGENDAS.clear()
    async with pair(directory, server.url, folder=folder_of(directory), rescan=rescan, **options) as two:
        await two.equal()
        await two.publisher.is_(lambda now: now.watching == "events")
        yield two


@pytest.mark.fault("W6")
async def test_what_is_written_through_a_mapping_is_found_by_the_look_at_everything(
    tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmap and msync: inotify tells of neither, nor of the end of the mapping; the timer finds what was written."""
    async with looking(tmp_path, shared_server, monkeypatch, 0.3) as two:
        hinted_at = AGENDAS[-1].begin_noting()
        path = two.source / "d/f"
        with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
            for page in range(2):
                mapped[page * mmap.PAGESIZE : page * mmap.PAGESIZE + 4] = b"page"
                mapped.flush()
                await two.equal()
            mapped[2 * mmap.PAGESIZE] = 0
        await two.equal()
        assert (two.mirror / "d/f").read_bytes()[2 * mmap.PAGESIZE] == 0
        assert not hinted_at


@pytest.mark.fault("W6")
async def test_the_other_name_of_a_file_is_found_by_the_look_that_follows_hints(
    tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hard links, written in place through one: inotify names that one, a look at everything finds the other."""
    async with looking(tmp_path, shared_server, monkeypatch, NEVER) as two:
        path, twin = two.source / "d/f", two.source / "twin"
        os.link(path, twin)
        await two.equal()
        hinted_at = AGENDAS[-1].begin_noting()
        in_place(path, NEW, lambda: None)
        await two.equal()
        assert (two.mirror / "twin").read_bytes() == NEW
        assert set(hinted_at) == {"d/f"}


# -- W6: looks that fall into a save -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [LOOK_LIMIT, 0], ids=["few", "many"])
@pytest.mark.fault("W6")
async def test_a_file_that_is_away_for_a_moment_is_not_deleted_by_a_look_at_everything(
    limit: int, tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed away and back again and again, while everything is looked at all the time: some looks find no file."""
    monkeypatch.setattr(publisher, "LOOK_LIMIT", limit)
    publish = {"settle_seconds": SETTLE}
    async with looking(tmp_path, shared_server, monkeypatch, 0.1, publish=publish) as two:
        path, away = two.source / "d/f", beside(two.source / "d/f", after="~")
        with Witness(two.mirror / "d/f") as witness:
            for _ in range(3):
                path.rename(away)
                await asyncio.sleep(SETTLE / 2)  # the fault itself
                away.rename(path)
                await asyncio.sleep(2.5 * SETTLE)  # hinted at within a second, it holds up no full round
            path.write_bytes(NEW)
            await two.equal()
        assert None not in witness.seen
        assert None not in await versions(two, "d/f")


def test_of_what_is_gone_the_topmost_is_looked_for_again(tmp_path: Path) -> None:
    """A directory with all that was in it is one look, not thousands; in a scan as below a path that was hinted at."""
    for name in ("a/t/u", "a/t!", "b"):
        tree(tmp_path / name, "x")
    source = Source(Scanner(tmp_path, Rules(), symlinks="inside"), Index(None), "app")
    assert source.scan() == []
    shutil.rmtree(tmp_path / "a/t")
    shutil.rmtree(tmp_path / "a/t!/e")
    assert source.look(["a"]).gone == ["a/t", "a/t!/e"]
    shutil.rmtree(tmp_path / "a/t!")
    assert source.look(["a/t!", "b/none"]).gone == ["a/t!"]
    shutil.rmtree(tmp_path / "b/e")
    (tmp_path / "b/n0").unlink()
    assert source.scan() == ["b/e", "b/n0"]


@pytest.mark.fault("W6")
async def test_a_file_that_is_still_being_written_is_not_read_by_a_look_at_everything(
    tmp_path: Path, shared_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written piece by piece, never quiet for the settle time, while everything is looked at again and again.

    One look may fall between the first write and its event; from the event on the file waits until it is quiet.
    """
    publish = {"settle_seconds": SETTLE}
    async with looking(tmp_path, shared_server, monkeypatch, 0.1, publish=publish) as two:
        path = two.source / "d/f"
        with Witness(two.mirror / "d/f") as witness:
            before = path.read_bytes()
            with path.open("wb", buffering=0) as opened:
                for number in range(30):
                    opened.write(b"%d" % number)
                    await asyncio.sleep(SETTLE / 4)
            await two.equal()
        assert (witness.seen[0], witness.seen[-1]) == (before, path.read_bytes())
        assert len(witness.seen) <= 3
