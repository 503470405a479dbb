"""Which paths of a mirror somebody else may have changed: watching it, less what syncd did itself.

Rules kept here:
 * a hint only says where to look (``watch.py``); whether a path differs from what syncd left there is asked of
   ``suspects``, which compares stat fields with the index. Our own renames are remembered by then, and are no news;
 * a path is asked about some time after its first hint, not at once: what is written in one go is looked at once;
 * a path that is changed again and again is answered ever more slowly, each by itself, up to MAX_WAIT: a program that
   rewrites a mirrored file for ever costs a repair per minute, not one per write. The same holds for rescans;
 * memory is bounded: more than MAX_PATHS paths are a rescan.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final, Self

from syncd.errors import SyncdError
from syncd.watch import PathHints, PathWatcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable
    from pathlib import Path
    from types import TracebackType

SETTLE_SECONDS: Final = 0.5
MAX_WAIT: Final = 60.0
MAX_PATHS: Final = 10_000
FOLLOW_SECONDS: Final = 1.0
"""How often the root is asked for: a release may have taken the place of the one that is watched."""

_EVERYTHING: Final = None
_MAX_TRIES: Final = 16


class Damper:
    """When a hinted path is due. Pure: the time is an argument, in seconds.

    :param settle: from the first hint to when the path is due, at least.
    :param max_wait: between two times that a path was found changed, at most. ``None`` as a path means everything.
    """

    def __init__(self, settle: float, max_wait: float = MAX_WAIT) -> None:
        self._settle = settle
        self._max_wait = max(settle, max_wait)
        self._due: dict[str | None, float] = {}
        self._found: dict[str | None, tuple[int, float]] = {}  # path -> (how often lately, not due before)

    def note(self, paths: Iterable[str | None], now: float) -> None:
        """Take hints; those of a path that waits already change nothing."""
        for path in paths:
            if path not in self._due:
                self._due[path] = max(now + self._settle, self._found.get(path, (0, now))[1])
        if len(self._due) > MAX_PATHS:
            self._due.clear()
            self.note([_EVERYTHING], now)

    def take(self, now: float) -> set[str | None]:
        """Return what is due, and let it go. Everything takes the place of all else."""
        due = {path for path, when in self._due.items() if when <= now}
        if _EVERYTHING in due:
            self._due.clear()
            return {_EVERYTHING}
        for path in due:
            del self._due[path]
        return due

    def found(self, paths: Iterable[str | None], now: float) -> None:
        """Somebody had changed these paths: each is due later the next time, unless it is left in peace meanwhile."""
        if len(self._found) > MAX_PATHS:
            self._found = {path: known for path, known in self._found.items() if not self._is_old(known, now)}
        if len(self._found) > MAX_PATHS:
            self._found.clear()
        for path in paths:
            known = self._found.get(path, (0, now))
            tries = 0 if self._is_old(known, now) else known[0]
            wait = min(self._max_wait, self._settle * 2 ** min(tries, _MAX_TRIES))
            self._found[path] = (tries + 1, now + wait)

    def wait(self, now: float) -> float:
        """Return the seconds until something is due, infinity where nothing waits."""
        return max(0.0, min(self._due.values(), default=math.inf) - now)

    def _is_old(self, known: tuple[int, float], now: float) -> bool:
        return now - known[1] > self._max_wait


class MirrorWatch:
    """Watches a mirror; an async context manager.

    :param root: the directory to watch, asked for every second: in release mode the current release, which may be
        named by a symlink. It may be missing.
    :param suspects: given hinted paths returns those that are not as syncd left them; blocking work belongs into the
        folder's thread.
    :param on_mode: called in the event loop with (mode, reason), see :class:`syncd.watch.PathWatcher`.
    :param settle: seconds from the first hint of a path to the look at it.
    """

    def __init__(
        self,
        root: Callable[[], Path],
        suspects: Callable[[frozenset[str]], Awaitable[Collection[str]]],
        *,
        on_mode: Callable[[str, str], None] = lambda _mode, _reason: None,
        settle: float = SETTLE_SECONDS,
        max_wait: float = MAX_WAIT,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._suspects = suspects
        self._on_mode = on_mode
        self._now = now
        self._damper = Damper(settle, max_wait)
        self._watched = root()
        self._watcher = PathWatcher(self._watched, on_mode=on_mode)

    async def __aenter__(self) -> Self:
        await self._watcher.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._watcher.__aexit__(kind, exc, trace)

    @property
    def mode(self) -> str:
        """How the mirror is watched now: "starting", "events", "polling" or "down"."""
        return self._watcher.mode

    async def next(self) -> PathHints:
        """Wait for paths that somebody else changed, or for a reason to look at everything.

        Every watching begins with such a reason: what happened before it was not seen.
        """
        while True:
            await self._follow()
            wait = min(FOLLOW_SECONDS, self._damper.wait(self._now()))
            hints = await self._watcher.next(wait)
            self._damper.note([_EVERYTHING] if hints.rescan else hints.paths, self._now())
            due = self._damper.take(self._now())
            if _EVERYTHING in due:
                self._damper.found(due, self._now())
                return PathHints(frozenset(), rescan=True)
            if not due:
                continue
            try:
                changed = frozenset(await self._suspects(frozenset(path for path in due if path is not None)))
            except SyncdError:  # the index or the disk: the full round that follows meets the same, and says so
                self._damper.note([_EVERYTHING], self._now())
                continue
            self._damper.found(changed, self._now())
            if changed:
                return PathHints(changed, rescan=False)

    async def _follow(self) -> None:
        """Watch another directory where the mirror's tree is another one now."""
        root = self._root()
        if root == self._watched:
            return
        await self._watcher.__aexit__(None, None, None)
        self._watched = root
        self._watcher = PathWatcher(root, on_mode=self._on_mode)
        await self._watcher.__aenter__()
