"""What a process tells the kernel, recorded; and every tree that a power cut may leave of it.

:class:`Recorder` stands in for the functions of ``os`` while it is entered and writes down each change below one root.
:meth:`Recording.crashes` then builds, for each moment, the trees that a filesystem may hold after the power was cut
there. What it may do is what POSIX allows and journaling filesystems make of it, and no more mercy than that:

 * what ``fsync`` and ``syncfs`` cover is there: of a file its bytes and attributes, of a directory its names;
 * of the rest any part may be missing, in any order: bytes (not written, half written, or zeros of the right length),
   names, modes and times. A file's fsync does not keep its name, a name does not keep the file's bytes;
 * a rename is whole: the old name or the new one, what was there before or what is there now;
 * a change of a name needs the changes of that same name before it, and whatever it names has to exist; a directory
   that is removed was empty.

What the recorder misses (the built-in ``open()``, a system call through ctypes, SQLite) does not go unnoticed:
:meth:`Recording.check` compares what was recorded with what is really there.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import io
import os
import random
import stat
import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Entry = tuple[int, str]
    """A name in a directory: the directory's number, and the name."""

ROOT = 0
FICLONE = 0x40049409
KEEP_CHANCES = (0.2, 0.5, 0.8, 0.95)
_OPEN_FD = "/proc/self/fd/"


@dataclass(slots=True)
class Inode:
    """A file, directory or symlink of the model.

    :ivar mtime_ns: ``None``: whenever it was changed last; nobody set it since.
    :ivar ino: the real inode number when it was recorded.
    :ivar ctime_ns: the real change time after the last change; ``None``: not known.
    """

    kind: int
    mode: int = 0
    mtime_ns: int | None = None
    data: bytearray = field(default_factory=bytearray)
    target: str = ""
    names: dict[str, int] = field(default_factory=dict)
    ino: int = 0
    ctime_ns: int | None = None

    def copy(self) -> Inode:
        return replace(self, data=bytearray(self.data), names=dict(self.names))


@dataclass(frozen=True, slots=True)
class Op:
    """One change, or one promise of the kernel.

    :ivar word: create, link, unlink, rename, write, size, mode, mtime; fsync, syncfs.
    :ivar inode: what it is done to; of an unlink or rename, what the name named.
    :ivar over: what a rename replaced, -1: nothing.
    :ivar value: a length, an offset, a mode or a time.
    """

    word: str
    inode: int = -1
    entry: Entry | None = None
    to: Entry | None = None
    over: int = -1
    value: int = 0
    data: bytes = b""
    kind: int = 0
    target: str = ""
    ino: int = 0
    ctime_ns: int | None = None

    def __str__(self) -> str:
        names = " ".join(f"{where[0]}/{where[1]}" for where in (self.entry, self.to) if where is not None)
        return f"{self.word} #{self.inode} {names}".strip()


class Fate(Enum):
    """What becomes of a change that nothing made durable. The last two are for bytes only."""

    KEPT = 1
    LOST = 2
    HALF = 3
    ZEROS = 4


class Disk:
    """A tree as a model: inodes by number, the root is :data:`ROOT`."""

    def __init__(self, inodes: dict[int, Inode]) -> None:
        self.inodes = inodes

    def copy(self) -> Disk:
        return Disk({number: inode.copy() for number, inode in self.inodes.items()})

    def at(self, entry: Entry | None) -> int:
        """The number of what has a name, -1: nothing has."""
        return -1 if entry is None else self.inodes[entry[0]].names.get(entry[1], -1)

    def apply(self, op: Op, fate: Fate = Fate.KEPT) -> None:
        """Do one change, as far as its fate lets it."""
        if op.word == "create":
            mode = op.value if op.kind != stat.S_IFLNK else 0o777
            self.inodes[op.inode] = Inode(op.kind, mode, target=op.target, ino=op.ino)
        if op.word in {"create", "link"}:
            self._name(op.entry, op.inode)
        elif op.word == "unlink":
            self._forget(op.entry)
        elif op.word == "rename":
            self._forget(op.entry)
            self._name(op.to, op.inode)
        elif op.word in {"write", "size", "mode", "mtime"}:
            self._change(op, fate)
        if op.inode >= 0:
            self.inodes[op.inode].ctime_ns = op.ctime_ns

    def _name(self, entry: Entry | None, number: int) -> None:
        assert entry is not None
        directory = self.inodes[entry[0]]
        directory.names[entry[1]] = number
        directory.mtime_ns = directory.ctime_ns = None

    def _forget(self, entry: Entry | None) -> None:
        assert entry is not None
        directory = self.inodes[entry[0]]
        directory.names.pop(entry[1], None)
        directory.mtime_ns = directory.ctime_ns = None

    def _change(self, op: Op, fate: Fate) -> None:
        inode = self.inodes[op.inode]
        if op.word == "mode":
            inode.mode = op.value
        elif op.word == "mtime":
            inode.mtime_ns = op.value
        else:
            inode.mtime_ns = None
            if op.word == "size":
                inode.data = inode.data[: op.value].ljust(op.value, b"\0")
                return
            data = op.data[: len(op.data) // 2] if fate is Fate.HALF else op.data
            data = bytes(len(data)) if fate is Fate.ZEROS else data
            inode.data = inode.data.ljust(op.value, b"\0")
            inode.data[op.value : op.value + len(data)] = data

    def walk(self, number: int = ROOT, above: str = "") -> Iterator[tuple[str, int]]:
        """Yield every path and the number of what is there, parents first."""
        for name, child in sorted(self.inodes[number].names.items()):
            path = f"{above}/{name}" if above else name
            yield path, child
            yield from self.walk(child, path)

    def key(self) -> tuple[Any, ...]:
        """Equal for trees that nobody can tell apart."""
        return tuple(
            (path, number, it.kind, it.mode, it.mtime_ns, bytes(it.data), it.target, it.ctime_ns)
            for path, number in self.walk()
            for it in (self.inodes[number],)
        )

    def build(self, where: Path) -> dict[int, int]:
        """Make this tree real in an empty directory; return real inode number -> number here."""
        made: dict[int, Path] = {}
        numbers = {where.stat().st_ino: ROOT}
        for path, number in self.walk():
            inode, at = self.inodes[number], where / path
            if number in made:
                at.hardlink_to(made[number])
                continue
            made[number] = at
            if inode.kind == stat.S_IFDIR:
                at.mkdir(0o700)
            elif inode.kind == stat.S_IFLNK:
                at.symlink_to(inode.target)
            else:
                at.write_bytes(inode.data)
            numbers[at.lstat().st_ino] = number
        for number, at in reversed([(ROOT, where), *made.items()]):
            inode = self.inodes[number]
            if inode.kind != stat.S_IFLNK:
                at.chmod(inode.mode)
            if inode.mtime_ns is not None:
                os.utime(at, ns=(inode.mtime_ns, inode.mtime_ns), follow_symlinks=False)
        return numbers


@dataclass(frozen=True)
class Crash:
    """One tree that a power cut may leave.

    :ivar position: how many operations had been called.
    :ivar how: what became of those that nothing had made durable.
    :ivar promised: the operations whose effect must be there: syncs that were called cover them.
    """

    position: int
    how: str
    disk: Disk
    promised: frozenset[int]


def _data_is(fate: Fate) -> Callable[[Op], Fate]:
    return lambda op: fate if op.word in {"write", "size"} else Fate.KEPT


def _only(*words: str) -> Callable[[Op], Fate]:
    return lambda op: Fate.KEPT if op.word in words else Fate.LOST


HOWS: dict[str, Callable[[Op], Fate]] = {
    "everything is there": lambda op: Fate.KEPT,
    "nothing is there that was not synced": lambda op: Fate.LOST,
    "names without bytes": _data_is(Fate.LOST),
    "names and lengths, but zeros": _data_is(Fate.ZEROS),
    "half of the bytes": _data_is(Fate.HALF),
    "bytes, but no later name, mode or time": _only("create", "write", "size"),
    "names and bytes without modes and times": _only("create", "link", "unlink", "rename", "write", "size"),
}


class Recording:
    """What was done below a root since the recording began.

    :ivar base: the tree at the beginning, all of it durable.
    :ivar ops: in the order of their calls.
    """

    def __init__(self, base: Disk) -> None:
        self.base = base
        self.ops: list[Op] = []
        self._whole: tuple[Recording, int] | None = None

    def without(self, position: int) -> Recording:
        """The same, but for one sync: as if somebody had taken that call out, and relied on it all the same."""
        other = Recording(self.base)
        other.ops = self.ops[:position] + self.ops[position + 1 :]
        other._whole = self, position
        return other

    def syncs(self) -> list[int]:
        """The positions of the promises."""
        return [position for position, op in enumerate(self.ops) if op.word in {"fsync", "syncfs"}]

    def final(self) -> Disk:
        """The tree at the end, as nobody cut the power."""
        disk = self.base.copy()
        for op in self.ops:
            disk.apply(op)
        return disk

    def check(self, root: Path) -> list[str]:
        """Where the model and the real tree differ: what the recorder missed."""
        real = read(root)
        mine, there = dict(self.final().walk()), dict(real.walk())
        wrong = [f"{path}: not in both" for path in mine.keys() ^ there.keys()]
        final = self.final()
        for path in sorted(mine.keys() & there.keys()):
            one, other = final.inodes[mine[path]], real.inodes[there[path]]
            if (one.kind, one.mode, one.data, one.target) != (other.kind, other.mode, other.data, other.target):
                wrong.append(f"{path}: {one} is {other}")
            elif one.mtime_ns not in {None, other.mtime_ns}:
                wrong.append(f"{path}: its time is {other.mtime_ns}, not {one.mtime_ns}")
        return wrong

    # -- what depends on what ---------------------------------------------------------------------------------------

    @functools.cached_property
    def needs(self) -> list[frozenset[int]]:
        """For each operation those that must have happened where it has."""
        made: dict[int, int] = {}
        named: dict[Entry, int] = {}
        inside: dict[int, set[int]] = {}
        found: list[frozenset[int]] = []
        for position, op in enumerate(self.ops):
            entries = [entry for entry in (op.entry, op.to) if entry is not None]
            numbers = [op.inode, *(directory for directory, _ in entries)]
            wanted = {made[number] for number in numbers if number in made}
            wanted |= {named[entry] for entry in entries if entry in named}
            if op.word in {"unlink", "rename"}:  # a directory that goes away, or is replaced, is empty
                gone = op.inode if op.word == "unlink" else op.over
                wanted |= inside.get(gone, set())
            found.append(frozenset(wanted - {position}))
            if op.word == "create":
                made[op.inode] = position
            for entry in entries:
                named[entry] = position
                inside.setdefault(entry[0], set()).add(position)
        return found

    def closure(self, positions: set[int]) -> set[int]:
        """Some operations and all that they need."""
        left, found = list(positions), set(positions)
        while left:
            for needed in self.needs[left.pop()]:
                if needed not in found:
                    found.add(needed)
                    left.append(needed)
        return found

    @functools.cached_property
    def _covered(self) -> list[tuple[frozenset[int], frozenset[int]]]:
        """For each position: what is there for certain, and what is there if the file that it belongs to is."""
        certain: set[int] = set()
        perhaps: set[int] = set()
        found = [(frozenset(certain), frozenset(perhaps))]
        for position, op in enumerate(self.ops):
            before = range(position)
            if op.word == "syncfs":
                certain |= set(before)
            elif op.word == "fsync":
                bytes_of = {at for at in before if self.ops[at].inode == op.inode and self.ops[at].entry is None}
                names = {at for at in before for where in (self.ops[at].entry, self.ops[at].to) if _in(where, op.inode)}
                certain |= self.closure(names)
                perhaps |= bytes_of
            found.append((frozenset(certain), frozenset(perhaps)))
        return found

    def durable(self, position: int) -> frozenset[int]:
        """The operations that no power cut after so many calls may undo."""
        return self._covered[position][0]

    def promised(self, position: int) -> frozenset[int]:
        """The operations that whoever called the syncs may count on; more than :meth:`durable` if one is taken out."""
        if self._whole is None:
            return self.durable(position)
        whole, gone = self._whole
        return frozenset(at - (at > gone) for at in whole.durable(position + (position >= gone)) if at != gone)

    # -- what may be left -------------------------------------------------------------------------------------------

    def crashes(self, *, seed: int, samples: int) -> Iterator[Crash]:
        """Yield the trees that may be left, for every moment; each as long as nobody could tell it from another.

        Systematically: all of :data:`HOWS`, and where most is under way (before each promise, and at the end) each
        operation missing alone, kept alone, and all after each moment missing. At random: ``samples`` per moment.
        """
        rng = random.Random(seed)
        last = len(self.ops)
        full = {*self.syncs(), last}
        seen: set[tuple[Any, ...]] = set()
        for position in range(last + 1):
            for how, fates in self._choices(position, rng, samples, all_of_them=position in full):
                disk = self._left(position, fates)
                key = (self.promised(position), disk.key())
                if key not in seen:
                    seen.add(key)
                    yield Crash(position, how, disk, self.promised(position))

    def _choices(
        self, position: int, rng: random.Random, samples: int, *, all_of_them: bool
    ) -> Iterator[tuple[str, Callable[[int], Fate]]]:
        ops = self.ops
        for how, fate_of in HOWS.items():
            yield how, lambda at, fate_of=fate_of: fate_of(ops[at])  # type: ignore[misc]
        for number in range(samples):
            chance = KEEP_CHANCES[number % len(KEEP_CHANCES)]
            fates = [_random_fate(rng, op, chance) for op in ops[:position]]
            yield f"anything, sample {number}", fates.__getitem__
        if not all_of_them:
            return
        for one in range(position):
            if one in self.durable(position):
                continue
            alone = self.closure({one})
            yield f"all but {ops[one]}", lambda at, one=one: Fate.LOST if at == one else Fate.KEPT  # type: ignore[misc]
            yield f"only {ops[one]}", lambda at, alone=alone: Fate.KEPT if at in alone else Fate.LOST  # type: ignore[misc]
            yield f"nothing after {ops[one]}", lambda at, one=one: Fate.KEPT if at <= one else Fate.LOST  # type: ignore[misc]

    def _left(self, position: int, fate_of: Callable[[int], Fate]) -> Disk:
        """The tree in which every operation has its fate, but for those that are durable."""
        certain, perhaps = self._covered[position]
        disk = self.base.copy()
        there: set[int] = set()
        for at, op in enumerate(self.ops[:position]):
            fate = Fate.KEPT if at in certain or at in perhaps else fate_of(at)
            if fate is not Fate.LOST and self.needs[at] <= there:
                disk.apply(op, fate)
                there.add(at)
        return disk


def _in(entry: Entry | None, directory: int) -> bool:
    return entry is not None and entry[0] == directory


def _random_fate(rng: random.Random, op: Op, chance: float) -> Fate:
    if rng.random() < chance:
        return Fate.KEPT
    return rng.choice([Fate.LOST, Fate.HALF, Fate.ZEROS]) if op.word == "write" else Fate.LOST


def read(root: Path) -> Disk:
    """A real tree as a model."""
    disk = Disk({})
    numbers: dict[int, int] = {}

    def take(path: Path) -> int:
        found = path.lstat()
        number = numbers.setdefault(found.st_ino, len(numbers))
        if number in disk.inodes:
            return number
        kind = stat.S_IFMT(found.st_mode)
        inode = Inode(kind, stat.S_IMODE(found.st_mode), found.st_mtime_ns)
        inode.ino, inode.ctime_ns = found.st_ino, found.st_ctime_ns
        disk.inodes[number] = inode
        if kind == stat.S_IFDIR:
            for child in sorted(path.iterdir()):
                inode.names[child.name] = take(child)
        elif kind == stat.S_IFLNK:
            inode.target = str(path.readlink())
        else:
            inode.data = bytearray(path.read_bytes())
        return number

    take(root)
    return disk


class _Raw(io.RawIOBase):
    """A file object whose writes go through ``os.write``."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        return os.write(self._fd, data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def _writer(fd: int, mode: str, encoding: str | None = None, newline: str | None = None) -> Any:
    """A file object for a descriptor, which writes through ``os.write``."""
    buffered = io.BufferedWriter(_Raw(fd))
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", newline=newline)


class _Libc:
    """A C library whose syncfs is noted."""

    def __init__(self, recorder: Recorder, libc: ctypes.CDLL) -> None:
        self._recorder = recorder
        self._libc = libc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._libc, name)

    def syncfs(self, fd: int) -> int:
        result: int = self._libc.syncfs(fd)
        if result == 0:
            self._recorder.note(Op("syncfs"))
        return result


_NAMES = ("open", "fdopen", "mkdir", "symlink", "link", "rename", "replace", "unlink", "remove", "rmdir")
_BYTES = ("write", "pwrite", "ftruncate", "truncate", "posix_fallocate", "copy_file_range")
_REPLACED = (*_NAMES, *_BYTES, "chmod", "fchmod", "utime", "fsync", "fdatasync", "sync")


class Recorder:
    """Writes down what this process changes below a root while it is entered. One thread at a time."""

    def __init__(self, root: Path) -> None:
        base = read(root)
        self.recording = Recording(base)
        self._root = root
        self._now = base.copy()
        self._dev = root.stat().st_dev
        self._numbers = {inode.ino: number for number, inode in base.inodes.items()}
        self._real = SimpleNamespace(**{name: getattr(os, name) for name in [*_REPLACED, "stat", "fstat"]})
        self._ioctl = fcntl.ioctl
        self._io_open = io.open
        self._libcs: list[tuple[Any, str, ctypes.CDLL]] = []

    def __enter__(self) -> Self:
        for name in _REPLACED:
            setattr(os, name, getattr(self, f"_{name}"))
        fcntl.ioctl = self._clone  # type: ignore[assignment]
        io.open = self._path_open  # type: ignore[assignment]
        for module in [module for name, module in sys.modules.items() if name.startswith("syncd.")]:
            for name, value in list(vars(module).items()):
                if isinstance(value, ctypes.CDLL):
                    self._libcs.append((module, name, value))
                    setattr(module, name, _Libc(self, value))
        return self

    def __exit__(self, *_: object) -> None:
        for name in _REPLACED:
            setattr(os, name, getattr(self._real, name))
        fcntl.ioctl = self._ioctl
        io.open = self._io_open
        for module, name, value in self._libcs:
            setattr(module, name, value)
        self._libcs.clear()

    def note(self, op: Op) -> None:
        """Write one operation down, with the change time that it left."""
        self._now.apply(op)
        paths = {number: path for path, number in self._now.walk()}
        if op.inode in paths:
            found = self._real.stat(self._root / paths[op.inode], follow_symlinks=False)
            op = replace(op, ctime_ns=found.st_ctime_ns)
        for gone in {op.inode, op.over} - paths.keys() - {ROOT, -1}:  # its inode number is soon another file's
            self._numbers.pop(self._now.inodes[gone].ino, None)
        self.recording.ops.append(op)

    # -- finding out what is meant ----------------------------------------------------------------------------------

    def _number(self, found: os.stat_result) -> int:
        return self._numbers.get(found.st_ino, -1) if found.st_dev == self._dev else -1

    def _entry(self, path: Any, dir_fd: int | None) -> Entry | None:
        """The directory of ours and the name in it that a path means, if it is one of ours."""
        above, _, name = os.fsdecode(path).rpartition("/")
        absolute = os.fsdecode(path).startswith("/")
        try:
            if dir_fd is None or absolute:
                found = self._real.stat(above or ("/" if absolute else "."))
            else:
                found = self._real.stat(above, dir_fd=dir_fd) if above else self._real.fstat(dir_fd)
        except OSError:
            return None
        directory = self._number(found)
        return (directory, name) if directory >= 0 else None

    def _meant(self, path: Any, dir_fd: int | None = None, *, follow_symlinks: bool = True) -> int:
        """The number of what a path or descriptor means, -1: none of ours."""
        if isinstance(path, int):
            return self._number(self._real.fstat(path))
        text = os.fsdecode(path)
        if text.startswith(_OPEN_FD):
            return self._number(self._real.fstat(int(text.removeprefix(_OPEN_FD))))
        return self._number(self._real.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks))

    def _created(self, entry: Entry, found: os.stat_result, target: str = "") -> None:
        number = len(self._now.inodes)
        self._numbers[found.st_ino] = number
        kind, mode = stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode)
        self.note(Op("create", number, entry, kind=kind, value=mode, target=target, ino=found.st_ino))

    def _written(self, fd: int, at: int, data: bytes) -> None:
        number = self._meant(fd)
        if number >= 0 and data:
            self.note(Op("write", number, value=at, data=data))

    # -- the functions of os ----------------------------------------------------------------------------------------

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        entry = self._entry(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        before = self._now.at(entry)
        fd: int = self._real.open(path, flags, mode, dir_fd=dir_fd)
        if entry is not None and before < 0:
            self._created(entry, self._real.fstat(fd))
        elif entry is not None and flags & os.O_TRUNC:
            self.note(Op("size", self._meant(fd)))
        return fd

    def _fdopen(self, fd: int, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if mode in {"w", "wb"} and self._meant(fd) >= 0:
            return _writer(fd, mode, keywords.get("encoding"))
        return self._real.fdopen(fd, mode, *arguments, **keywords)

    def _path_open(
        self,
        path: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **keywords: Any,
    ) -> Any:
        """``io.open``, which is what ``Path.open()`` and ``Path.write_text()`` call."""
        if isinstance(path, int) or not set(mode) & set("wax+") or self._entry(path, None) is None:
            return self._io_open(path, mode, buffering, encoding, errors, newline, **keywords)
        assert set(mode) <= set("wxbt"), f"the recorder does not know the mode {mode!r}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if "x" in mode else os.O_TRUNC)
        return _writer(self._open(path, flags, 0o666), mode, encoding, newline)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._real.mkdir(path, mode, dir_fd=dir_fd)
        entry = self._entry(path, dir_fd)
        if entry is not None:
            self._created(entry, self._real.stat(path, dir_fd=dir_fd, follow_symlinks=False))

    def _symlink(self, target: Any, path: Any, _is_dir: bool = False, *, dir_fd: int | None = None) -> None:
        self._real.symlink(target, path, dir_fd=dir_fd)
        entry = self._entry(path, dir_fd)
        if entry is not None:
            found = self._real.stat(path, dir_fd=dir_fd, follow_symlinks=False)
            self._created(entry, found, os.fsdecode(target))

    def _link(self, path: Any, new: Any, *, dst_dir_fd: int | None = None, **keywords: Any) -> None:
        self._real.link(path, new, dst_dir_fd=dst_dir_fd, **keywords)
        entry = self._entry(new, dst_dir_fd)
        if entry is not None:
            self.note(Op("link", self._meant(new, dst_dir_fd, follow_symlinks=False), entry))

    def _rename(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        source, target = self._entry(old, src_dir_fd), self._entry(new, dst_dir_fd)
        self._real.rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if source is None and target is None:
            return
        assert source is not None, "a rename into the root from outside"
        assert target is not None, "a rename out of the root"
        moved, over = self._now.at(source), self._now.at(target)
        if moved != over:  # two names of one file: nothing happens
            self.note(Op("rename", moved, source, target, over))

    _replace = _rename

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        entry = self._entry(path, dir_fd)
        self._real.unlink(path, dir_fd=dir_fd)
        if entry is not None:
            self.note(Op("unlink", self._now.at(entry), entry))

    _remove = _unlink

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        entry = self._entry(path, dir_fd)
        self._real.rmdir(path, dir_fd=dir_fd)
        if entry is not None:
            self.note(Op("unlink", self._now.at(entry), entry))

    def _write(self, fd: int, data: Any) -> int:
        ours = self._meant(fd) >= 0
        at = os.lseek(fd, 0, os.SEEK_CUR) if ours else 0
        count: int = self._real.write(fd, data)
        if ours:
            self._written(fd, at, bytes(memoryview(data).cast("B")[:count]))
        return count

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        count: int = self._real.pwrite(fd, data, offset)
        self._written(fd, offset, bytes(memoryview(data).cast("B")[:count]))
        return count

    def _ftruncate(self, fd: int, length: int) -> None:
        self._real.ftruncate(fd, length)
        if self._meant(fd) >= 0:
            self.note(Op("size", self._meant(fd), value=length))

    def _truncate(self, path: Any, length: int) -> None:
        self._real.truncate(path, length)
        if self._meant(path) >= 0:
            self.note(Op("size", self._meant(path), value=length))

    def _posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._real.posix_fallocate(fd, offset, length)
        if self._meant(fd) >= 0:
            self.note(Op("size", self._meant(fd), value=self._real.fstat(fd).st_size))

    def _copy_file_range(self, source: int, target: int, count: int, *offsets: Any, **keywords: Any) -> int:
        at = keywords.get("offset_dst", offsets[1] if len(offsets) > 1 else None)
        at = os.lseek(target, 0, os.SEEK_CUR) if at is None else at
        copied: int = self._real.copy_file_range(source, target, count, *offsets, **keywords)
        if self._meant(target) >= 0:
            self._written(target, at, os.pread(target, copied, at))
        return copied

    def _clone(self, fd: int, request: int, *arguments: Any) -> Any:
        result = self._ioctl(fd, request, *arguments)
        if request == FICLONE and self._meant(fd) >= 0:
            size = self._real.fstat(fd).st_size
            self.note(Op("size", self._meant(fd), value=size))
            self._written(fd, 0, os.pread(fd, size, 0))
        return result

    def _chmod(self, path: Any, mode: int, **keywords: Any) -> None:
        self._real.chmod(path, mode, **keywords)
        self._note_mode(self._meant(path, **keywords), mode)

    def _fchmod(self, fd: int, mode: int) -> None:
        self._real.fchmod(fd, mode)
        self._note_mode(self._meant(fd), mode)

    def _note_mode(self, number: int, mode: int) -> None:
        if number >= 0:
            self.note(Op("mode", number, value=mode))

    def _utime(self, path: Any, times: Any = None, *, ns: tuple[int, int] | None = None, **keywords: Any) -> None:
        assert times is None, "the recorder knows times in nanoseconds only"
        self._real.utime(path, **({} if ns is None else {"ns": ns}), **keywords)
        number = self._meant(path, **keywords)
        if number >= 0 and ns is not None:
            self.note(Op("mtime", number, value=ns[1]))

    def _fsync(self, fd: int) -> None:
        self._real.fsync(fd)
        if self._meant(fd) >= 0:
            self.note(Op("fsync", self._meant(fd)))

    def _fdatasync(self, fd: int) -> None:
        self._fsync(fd)

    def _sync(self) -> None:
        self._real.sync()
        self.note(Op("syncfs"))


class Familiar:
    """While entered, files of a rebuilt tree show the inode numbers and change times they had when they were recorded.

    A power cut keeps both; building a tree anew cannot. What is changed from now on has a change time of its own.
    """

    def __init__(self, disk: Disk, numbers: dict[int, int], root: Path) -> None:
        self._stat, self._fstat = os.stat, os.fstat
        self._known: dict[int, tuple[int, int, Inode]] = {}
        for path in (root, *root.rglob("*")):
            found = path.lstat()
            self._known[found.st_ino] = (found.st_dev, found.st_ctime_ns, disk.inodes[numbers[found.st_ino]])

    def __enter__(self) -> Self:
        os.stat = self._as_stat
        os.fstat = self._as_fstat
        return self

    def __exit__(self, *_: object) -> None:
        os.stat, os.fstat = self._stat, self._fstat

    def _as_stat(self, *arguments: Any, **keywords: Any) -> os.stat_result:
        return self._as_known(self._stat(*arguments, **keywords))

    def _as_fstat(self, fd: int) -> os.stat_result:
        return self._as_known(self._fstat(fd))

    def _as_known(self, found: os.stat_result) -> os.stat_result:
        dev, built, inode = self._known.get(found.st_ino, (-1, 0, None))
        if inode is None or found.st_dev != dev:
            return found
        fields = list(found)
        fields[1] = inode.ino
        same = found.st_ctime_ns == built and inode.ctime_ns is not None
        times = {"st_atime_ns": found.st_atime_ns, "st_mtime_ns": found.st_mtime_ns}
        return os.stat_result(fields, {**times, "st_ctime_ns": inode.ctime_ns if same else found.st_ctime_ns})
