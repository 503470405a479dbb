"""A mirror: stage, commit, recover.

The order of one batch, and what a crash at each arrow leaves:

    stage -> verify        a staged file that nothing refers to; the next recover() sweeps it
    -> sync (syncfs)       the same
    -> journal, synced     before its rename: the old tree and litter, swept; after it: the old tree and a journal,
                           rolled forward by the next recover()
    -> apply               old and new paths, each whole; rolled forward
    -> sync                the new tree, perhaps not durable, and the journal; rolled forward
    -> remove the journal  the new tree; what the caller did not remember its next reconcile finds

In release mode whole trees are built and switched to (:mod:`syncd.mirror.release` has that order), and a batch mends
the current release in place.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Literal, Self

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import DiskProblem, FileChanged, Locked
from syncd.mirror.apply import DRIFT_POLICIES, Apply, Outcome, Placed
from syncd.mirror.assembly import Assembly
from syncd.mirror.build import Builder
from syncd.mirror.journal import JournalFile
from syncd.mirror.own import open_own, quietly, remove_tree
from syncd.mirror.release import Releases, view_current
from syncd.mirror.root import Dirs, Disk, View, disk_problem, lstat_at, open_root, without_ctime
from syncd.mirror.share import Sharer
from syncd.mirror.staging import PART_NAME, STAGED_NAME, Stage, Staged, stage_many
from syncd.model import Kind, Problem, Stat
from syncd.paths import PRIVATE_DIR, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from syncd.mirror.build import BuildItem, Built
    from syncd.mirror.share import Share
    from syncd.model import Entry
    from syncd.plan import MirrorPlan

log = structlog.get_logger()

Mode = Literal["mirror", "release"]
_LOCK = "lock"
_STAGE = "stage"
_CHECK = "check"

_libc = ctypes.CDLL(None, use_errno=True)


def sync_filesystem(fd: int) -> None:
    """Make everything that was written to the descriptor's filesystem durable, with one call.

    Since Linux 5.8 it reports write errors that happened since ``fd`` was opened.

    :raises OSError: something could not be written.
    """
    syncfs = getattr(_libc, "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    if syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Either:
    """What is in either of two."""

    def __init__(self, one: Container[str], other: Container[str]) -> None:
        self._one = one
        self._other = other

    def __contains__(self, name: object) -> bool:
        return name in self._one or name in self._other


class Mirror:
    """The only writer of one mirror: holds its root by descriptor and its lock by flock. Thread-confined, blocking.

    The *tree* is what is looked at and changed: in mirror mode the root, in release mode the current release; there it
    may be missing, then nothing is in it. Every stat that comes out of a release has no ctime.
    """

    def __init__(
        self,
        root: Path,
        root_fd: int,
        private_fd: int,
        lock_fd: int,
        stage: Stage,
        releases: Releases | None = None,
    ) -> None:
        """Take over open descriptors; see :meth:`open`."""
        self.root = root
        self._fds = [lock_fd, stage.fd, private_fd, root_fd]
        self._root_fd = root_fd
        self._private_fd = private_fd
        self._releases = releases
        self._whole = View(root, root_fd)
        self._stage = stage
        self._journal = JournalFile(private_fd)

    @classmethod
    def open(
        cls, root: Path, *, create: bool = True, owner: tuple[int, int] | None = None, mode: Mode = "mirror"
    ) -> Mirror:
        """Open a mirror, make its private directory and take its lock.

        :param create: make the root directory, with its parents, where it is missing.
        :param owner: user and group id of everything that is put into the mirror, see :class:`Stage`.
        :param mode: "release": keep releases, and work in the current one.
        :raises Locked: another process holds the mirror; the message names its pid.
        :raises DiskProblem: no such directory, not writable, a ``.syncd`` or ``releases`` that cannot be trusted, or a
            ``current`` that syncd did not make.
        """
        with ExitStack() as undo:
            if create:
                try:
                    root.mkdir(parents=True, exist_ok=True)
                except OSError as exc:
                    raise disk_problem(exc, f"cannot make the mirror directory {printable(str(root))}") from exc
            root_fd = open_root(root)
            undo.callback(os.close, root_fd)
            private_fd = open_own(root_fd, PRIVATE_DIR, root)
            undo.callback(os.close, private_fd)
            lock_fd = _lock(private_fd, root)
            undo.callback(os.close, lock_fd)
            stage_fd = open_own(private_fd, _STAGE, root)
            undo.callback(os.close, stage_fd)
            stage = Stage(stage_fd, owner)
            releases = Releases.open(root, root_fd, private_fd, stage) if mode == "release" else None
            undo.pop_all()
            return cls(root, root_fd, private_fd, lock_fd, stage, releases)

    @staticmethod
    def peek(root: Path, *, mode: Mode = "mirror") -> View:
        """Return a reader of a mirror (or any directory): no lock, nothing created, nothing changed.

        :raises DiskProblem: missing, not a directory or not readable; no release is current.
        """
        return view_current(root) if mode == "release" else View.open(root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mirror. A committed batch that is not complete stays for the next recover()."""
        if self._releases is not None and self._fds:
            self._releases.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    @property
    def _tree(self) -> View:
        return self._whole if self._releases is None else self._releases.tree

    # looking -------------------------------------------------------------------------------------------------------

    def look(self, path: str) -> Disk | None:
        """See :meth:`View.look`."""
        return self._tree.look(path)

    def look_all(self, paths: Iterable[str]) -> Iterator[tuple[str, Disk | None]]:
        """See :meth:`View.look_all`."""
        return self._tree.look_all(paths)

    def read_digests(self, path: str, *, sha256: bool = True) -> tuple[str, str, Stat]:
        """See :meth:`View.read_digests`."""
        return self._tree.read_digests(path, sha256=sha256)

    def walk(self, on_problem: Callable[[Problem], None] | None = None) -> Iterator[tuple[str, Disk]]:
        """See :meth:`View.walk`."""
        return self._tree.walk(on_problem)

    def is_foreign(self, disk: Disk) -> bool:
        """Tell whether what was found belongs to somebody else: neither root, nor us, nor the configured owner."""
        return self._stage.belongs.is_foreign(disk.uid)

    def is_settled(self, disk: Disk) -> bool:
        """Tell whether what was found belongs to whom syncd gives it."""
        return self._stage.belongs.is_settled(disk.uid, disk.gid)

    def holds_private(self, path: str) -> bool:
        """See :meth:`View.holds_private`."""
        return self._tree.holds_private(path)

    # staging -------------------------------------------------------------------------------------------------------

    def stage(self, entry: Entry) -> Staged:
        """Begin a staged file; its methods may be called from another thread.

        :raises DiskProblem: the disk refused.
        """
        return Staged(self._stage, entry)

    def stage_bytes(self, items: Sequence[tuple[Entry, bytes]]) -> list[str | Exception]:
        """Stage many small files; one staged name or SyncdError per item, in order."""
        return stage_many(self._stage, items)

    def stage_copy(self, path: str, entry: Entry) -> str:
        """Stage the content of another file of the mirror, checked against the entry's digest.

        :raises FileChanged: no regular file is there, or it does not hold that content.
        :raises DiskProblem: the disk refused.
        """
        source = self.open_source(path)
        try:
            return self._stage.add_copy(source, entry, path)
        finally:
            os.close(source)

    def stage_symlink(self, entry: Entry) -> str:
        """Stage a symlink.

        :raises BadName: no filesystem can hold this link text.
        :raises DiskProblem: the disk refused.
        """
        if entry.kind is not Kind.SYMLINK:
            raise ValueError(f"a {entry.kind} has no link text")
        return self._stage.add_symlink(entry)

    def stage_copy_staged(self, name: str, entry: Entry) -> str:
        """Stage a copy of content that is staged already.

        :raises FileChanged: it is not there (any more).
        :raises DiskProblem: the disk refused.
        """
        try:
            source = self._stage.open_staged(name)
        except FileNotFoundError:
            raise FileChanged("the staged content is gone") from None
        except OSError as exc:
            raise disk_problem(exc, "cannot open staged content") from exc
        try:
            return self._stage.add_copy(source, entry, name)
        finally:
            os.close(source)

    def assemble(self, entry: Entry) -> Assembly:
        """Begin, or go on with, a large staged file that is put together from chunks.

        :raises DiskProblem: the disk refused.
        """
        return Assembly(self._stage, entry)

    @property
    def run(self) -> str:
        """What the names of this run's staged content begin with."""
        return self._stage.run

    def refit_staged(self, name: str, entry: Entry, *, reread: bool) -> bool:
        """See :meth:`Stage.refit`."""
        return self._stage.refit(name, entry, reread=reread)

    def open_source(self, path: str) -> int:
        """Open a file of the mirror to read parts of it.

        :raises FileChanged: no regular file is there.
        :raises DiskProblem: the disk refused.
        """
        return self._tree.open_source(path)

    def open_part(self, digest: str) -> int:
        """Open a large staged file in the making to read parts of it.

        :raises FileChanged: there is none.
        """
        try:
            return self._stage.open_staged(f"part-{digest}")
        except OSError:
            raise FileChanged("no such file in the making") from None

    def part_bytes(self) -> int:
        """Return the bytes that large files in the making have on disk already."""
        size = 0
        with self._words("cannot look at staged content"), os.scandir(self._stage.fd) as found:
            for item in found:
                if PART_NAME.fullmatch(item.name) is not None:
                    with suppress(FileNotFoundError):
                        size += item.stat(follow_symlinks=False).st_blocks * 512
        return size

    def sweep_parts(self, wanted: Callable[[str], bool], spare: int) -> None:
        """Remove large files in the making that are not wanted any more, but for the newest few.

        :param wanted: given a content's digest.
        :param spare: how many stay: their chunks may serve what came after them.
        :raises DiskProblem: the disk refused.
        """
        old: list[tuple[int, str]] = []
        with self._words("cannot sweep staged content"), os.scandir(self._stage.fd) as found:
            for item in found:
                part = PART_NAME.fullmatch(item.name)
                if part is not None and not wanted(part[1]):
                    old.append((item.stat(follow_symlinks=False).st_mtime_ns, item.name))
            for _, name in sorted(old, reverse=True)[spare:]:
                self._stage.remove(name)

    def free_bytes(self) -> int:
        """Return the room for new content.

        :raises DiskProblem: the disk does not tell.
        """
        with self._words("cannot ask for free space"):
            found = os.fstatvfs(self._root_fd)
        if not found.f_blocks:  # a filesystem that does not tell (tmpfs without a limit, some of FUSE)
            return sys.maxsize
        return found.f_bavail * found.f_frsize

    def discard_staged(self, keep: Container[str] = ()) -> None:
        """Remove all staged content but that of a committed batch that is not complete.

        :param keep: names that stay, too.
        :raises DiskProblem: the disk refused.
        """
        journal = self._journal.read()
        names = {step.staged for step in journal.plan.place} if journal is not None else set()
        self._stage.sweep(_Either(names, keep), own=True)

    # committing ----------------------------------------------------------------------------------------------------

    def commit(self, plan: MirrorPlan, *, drift: str) -> Outcome:
        """Make a batch durable, then apply it.

        A batch of an earlier call that could not be completed is completed first; its paths are in the outcome.
        Staged content of the plan that is not in place afterwards (drift that is kept, problems) is removed.

        :param drift: "repair", "report" or "keep": what to do where a path is not as the plan assumed.
        :raises DiskProblem: the root, ``.syncd`` or the filesystem failed. Either nothing of the plan has happened, or
            it is committed and will be completed by the next commit() or recover(): plan anew from what is there.
        """
        if drift not in DRIFT_POLICIES:
            raise ValueError(f"unknown drift policy {drift!r}")
        if not plan:
            return Outcome()
        self._check_root()
        if self._releases is not None:
            self._releases.check_held()
        earlier = self._complete_journal()
        if plan.place:
            self._sync_staged()
        crash_point("before_journal")
        self._journal.write(plan, drift, self.release)
        crash_point("journal_durable")
        trusted = {done.path: done.stat for done in earlier.placed if done.stat is not None}
        with Dirs(self._tree.fd, one_filesystem=True) as dirs:
            outcome = Apply(dirs, self._stage, drift, self._sync, recovering=False, trusted=trusted).run(plan)
        self._finish(plan, outcome)
        return _merge(earlier, outcome)

    def _sync(self) -> None:
        sync_filesystem(self._root_fd)

    def _sync_staged(self) -> None:
        """Make staged content durable, or give all of it up: after a failed sync nobody knows what is on the disk."""
        try:
            sync_filesystem(self._root_fd)
        except OSError as exc:
            self._stage.sweep((), own=True)
            raise disk_problem(exc, "cannot make staged content durable") from exc

    def recover(self, keep: Container[str] = ()) -> list[Placed]:
        """Complete the batch of a journal, then remove what crashes left behind.

        To be called once after :meth:`open`, before anything is staged, and whenever commit() raised.

        :param keep: names of staged content that stay.
        :returns: what is in place because of the journal, for the index to remember; a path that somebody changed
            since is not among it and shows in the next comparison with the index.
        :raises DiskProblem: the disk refused; call it again later.
        """
        self._check_root()
        outcome = self._complete_journal()
        self._journal.sweep()
        self.drop_check()
        swept = self._releases.sweep() if self._releases is not None else 0
        swept += self._stage.sweep(keep, own=False)
        if swept:
            log.info("staging_swept", names=swept)
        return outcome.placed

    def _complete_journal(self) -> Outcome:
        journal = self._journal.read() if self._journal.exists() else None
        if journal is None:
            return Outcome()
        if journal.release != self.release or self._tree.fd < 0:  # its paths are not those of the tree we have now
            log.warning("journal_of_another_release", release=journal.release, now=self.release)
            self._journal.remove()
            return Outcome()
        with Dirs(self._tree.fd, one_filesystem=True) as dirs:
            outcome = Apply(dirs, self._stage, journal.drift, self._sync, recovering=True).run(journal.plan)
        self._finish(journal.plan, outcome)
        for problem in outcome.problems:
            log.warning("recover_problem", path=problem.path, code=problem.code, text=problem.text)
        log.info("journal_completed", placed=len(outcome.placed), problems=len(outcome.problems))
        return outcome

    def _finish(self, plan: MirrorPlan, outcome: Outcome) -> None:
        in_place = {done.path for done in outcome.placed}
        if self._releases is not None:
            for done in outcome.placed:
                done.stat = without_ctime(done.stat) if done.stat is not None else None
        with self._words("cannot make the mirror durable"):
            sync_filesystem(self._root_fd)
        crash_point("before_journal_removed")
        self._journal.remove()
        crash_point("done")
        # a crash from here on leaves staged content that was not wanted in the end: swept
        with self._words("cannot remove staged content"):
            for step in plan.place:
                if step.path not in in_place and STAGED_NAME.fullmatch(step.staged) is not None:
                    self._stage.remove(step.staged)

    # releases ------------------------------------------------------------------------------------------------------

    @property
    def release(self) -> str:
        """The release that is the tree; "": none, or mirror mode."""
        return self._releases.held if self._releases is not None else ""

    def current(self) -> str:
        """See :meth:`Releases.current`."""
        return self._need_releases().current()

    def releases(self) -> list[str]:
        """See :meth:`Releases.names`."""
        return self._need_releases().names()

    def build(
        self,
        name: str,
        items: Iterable[BuildItem],
        *,
        share: Share = "auto",
        read_only: bool = True,
        on_problem: Callable[[Problem], None] | None = None,
    ) -> Iterator[Built]:
        """See :meth:`Releases.build`."""
        self._check_root()
        return self._need_releases().build(name, items, share=share, read_only=read_only, on_problem=on_problem)

    def build_path(self, name: str) -> Path:
        """See :meth:`Releases.build_path`."""
        return self._need_releases().build_path(name)

    def drop_build(self, name: str) -> None:
        """See :meth:`Releases.drop`."""
        self._need_releases().drop(name)

    def publish_release(self, name: str) -> None:
        """See :meth:`Releases.publish`."""
        self._check_root()
        self._need_releases().publish(name, self._sync_staged)

    def switch(self, name: str) -> None:
        """See :meth:`Releases.switch`."""
        releases = self._need_releases()
        self._check_root()
        self._complete_journal()  # it is of the release that is left
        releases.switch(name)

    def prune(self, keep: int, spare: Container[str] = (), *, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """See :meth:`Releases.prune`."""
        self._check_root()
        return self._need_releases().prune(keep, spare, stop)

    def _need_releases(self) -> Releases:
        if self._releases is None:
            raise ValueError("the mirror keeps no releases")
        return self._releases

    # a tree to be checked ------------------------------------------------------------------------------------------

    def build_check(
        self,
        items: Iterable[BuildItem],
        *,
        share: Share = "reflink",
        on_problem: Callable[[Problem], None] | None = None,
    ) -> Path:
        """Build a tree to be looked at by a check, in mirror mode; return where it is.

        :meth:`drop_check` must come before :meth:`commit`: staged content is linked into it.

        :param items: see :meth:`Releases.build`.
        :param share: "reflink" or "copy"; a hard link would change the ctime of a file that is in use.
        :raises ContentChanged, DiskProblem: see :meth:`Releases.build`.
        """
        if share not in {"reflink", "copy"}:
            raise ValueError(f"files in use are not shared by {share!r}")
        self._check_root()
        self.drop_check()
        top = open_own(self._private_fd, _CHECK, self.root)
        try:
            sharer = Sharer(share, self._stage.owner)
            with Builder(top, self._stage, self._tree.fd, sharer, read_only=False, on_problem=on_problem) as builder:
                for _ in builder.build(items):
                    pass
                builder.finish_top()
        except BaseException:
            quietly(self.drop_check)
            raise
        finally:
            os.close(top)
        crash_point("check_built")
        return self.root / PRIVATE_DIR / _CHECK

    def drop_check(self) -> None:
        """Remove what :meth:`build_check` made, if anything.

        :raises DiskProblem: the disk refused.
        """
        with self._words("cannot remove the tree that was checked"):
            remove_tree(self._private_fd, _CHECK)
        crash_point("check_dropped")

    @contextmanager
    def _words(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise disk_problem(exc, what) from exc

    def _check_root(self) -> None:
        """Refuse to write into a directory that its path does not lead to any more (L10).

        :raises DiskProblem: replaced, unmounted or gone.
        """
        held = (os.fstat(self._root_fd), os.fstat(self._private_fd), os.fstat(self._stage.fd))
        with self._words(f"cannot find the mirror directory {printable(str(self.root))}"):
            root = self.root.stat()
            private = lstat_at(self._root_fd, PRIVATE_DIR)
            stage = lstat_at(self._private_fd, _STAGE)
        for was, now in zip(held, (root, private, stage), strict=True):
            if now is None or not os.path.samestat(was, now):
                raise DiskProblem(
                    f"mirror root was replaced: {printable(str(self.root))} is not the directory that was opened",
                    hint="it will be opened again; check what is mounted there",
                )
        if self._releases is not None:
            self._releases.check()


def _merge(earlier: Outcome, outcome: Outcome) -> Outcome:
    """Put two outcomes into one, the later one having the last word on each path."""
    later = {done.path for done in outcome.placed}
    told = {problem.path for problem in outcome.problems}
    return Outcome(
        [done for done in earlier.placed if done.path not in later] + outcome.placed,
        [problem for problem in earlier.problems if problem.path not in told] + outcome.problems,
        list(dict.fromkeys([*earlier.drifted, *outcome.drifted])),
    )


def _lock(private_fd: int, root: Path) -> int:
    """Take the mirror's lock; it is released by closing the descriptor, so also by dying.

    :raises Locked: another process holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(_LOCK, flags, 0o600, dir_fd=private_fd)
    except OSError as exc:
        raise disk_problem(exc, f"cannot open the lock of the mirror {printable(str(root))}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as exc:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise Locked(
            f"the mirror {printable(str(root))} is in use by process {printable(holder) or 'unknown'}",
            hint="stop that process, or give this one another directory",
        ) from exc
    except OSError as exc:
        os.close(fd)
        raise disk_problem(exc, f"cannot lock the mirror {printable(str(root))}") from exc
    return fd
