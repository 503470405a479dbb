"""How far a push or pull is, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Progress:
    """Files and bytes of content, done and in total."""

    files: int
    total_files: int
    bytes: int
    total_bytes: int


class Meter:
    """Adds up progress; silent without a listener."""

    def __init__(self, listener: Callable[[Progress], None] | None, total_files: int = 0, total_bytes: int = 0) -> None:
        self._listener = listener
        self.total_files = total_files
        self.total_bytes = total_bytes
        self.files = 0
        self.bytes = 0

    def add(self, size: int) -> None:
        """Count bytes of content."""
        self.bytes += size
        if self._listener is not None:
            self._listener(Progress(self.files, self.total_files, self.bytes, self.total_bytes))

    def done(self, size: int) -> None:
        """Count a file, with ``size`` bytes that were not counted before."""
        self.files += 1
        self.add(size)
