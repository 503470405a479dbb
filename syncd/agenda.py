"""When a service looks at what: hints and their settle times, the full round, waits after failures.

One clock (monotonic seconds), one wake-up event, no decisions about content. All calls come from the event loop.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STARVATION_FACTOR = 20
"""A path that never gets quiet is due anyway after this many settle times."""
QUIET_FACTOR = 20
"""A full round follows hints after a quiet time of this many of its own durations: some 5 % of one core at most."""
MIN_QUIET_SECONDS = 1.0
MAX_PATH_WAIT = 5.0
ALLOW_POLL_SECONDS = 0.5


class Agenda:
    """What is due, and when.

    :ivar settle: seconds a hinted path must be quiet before it is due.
    :param rescan: seconds after which a full round is due without any hint.
    :param allowed: while halted: did a person allow the plan meanwhile?
    """

    def __init__(
        self,
        *,
        settle: float,
        rescan: float,
        allowed: Callable[[], bool] = lambda: False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settle = settle
        self._rescan = rescan
        self._allowed = allowed
        self._now = now
        self._hints: dict[str, tuple[float, float]] = {}  # path -> (first, last) hint
        self._not_before: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._full_at = now()
        self._last_full = now()
        self._hold_until = 0.0
        self._halted = False
        self._had_hints = False
        self._wake = asyncio.Event()

    # -- what happened -------------------------------------------------------------------------------------------

    def hint(self, paths: Iterable[str]) -> None:
        """Something may have changed at ``paths``."""
        now = self._now()
        for path in paths:
            first, _ = self._hints.get(path, (now, now))
            self._hints[path] = (first, now)
        self._wake.set()

    def full(self) -> None:
        """Something may have changed anywhere."""
        self._full_at = min(self._full_at, self._now() + self.settle)
        self._wake.set()

    # -- what became of a round ----------------------------------------------------------------------------------

    def done(self, duration: float) -> None:
        """A round succeeded.

        :param duration: seconds that a full round takes here.
        """
        self._halted = False
        self._hold_until = 0.0
        if not self._hints:
            self._tries.clear()
            self._not_before.clear()
        now = self._now()
        quiet = max(MIN_QUIET_SECONDS, QUIET_FACTOR * duration)
        # Where it never gets quiet the timer counts from the last full round, not from the last hint.
        self._full_at = max(now + MIN_QUIET_SECONDS, self._last_full + self._rescan)
        if self._had_hints:  # events are known to get lost in bursts: look at everything once it is quiet
            self._full_at = min(self._full_at, now + quiet)

    def again(self, paths: Iterable[str]) -> None:
        """Paths were not quiet: each is due again, every time a little later. A constant writer starves only itself."""
        now = self._now()
        for path in paths:
            tries = self._tries[path] = self._tries.get(path, 0) + 1
            self._not_before[path] = now + min(MAX_PATH_WAIT, max(self.settle, 0.02) * 2 ** min(tries, 10))
            self._hints.setdefault(path, (now, now))

    def failed(self, wait: float) -> None:
        """A round failed: nothing before ``wait`` seconds, then everything."""
        self._hints.clear()
        self._hold_until = self._full_at = self._now() + wait

    def halted(self) -> None:
        """A round was held: any hint, the timer or a person's word means a full round."""
        self._halted = True
        self._full_at = self._now() + self._rescan

    def wake(self) -> None:
        """End a wait after a failure early (the connection is back)."""
        self._hold_until = 0.0
        self.full()

    # -- what is due ---------------------------------------------------------------------------------------------

    async def due(self) -> frozenset[str] | None:
        """Wait for something to do: paths whose hints have settled, or ``None`` for everything."""
        while True:
            now = self._now()
            self._wake.clear()
            if now >= self._hold_until:
                if now >= self._full_at or (self._halted and self._allowed()):
                    self._take_all()
                    return None
                ready = frozenset(path for path in self._hints if self._ready_at(path) <= now)
                if ready and self._halted:
                    self._take_all()
                    return None
                if ready:
                    return self._take(ready)
            await self._sleep_until(self._next_time(now))

    def _take_all(self) -> None:
        self._hints.clear()
        self._had_hints = False
        self._last_full = self._now()
        self._full_at = self._last_full + self._rescan

    def _take(self, ready: frozenset[str]) -> frozenset[str]:
        for path in ready:
            del self._hints[path]
        self._had_hints = True
        return ready

    def _next_time(self, now: float) -> float:
        next_time = min([self._full_at, *map(self._ready_at, self._hints)])
        next_time = max(next_time, self._hold_until)
        return min(next_time, now + ALLOW_POLL_SECONDS) if self._halted else next_time

    async def _sleep_until(self, when: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, when - self._now())):
                await self._wake.wait()
        except TimeoutError:
            return

    def _ready_at(self, path: str) -> float:
        first, last = self._hints[path]
        settled = min(last + self.settle, first + self.settle * STARVATION_FACTOR)
        return max(settled, self._not_before.get(path, 0.0))
