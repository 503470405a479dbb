"""What a tool must be able to do to be measured beside syncd."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from benchmarks.processes import Legs
    from benchmarks.world import World


class Session(ABC):
    """One source and its destinations, from the first synchronisation on."""

    @abstractmethod
    def sync(self) -> Legs:
        """Bring all destinations to what the source holds now."""


class Peer(ABC):
    """A tool, set up as its manual says.

    :cvar name: its key in figures and in ``--peers``.
    :cvar programs: what must be installed.
    :cvar cases: where it is measured.
    :cvar slow: one repetition must do.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ()
    cases: ClassVar[frozenset[str]]
    slow: ClassVar[bool] = False

    def missing(self) -> str:
        """The first program that is not installed, or ""."""
        return next((program for program in self.programs if shutil.which(program) is None), "")

    @abstractmethod
    def session(self, world: World, source: Path, targets: Sequence[Path]) -> AbstractContextManager[Session]:
        """Prepare servers and configuration; outside the clock. Targets do not exist yet."""


FIRST = frozenset({"large", "small"})
PACKAGES = frozenset({"packages"})
DELTA = frozenset({"delta"})
EIGHT = frozenset({"eight"})
RESTART = frozenset({"restart"})
LATENCY = frozenset({"latency"})
ALL = FIRST | PACKAGES | DELTA | EIGHT | RESTART
