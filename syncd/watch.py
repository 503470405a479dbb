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
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog
import watchfiles

from syncd.paths import is_private, printable
from syncd.retry import backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

log = structlog.get_logger()

MAX_PENDING = 10_000
STABLE_SECONDS = 60.0
"""Watching that lasted so long was a success: the backoff begins anew."""

_DEBOUNCE_MS = 200
_RUST_TIMEOUT_MS = 300
_POLL_DELAY_MS = 1000
_ROOT_CHECK_SECONDS = 1.0
_JOIN_SECONDS = 2.0
_LIMIT_ERRORS = {errno.ENOSPC, errno.EMFILE, errno.ENFILE}
_LIMIT_WORDS = ("inotify", "watch limit", "no space left", "too many open files")


@dataclass(frozen=True)
class PathHints:
    """Where to look.

    :ivar paths: relative POSIX paths; "" is the root. A directory may stand for something inside it.
    :ivar rescan: paths may be missing: look at everything.
    """

    paths: frozenset[str]
    rescan: bool


def is_limit(exc: BaseException) -> bool:
    """Tell whether watching failed because the kernel has no room for more watches (then polling still works).

    watchfiles 1.3 wraps it as an OSError with ENOSPC, or as a text of the notify crate without a number.
    """
    if isinstance(exc, OSError) and exc.errno in _LIMIT_ERRORS:
        return True
    text = str(exc).lower()
    return any(word in text for word in _LIMIT_WORDS)


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
            try:
                name.encode()
            except UnicodeEncodeError:
                doubt = True
            else:
                paths.add(name)
    return paths, doubt


class PathWatcher:
    """Watches a directory tree; an async context manager.

    :param root: the directory; it may be missing, now or later. It may be a symlink.
    :param step_ms: how long the tree must be quiet before changes are told; the latency of a hint.
    :param on_mode: called in the event loop with (mode, reason) at every change of :attr:`mode`.
    :ivar mode: "starting" | "events" | "polling" | "down".
    """

    def __init__(self, root: Path, *, step_ms: int = 10, on_mode: Callable[[str, str], None]) -> None:
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
            self._paths.clear()
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
        polling = False
        waits = backoff(0.1, 10.0)
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                ended = self._watch(polling=polling)
            except Exception as exc:  # noqa: BLE001 - watchfiles raises whatever its native part makes of an error
                reason = printable(str(exc))
                ended = "error"
                if not polling and is_limit(exc):
                    polling = True
                    self._log.warning("watch_limit_reached", error=reason)
                    self._tell(self._set_mode, "polling", reason)
                    continue
                self._log.warning("watch_failed", error=reason)
            if ended == "down":
                # Events again once it is back: another filesystem may be mounted there, with fewer
                # directories.
                polling = False
                self._tell(self._set_mode, "down", "the root is missing")
                self._stop.wait(_ROOT_CHECK_SECONDS)
                continue
            if time.monotonic() - began > STABLE_SECONDS:
                waits = backoff(0.1, 10.0)
            self._tell(self._add, set(), True)
            self._stop.wait(next(waits))

    def _watch(self, *, polling: bool) -> str:
        """Watch until something ends it: "down", the root is missing; "replaced", it is another one; "stopped"."""
        try:
            root = os.path.realpath(self._root, strict=True)
            identity = _identity(root)
        except OSError:
            return "down"
        if identity is None:
            return "down"
        begun = False
        checked = time.monotonic()
        with contextlib.closing(self._changes(root, polling=polling)) as batches:
            for batch in batches:
                if not begun:
                    begun = True
                    self._tell(self._set_mode, "polling" if polling else "events", "")
                    self._tell(self._add, set(), True)
                if batch:
                    paths, doubt = relative_paths(root, batch)
                    if len(paths) > MAX_PENDING:
                        paths, doubt = set(), True
                    if paths or doubt:
                        self._tell(self._add, paths, doubt)
                if batch or time.monotonic() - checked > _ROOT_CHECK_SECONDS:
                    # inotify follows the inode: a root that was deleted or replaced would be silent for ever.
                    checked = time.monotonic()
                    now = _identity(self._root)
                    if now != identity:
                        return "down" if now is None else "replaced"
        return "stopped"

    def _changes(self, root: str, *, polling: bool) -> Iterator[list[str]]:
        batches = watchfiles.watch(
            root,
            watch_filter=None,
            debounce=_DEBOUNCE_MS,
            step=self._step_ms,
            rust_timeout=_RUST_TIMEOUT_MS,
            yield_on_timeout=True,
            stop_event=self._stop,
            raise_interrupt=False,
            recursive=True,
            ignore_permission_denied=True,
            force_polling=polling,
            poll_delay_ms=_POLL_DELAY_MS,
        )
        for batch in batches:
            yield [path for _, path in batch]


def _identity(root: Path | str) -> tuple[int, int] | None:
    """Return which directory the root is now; ``None``: there is none."""
    try:
        st = os.stat(root)
    except OSError:
        return None
    return (st.st_dev, st.st_ino) if os.path.isdir(root) else None
