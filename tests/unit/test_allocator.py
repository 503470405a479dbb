"""Freed buffers stay in the process: without that every megabyte of a transfer is page faults anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from syncd.allocator import keep_buffers
taken = keep_buffers() if sys.argv[1] == "kept" else False
def churn():
    for _ in range(200):
        held = [bytearray(512 * 1024) for _ in range(8)]
        del held
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(int(taken), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HELD = """
import sys
from syncd.allocator import keep_buffers
taken = keep_buffers()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
held = [None] * 80
before = resident()
for number in range(80):
    held[number] = b"x" * (512 * 1024)
for number in reversed(range(80)):
    held[number] = None
print(int(taken), resident() - before)
"""


def page_faults(how: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=60)
    taken, faults = done.stdout.split()
    return taken == "1", int(faults)


def test_freed_buffers_are_used_again_without_page_faults() -> None:
    """Buffers of half a megabyte, freed and asked for again, cost no faults."""
    taken, kept = page_faults("kept")
    if not taken:
        pytest.skip("this C library has no mallopt()")
    assert kept < 1000, kept


def test_what_is_not_needed_for_the_next_burst_goes_back() -> None:
    """Of 40 MiB that were in use at once at most 32 stay for the next time: a daemon rests more than it works."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, timeout=60)
    taken, left = map(int, done.stdout.split())
    if not taken:
        pytest.skip("this C library has no mallopt()")
    assert left < 34 * 1024 * 1024, left
