"""The one retry policy."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from syncd.errors import SyncdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def is_transient(exc: BaseException) -> bool:
    """Tell whether trying again, unchanged, can succeed.

    Yes: the server is away or silent, the bucket is missing or full, a right is missing (it may be granted),
    the disk is full, a file or an object changed while it was read. No: a corrupt object, a bad name, a sealed
    bucket, a safety halt (a person must act; the next reconcile looks again), and every bug.
    """
    return isinstance(exc, SyncdError) and exc.transient


def backoff(
    first: float = 0.25,
    cap: float = 30.0,
    factor: float = 2.0,
    *,
    rng: Callable[[], float] = random.random,
) -> Iterator[float]:
    """Yield waiting times in seconds for ever: exponential, capped, with full jitter above one half.

    :param first: the first waiting time before jitter.
    :param cap: the longest waiting time before jitter.
    :param rng: uniform numbers in [0, 1); an argument so that tests need no luck.
    """
    wait = first
    while True:
        yield wait * (0.5 + 0.5 * rng())
        wait = min(cap, wait * factor)
