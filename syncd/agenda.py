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
BURST_SHARE = 0.25
"""A burst must be followed by a quiet time of this share of its own duration."""
BURST_MAX_SETTLE = 1.0
"""Seconds; a longer settle time that is configured counts all the same."""
BURST_GAP_SECONDS = 0.03
"""What is at most so far apart belongs together, however short the settle time; hints come late by some 10 ms."""
BURST_MEMORY_SECONDS = 1.0
"""A path that was hinted at so recently adds nothing to a burst: a constant writer holds up only itself."""


class Burst:
    """Many paths that change one after the other: a checkout, an unpacked archive, an installation.

    Such a thing is one generation rather than hundreds (docs/faults.md, S4), so the whole tree has to be quiet, and the
    longer the burst has lasted, the longer. Whoever waits for each change to arrive before the next one never makes a
    burst: a hint belongs to it only when it comes before the tree was quiet.
    """

    def __init__(self) -> None:
        self._begun = self._last = 0.0
        self._waiting_since: float | None = None
        self._seen: dict[str, float] = {}

    def hint(self, paths: Iterable[str], settle: float, now: float) -> None:
        """Paths were hinted at.

        :param settle: see :class:`Agenda`, seconds. ``now``: by the same clock as all other times here, seconds.
        """
        fresh = False
        for path in paths:
            before = self._seen.pop(path, 0.0)  # the oldest stay in front
            self._seen[path] = now
            fresh = fresh or not before or now - before > BURST_MEMORY_SECONDS
        while self._seen and now - self._seen[oldest := next(iter(self._seen))] > BURST_MEMORY_SECONDS:
            del self._seen[oldest]
        if not fresh:
            return
        if now - self._last > max(BURST_GAP_SECONDS, self._settle(settle)):
            self._begun = now
        self._last = now
        if self._waiting_since is None:
            self._waiting_since = now

    def taken(self) -> None:
        """What had been hinted at is being looked at."""
        self._waiting_since = None

    def calm_at(self, settle: float) -> float:
        """Return when the tree has been quiet for long enough, or changes have waited for long enough."""
        if self._waiting_since is None:
            return 0.0
        quiet = self._settle(settle)
        return min(self._last + quiet, self._waiting_since + quiet * STARVATION_FACTOR)

    def _settle(self, settle: float) -> float:
        return max(settle, min(BURST_MAX_SETTLE, BURST_SHARE * (self._last - self._begun)))


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
        self._burst = Burst()
        self._wake = asyncio.Event()

    # -- what happened -------------------------------------------------------------------------------------------

    def hint(self, paths: Iterable[str]) -> None:
        """Something may have changed at ``paths``."""
        now = self._now()
        paths = tuple(paths)
        self._burst.hint(paths, self.settle, now)
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
            earliest = max(self._hold_until, self._burst.calm_at(self.settle))
            if now < earliest:  # hints that come meanwhile cost nothing, however many there are
                await self._sleep_until(earliest)
                continue
            if now >= self._full_due_at() or (self._halted and self._allowed()):
                self._take_all()
                return None
            ready = frozenset(path for path in self._hints if self._ready_at(path) <= now)
            if ready and self._halted:
                self._take_all()
                return None
            if ready:
                return self._take(ready)
            await self._sleep_until(self._next_time(now))

    def _full_due_at(self) -> float:
        """A full round reads hinted paths as well: it waits for them to settle, but no longer than they wait."""
        settled = max(map(self._ready_at, self._hints), default=0.0)
        return max(self._full_at, min(settled, self._full_at + self.settle * STARVATION_FACTOR))

    def _take_all(self) -> None:
        self._hints.clear()
        self._burst.taken()
        self._had_hints = False
        self._last_full = self._now()
        self._full_at = self._last_full + self._rescan

    def _take(self, ready: frozenset[str]) -> frozenset[str]:
        for path in ready:
            del self._hints[path]
        self._burst.taken()
        self._had_hints = True
        return ready

    def _next_time(self, now: float) -> float:
        next_time = min([self._full_due_at(), *map(self._ready_at, self._hints)])
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
