"""What a mirror holds although syncd never wrote it, and its removal where the policy says so. Blocking.

Rules kept here:
 * only what the mirror's rules take is anybody's business here; a ``.syncd`` never is;
 * what is removed is what was seen: whatever changed since stays, and so does every directory that holds something;
 * nothing is removed on another filesystem, in another mirror within this one, or below a directory that cannot be
   read; sockets, fifos and devices stay;
 * much at once waits for a person's word: a mirror may have been pointed at the wrong directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from syncd.crashpoints import crash_point
from syncd.drift import evidence
from syncd.errors import DiskProblem, SafetyHalt, SyncdError
from syncd.index import LocalRow
from syncd.model import Kind, Problem
from syncd.paths import is_usable, parent, printable, sort_key
from syncd.plan import MAX_UNEXPLAINED_PERCENT, DirMeta, MirrorPlan, Remove, parents_of
from syncd.rules import IGNORE_FILE, Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from syncd.index import Index, RemoteRow
    from syncd.mirror import Disk, Mirror

log = structlog.get_logger()

MAX_STRANGERS: Final = 10_000
"""Paths removed at once."""
MAX_IGNORE_BYTES: Final = 1024 * 1024


class Stranger(NamedTuple):
    """One extraneous path."""

    path: str
    disk: Disk


class Extraneous:
    """The paths of one mirror that neither its index nor its bucket knows. Confined to the folder's thread.

    :param rules: what of the folder the mirror takes.
    :ivar problems: what could not be removed at the last attempt.
    :ivar stopping: set from another thread: leave the rest to the next time.
    """

    def __init__(self, mirror: Mirror, index: Index, rules: Rules, folder: str) -> None:
        self._mirror = mirror
        self._index = index
        self._rules = rules
        self._folder = folder
        self._log = log.bind(folder=folder, role="subscribe")
        self.problems: list[Problem] = []
        self.stopping = False

    def find(self, spare: Callable[[str], bool] = lambda _path: False) -> Iterator[Stranger]:
        """Yield what the mirror holds and syncd never wrote, children before parents.

        Left out, and with it every directory above it: what the bucket announces or the index knows, what the rules do
        not take (those of a mirrored ``.syncdignore``, too), names that cannot be paths, sockets, fifos and devices,
        what is on another filesystem, in another mirror, or below a directory that cannot be read.

        :param spare: paths that are to stay for other reasons.
        :raises DiskProblem: the mirror's directory cannot be looked at.
        """
        kept: set[str] = set()

        def on_problem(problem: Problem) -> None:
            kept.add(problem.path if problem.code == "unreadable_dir" else parent(problem.path))

        known = _Known(self._index)
        device = self._device()
        frames = [_Frame("", None, self._rules_below("", self._rules), closed=False)]
        for path, disk in self._mirror.walk(on_problem):
            while not _is_below(path, frames[-1].path):
                yield from self._leave(frames, kept)
            above = frames[-1]
            if above.closed:
                continue
            is_dir = disk.kind is Kind.DIR
            elsewhere = disk.kind is None or disk.stat.dev != device
            stays = elsewhere or known.has(path) or spare(path) or not above.rules.takes(path, is_dir=is_dir)
            if is_dir and not stays and self._is_mirror(path):
                stays = elsewhere = True
            if stays:
                above.keeps = True
            if is_dir:
                closed = elsewhere or not above.rules.may_descend(path)
                rules = above.rules if closed else self._rules_below(path, above.rules)
                frames.append(_Frame(path, None if stays else disk, rules, closed=closed))
            elif not stays:
                yield Stranger(path, disk)
        while frames:
            yield from self._leave(frames, kept)

    def _device(self) -> int:
        root = self._mirror.root
        try:
            return root.stat().st_dev
        except OSError as exc:
            raise DiskProblem(f"cannot look at the mirror directory {printable(str(root))}: {exc.strerror}") from exc

    def _is_mirror(self, path: str) -> bool:
        try:
            return self._mirror.holds_private(path)
        except DiskProblem:
            return True  # closed to us, so no business of ours

    @staticmethod
    def _leave(frames: list[_Frame], kept: set[str]) -> Iterator[Stranger]:
        frame = frames.pop()
        if frame.keeps or frame.path in kept or frame.disk is None:
            if frames:
                frames[-1].keeps = True
            return
        yield Stranger(frame.path, frame.disk)

    def _rules_below(self, directory: str, rules: Rules) -> Rules:
        """Return the rules within a directory: whoever wrote an ignore file for the source means the mirror, too.

        One that cannot be read might say anything, so all in its directory stays.
        """
        path = f"{directory}/{IGNORE_FILE}" if directory else IGNORE_FILE
        row = self._index.local(path) if is_usable(path) else None
        if row is None or row.entry.kind is not Kind.FILE:
            return rules
        text = self._read_ignore_file(path)
        return rules.with_ignore_file(directory, "*" if text is None else text, skipped=[])

    def _read_ignore_file(self, path: str) -> str | None:
        try:
            fd = self._mirror.open_source(path)
        except SyncdError:
            return None
        try:
            data = os.pread(fd, MAX_IGNORE_BYTES + 1, 0)
        except OSError:
            return None
        finally:
            os.close(fd)
        return data.decode("utf-8", "replace") if len(data) <= MAX_IGNORE_BYTES else None

    def remove(self, spare: Callable[[str], bool] = lambda _path: False, *, allow_delete: bool) -> int:
        """Remove what :meth:`find` yields, as far as it is still what was seen; return how many paths went.

        To be called when the mirror has all that the bucket announces: what is yet to come is not known here.

        :param allow_delete: a person's word.
        :raises SafetyHalt: too much of it; nothing is removed.
        :raises DiskProblem: the disk refused.
        """
        removed = 0
        self.problems = []
        while True:
            strangers = self.find(spare)
            page = list(islice(strangers, MAX_STRANGERS))
            if not page or self.stopping:
                return removed
            if not allow_delete:
                count = sum(1 for stranger in chain(page, strangers) if stranger.disk.kind is not Kind.DIR)
                if reason := extraneous_halt(count, self._index.count_local(dirs=False)):
                    raise SafetyHalt(
                        f"mirror of {self._folder!r}: {reason}",
                        hint=f'if that is meant: syncd allow {self._folder}; else extraneous = "keep"',
                    )
            gone = self._remove(page)
            removed += gone
            if len(page) < MAX_STRANGERS or gone == 0:
                return removed

    def _remove(self, page: list[Stranger]) -> int:
        steps = tuple(Remove(path, disk.kind, disk.stat) for path, disk in page if disk.kind is not None)
        metas = [
            DirMeta(path, remote.entry.mode, remote.entry.mtime_ns)
            for path in sorted(parents_of(step.path for step in steps), key=sort_key, reverse=True)
            if (remote := self._index.remote(path)) is not None and remote.entry.kind is Kind.DIR
        ]
        outcome = self._mirror.commit(MirrorPlan(remove=steps, dir_meta=tuple(metas)), drift="keep")
        crash_point("extraneous_removed")
        self.problems += outcome.problems
        found = dict(page)
        self._index.put_local(
            LocalRow(done.path, done.entry, done.stat)
            for done in outcome.placed
            if done.entry is not None and done.stat is not None
        )
        gone = [done.path for done in outcome.placed if done.entry is None and done.path in found]
        for path in gone:
            self._log.info("extraneous_removed", path=path, found=evidence(None, found[path]))
        return len(gone)


def extraneous_halt(extraneous: int, mirrored: int) -> str:
    """Return why the removal of extraneous paths must be held, "" if it need not. Directories are not counted.

    A mirror that was pointed at somebody's home looks like this: much that is not ours, and little that is.
    """
    if 100 * extraneous > MAX_UNEXPLAINED_PERCENT * mirrored:
        return f"would remove {extraneous} paths that syncd never wrote, beside {mirrored} that it keeps"
    return ""


@dataclass(slots=True)
class _Frame:
    """A directory on the way of :meth:`Extraneous.find`.

    :ivar disk: what it is, where it may go; ``None``: it stays.
    :ivar closed: what is below is nobody's business.
    :ivar keeps: something in it stays.
    """

    path: str
    disk: Disk | None
    rules: Rules
    closed: bool
    keeps: bool = False


class _Known:
    """Whether index or bucket know a path or anything below it; asked in component order."""

    def __init__(self, index: Index) -> None:
        self._tables: list[Iterator[LocalRow] | Iterator[RemoteRow]] = [index.iter_local(), index.iter_remote()]
        self._next: list[str | None] = [self._step(table) for table in self._tables]

    @staticmethod
    def _step(table: Iterator[LocalRow] | Iterator[RemoteRow]) -> str | None:
        row = next(table, None)
        return None if row is None else row.path

    def has(self, path: str) -> bool:
        """Advance to a path and tell what is known of it."""
        key = sort_key(path)
        for number, table in enumerate(self._tables):
            while (known := self._next[number]) is not None and sort_key(known) < key:
                self._next[number] = self._step(table)
        return any(known is not None and _is_below(known, path, itself=True) for known in self._next)


def _is_below(path: str, directory: str, *, itself: bool = False) -> bool:
    return directory == "" or path.startswith(directory + "/") or (itself and path == directory)
