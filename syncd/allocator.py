"""How glibc's malloc treats what a stream of content needs: buffers of some hundred KiB, again and again.

By default each freed run of them goes back to the kernel, and the next megabytes are page faults and zeroed pages
anew: a third of the time of a large transfer (docs/decisions/0016-what-profiles-found.md). Other C libraries are left
as they are.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

KEPT_BYTES: Final = 32 * 1024 * 1024
"""What stays free at the end of the heap; the windows of the transfers together are smaller."""
_STEP_BYTES: Final = 8 * 1024 * 1024
_LARGEST_BYTES: Final = 32 * 1024 * 1024
"""glibc's own maximum."""
_ARENAS: Final = 2
"""Each arena keeps memory of its own; more than two threads rarely allocate at once."""


def keep_buffers() -> bool:
    """Keep freed buffers in the process; to be called before threads are started. Return whether malloc took it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    wishes = (
        (_M_MMAP_THRESHOLD, _LARGEST_BYTES),
        (_M_TRIM_THRESHOLD, KEPT_BYTES),
        (_M_TOP_PAD, _STEP_BYTES),
        (_M_ARENA_MAX, _ARENAS),
    )
    return all(mallopt(*wish) == 1 for wish in wishes)
