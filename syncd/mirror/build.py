"""Building a whole tree of its own out of staged content and unchanged files: a release, or a tree to be checked.

Rules kept here:
 * the tree is built under a name that nothing else looks at; a failure or a crash leaves what the next start sweeps;
 * staged content is linked in, not moved: it stays staged until the tree is what somebody needs, so that neither costs
   a second download;
 * a file of the tree that is held now is shared (:mod:`syncd.mirror.share`) only if its stat is as it was remembered;
 * directories are private until everything below them is done, then they get owner, mode and time;
 * memory is bounded by the depth of the tree.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

from syncd.crashpoints import crash_point
from syncd.errors import BadName, FileChanged, ObjectCorrupt
from syncd.mirror.root import (
    Dirs,
    PathRefused,
    change_mtime,
    change_owner,
    disk_problem,
    lstat_at,
    split,
    to_stat,
    without_ctime,
)
from syncd.mirror.staging import STAGED_NAME, make_symlink
from syncd.model import DEFAULT_DIR_MODE, MODE_BITS, Entry, Kind, Problem, Stat
from syncd.paths import ancestors, printable, sort_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from syncd.errors import SyncdError
    from syncd.mirror.share import Sharer
    from syncd.mirror.staging import Stage

MAX_CHANGED: Final = 10_000
"""Paths that one :class:`ContentChanged` names."""
_WRITE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_NO_LINK: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
_OF_THE_PATH: Final = {errno.ENAMETOOLONG: "name_too_long", errno.EILSEQ: "bad_name", errno.EINVAL: "bad_name"}


class Source(Protocol):
    """A file of the tree that is held now, with what is known of it; a row of the index is one."""

    @property
    def path(self) -> str:
        """Its path there."""

    @property
    def stat(self) -> Stat:
        """Its stat as remembered."""


class BuildItem(NamedTuple):
    """One path of the tree to be built.

    :ivar staged: name of staged content; of a file, where ``source`` is not given.
    :ivar source: a file with this content in the tree that is held now; its mode and time may be others.
    """

    path: str
    entry: Entry
    staged: str = ""
    source: Source | None = None


class Built(NamedTuple):
    """One path of a tree that was built, for the index to remember.

    :ivar stat: without ctime: another tree may share the inode.
    """

    path: str
    entry: Entry
    stat: Stat


class ContentChanged(FileChanged):
    """Files are not as they were remembered, or staged content is gone: stage them and build again.

    :ivar paths: the items that miss their content, at most :data:`MAX_CHANGED`.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        super().__init__(f"the content of {printable(paths[0])}{more} is not what it was; it will be fetched again")
        self.paths = paths


class Builder:
    """Fills one empty directory. Thread-confined, blocking.

    :param top: descriptor of the directory; borrowed.
    :param sources: descriptor of the tree that is held now, -1 for none; borrowed.
    :param read_only: directories that no item describes get no write permission.
    :param on_problem: is told of a path that cannot be made, which is then left out; ``None``: it is raised.
    """

    def __init__(
        self,
        top: int,
        stage: Stage,
        sources: int,
        sharer: Sharer,
        *,
        read_only: bool,
        on_problem: Callable[[Problem], None] | None = None,
    ) -> None:
        self._top = top
        self._dirs = Dirs(top, one_filesystem=True)
        self._sources = Dirs(sources, one_filesystem=True) if sources >= 0 else None
        self._stage = stage
        self._sharer = sharer
        self._bare_mode = DEFAULT_DIR_MODE & ~_WRITE if read_only else DEFAULT_DIR_MODE
        self._on_problem = on_problem
        self._open: list[tuple[str, Entry | None]] = []  # directories along one path that are not finished
        self._last = b""
        self._changed: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._dirs.close()
        if self._sources is not None:
            self._sources.close()

    def build(self, items: Iterable[BuildItem]) -> Iterator[Built]:
        """Make everything; yield it as it gets done, a directory after what is below it.

        :param items: in component order, each path once.
        :raises ContentChanged: after all sources were looked at; the tree is of no use.
        :raises BadName, ObjectCorrupt, DiskProblem: a path that cannot be made, where nobody is to be told.
        :raises DiskProblem: the disk refused.
        """
        for item in items:
            key = sort_key(item.path)
            if key <= self._last:
                raise ValueError(f"{printable(item.path)} is out of order")
            self._last = key
            if self._changed:
                self._look_only(item)
                continue
            yield from self._finish_to(item.path)
            yield from self._step(item)
            crash_point("release_building")
        if self._changed:
            raise ContentChanged(tuple(self._changed))
        yield from self._finish_to("")

    def finish_top(self) -> None:
        """Give the top directory, which no item describes, its owner and mode.

        :raises DiskProblem: the disk refused.
        """
        try:
            change_owner(self._top, os.fstat(self._top), self._stage.owner)
            os.fchmod(self._top, self._bare_mode)
        except OSError as exc:
            raise disk_problem(exc, "cannot finish a tree") from exc

    def _step(self, item: BuildItem) -> Iterator[Built]:
        try:
            done = self._make(item)
        except FileChanged:
            self._changed.append(item.path)
        except BadName as exc:
            self._refuse(item.path, "bad_name", exc)
        except ObjectCorrupt as exc:
            self._refuse(item.path, "bad_time", exc)
        except PathRefused as exc:
            self._refuse(item.path, exc.code, exc)
        except OSError as exc:
            problem = disk_problem(exc, f"cannot make {printable(item.path)}")
            if exc.errno not in _OF_THE_PATH:
                raise problem from exc
            self._refuse(item.path, _OF_THE_PATH[exc.errno], problem)
        else:
            if done is not None:
                yield done

    def _refuse(self, path: str, code: str, error: SyncdError) -> None:
        if self._on_problem is None:
            raise error
        self._on_problem(Problem(path, code, error.message))

    def _make(self, item: BuildItem) -> Built | None:
        above, name = split(item.path)
        self._enter_parents(item.path)
        entry = item.entry
        if entry.kind is Kind.DIR:
            self._make_dir(item.path, entry)
            return None
        dir_fd = self._dirs.open(above)
        if entry.kind is Kind.SYMLINK:
            make_symlink(dir_fd, name, entry, self._stage.owner)
        elif item.source is not None:
            self._share(item.source, entry, dir_fd, name)
        else:
            self._link_staged(item.staged, entry, dir_fd, name)
        found = lstat_at(dir_fd, name)
        if found is None:
            raise FileChanged("it vanished at once")
        return Built(item.path, entry, without_ctime(to_stat(found)))

    # content -------------------------------------------------------------------------------------------------------

    def _share(self, source: Source, entry: Entry, dir_fd: int, name: str) -> None:
        above, base = split(source.path)
        if self._sources is None:
            raise FileChanged("there is no tree to take it from")
        try:
            source_fd = self._sources.open(above)
        except (FileNotFoundError, PathRefused):
            raise FileChanged("its directory is gone") from None
        self._sharer.share((source_fd, base), source.stat, (dir_fd, name), entry)

    def _link_staged(self, staged: str, entry: Entry, dir_fd: int, name: str) -> None:
        if STAGED_NAME.fullmatch(staged) is None:
            raise ValueError(f"{printable(staged)!r} is not a staged name")
        found = lstat_at(self._stage.fd, staged)
        if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
            raise FileChanged("its staged content is gone")
        try:
            os.link(staged, name, src_dir_fd=self._stage.fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno not in _NO_LINK:
                raise
            os.rename(staged, name, src_dir_fd=self._stage.fd, dst_dir_fd=dir_fd)  # no links here: better than a copy

    def _look_only(self, item: BuildItem) -> None:
        """Something is missing, so that nothing will come of the tree: find out what else is."""
        if item.source is None or len(self._changed) >= MAX_CHANGED:
            return
        try:
            above, base = split(item.source.path)
            found = lstat_at(self._sources.open(above), base) if self._sources is not None else None
        except (OSError, BadName, PathRefused):
            found = None
        if found is None or not self._sharer.knows(found, item.source.stat):
            self._changed.append(item.path)

    # directories ---------------------------------------------------------------------------------------------------

    def _enter_parents(self, path: str) -> None:
        """Make the directories above a path that no item describes."""
        for above in ancestors(path)[len(self._open) :]:
            self._make_dir(above, None)

    def _make_dir(self, path: str, entry: Entry | None) -> None:
        above, name = split(path)
        try:
            os.mkdir(name, stat.S_IRWXU, dir_fd=self._dirs.open(above))
        except FileExistsError:
            text = f"{printable(path)} is a file, and something is to be below it"
            raise PathRefused("parent_not_directory", text, at=path) from None
        self._open.append((path, entry))

    def _finish_to(self, path: str) -> Iterator[Built]:
        """Finish the open directories that do not hold ``path``, the innermost first; "": all."""
        while self._open:
            last, entry = self._open[-1]
            if path.startswith(f"{last}/"):
                return
            try:
                done = self._finish(last, entry)
            except OverflowError:
                error = BadName(f"the modification time of {printable(last)} is out of range")
                self._refuse(last, "bad_time", error)
                done = self._finish(last, None)
            except OSError as exc:
                raise disk_problem(exc, f"cannot finish {printable(last)}") from exc
            self._open.pop()
            yield done

    def _finish(self, path: str, entry: Entry | None) -> Built:
        fd = self._dirs.open(path)
        found = os.fstat(fd)
        change_owner(fd, found, self._stage.owner)
        os.fchmod(fd, (entry.mode & MODE_BITS) if entry is not None else self._bare_mode)
        if entry is not None:
            change_mtime(fd, found, entry.mtime_ns)
        found = os.fstat(fd)
        if entry is None:
            entry = Entry(Kind.DIR, self._bare_mode, found.st_mtime_ns)
        self._dirs.forget(path)
        return Built(path, entry, without_ctime(to_stat(found)))
