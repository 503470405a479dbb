"""Disk to rows: what a source directory holds, and content read untorn.

Rules kept here:
 * below the root no symlink is ever followed, and nothing but regular files and directories is opened:
   every step goes through a held directory descriptor with O_NOFOLLOW. The root itself may be a
   symlink; it is opened anew for every scan and look, so that a root that was replaced or unmounted is seen;
 * a failure belongs to its path: what cannot be read is a problem, not an absence. Only a missing root
   and a lack of descriptors or memory end a scan;
 * a file counts as unchanged only if its stat fields are those of the index *and* it was hashed late
   enough that a change could not hide behind equal timestamps;
 * content is read between two equal stats, the first one old enough that a write during the read must
   show in the second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_bits
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from blake3 import blake3

from syncd.errors import BadName, DiskProblem, FileChanged
from syncd.index import LocalRow
from syncd.model import MODE_BITS, Entry, Kind, Problem, Stat
from syncd.paths import check_path, is_private, printable
from syncd.rules import IGNORE_FILE, Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    Known = Callable[[str], Iterable[LocalRow]]

RACY_NS = 10_000_000
"""Linux stamps files with a clock that ticks every 1 to 10 ms (CONFIG_HZ): within a tick a change leaves no trace."""

MAX_DEPTH = 200
MAX_IGNORE_BYTES = 1024 * 1024
_BLOCK = 1024 * 1024
_SURE_BYTES = 700  # a path of fewer characters fits whatever they are
_SYMLINK_MODE = 0o777

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OPEN_DIR = _OPEN | os.O_DIRECTORY
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # with O_NOFOLLOW, ELOOP says "a symlink now"
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

SymlinkPolicy = Literal["inside", "all", "skip"]


@dataclass(frozen=True, slots=True)
class Found:
    """A path that takes part.

    :ivar row: what is there now; the index's own row where ``fresh``.
    :ivar fresh: the quick check holds, so nothing need be remembered anew. Otherwise a file is to be
        hashed, and the row of a directory or symlink is complete as it is.
    """

    row: LocalRow
    fresh: bool


@dataclass(frozen=True, slots=True)
class Vanished:
    """A directory that was listed, or asked for, and is not there (any more)."""

    path: str


class Unreadable(DiskProblem):
    """One file cannot be read; others may."""


class _Known:
    """The index's rows of one directory's children, asked for in the order of their names.

    Both sides are sorted by the bytes of the names, which for UTF-8 is the order of ``str``; so they are merged, and
    no more than a page of rows is in memory.
    """

    __slots__ = ("_here", "_rows")

    def __init__(self, rows: Iterable[LocalRow]) -> None:
        self._rows = iter(rows)
        self._here = next(self._rows, None)

    def row(self, path: str) -> LocalRow | None:
        """Return a child's row; no path may come before the one asked for last."""
        here = self._here
        while here is not None and here.path < path:
            here = next(self._rows, None)
        self._here = here
        return here if here is not None and here.path == path else None


@dataclass(slots=True)
class _Frame:
    """One directory on the way down."""

    fd: int
    path: str
    rules: Rules
    names: Iterator[str]
    known: _Known
    ignore_problem: Problem | None
    pending: Found | None = None  # needed only as a parent: told when something below is


def stays_inside(path: str, target: str) -> bool:
    """Tell whether a symlink at ``path`` is relative and, read as text, never climbs above the root."""
    if target.startswith("/"):
        return False
    depth = path.count("/")
    for part in target.split("/"):
        if part == "..":
            depth -= 1
            if depth < 0:
                return False
        elif part not in {"", "."}:
            depth += 1
    return True


def is_racy(hashed_ns: int, mtime_ns: int, ctime_ns: int) -> bool:
    """Tell whether content read at ``hashed_ns`` may have changed afterwards without a trace in the timestamps.

    A time of modification in the future always counts: it may be stamped again. ctime cannot be set,
    so one far from the moment of reading means a clock that was set, and says nothing.
    """
    return hashed_ns <= mtime_ns + RACY_NS or abs(hashed_ns - ctime_ns) <= RACY_NS


def _stat(st: os.stat_result) -> Stat:
    return Stat(st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino, st.st_dev)


def _file_row(path: str, st: os.stat_result) -> LocalRow:
    return LocalRow(path, Entry(Kind.FILE, st.st_mode & MODE_BITS, st.st_mtime_ns, st.st_size), _stat(st))


def _dir_row(path: str, st: os.stat_result) -> LocalRow:
    return LocalRow(path, Entry(Kind.DIR, st.st_mode & MODE_BITS, st.st_mtime_ns), _stat(st))


def _found_file(path: str, st: os.stat_result, known: LocalRow | None) -> Found:
    if known is not None and not known.problem:
        entry, old = known.entry, known.stat
        if (
            entry.kind is Kind.FILE
            and entry.digest
            and old.mtime_ns == st.st_mtime_ns
            and old.ctime_ns == st.st_ctime_ns
            and old.size == st.st_size
            and old.ino == st.st_ino
            and entry.mode == st.st_mode & MODE_BITS
            and not is_racy(known.hashed_ns, old.mtime_ns, old.ctime_ns)
        ):
            return Found(known, fresh=True)
    return Found(_file_row(path, st), fresh=False)


def _found(row: LocalRow, known: LocalRow | None) -> Found:
    return Found(row, fresh=row == known)


class _BlockedError(Exception):
    """A directory cannot be looked into: what it holds is unknown, not gone."""

    def __init__(self, path: str, why: str, code: str = "unreadable_dir") -> None:
        super().__init__(path)
        self.problem = Problem(path, code, why)


def _why(exc: OSError) -> str:
    return exc.strerror or str(exc)


def _dir_problem(path: str) -> Problem | None:
    if path.count("/") >= MAX_DEPTH:
        return Problem(path, "loop_too_deep", f"more than {MAX_DEPTH} directories deep")
    return _name_problem(path)


def _raise_if_exhausted(exc: OSError) -> None:
    if exc.errno in _EXHAUSTED:
        raise DiskProblem(f"cannot read the source: {_why(exc)}", hint="raise the limit of open files") from exc


def _name_problem(path: str) -> Problem | None:
    """Return why a name from disk cannot be an object's name."""
    if len(path) <= _SURE_BYTES and path.isascii():
        return None
    if not _is_utf8(path):
        return Problem(path, "not_utf8", "the name is not valid UTF-8")
    try:
        check_path(path)
    except BadName as exc:
        return Problem(path, "bad_name", exc.message)
    return None


class Scanner:
    """Reads one source directory. Blocking; one thread at a time."""

    def __init__(self, root: Path, rules: Rules, *, symlinks: SymlinkPolicy) -> None:
        self._root = root
        self._rules = rules
        self._symlinks = symlinks

    # -- directories -----------------------------------------------------------------------------------

    def check_root(self) -> None:
        """Return if the root can be scanned now.

        :raises DiskProblem: it is missing, not a directory, or unreadable.
        """
        os.close(self._open_root())

    def _open_root(self) -> int:
        hint = "check the path and what is mounted there"
        try:
            # Without O_NOFOLLOW: the root may be a symlink.
            fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise DiskProblem(f"source directory {self._root}: {_why(exc)}", hint=hint) from exc
        try:
            os.stat(".", dir_fd=fd)  # readable is not enough: its entries must be reachable
        except OSError as exc:
            os.close(fd)
            raise DiskProblem(f"source directory {self._root}: {_why(exc)}", hint=hint) from exc
        return fd

    def _with_ignore_file(self, fd: int, path: str, rules: Rules) -> tuple[Rules, Problem | None]:
        """Return the rules inside a directory, and what is wrong with its ``.syncdignore``.

        :raises _BlockedError: it cannot be read. What it excludes must not be published for that.
        """
        try:
            text = _read_ignore_file(fd)
        except OSError as exc:
            _raise_if_exhausted(exc)
            if exc.errno in _GONE:
                return rules, None
            raise _BlockedError(path, f"{IGNORE_FILE}: {_why(exc)}") from exc
        name = f"{path}/{IGNORE_FILE}" if path else IGNORE_FILE
        if text is None:
            return rules, Problem(name, "bad_ignore_file", "not a regular file, so it excludes nothing")
        skipped: list[str] = []
        rules = rules.with_ignore_file(path, text, skipped=skipped)
        return rules, Problem(name, "bad_ignore_file", printable("; ".join(skipped[:3]))) if skipped else None

    def _descend(self, path: str) -> tuple[int, Rules]:
        """Open a directory of the tree from the root down; the caller closes it.

        :returns: the descriptor, and the rules at (not inside) the directory.
        :raises FileNotFoundError: it is not there or does not take part, or an ancestor is a symlink.
        :raises _BlockedError: it or an ancestor cannot be looked into.
        """
        fd, rules, at = self._open_root(), self._rules, ""
        try:
            for name in path.split("/") if path else ():
                rules, _ = self._with_ignore_file(fd, at, rules)
                at = f"{at}/{name}" if at else name
                inner = self._open_dir(fd, name, at, rules)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
        return fd, rules

    @staticmethod
    def _open_dir(fd: int, name: str, path: str, rules: Rules) -> int:
        """Open a child directory.

        :raises FileNotFoundError: it is not there, not a directory (any more), or nothing in it takes part.
        :raises _BlockedError: it cannot be opened.
        """
        if not rules.may_descend(path) or path.count("/") >= MAX_DEPTH:
            raise FileNotFoundError(errno.ENOENT, "does not take part", path)
        try:
            return os.open(name, _OPEN_DIR, dir_fd=fd)
        except OSError as exc:
            _raise_if_exhausted(exc)
            if exc.errno in _GONE:
                raise FileNotFoundError(errno.ENOENT, "no such directory", path) from exc
            raise _BlockedError(path, _why(exc)) from exc

    # -- scanning --------------------------------------------------------------------------------------

    def scan(self, below: str, known: Known) -> Generator[Found | Problem | Vanished, None, None]:
        """Yield all that takes part below a directory ("" = all), parents first, in component order.

        The directory's own row comes first (the root has none), never as ``fresh``. A directory that
        takes part only as a parent comes right before the first thing below it that does. A single
        ``Vanished(below)`` says that no such directory takes part. Close the iterator to free its
        descriptors (one per level).

        :param known: gives the index's rows of one directory's children in component order. It is read while the scan
            goes on; rows may be written meanwhile if it allows that.
        :raises DiskProblem: the root cannot be read, or descriptors or memory ran out.
        """
        try:
            fd, rules = self._descend(below)
        except FileNotFoundError:
            yield Vanished(below)
            return
        except _BlockedError as blocked:
            yield self._unless_root(blocked)
            return
        found = Found(_dir_row(below, os.fstat(fd)), fresh=False) if below else None
        try:
            frame = self._enter(fd, below, rules, known)
        except _BlockedError as blocked:
            yield self._unless_root(blocked)
            return
        if found is not None and not rules.takes(below, is_dir=True):
            frame.pending, found = found, None
        yield from self._walk(frame, found, known)

    def _unless_root(self, blocked: _BlockedError) -> Problem:
        if not blocked.problem.path:  # then nothing at all is known
            raise DiskProblem(f"source directory {self._root}: {blocked.problem.text}") from blocked
        return blocked.problem

    def _enter(self, fd: int, path: str, rules: Rules, known: Known) -> _Frame:
        """List an open directory. The frame owns the descriptor; without one it is closed.

        :raises _BlockedError: it cannot be looked into.
        """
        try:
            try:
                names = sorted(os.listdir(fd))
            except OSError as exc:
                _raise_if_exhausted(exc)
                raise _BlockedError(path, _why(exc)) from exc
            problem = None
            if IGNORE_FILE in names:
                rules, problem = self._with_ignore_file(fd, path, rules)
            return _Frame(fd, path, rules, iter(names), _Known(known(path)), problem)
        except BaseException:
            os.close(fd)
            raise

    def _walk(self, first: _Frame, own: Found | None, known: Known) -> Iterator[Found | Problem | Vanished]:
        stack = [first]
        waiting = first.pending is not None  # whether a frame may have something pending
        try:
            if own is not None:
                yield own
            while stack:
                frame = stack[-1]
                for item in self._list(frame):
                    child = None
                    told: Found | Problem | Vanished | None
                    if isinstance(item, _Directory):
                        child, told = self._enter_child(frame, item, known)
                    else:
                        told = item
                    if child is not None:
                        stack.append(child)
                        waiting = waiting or child.pending is not None
                    if told is not None:
                        if waiting and isinstance(told, Found):
                            yield from _flush(stack)
                            waiting = False
                        yield told
                    if child is not None:
                        break
                else:
                    os.close(stack.pop().fd)
        finally:
            for frame in stack:
                os.close(frame.fd)

    def _list(self, frame: _Frame) -> Iterator[Found | Problem | _Directory]:
        """Yield what the directory's remaining names are; the caller enters directories."""
        fd, rules, known = frame.fd, frame.rules, frame.known
        prefix = f"{frame.path}/" if frame.path else ""
        for name in frame.names:
            path = prefix + name
            try:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except OSError as exc:
                if (problem := self._stat_failed(path, rules, exc)) is not None:
                    yield problem
                continue
            kind = stat_bits.S_IFMT(st.st_mode)
            if kind == stat_bits.S_IFDIR:
                if rules.may_descend(path):
                    yield _Directory(name, path)
            elif rules.takes(path, is_dir=False):
                item = self._judge(fd, name, path, st, known.row(path))
                if item is not None:
                    yield item
            if name == IGNORE_FILE and frame.ignore_problem is not None:
                yield frame.ignore_problem

    @staticmethod
    def _stat_failed(path: str, rules: Rules, exc: OSError) -> Problem | None:
        _raise_if_exhausted(exc)
        if exc.errno in _GONE or not rules.takes(path, is_dir=False):
            return None
        return _name_problem(path) or Problem(path, "unreadable", _why(exc))

    def _judge(
        self, fd: int, name: str, path: str, st: os.stat_result, known: LocalRow | None
    ) -> Found | Problem | None:
        """Judge what is not a directory; ``None`` where it is not to be mentioned."""
        kind = stat_bits.S_IFMT(st.st_mode)
        if kind == stat_bits.S_IFLNK and self._symlinks == "skip":
            return None
        if problem := _name_problem(path):
            return problem
        if kind == stat_bits.S_IFREG:
            return _found_file(path, st, known)
        if kind == stat_bits.S_IFLNK:
            return self._judge_symlink(fd, name, path, st, known)
        return Problem(path, "special_file", "neither file, directory nor symlink")

    def _judge_symlink(
        self, fd: int, name: str, path: str, st: os.stat_result, known: LocalRow | None
    ) -> Found | Problem | None:
        try:
            target = os.readlink(name, dir_fd=fd)
        except OSError as exc:
            _raise_if_exhausted(exc)
            if exc.errno in {*_GONE, errno.EINVAL}:  # not a symlink any more: the next look says what it is
                return None
            return Problem(path, "unreadable", _why(exc))
        if not _is_utf8(target):
            return Problem(path, "not_utf8", "the link's target is not valid UTF-8")
        if self._symlinks == "inside" and not stays_inside(path, target):
            return Problem(path, "symlink_outside", f"points to {printable(target)}")
        entry = Entry(Kind.SYMLINK, _SYMLINK_MODE, st.st_mtime_ns, target=target)
        return _found(LocalRow(path, entry, _stat(st)), known)

    def _enter_child(
        self, frame: _Frame, directory: _Directory, known: Known
    ) -> tuple[_Frame | None, Found | Problem | Vanished | None]:
        """Open a child; return its frame (``None``: not entered) and what to tell of it at once."""
        path = directory.path
        if problem := _dir_problem(path):
            return None, problem
        try:
            fd = self._open_dir(frame.fd, directory.name, path, frame.rules)
            # Of the descriptor: the name may have been given to another directory since the stat.
            found = _found(_dir_row(path, os.fstat(fd)), frame.known.row(path))
            child = self._enter(fd, path, frame.rules, known)
        except FileNotFoundError:
            return None, Vanished(path)
        except _BlockedError as blocked:
            return None, blocked.problem
        if frame.rules.takes(path, is_dir=True):
            return child, found
        child.pending = found
        return child, None

    def look(self, path: str, known: LocalRow | None) -> Found | Problem | None:
        """Return what one path is now; nothing below it is looked at.

        :returns: ``None``: not there or not taking part; an ancestor that is excluded or a symlink counts
            as that. A problem may name an ancestor that could not be read.
        :raises DiskProblem: the root cannot be read, or descriptors or memory ran out.
        """
        if not path or is_private(path):
            return None
        above, _, name = path.rpartition("/")
        try:
            fd, rules = self._descend(above)
        except FileNotFoundError:
            return None
        except _BlockedError as blocked:
            return self._unless_root(blocked)
        try:
            return self._look_in(fd, above, name, rules, known)
        except FileNotFoundError:
            return None
        except _BlockedError as blocked:
            return self._unless_root(blocked)
        finally:
            os.close(fd)

    def _look_in(self, fd: int, above: str, name: str, rules: Rules, known: LocalRow | None) -> Found | Problem | None:
        rules, _ = self._with_ignore_file(fd, above, rules)
        path = f"{above}/{name}" if above else name
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError as exc:
            return self._stat_failed(path, rules, exc)
        if not stat_bits.S_ISDIR(st.st_mode):
            return self._judge(fd, name, path, st, known) if rules.takes(path, is_dir=False) else None
        if not rules.may_descend(path):
            return None
        return _dir_problem(path) or self._look_dir(fd, name, path, rules, known)

    def _look_dir(self, fd: int, name: str, path: str, rules: Rules, known: LocalRow | None) -> Found | None:
        opened = self._open_dir(fd, name, path, rules)  # as a scan would: a directory that it cannot enter is a problem
        try:
            found = _found(_dir_row(path, os.fstat(opened)), known)
        finally:
            os.close(opened)
        if rules.takes(path, is_dir=True):
            return found
        # Perhaps it is needed as the parent of something: then a scan tells so.
        with contextlib.closing(self.scan(path, lambda _: ())) as inside:
            return found if any(isinstance(item, Found) for item in inside) else None

    # -- content ---------------------------------------------------------------------------------------

    def open_file(self, path: str) -> Source:
        """Open a regular file for reading.

        :raises FileChanged: it is gone, or not a regular file (any more).
        :raises Unreadable: it cannot be opened.
        :raises DiskProblem: the root cannot be opened, or descriptors or memory ran out.
        """
        above, _, name = path.rpartition("/")
        parent = self._open_parent(path, above)
        try:
            # RACE: what is opened may not be what was looked at. A symlink is refused, a fifo does not
            # block, a socket cannot be opened; Source looks again at the descriptor.
            st = os.stat(name, dir_fd=parent, follow_symlinks=False)
            fd = os.open(name, _OPEN, dir_fd=parent) if stat_bits.S_ISREG(st.st_mode) else -1
        except OSError as exc:
            os.close(parent)
            raise self._content_error(path, exc) from exc
        if fd < 0:
            os.close(parent)
            raise FileChanged(f"{printable(path)} is not a regular file any more")
        return Source(path, fd, parent)

    def _open_parent(self, path: str, above: str) -> int:
        fd = self._open_root()
        try:
            for name in above.split("/") if above else ():
                inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = inner
        except OSError as exc:
            os.close(fd)
            raise self._content_error(path, exc) from exc
        return fd

    @staticmethod
    def _content_error(path: str, exc: OSError) -> Exception:
        _raise_if_exhausted(exc)
        if exc.errno in {*_GONE, errno.ENXIO}:
            return FileChanged(f"{printable(path)} vanished before it was read")
        return Unreadable(f"{printable(path)}: {_why(exc)}")

    def hash_file(self, path: str, *, keep: int) -> tuple[LocalRow, bytes | None]:
        """Read a file untorn: its row with the BLAKE3, and its content where that has at most ``keep`` bytes.

        Blocks for up to RACY_NS where the file changed this moment. Bounded memory.

        :raises FileChanged: it is gone, or changed while it was read.
        :raises Unreadable: it cannot be read.
        :raises DiskProblem: the root cannot be opened, or descriptors or memory ran out.
        """
        with self.open_file(path) as source:
            hasher = blake3()
            kept: list[bytes] | None = [] if source.size <= keep else None
            while block := source.read(_BLOCK):
                hasher.update(block)
                if kept is not None:
                    kept.append(block)
            source.check()
            row = source.row(hasher.hexdigest())
        return row, b"".join(kept) if kept is not None else None


@dataclass(frozen=True, slots=True)
class _Directory:
    """A name that is a directory and may hold something that takes part."""

    name: str
    path: str


def _flush(stack: list[_Frame]) -> Iterator[Found]:
    for frame in stack:
        if frame.pending is not None:
            yield frame.pending
            frame.pending = None


def _read_ignore_file(fd: int) -> str | None:
    """Return the text of a directory's ``.syncdignore``; ``None``: it is not a regular file.

    :raises OSError: it is not there, cannot be read, or is too large.
    """
    if not stat_bits.S_ISREG(os.stat(IGNORE_FILE, dir_fd=fd, follow_symlinks=False).st_mode):
        return None
    with open(os.open(IGNORE_FILE, _OPEN, dir_fd=fd), "rb", buffering=0) as opened:  # noqa: PTH123 - a descriptor
        data = bytearray()
        while block := opened.read(MAX_IGNORE_BYTES + 1 - len(data)):
            data += block
    if len(data) > MAX_IGNORE_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_IGNORE_BYTES} bytes")
    return data.decode("utf-8", "surrogateescape")


def _is_utf8(text: str) -> bool:
    """Tell whether text that came from the disk was UTF-8 there (undecodable bytes are surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Source:
    """An open regular file whose content is only good if :meth:`check` passes afterwards.

    :ivar size: bytes the file had when it was opened; never more than that are read.
    """

    def __init__(self, path: str, fd: int, parent: int) -> None:
        """Take over both descriptors.

        :raises FileChanged: the descriptor is not a regular file.
        """
        self._path = path
        self._fd = fd
        self._parent = parent
        try:
            self._stat = self._settled()
        except BaseException:
            self.close()
            raise
        self.size = self._stat.st_size
        self._left = self.size

    def _settled(self) -> os.stat_result:
        """Return the file's stat at a moment when any later write must leave another ctime."""
        st = os.fstat(self._fd)
        if not stat_bits.S_ISREG(st.st_mode):
            raise FileChanged(f"{printable(self._path)} is not a regular file any more")
        self._opened_ns = time.time_ns()
        age = self._opened_ns - st.st_ctime_ns
        if not 0 <= age <= RACY_NS:
            # RACE: a single write(2) stamps the file when it begins. One that overwrites in place and
            # takes longer than the tick may be under way unseen; its end makes a new event, but no new stamp.
            return st
        time.sleep((RACY_NS - age + 1_000_000) / 1e9)
        self._opened_ns = time.time_ns()
        if _changed(st, os.fstat(self._fd)):
            raise FileChanged(f"{printable(self._path)} is being written")
        return st

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, ``b""`` at the end.

        :raises Unreadable: the disk refuses.
        """
        try:
            block = os.read(self._fd, min(size, self._left))
        except OSError as exc:
            raise Unreadable(f"{printable(self._path)}: {_why(exc)}") from exc
        self._left -= len(block)
        return block

    def check(self) -> None:
        """Return if all was read and the file is as it was when opened, under its name.

        :raises FileChanged: it is not.
        """
        # RACE: a directory above may have been renamed since; then this is what the path held a moment
        # ago, and the rename itself is another change that is seen by itself.
        try:
            now = os.fstat(self._fd)
            named = os.stat(self._path.rpartition("/")[2], dir_fd=self._parent, follow_symlinks=False)
        except OSError as exc:
            raise FileChanged(f"{printable(self._path)} vanished while it was read") from exc
        if (named.st_ino, named.st_dev) != (now.st_ino, now.st_dev):
            raise FileChanged(f"{printable(self._path)} was replaced while it was read")
        if self._left or _changed(self._stat, now):
            raise FileChanged(f"{printable(self._path)} changed while it was read")

    def row(self, digest: str) -> LocalRow:
        """Return the file's row as of its opening."""
        st = self._stat
        entry = Entry(Kind.FILE, st.st_mode & MODE_BITS, st.st_mtime_ns, st.st_size, digest)
        return LocalRow(self._path, entry, _stat(st), self._opened_ns)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        for fd in (self._fd, self._parent):
            if fd >= 0:
                os.close(fd)
        self._fd = self._parent = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _changed(before: os.stat_result, now: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_mode) != (
        now.st_size,
        now.st_mtime_ns,
        now.st_ctime_ns,
        now.st_mode,
    )
