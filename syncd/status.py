"""What a folder says of itself: for ``syncd status``, the service manager and, later, the fleet.

A status is a plain value. The services change it and hand it to a callable; who writes it where is not their business.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from syncd.model import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ALARMS = frozenset({"stale", "channel_behind", "not_gone_back"})
"""Codes of problems that somebody has to look at, although the mirror is as it must be."""
KEPT_PROBLEMS = 100
"""Problems kept with their text; the rest is only counted."""


def path_tag(path: str) -> str:
    """Return eight hex characters that tell paths of one folder apart in file names."""
    return f"{zlib.crc32(path.encode('utf-8', 'surrogateescape')):08x}"


Role = Literal["publish", "subscribe"]


class FolderState(StrEnum):
    """Where a folder stands."""

    STARTING = "starting"
    WAITING = "waiting"
    """Something outside is missing (server, bucket, source directory): tried again until it is there."""
    SYNCING = "syncing"
    IN_SYNC = "in_sync"
    HALTED = "halted"
    """A safety halt: a person must allow the plan."""
    FAILED = "failed"
    """The last round failed; tried again, see ``error``."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class FolderStatus:
    """One folder of one host at one moment.

    :ivar since: wall clock (seconds since the epoch) of the last change of ``state``.
    :ivar last_sync: wall clock of the last round that left nothing undone; ``None``: none yet.
    :ivar pending: paths known to differ and not yet done.
    :ivar problems: the first :data:`KEPT_PROBLEMS` of ``problem_count``.
    :ivar bytes: sum of the content sizes of the folder's files.
    :ivar generation: number of the generation that the folder has, 0 where there is none (objects layout).
    :ivar root: that generation's tree digest.
    :ivar channel: what a mirror follows; "" for publishers.
    :ivar pinned: the generation that it stays at instead, 0 for none.
    :ivar exact: nothing of it is left out by the mirror's rules, held back as drift, or in trouble.
    """

    role: Role
    folder: str
    path: str
    state: FolderState = FolderState.STARTING
    since: float = 0.0
    last_sync: float | None = None
    pending: int = 0
    entries: int = 0
    bytes: int = 0
    generation: int = 0
    root: str = ""
    channel: str = ""
    pinned: int = 0
    exact: bool = False
    watching: str = ""
    error: str = ""
    hint: str = ""
    problem_count: int = 0
    problems: tuple[Problem, ...] = field(default=())

    @property
    def is_healthy(self) -> bool:
        """Whether nobody has to look at it: not failed, held or stopped, and no problem that is an alarm."""
        lasting = {FolderState.FAILED, FolderState.HALTED, FolderState.STOPPED}
        return self.state not in lasting and not any(problem.code in ALARMS for problem in self.problems)

    @property
    def key(self) -> str:
        """A file name for this status: a folder may have several mirrors on one host."""
        return f"{self.role}-{self.folder}-{path_tag(self.path)}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FolderStatus:
        """Invert :meth:`to_json`; unknown keys (of a newer version) are ignored.

        :raises ValueError, KeyError, TypeError: the data is not a status.
        """
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["state"] = FolderState(known["state"])
        known["problems"] = tuple(
            Problem(str(row["path"]), str(row["code"]), str(row["text"])) for row in known.get("problems", ())
        )
        return cls(**known)


class Allowance:
    """A person's word on a safety halt: never given, unless a subclass knows better."""

    def given(self) -> bool:
        """Tell whether the held plan may go on; asking does not use it up."""
        return False

    def clear(self) -> None:
        """Use it up: a round went through, so the word must not count for a later plan."""


class StatusKeeper:
    """The one place that changes a folder's status; tells ``report`` about every change."""

    def __init__(
        self, first: FolderStatus, *, clock: Callable[[], float], report: Callable[[FolderStatus], None]
    ) -> None:
        self._clock = clock
        self._report = report
        self.now = replace(first, since=clock())
        report(self.now)

    def set(self, **changes: Any) -> None:
        """Change fields; ``since`` follows ``state``."""
        if "state" in changes and changes["state"] is not self.now.state:
            changes["since"] = self._clock()
        after = replace(self.now, **changes)
        if after != self.now:
            self.now = after
            self._report(after)

    def set_problems(self, problems: Iterable[Problem], count: int | None = None) -> None:
        """Replace the problems; ``count`` where more exist than are given."""
        kept = tuple(problems)
        self.set(problems=kept[:KEPT_PROBLEMS], problem_count=len(kept) if count is None else count)

    def in_sync(self) -> None:
        """Note a round that left nothing undone."""
        self.set(state=FolderState.IN_SYNC, last_sync=self._clock(), pending=0, error="", hint="")
