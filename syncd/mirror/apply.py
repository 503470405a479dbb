"""Carrying out a committed batch, one step at a time.

Rules kept here:
 * every step can be done again: a step that finds its work done says so and changes nothing;
 * what is at a path is looked at right before it is changed and compared with what the plan assumed; the rest is
   drift, and the policy decides ("repair": ours wins, "report": theirs stays and is a problem, "keep": theirs stays);
 * a path that exists and is overwritten by a file or symlink is never missing: one rename;
 * nothing that is not a regular file or a directory is ever opened, and no symlink is followed;
 * a file gets its mode or owner in place only where nobody else can have it open for writing, else a verified copy
   takes its place; a directory of somebody else is taken over before anything is put into it
   (:mod:`syncd.mirror.owner`);
 * one path's failure is that path's problem; only a failing filesystem or process ends the batch, and its journal
   stays to be completed later.

RACE: between the look and the rename (or unlink) somebody may change the path; under "report" and "keep" that change
is lost. The window is a few microseconds; closing it would need a kernel call that compares and renames.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import BadName, DiskProblem, FileChanged
from syncd.mirror.root import (
    Dirs,
    PathRefused,
    change_mode,
    change_mtime,
    disk_problem,
    hash_fd,
    kind_of,
    lstat_at,
    open_regular,
    same_stat,
    split,
    to_stat,
)
from syncd.mirror.staging import STAGED_NAME, Stage
from syncd.model import DEFAULT_DIR_MODE, MODE_BITS, Entry, Kind, Problem, Stat
from syncd.paths import ancestors, printable, sort_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from syncd.plan import DirMeta, MakeDir, MirrorPlan, Place, Remove, SetMeta

log = structlog.get_logger()

DRIFT_POLICIES = ("repair", "report", "keep")

_ENDS_THE_BATCH = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENODEV, errno.ENXIO}
"""Of the process, the disk or its connection, not of a path: to be completed when that is mended."""

_CODES = {
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EROFS: "read_only",
    errno.EXDEV: "other_filesystem",
    errno.EBUSY: "busy",
    errno.ENAMETOOLONG: "name_too_long",
    errno.ENOENT: "missing",
}

COPIES_AT_ONCE = 500
"""Copies that are made durable together: each of them needs room beside what it is a copy of."""
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}
_UNSEEN = Stat(-1, 0, 0, 0, 0)
"""No file is like that."""
_U_RWX = stat.S_IRWXU


@dataclass(slots=True)
class Placed:
    """What is at a path now because of us.

    :ivar entry: ``None``: nothing any more.
    :ivar stat: read after rename, mode and time, so that the quick check of the index holds.
    """

    path: str
    entry: Entry | None
    stat: Stat | None


@dataclass(slots=True)
class Outcome:
    """What became of a batch.

    :ivar placed: at most one per path; the index should remember exactly these.
    :ivar problems: at most one per path.
    :ivar drifted: paths that were not as the plan assumed, in the order met; those without a ``placed`` are as they
        were found and need another look.
    """

    placed: list[Placed] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)


def same_as_entry(found: os.stat_result, entry: Entry) -> bool:
    """Tell whether kind, size, mode and time on disk are those of an entry (content and link text are not read)."""
    if kind_of(found.st_mode) is not entry.kind or found.st_mtime_ns != entry.mtime_ns:
        return False
    if entry.kind is Kind.SYMLINK:
        return True
    return found.st_size == entry.size and stat.S_IMODE(found.st_mode) == entry.mode & MODE_BITS


class Apply:
    """One execution of one plan.

    :param recovering: an earlier execution was cut off: work that is found done is accepted after reading it again.
    :param sync: makes everything that was written durable.
    :param trusted: paths that the plan could not know to be ours yet (completed from an older journal just now).
    """

    def __init__(
        self,
        dirs: Dirs,
        stage: Stage,
        drift: str,
        sync: Callable[[], None],
        *,
        recovering: bool,
        trusted: Mapping[str, Stat] | None = None,
    ) -> None:
        self._dirs = dirs
        self._stage = stage
        self._drift = drift
        self._sync = sync
        self._recovering = recovering
        self._trusted = trusted or {}
        self._placed: dict[str, Placed] = {}
        self._problems: dict[str, Problem] = {}
        self._drifted: dict[str, None] = {}
        self._blocked: set[str] = set()
        self._made: set[str] = set()
        self._opened_up: dict[str, int] = {}
        self._copies: list[tuple[SetMeta, str, Stat]] = []  # what takes the place of which inode

    def run(self, plan: MirrorPlan) -> Outcome:
        """Carry the plan out, in its order.

        :raises DiskProblem: the filesystem or the process fails; some steps are done, the journal has to stay.
        """
        try:
            # a crash after any step leaves the journal: recover() does all steps again, those done are recognised
            for clear in plan.clear:
                self._step(clear.path, partial(self._remove, clear, clearing=True))
            for make in plan.make_dirs:
                self._step(make.path, partial(self._make_dir, make))
            for place in plan.place:
                self._step(place.path, partial(self._place, place))
            for change in plan.set_meta:
                self._step(change.path, partial(self._set_meta, change))
                if len(self._copies) >= COPIES_AT_ONCE:
                    self._place_copies()
            self._place_copies()
            for remove in plan.remove:
                self._step(remove.path, partial(self._remove, remove, clearing=False))
            crash_point("before_dir_meta")
            # a crash here leaves directories with temporary modes and times: recover() sets them
            self._finish_dirs(plan.dir_meta)
        finally:
            for _, staged, _ in self._copies:  # the batch has ended before their turn
                self._stage.give_up(staged)
            self._close_up()
        return Outcome(list(self._placed.values()), list(self._problems.values()), list(self._drifted))

    def _step(self, path: str, action: Callable[[], None]) -> None:
        if path in self._blocked:
            return
        try:
            action()
        except PathRefused as exc:
            self._problem(path, exc.code, exc.message)
        except BadName as exc:
            self._problem(path, "bad_name", exc.message)
        except FileChanged:
            self._left_alone(path, "its content was changed here; it will be fetched again")
        except OverflowError:
            self._problem(path, "bad_time", "its modification time is out of range")
        except DiskProblem as exc:
            if not isinstance(exc.__cause__, OSError):
                raise
            self._os_error(path, exc.__cause__)
        except OSError as exc:
            self._os_error(path, exc)
        crash_point("after_each_step")

    def _os_error(self, path: str, exc: OSError) -> None:
        """Make an OSError one path's problem, or the end of the batch."""
        if exc.errno in _ENDS_THE_BATCH or (exc.errno == errno.EROFS and self._root_is_read_only()):
            raise disk_problem(exc, f"cannot go on at {printable(path)}") from exc
        code = _CODES.get(exc.errno or 0, "disk_error")
        if code == "missing":
            self._drifted[path] = None
        self._problem(path, code, str(disk_problem(exc, "the disk refused")))

    def _root_is_read_only(self) -> bool:
        return bool(os.fstatvfs(self._dirs.open("")).f_flag & os.ST_RDONLY)

    def _problem(self, path: str, code: str, text: str) -> None:
        self._problems.setdefault(path, Problem(path, code, text))

    def _remember(self, path: str, entry: Entry | None, found: os.stat_result | None) -> None:
        self._placed.pop(path, None)  # the later step of two at one path is the last in the list, too
        self._placed[path] = Placed(path, entry, None if found is None else to_stat(found))

    def _is_assumed(self, path: str, found: os.stat_result, assumed: Stat | None) -> bool:
        now = to_stat(found)
        return same_stat(now, assumed) or same_stat(now, self._trusted.get(path))

    def _left_alone(self, path: str, text: str) -> None:
        """Note drift that stays."""
        self._drifted[path] = None
        if self._drift != "keep":
            self._problem(path, "drift", text)

    # directories ---------------------------------------------------------------------------------------------------

    def _at(self, path: str, action: Callable[[int, str], None]) -> None:
        """Do something in the directory that holds ``path``; once more after opening up what is ours but closed."""
        above, name = split(path)
        try:
            action(self._dirs.open(above), name)
        except PermissionError:
            if not self._open_up(above):
                raise
            action(self._dirs.open(above), name)

    def _open_up(self, path: str) -> bool:
        """Give ourselves rwx on a directory and its ancestors where we own them; return whether that changed any.

        A crash leaves such a directory open: its DirMeta in the journal mends it, else the next reconcile.
        """
        changed = False
        for name in ["", *ancestors(path), path] if path else [""]:
            fd = self._dirs.open(name)
            found = os.fstat(fd)
            mode = stat.S_IMODE(found.st_mode)
            if found.st_uid != os.geteuid() or mode & _U_RWX == _U_RWX:
                continue
            change_mode(fd, mode | _U_RWX)
            self._opened_up.setdefault(name, mode)
            self._dirs.forget(name)  # what was held may be an O_PATH descriptor
            changed = True
        return changed

    def _close_up(self) -> None:
        """Give directories that were opened up their mode back, children first."""
        for path in sorted(self._opened_up, key=sort_key, reverse=True):
            try:
                change_mode(self._dirs.open(path), self._opened_up[path])
            except (OSError, PathRefused) as exc:
                log.warning("directory_left_open", path=printable(path), error=str(exc))
        self._opened_up.clear()

    def _make_dir(self, step: MakeDir) -> None:
        """Make a directory that only we can enter (it gets its mode when it is complete), or accept what is there.

        A file or symlink that is there without the plan knowing stays (an administrator may have moved a directory
        elsewhere and linked it), under every policy; the next plan, which knows it, may clear it.
        """

        def make(dir_fd: int, name: str) -> None:
            found = lstat_at(dir_fd, name)
            if found is not None and kind_of(found.st_mode) is None and self._drift == "repair":
                self._drifted[step.path] = None
                os.unlink(name, dir_fd=dir_fd)  # a fifo, socket or device is never part of a plan
            try:
                os.mkdir(name, _U_RWX, dir_fd=dir_fd)
            except FileExistsError:
                return
            self._made.add(step.path)

        split(step.path)
        try:
            self._claim(step.path)
        except PathRefused as exc:
            self._drifted[exc.at] = None
            if exc.at != step.path or exc.code != "parent_not_directory":
                raise
        except (FileNotFoundError, PermissionError):
            pass
        else:
            return
        self._at(step.path, make)
        self._claim(step.path)

    def _claim(self, path: str) -> int:
        """Open a directory, and take it over where it is somebody else's: his are the names in it, then.

        :raises PathRefused: it stays somebody else's, or it cannot be opened.
        """
        fd = self._dirs.open(path)
        found = os.fstat(fd)
        if not path or not self._stage.belongs.is_foreign(found.st_uid):
            return fd
        above = os.fstat(self._dirs.open(path.rpartition("/")[0]))
        fd = self._dirs.open(path)
        if not os.path.samestat(found, os.fstat(fd)):  # RACE: replaced since; the next look tells
            raise PathRefused("drift", "it was replaced while it was looked at", at=path)
        try:
            self._stage.belongs.take_over(fd, above)
        except PermissionError as exc:
            text = f"uid {found.st_uid} owns it and may change what is in it, and only root can take it over"
            raise PathRefused("foreign_directory", text, at=path) from exc
        log.warning("directory_taken_over", path=printable(path), uid=found.st_uid)
        self._made.add(path)
        self._dirs.forget(path)  # what was held may be an O_PATH descriptor
        return self._dirs.open(path)

    def _finish_dirs(self, metas: tuple[DirMeta, ...]) -> None:
        """Set modes and times, deepest first, after everything below is done."""
        described = {meta.path: meta for meta in metas}
        paths = [meta.path for meta in metas]
        bare = self._made - described.keys()
        if bare:
            paths = sorted({*paths, *bare}, key=sort_key, reverse=True)
        for path in paths:
            meta = described.get(path)
            self._step(path, partial(self._finish_dir, path, meta))

    def _finish_dir(self, path: str, meta: DirMeta | None) -> None:
        split(path)
        try:
            fd = self._claim(path)
        except PermissionError:
            if not self._open_up(path.rpartition("/")[0]):
                raise
            fd = self._claim(path)
        found = self._stage.belongs.give(fd)
        mode = meta.mode & MODE_BITS if meta is not None else DEFAULT_DIR_MODE
        if stat.S_IMODE(found.st_mode) != mode:
            change_mode(fd, mode)
        self._opened_up.pop(path, None)
        if meta is not None and found.st_mtime_ns != meta.mtime_ns:
            change_mtime(fd, found, meta.mtime_ns)
        found = os.fstat(fd)
        entry = Entry(Kind.DIR, mode, meta.mtime_ns if meta is not None else found.st_mtime_ns)
        self._remember(path, entry, found)

    # files and symlinks --------------------------------------------------------------------------------------------

    def _place(self, step: Place) -> None:
        if STAGED_NAME.fullmatch(step.staged) is None:
            raise BadName(f"{printable(step.staged)!r} is not a staged name")
        self._at(step.path, lambda dir_fd, name: self._place_at(step, dir_fd, name))

    def _place_at(self, step: Place, dir_fd: int, name: str) -> None:
        found = lstat_at(dir_fd, name)
        staged = lstat_at(self._stage.fd, step.staged)
        if staged is None:
            self._already_placed(step, found, dir_fd, name)
            return
        if found is not None:
            drift = not self._is_assumed(step.path, found, step.assumed)
            if drift and self._drift != "repair":
                self._left_alone(step.path, "it was changed here; the change is kept")
                return
            if drift:
                self._drifted[step.path] = None
            if stat.S_ISDIR(found.st_mode):
                self._dirs.forget(step.path)
                try:
                    os.rmdir(name, dir_fd=dir_fd)
                except OSError as exc:
                    if exc.errno not in _NOT_EMPTY:
                        raise
                    text = "a directory that is not empty is in the way"
                    raise PathRefused("directory_in_the_way", text, at=step.path) from exc
        try:
            os.rename(step.staged, name, src_dir_fd=self._stage.fd, dst_dir_fd=dir_fd)
        except IsADirectoryError as exc:  # RACE: made since we looked
            raise PathRefused("directory_in_the_way", "a directory is in the way", at=step.path) from exc
        after = lstat_at(dir_fd, name)
        if after is None or after.st_ino != staged.st_ino:  # RACE: replaced since; then it is not ours to remember
            self._drifted[step.path] = None
            return
        self._remember(step.path, step.entry, after)

    def _already_placed(self, step: Place, found: os.stat_result | None, dir_fd: int, name: str) -> None:
        """The staged name is gone: an execution before this one renamed it, or it never was there."""
        if found is not None and self._recovering and same_as_entry(found, step.entry):
            if step.entry.kind is Kind.SYMLINK:
                same = os.readlink(name, dir_fd=dir_fd) == step.entry.target
            else:
                same = self._content_is(step.entry, dir_fd, name, found)
            if same:
                self._remember(step.path, step.entry, found)
                return
        self._drifted[step.path] = None
        if not self._recovering:
            raise PathRefused("staged_missing", "its staged content is gone; it will be fetched again", at=step.path)
        if found is not None and self._drift == "repair" and not stat.S_ISDIR(found.st_mode):
            # Placed by us, and changed before it could be remembered: the comparison with the disk finds a drift of
            # what is ours, not a file of somebody else that stands in the way for ever.
            self._placed[step.path] = Placed(step.path, step.entry, _UNSEEN)

    def _content_is(self, entry: Entry, dir_fd: int, name: str, found: os.stat_result) -> bool:
        """Read a file that we cannot be certain of; tell whether it holds the entry's content."""
        try:
            fd = open_regular(dir_fd, name)
        except FileNotFoundError:
            return False
        try:
            return to_stat(os.fstat(fd)) == to_stat(found) and _reads_as(fd, entry)
        finally:
            os.close(fd)

    def _set_meta(self, step: SetMeta) -> None:
        self._at(step.path, lambda dir_fd, name: self._set_meta_at(step, dir_fd, name))

    def _set_meta_at(self, step: SetMeta, dir_fd: int, name: str) -> None:
        found = lstat_at(dir_fd, name)
        if found is None or kind_of(found.st_mode) is not step.entry.kind:
            self._left_alone(step.path, "what syncd wrote is not there any more; it will be fetched again")
            return
        certain = self._is_assumed(step.path, found, step.assumed)
        if not certain and not self._cut_off(step, found):
            if self._drift != "repair":
                self._left_alone(step.path, "it was changed here; the change is kept")
                return
            self._drifted[step.path] = None
        if step.entry.kind is Kind.SYMLINK:
            self._set_link_time(step, dir_fd, name, found)
        else:
            self._set_file_meta(step, dir_fd, name, found, certain=certain)

    def _cut_off(self, step: SetMeta, found: os.stat_result) -> bool:
        """Tell whether an execution that was cut off can explain what we find (its ctime is new at any rate)."""
        was = step.assumed
        return (
            self._recovering
            and was is not None
            and (found.st_ino, found.st_size) == (was.ino, was.size)
            and found.st_mtime_ns in {was.mtime_ns, step.entry.mtime_ns}
        ) or (self._recovering and same_as_entry(found, step.entry))

    def _set_link_time(self, step: SetMeta, dir_fd: int, name: str, found: os.stat_result) -> None:
        if os.readlink(name, dir_fd=dir_fd) != step.entry.target:
            self._left_alone(step.path, "the symlink was changed here; it will be made again")
            return
        if found.st_mtime_ns != step.entry.mtime_ns:
            times = (found.st_atime_ns, step.entry.mtime_ns)
            os.utime(name, ns=times, dir_fd=dir_fd, follow_symlinks=False)
        after = lstat_at(dir_fd, name)
        if after is None or after.st_ino != found.st_ino:
            self._drifted[step.path] = None
            return
        self._remember(step.path, step.entry, after)

    def _set_file_meta(self, step: SetMeta, dir_fd: int, name: str, found: os.stat_result, *, certain: bool) -> None:
        fd = _open_for_meta(dir_fd, name, step.path)
        try:
            now = os.fstat(fd)
            if to_stat(now) != to_stat(found) or (not certain and not _reads_as(fd, step.entry)):
                self._left_alone(step.path, "its content was changed here; it will be fetched again")
                return
            mode = step.entry.mode & MODE_BITS
            if not self._stage.belongs.may_stay(now, mode):
                # its other names, or who has it open, keep the inode as it is; we take a copy
                self._copies.append((step, self._stage.add_copy(fd, step.entry, step.path), to_stat(now)))
                return
            if stat.S_IMODE(self._stage.belongs.give(fd).st_mode) != mode:  # chown may have dropped set-id bits
                change_mode(fd, mode)
            if now.st_mtime_ns != step.entry.mtime_ns:
                change_mtime(fd, now, step.entry.mtime_ns)
            after = os.fstat(fd)
        finally:
            os.close(fd)
        self._remember(step.path, step.entry, after)

    def _place_copies(self) -> None:
        """Put copies in the place of what they are copies of; a rename must not be on the disk before its content is.

        :raises DiskProblem: the filesystem fails.
        """
        if not self._copies:
            return
        try:
            self._sync()
        except OSError as exc:
            raise disk_problem(exc, "cannot make copies durable") from exc
        self._copies.reverse()
        while self._copies:
            step, staged, original = self._copies.pop()
            self._step(step.path, partial(self._place_copy, step, staged, original))

    def _place_copy(self, step: SetMeta, staged: str, original: Stat) -> None:
        def put(dir_fd: int, name: str) -> None:
            found = lstat_at(dir_fd, name)
            if found is None or to_stat(found) != original:
                raise FileChanged("it was changed while it was copied")
            os.rename(staged, name, src_dir_fd=self._stage.fd, dst_dir_fd=dir_fd)
            self._remember(step.path, step.entry, os.stat(name, dir_fd=dir_fd, follow_symlinks=False))

        try:
            self._at(step.path, put)
        except BaseException:
            self._stage.give_up(staged)
            raise

    # removals ------------------------------------------------------------------------------------------------------

    def _remove(self, step: Remove, *, clearing: bool) -> None:
        try:
            self._at(step.path, lambda dir_fd, name: self._remove_at(step, dir_fd, name, clearing=clearing))
        except FileNotFoundError:
            self._remember(step.path, None, None)
        except PathRefused as exc:
            if exc.code not in {"parent_is_symlink", "parent_not_directory"}:
                if clearing:
                    self._blocked.add(step.path)
                raise
            # nothing of ours can be below what is no directory; where that leads is none of our business
            self._remember(step.path, None, None)
        except OSError:
            if clearing:
                self._blocked.add(step.path)
            raise

    def _remove_at(self, step: Remove, dir_fd: int, name: str, *, clearing: bool) -> None:
        found = lstat_at(dir_fd, name)
        if found is None:
            self._remember(step.path, None, None)
            return
        kind = kind_of(found.st_mode)
        if kind is not step.kind:
            self._remove_other_kind(step, clearing=clearing)
            return
        if kind is Kind.DIR:
            self._dirs.forget(step.path)
            try:
                os.rmdir(name, dir_fd=dir_fd)
            except OSError as exc:
                if exc.errno not in _NOT_EMPTY:
                    raise
                text = "it holds files that syncd did not write, so it stays"
                code = "directory_in_the_way" if clearing else "directory_not_empty"
                raise PathRefused(code, text, at=step.path) from exc
        else:
            if not self._is_assumed(step.path, found, step.assumed):
                if self._drift != "repair":
                    if clearing:
                        self._blocked.add(step.path)
                    self._left_alone(step.path, "it was changed here; it is kept although it was removed upstream")
                    return
                self._drifted[step.path] = None
            os.unlink(name, dir_fd=dir_fd)
        self._remember(step.path, None, None)

    def _remove_other_kind(self, step: Remove, *, clearing: bool) -> None:
        """What we wrote is gone and something else is there, which is not ours to remove.

        While completing a journal, what is there may be the very thing that the path was cleared for.
        """
        if clearing and self._recovering:
            return
        self._drifted[step.path] = None
        if self._drift == "repair":
            self._remember(step.path, None, None)
            return
        if clearing:
            self._blocked.add(step.path)
        self._left_alone(step.path, "it was replaced here; what is there now is kept")


def _open_for_meta(dir_fd: int, name: str, path: str) -> int:
    """Open a regular file to change its mode or time; one that we may not read by O_PATH."""
    try:
        return open_regular(dir_fd, name)
    except FileNotFoundError as exc:
        raise PathRefused("drift", "it was replaced while its mode was being set", at=path) from exc
    except PermissionError:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def _reads_as(fd: int, entry: Entry) -> bool:
    """Tell whether an open file holds the entry's content; without any digest known its size decides."""
    if os.fstat(fd).st_size != entry.size:
        return False
    try:
        digest, sha256, _ = hash_fd(fd, sha256=not entry.digest and bool(entry.sha256))
    except OSError as exc:
        if exc.errno != errno.EBADF:  # O_PATH: not readable for us
            raise
        return False
    if entry.digest:
        return digest == entry.digest
    return not entry.sha256 or sha256 == entry.sha256
