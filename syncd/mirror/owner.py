"""Whose a file or directory is: what syncd may take for its own, and what it may change in place.

Rules kept here:
 * who owns an inode, or has it open for writing, decides what it holds, whatever its name and mode say later. So what
   belongs to somebody else is never made ours in place: its content is copied, verified and renamed over it;
 * the superuser, we ourselves and the configured owner are not somebody else;
 * a directory has no content of its own, and is taken over: by descriptor, closed to others before anything else.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Final

from syncd.mirror.root import change_mode, change_owner, drop_acls

OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
"""With an ACL the group's bits are its mask, so they say whether anybody else may write."""
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_PRIVATE: Final = stat.S_IRWXU


class Owner:
    """Whom everything in a mirror belongs to.

    :param ids: user and group, -1: as it is; ``None``: whoever runs this.
    :ivar kept: the filesystem does not ignore who things are given to.
    """

    def __init__(self, ids: tuple[int, int] | None = None) -> None:
        self.ids = ids
        self.kept = True
        self._self = os.geteuid()
        self._known = frozenset({0, self._self, *(uid for uid in (ids or ())[:1] if uid >= 0)})
        self._writers = self._known - {0} | {self._self}

    def is_foreign(self, uid: int) -> bool:
        """Tell whether something belongs to somebody whose word on its content does not count (-1: not known)."""
        return uid not in self._known and uid >= 0

    def is_settled(self, uid: int, gid: int) -> bool:
        """Tell whether something belongs to whom it must; without a configured owner, to nobody else."""
        if self.ids is None or not self.kept:
            return not self.is_foreign(uid)
        return self.ids[0] in {-1, uid} and self.ids[1] in {-1, gid} and not self.is_foreign(uid)

    def may_stay(self, found: os.stat_result, mode: int) -> bool:
        """Tell whether an inode may get a mode, and its owner, in place: nobody else can hold it open for writing.

        Only a time is changed where owner and mode are right already: who may write goes on being who may write.
        """
        before = stat.S_IMODE(found.st_mode)
        if found.st_nlink > 1 or found.st_uid not in self._writers:
            return False
        settled = self.is_settled(found.st_uid, found.st_gid)
        if before == mode and settled:
            return True
        gained = mode & ~before if settled else mode  # chown(2) takes set-id bits away, if only for a moment
        return not before & OTHERS_WRITE and not gained & _SET_ID

    def give(self, fd: int) -> os.stat_result:
        """Give an open file or directory to its owner; return what it is then.

        :raises OSError: the kernel refuses.
        """
        found = os.fstat(fd)
        if self.ids is None or (self.ids[0] in {-1, found.st_uid} and self.ids[1] in {-1, found.st_gid}):
            return found
        change_owner(fd, found, self.ids)
        found = os.fstat(fd)
        self.kept = self.ids[0] in {-1, found.st_uid} and self.ids[1] in {-1, found.st_gid}
        return found

    def take_over(self, fd: int, above: os.stat_result) -> None:
        """Make an open directory of somebody else ours and private, as if we had just made it.

        What he did inside meanwhile is drift or extraneous, as anybody's.

        :param above: of the directory that holds it.
        :raises OSError: the kernel refuses: only root (CAP_CHOWN) may take what is not its own.
        """
        with suppress(PermissionError):  # with CAP_CHOWN alone it must be ours first
            change_mode(fd, _PRIVATE)
        group = above.st_gid if above.st_mode & stat.S_ISGID else os.getegid()
        change_owner(fd, os.fstat(fd), (self._self, group))
        change_mode(fd, _PRIVATE)  # it was his to change until now
        drop_acls(fd)
