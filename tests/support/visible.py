"""What others get to see of a directory while this process changes it: looked at after every single system call."""

from __future__ import annotations

import os
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

PRIVATE = ".syncd"
OTHERS = stat.S_IRWXG | stat.S_IRWXO
SYSTEM = "posix"
"""The module that the functions of :mod:`os` come from."""


class Seen(NamedTuple):
    """What somebody else can find out about a path.

    :ivar kind: the file type's bits.
    """

    kind: int
    mode: int
    uid: int
    gid: int

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.kind)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.kind)


class Watch:
    """While entered, notes every state that a path below a root is in, for threads that begin meanwhile, too.

    What is in hidden directories that only their owner can enter (a release that is being built) is not seen.

    It is the interpreter that tells of the calls (``sys.setprofile``), so nothing of the program is replaced, and none
    is missed: whatever is between two calls lasts until the second one.

    :ivar states: for each path, what it was in order, without repetition in a row; ``None``: it was not there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self.states: dict[str, list[Seen | None]] = {}
        self.looks = 0

    def __enter__(self) -> Self:
        self.look()
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        self.look()

    def _on_event(self, _frame: FrameType, event: str, function: Any) -> None:
        if event == "c_return" and getattr(function, "__module__", "") == SYSTEM:
            self.look()

    def look(self) -> None:
        """Note what is there now."""
        with self._lock:
            self.looks += 1
            now: dict[str, Seen] = {}
            self._walk(str(self._root), "", now)
            for path in self.states.keys() | now.keys():
                states = self.states.setdefault(path, [None] if self.looks > 1 else [])
                if not states or states[-1] != now.get(path):
                    states.append(now.get(path))

    def _walk(self, directory: str, above: str, now: dict[str, Seen]) -> None:
        try:
            found = list(os.scandir(directory))
        except FileNotFoundError:
            return
        for item in found:
            if item.name == PRIVATE and not above:
                continue
            path = f"{above}{item.name}"
            try:
                it = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            now[path] = Seen(stat.S_IFMT(it.st_mode), stat.S_IMODE(it.st_mode), it.st_uid, it.st_gid)
            is_open = it.st_mode & OTHERS or not item.name.startswith(".")
            if stat.S_ISDIR(it.st_mode) and is_open:
                self._walk(item.path, path + "/", now)
