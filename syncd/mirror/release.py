"""Releases: whole trees side by side, and one symlink that says which of them is current.

    <root>/releases/<number>-<root8>/      complete, durable trees; read-only by default
    <root>/releases/.<name>.building       one that is being built, or checked
    <root>/releases/.<name>.trash          one that is being removed
    <root>/current -> releases/<name>      the switch

Rules kept here:
 * what is in ``releases`` under its own name is whole and durable: it got that name by one rename after one sync, and
   loses it by one rename before its first file goes (both within ``releases``: a directory that is moved elsewhere
   must be writable, and a release is not);
 * ``current`` is only ever replaced by one rename, and only if it is a symlink that syncd could have written;
 * the current release is never removed; what else is in ``releases`` is somebody else's and stays.

The order of one release, and what a crash at each arrow leaves:

    build -> check         a tree under a hidden name: swept; staged content is still staged
    -> sync (syncfs)       the same
    -> rename              a complete release that is not current: the next start may switch to it at once
    -> switch (rename)     the new release is current; what the caller did not remember it finds by the name
    -> prune (rename)      a tree under a hidden name: swept
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from syncd.crashpoints import crash_point
from syncd.errors import BadName, DiskProblem
from syncd.mirror.build import Builder
from syncd.mirror.own import open_own, quietly, remove_tree
from syncd.mirror.root import NoTree, PathRefused, View, disk_problem, lstat_at, open_root
from syncd.mirror.share import Sharer
from syncd.paths import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from pathlib import Path

    from syncd.mirror.build import BuildItem, Built
    from syncd.mirror.share import Share
    from syncd.mirror.staging import Stage
    from syncd.model import Problem

log = structlog.get_logger()

RELEASES: Final = "releases"
CURRENT: Final = "current"
_NEW_LINK: Final = "current.new"
_PUBLIC_MODE: Final = 0o755
_NAME: Final = r"(0|[1-9][0-9]{0,17})-([0-9a-f]{8})(?:-([1-9][0-9]{0,8}))?"
RELEASE_NAME: Final = re.compile(_NAME)
_HIDDEN: Final = re.compile(rf"\.{_NAME}\.(building|trash)")
_LINK: Final = re.compile(rf"{RELEASES}/({_NAME})")
_OPEN_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def release_name(number: int, root: str, taken: Container[str] = ()) -> str:
    """Return the name of a release.

    :param number: of its generation.
    :param root: the tree digest, hexadecimal.
    :param taken: names that are in use: the same generation may be built again (other rules, modes or owner).
    """
    name = plain = f"{number}-{root[:8]}"
    if RELEASE_NAME.fullmatch(name) is None:
        raise ValueError(f"no name of a release: {printable(name)}")
    again = 1
    while name in taken:
        again += 1
        name = f"{plain}-{again}"
    return name


def release_number(name: str) -> int:
    """Return the number of a release's generation."""
    return _order(name)[0]


def _order(name: str) -> tuple[int, int, str]:
    found = RELEASE_NAME.fullmatch(name)
    if found is None:
        raise BadName(f"{printable(name)!r} is no name of a release")
    return int(found[1]), int(found[3] or 1), name


def _building(name: str) -> str:
    return f".{name}.building"


class Releases:
    """The releases of one mirror. Thread-confined, blocking.

    :ivar tree: the release that is worked in, see :class:`View`; its stats have no ctime.
    :ivar held: its name; "": there is none. Not :meth:`current` where somebody else moved the link.
    """

    def __init__(self, root: Path, root_fd: int, private_fd: int, fd: int, stage: Stage) -> None:
        """Take over ``fd``, of ``releases``; the other descriptors are borrowed. See :meth:`open`."""
        self._root = root
        self._root_fd = root_fd
        self._private_fd = private_fd
        self._fd = fd
        self._stage = stage
        self._built: set[str] = set()
        self.tree: View = NoTree(root)
        self.held = ""

    @classmethod
    def open(cls, root: Path, root_fd: int, private_fd: int, stage: Stage) -> Releases:
        """Make or open ``releases``, and the current one.

        :raises DiskProblem: the disk refused, others could have prepared it for us, or ``current`` is nothing that
            syncd could have written.
        """
        releases = cls(root, root_fd, private_fd, open_own(root_fd, RELEASES, root, _PUBLIC_MODE), stage)
        try:
            if current := releases.current():
                releases._take_up(current, releases._open(current))
        except BaseException:
            releases.close()
            raise
        return releases

    def close(self) -> None:
        """Let go."""
        self.tree.close()
        os.close(self._fd)

    def _take_up(self, name: str, fd: int) -> None:
        self.tree.close()
        self.tree = View(self._root / RELEASES / name, fd, ctime=False)
        self.held = name

    def check(self) -> None:
        """Refuse to write into a ``releases`` that was replaced.

        :raises DiskProblem: it was.
        """
        now = lstat_at(self._root_fd, RELEASES)
        if now is None or not os.path.samestat(now, os.fstat(self._fd)):
            raise DiskProblem(
                f"{RELEASES!r} in the mirror {printable(str(self._root))} was replaced",
                hint="it will be opened again; check what is mounted there",
            )

    def check_held(self) -> None:
        """Refuse to change a release that is not the current one (any more).

        :raises DiskProblem: ``current`` was moved by somebody else, or there is none.
        """
        if not self.held or self.current() != self.held:
            raise DiskProblem(
                f"{CURRENT!r} in the mirror {printable(str(self._root))} does not lead to {self.held or 'a release'}",
                hint="syncd switches back to it, or builds it anew",
            )

    # looking -------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the complete releases, that of the oldest generation first.

        :raises DiskProblem: the disk refused.
        """
        try:
            with os.scandir(self._fd) as found:
                names = [
                    item.name
                    for item in found
                    if RELEASE_NAME.fullmatch(item.name) is not None and item.is_dir(follow_symlinks=False)
                ]
        except OSError as exc:
            raise disk_problem(exc, "cannot list the releases") from exc
        return sorted(names, key=_order)

    def current(self) -> str:
        """Return the release that ``current`` names; "": there is none, or it names one that is not there.

        :raises DiskProblem: it is nothing that syncd could have written.
        """
        name = read_current(self._root, self._root_fd)
        if name and lstat_at(self._fd, name) is None:
            log.warning("current_release_missing", release=name)
            return ""
        return name

    def _open(self, name: str) -> int:
        """Return a descriptor of a complete release.

        :raises DiskProblem: there is none of that name.
        """
        _order(name)
        try:
            return os.open(name, _OPEN_DIR, dir_fd=self._fd)
        except OSError as exc:
            raise disk_problem(exc, f"cannot open the release {name}") from exc

    # building ------------------------------------------------------------------------------------------------------

    def build(
        self,
        name: str,
        items: Iterable[BuildItem],
        *,
        share: Share = "auto",
        read_only: bool = True,
        on_problem: Callable[[Problem], None] | None = None,
    ) -> Iterator[Built]:
        """Build a whole release, not visible to anybody yet; to be exhausted, else nothing is left of it.

        Staged content is linked in and stays staged until the release is published.

        :param name: see :func:`release_name`; what an earlier call left under it is replaced.
        :param items: in component order, each path once. Directories that no item describes are made.
        :param share: how unchanged files are shared with the current release, see :class:`Sharer`.
        :param read_only: the release's own directory, and those that no item describes, get no write permission; the
            other modes are the items'.
        :param on_problem: is told of a path that cannot be made, which is then left out; ``None``: it is raised.
        :returns: what was made, a directory after what is below it.
        :raises ContentChanged: files or staged content are not as they were; it names them.
        :raises DiskProblem: the disk refused.
        """
        sharer = Sharer(share, self._stage.owner)
        top = self._begin(name)
        try:
            with Builder(top, self._stage, self.tree.fd, sharer, read_only=read_only, on_problem=on_problem) as builder:
                yield from builder.build(items)
                builder.finish_top()
        except BaseException:
            quietly(lambda: self.drop(name))
            raise
        finally:
            os.close(top)
        self._built.add(name)
        crash_point("release_built")

    def _begin(self, name: str) -> int:
        self.drop(name)
        try:
            os.mkdir(_building(name), stat.S_IRWXU, dir_fd=self._fd)
            return os.open(_building(name), _OPEN_DIR, dir_fd=self._fd)
        except OSError as exc:
            raise disk_problem(exc, f"cannot make the release {name}") from exc

    def build_path(self, name: str) -> Path:
        """Return where a release is that was built and is not published, for a check of it."""
        _order(name)
        return self._root / RELEASES / _building(name)

    def drop(self, name: str) -> None:
        """Give up a release that was built.

        :raises DiskProblem: the disk refused.
        """
        _order(name)
        self._built.discard(name)
        try:
            remove_tree(self._fd, _building(name))
        except OSError as exc:
            raise disk_problem(exc, f"cannot remove the unfinished release {name}") from exc

    def publish(self, name: str, sync: Callable[[], None]) -> None:
        """Make a release that was built durable, and give it its name.

        One that has the name already, and is not current, makes room.

        :param sync: makes everything durable that was written; where it fails nobody knows what is on the disk, and
            the release is given up.
        :raises DiskProblem: the disk refused.
        """
        if name not in self._built:
            raise ValueError(f"release {name} was not built")
        if name in {self.current(), self.held}:
            raise ValueError(f"release {name} is current")
        try:
            sync()
        except DiskProblem:
            quietly(lambda: self.drop(name))
            raise
        if lstat_at(self._fd, name) is not None:
            self._retire(name)
        try:
            os.rename(_building(name), name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as exc:
            raise disk_problem(exc, f"cannot publish the release {name}") from exc
        self._built.discard(name)
        crash_point("release_published")
        self._stage.sweep_linked()

    # switching -----------------------------------------------------------------------------------------------------

    def switch(self, name: str) -> None:
        """Make a complete release current, by one rename; it is the tree then. Doing it again changes nothing.

        :raises DiskProblem: there is no such release, the disk refused, or ``current`` is nothing that syncd could have
            written. :meth:`current` tells what is so.
        """
        fd = self._open(name)
        try:
            if self.current() != name:
                self._point(name)
        except BaseException:
            os.close(fd)
            raise
        self._take_up(name, fd)
        try:
            os.fsync(self._root_fd)
        except OSError as exc:
            raise disk_problem(exc, "cannot make the switch durable") from exc

    def _point(self, name: str) -> None:
        """Let ``current`` name a release.

        RACE: what somebody puts at ``current`` between the look and the rename is lost, unless it is a directory.
        """
        owner = self._stage.owner
        try:
            with suppress(FileNotFoundError):
                os.unlink(_NEW_LINK, dir_fd=self._private_fd)
            os.symlink(f"{RELEASES}/{name}", _NEW_LINK, dir_fd=self._private_fd)
            if owner is not None:  # a web server may follow only links of the owner of what they lead to
                os.chown(_NEW_LINK, *owner, dir_fd=self._private_fd, follow_symlinks=False)
            crash_point("before_switch")
            # a crash before this rename leaves the old release current, one after it the new one
            os.rename(_NEW_LINK, CURRENT, src_dir_fd=self._private_fd, dst_dir_fd=self._root_fd)
        except OSError as exc:
            raise disk_problem(exc, f"cannot switch to the release {name}") from exc
        crash_point("after_switch")

    # removing ------------------------------------------------------------------------------------------------------

    def prune(self, keep: int, spare: Container[str] = (), stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Remove old releases.

        :param keep: how many stay, the current one among them; those of the newest generations.
        :param spare: these stay, too.
        :param stop: asked between two removals, each of one file; once it says so, the rest stays for the next time.
        :returns: what is gone.
        :raises DiskProblem: the disk refused.
        """
        held = {self.current(), self.held}
        others = [name for name in reversed(self.names()) if name not in held]
        old = others[max(0, keep - 1) :]
        return [name for name in old if name not in spare and self._retire(name, stop)]

    def _retire(self, name: str, stop: Callable[[], bool] = lambda: False) -> bool:
        """Remove a release: its name goes first, durably, then what is in it.

        What cannot be removed now stays under a hidden name for the next :meth:`sweep`.

        :param stop: see :func:`remove_tree`.
        :returns: ``False``: stopped before anything happened.
        :raises DiskProblem: it could not even be taken away.
        """
        hidden = f".{name}.trash"
        try:
            self._remove(hidden, stop)
            if stop():
                return False
            os.rename(name, hidden, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as exc:
            raise disk_problem(exc, f"cannot remove the release {name}") from exc
        crash_point("release_pruned")
        self._remove(hidden, stop)
        return True

    def sweep(self) -> int:
        """Remove what crashes left; return how many names.

        :raises DiskProblem: the disk refused.
        """
        self._built.clear()
        swept = 0
        try:
            for name in os.listdir(self._fd):  # noqa: PTH208 - a descriptor, not a path
                if _HIDDEN.fullmatch(name) is not None:
                    self._remove(name)
                    swept += 1
            with suppress(FileNotFoundError):
                os.unlink(_NEW_LINK, dir_fd=self._private_fd)
                swept += 1
        except OSError as exc:
            raise disk_problem(exc, "cannot sweep the releases") from exc
        return swept + self._stage.sweep_linked()

    def _remove(self, hidden: str, stop: Callable[[], bool] = lambda: False) -> None:
        """Remove a tree under a hidden name; what refuses to go is reported and stays."""
        try:
            remove_tree(self._fd, hidden, stop=stop)
        except (OSError, PathRefused) as exc:
            log.warning("release_left", name=hidden, error=str(exc))


def read_current(root: Path, root_fd: int) -> str:
    """Return the release that ``current`` names, whether it is there or not; "": there is no ``current``.

    :raises DiskProblem: it is nothing that syncd could have written.
    """
    try:
        target = os.readlink(CURRENT, dir_fd=root_fd)
    except FileNotFoundError:
        return ""
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise disk_problem(exc, f"cannot read {CURRENT!r} in the mirror {printable(str(root))}") from exc
        target = ""
    found = _LINK.fullmatch(target)
    if found is None:
        what = f"a symlink to {printable(target)}" if target else "no symlink"
        raise DiskProblem(
            f"{CURRENT!r} in the mirror {printable(str(root))} is {what}, which syncd did not make",
            hint=f"remove it, or make it a symlink to {RELEASES}/<one of them>",
        )
    return found[1]


def view_current(root: Path) -> View:
    """Return a reader of the current release: no lock, nothing created, nothing changed.

    :raises DiskProblem: there is none, or it cannot be read.
    """
    root_fd = open_root(root)
    try:
        name = read_current(root, root_fd)
        if not name:
            raise DiskProblem(f"the mirror {printable(str(root))} has no current release yet")
        releases = os.open(RELEASES, _OPEN_DIR, dir_fd=root_fd)
        try:
            return View(root / RELEASES / name, os.open(name, _OPEN_DIR, dir_fd=releases))
        finally:
            os.close(releases)
    except OSError as exc:
        raise disk_problem(exc, f"cannot open the current release of {printable(str(root))}") from exc
    finally:
        os.close(root_fd)
