"""watchfiles to hints: where something may have changed.

Rules kept here:
 * a hint says where to look, never what happened. watchfiles 1.3 loses events (an overflow of
   inotify's queue is not reported, directories made in a burst are registered too late), so a caller
   needs a scan by the clock as well;
 * every doubt is ``rescan``: watching begins or begins anew, an error, too many paths to name, a name
   that is not UTF-8;
 * the watcher never gives up: after any error it starts again with backoff, and it waits for a root
   that is missing;
 * memory is bounded by MAX_PENDING paths, however long nobody asks.

``watchfiles.watch`` runs in a thread of its own: its constructor walks the whole tree, and its loop
blocks for ``rust_timeout``. The first thing it yields, empty or not, means that watching has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Self

import structlog
import watchfiles

from syncd.paths import is_private, printable
from syncd.retry import backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger()

MAX_PENDING = 10_000
STABLE_SECONDS = 60.0
"""Watching that lasted so long was a success: the backoff begins anew."""

_DEBOUNCE_MS = 10  # while it never gets quiet, hints come in batches so far apart (agenda.py: BURST_GAP_SECONDS)
_RUST_TIMEOUT_MS = 300
_POLL_DELAY_MS = 2000  # 50,000 files cost 7 % of a core
_ROOT_CHECK_SECONDS = 1.0
_JOIN_SECONDS = 2.0
_LIMIT_ERRORS = {errno.ENOSPC, errno.EMFILE, errno.ENFILE}
_LIMIT_WORDS = ("watch limit", "no space left", "too many open files")
_RESCAN = True


@dataclass(frozen=True)
class PathHints:
    """Where to look.

    :ivar paths: relative POSIX paths; "" is the root. A directory may stand for something inside it.
    :ivar rescan: paths may be missing: look at everything.
    """

    paths: frozenset[str]
    rescan: bool


class _How(Enum):
    """The ways to watch, the best first."""

    EVENTS = "events"
    PARTIAL = "partial"
    """Events, except for directories that we may not read."""
    POLLING = "polling"

    @property
    def reason(self) -> str:
        """Why it is not the best way."""
        return {
            _How.EVENTS: "",
            _How.PARTIAL: "directories that cannot be read are not watched",
            _How.POLLING: "the kernel's limit of watches is reached (fs.inotify.max_user_watches)",
        }[self]

    def after(self, exc: Exception) -> _How:
        """Return how to go on after an error; the same way means: try again."""
        if is_denied(exc):
            return _How.PARTIAL  # polling is refused there as well
        return _How.POLLING if is_limit(exc) else self


def is_limit(exc: Exception) -> bool:
    """Tell whether the kernel has no room for more watches or instances (then polling still works).

    watchfiles 1.3 has no type for it, and no number: only the texts of the notify crate and of the system.
    """
    if isinstance(exc, OSError) and exc.errno in _LIMIT_ERRORS:
        return True
    text = str(exc).lower()
    return any(word in text for word in _LIMIT_WORDS)


def is_denied(exc: Exception) -> bool:
    """Tell whether a directory may not be read (for polling watchfiles 1.3 has no type for it either)."""
    return isinstance(exc, PermissionError) or "permission denied" in str(exc).lower()


def around_unreadable(root: str) -> list[str]:
    """Return what to watch so that a directory that cannot be read hides no other. Blocking.

    The registration of one path and all below it stops at the first refusal (notify 8), that of
    further paths goes on. So: the root, and all directories beside the way to every unreadable one.
    """
    refused: list[str] = []

    def note(exc: OSError) -> None:
        refused.append(os.fsdecode(exc.filename))

    for _ in os.walk(root, onerror=note):
        pass
    above = {parent for path in refused for parent in _parents(root, path)}
    beside = [entry.path for path in above for entry in _directories(path) if entry.path not in refused]
    return [root, *sorted(path for path in beside if _is_utf8(path))]


def _parents(root: str, path: str) -> Iterator[str]:
    while len(path) > len(root):
        path = path.rpartition("/")[0]
        yield path or "/"


def _directories(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # it vanished since: nothing to watch
        return []


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def relative_paths(root: str, changed: Iterable[str]) -> tuple[set[str], bool]:
    """Turn absolute paths below ``root`` into relative ones, without syncd's own.

    :returns: the paths, and whether one was left out that cannot be named (not UTF-8, or not below the root).
    """
    prefix = root.rstrip("/") + "/"
    paths: set[str] = set()
    doubt = False
    for path in changed:
        if path == root:
            paths.add("")
            continue
        name = path.removeprefix(prefix)
        if name is path or name == path:
            doubt = True
        elif not is_private(name):
            if _is_utf8(name):
                paths.add(name)
            else:
                doubt = True
    return paths, doubt


class PathWatcher:
    """Watches a directory tree; an async context manager.

    :param root: the directory; it may be missing, now or later. It may be a symlink.
    :param step_ms: how long the tree must be quiet before changes are told; the latency of a hint.
    :param on_mode: called in the event loop with (mode, reason) at every change of :attr:`mode`.
    :ivar mode: "starting" | "events" | "polling" | "down".
    """

    def __init__(self, root: Path, *, step_ms: int = 2, on_mode: Callable[[str, str], None]) -> None:
        self.mode = "starting"
        self._root = root
        self._step_ms = step_ms
        self._on_mode = on_mode
        self._log = log.bind(root=str(root))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="syncd-watch", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._arrived: asyncio.Event
        self._paths: set[str] = set()
        self._rescan = False
        self._begun_at = 0.0  # of the thread: monotonic seconds when this watching began, 0: not yet

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # The constructor of watchfiles cannot be interrupted; a daemon thread in the middle of a huge
        # tree is left behind, and finds the stop event as soon as it is through.
        ended = self._loop.run_in_executor(None, self._thread.join, _JOIN_SECONDS)
        await asyncio.shield(ended)

    async def next(self, max_seconds: float) -> PathHints:
        """Wait for hints, at most so long, and take all that there are; empty ones at the end of that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_seconds):
                await self._arrived.wait()
        self._arrived.clear()
        hints = PathHints(frozenset(self._paths), self._rescan)
        self._paths, self._rescan = set(), False
        return hints

    # -- in the event loop -----------------------------------------------------------------------------

    def _add(self, paths: set[str], rescan: bool) -> None:  # noqa: FBT001 - call_soon_threadsafe takes no keywords
        self._paths |= paths
        if len(self._paths) > MAX_PENDING:
            self._paths = set()
            rescan = True
        self._rescan = self._rescan or rescan
        if self._rescan or self._paths:
            self._arrived.set()

    def _set_mode(self, mode: str, reason: str) -> None:
        if mode != self.mode:
            self.mode = mode
            self._on_mode(mode, reason)

    # -- in the thread ---------------------------------------------------------------------------------

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call, *arguments)

    def _run(self) -> None:
        how = _How.EVENTS
        waits = backoff(0.1, 10.0)
        while not self._stop.is_set():
            self._begun_at = 0.0
            try:
                there = self._watch(how)
            except Exception as exc:  # noqa: BLE001 - whatever watchfiles makes of an error of its native part
                reason = printable(str(exc))
                following = how.after(exc)
                self._log.warning("watch_failed", error=reason, how=how.value, then=following.value)
                if following is not how:
                    how = following
                    continue
                if not self._begun_at:
                    self._tell(self._set_mode, "down", reason)
                there = True
            if not there:
                # Events again once it is back: another filesystem may be mounted there, with fewer
                # directories.
                how = _How.EVENTS
                self._tell(self._set_mode, "down", "the root is missing")
                self._stop.wait(_ROOT_CHECK_SECONDS)
                continue
            if self._begun_at and time.monotonic() - self._begun_at > STABLE_SECONDS:
                waits = backoff(0.1, 10.0)
            self._stop.wait(next(waits))

    def _watch(self, how: _How) -> bool:
        """Watch until something ends it; return False if that is a missing root."""
        identity = _identity(self._root)
        if identity is None:
            return False
        root = os.path.realpath(self._root)
        checked = time.monotonic()
        with contextlib.closing(self._changes(root, how)) as batches:
            for batch in batches:
                if not self._begun_at:
                    self._begun_at = time.monotonic()
                    mode = "polling" if how is _How.POLLING else "events"
                    self._tell(self._set_mode, mode, how.reason)
                    self._tell(self._add, set(), _RESCAN)
                if batch:
                    paths, doubt = relative_paths(root, (path for _, path in batch))
                    self._tell(self._add, paths, doubt)
                if batch or time.monotonic() - checked > _ROOT_CHECK_SECONDS:
                    # inotify follows the inode: a root that was deleted or replaced would be silent for ever.
                    checked = time.monotonic()
                    now = _identity(self._root)
                    if now != identity:
                        return now is not None
        return True

    def _changes(self, root: str, how: _How) -> Generator[set[tuple[watchfiles.Change, str]], None, None]:
        return watchfiles.watch(
            *(around_unreadable(root) if how is _How.PARTIAL else [root]),
            watch_filter=None,
            debounce=_DEBOUNCE_MS,
            step=self._step_ms,
            rust_timeout=_RUST_TIMEOUT_MS,
            yield_on_timeout=True,
            stop_event=self._stop,
            raise_interrupt=False,
            recursive=True,
            # It hides every error of the registration (watchfiles 1.3): the watch limit and a missing
            # root, too.
            ignore_permission_denied=how is _How.PARTIAL,
            force_polling=True if how is _How.POLLING else None,
            poll_delay_ms=_POLL_DELAY_MS,
        )


def _identity(root: Path) -> tuple[int, int] | None:
    """Return which directory the root is now; ``None``: there is none."""
    try:
        st = root.stat()
    except OSError:
        return None
    return (st.st_dev, st.st_ino) if stat.S_ISDIR(st.st_mode) else None
