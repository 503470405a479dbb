"""What the mirror has: compares its files with the index and decides what is drift. Blocking."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Literal

import structlog

from syncd.errors import DiskProblem, SyncdError
from syncd.index import LocalRow
from syncd.model import Entry, Kind, Problem, Stat
from syncd.problems import ProblemBook

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.index import Index
    from syncd.mirror import Disk, Mirror
    from syncd.plan import MirrorPlan

log = structlog.get_logger()

DriftPolicy = Literal["repair", "report", "keep"]
IN_FLIGHT = "in_flight"
PAGE = 1000
"""Paths looked at together."""


class _Unseen:
    """The disk did not tell."""


_UNSEEN = _Unseen()


class DriftCheck:
    """A mirror directory and the ``local`` half of its index.

    :ivar held: drifted paths that stay as they are by policy, with what was found there (``None``: nothing).
    :ivar problems: paths that could not be read, brought up or, under "report", have drifted.
    """

    def __init__(self, mirror: Mirror, index: Index, policy: DriftPolicy, folder: str) -> None:
        self._mirror = mirror
        self._index = index
        self._policy = policy
        self._log = log.bind(folder=folder, role="subscribe")
        self.problems = ProblemBook(self._log, "path_problem")
        self.held: dict[str, Stat | None] = {}
        self.stopping = False
        self._in_flight: dict[str, Entry | None] = {}

    def expect(self, plan: MirrorPlan) -> None:
        """Note what a commit is about to do.

        A crash after the commit and before it is remembered leaves paths that the index does not know. Without this
        note they would be a stranger's: kept for ever, if they are deleted upstream before the next start.
        """
        for gone in (*plan.clear, *plan.remove):
            self._in_flight[gone.path] = None
        for made in plan.make_dirs:
            self._in_flight[made.path] = Entry(Kind.DIR, 0, 0)
        self._in_flight |= {step.path: step.entry for step in plan.place} | {
            step.path: step.entry for step in plan.set_meta
        }
        lines = [[path, None if entry is None else _fields(entry)] for path, entry in self._in_flight.items()]
        self._index.set_note(IN_FLIGHT, json.dumps(lines))

    def remembered(self) -> None:
        """The commit is in the index."""
        self._in_flight.clear()
        self._index.set_note(IN_FLIGHT, "")

    def settle(self) -> None:
        """After a crash: take into the index what the last commit did, as far as it is there to be seen."""
        rows: list[LocalRow] = []
        gone: list[str] = []
        for path, expected in _read_note(self._index.note(IN_FLIGHT)):
            disk = self._mirror.look(path)
            if disk is None and expected is None:
                gone.append(path)
            if disk is None or expected is None or disk.kind is not expected.kind:
                continue
            have = self._read_back(path, disk)
            if have is not None and have.entry.same_content(expected):
                rows.append(have)
        with self._index.transaction():
            self._index.drop_local(gone)
            self._index.put_local(rows)
            self.remembered()

    def check(self) -> None:
        """Compare the mirror's files with the index by their stat fields, and what differs by content."""
        self.problems.begin()
        held, self.held = self.held, {}
        for row, seen in self._looked():
            if self.stopping:
                return
            try:
                disk = self._mirror.look(row.path) if isinstance(seen, _Unseen) else seen
            except DiskProblem as error:  # below a directory that we may not search: unknown, not gone
                self.problems.note(Problem(row.path, "unreadable", error.message))
                self.held[row.path] = None
                continue
            if disk is not None and _unchanged(row, disk):
                continue
            if row.path in held and held[row.path] == (disk.stat if disk else None):
                self.held[row.path] = held[row.path]  # left as it is by policy, and the same as last time
                self._report_drift(row.path, again=True)
                continue
            self._recheck(row, disk)

    def _looked(self) -> Iterator[tuple[LocalRow, Disk | _Unseen | None]]:
        """Yield what the index has with what is there, a page at a time: paths in order are looked at much faster."""
        rows = self._index.iter_local()
        while page := list(islice(rows, PAGE)):
            seen = dict(self._mirror.look_all(row.path for row in page))
            for row in page:
                yield row, seen.get(row.path, _UNSEEN)

    def _recheck(self, row: LocalRow, disk: Disk | None) -> None:
        """Read a path whose stat fields changed, and decide whether that is drift."""
        have = None if disk is None else self._read_back(row.path, disk)
        remote = self._index.remote(row.path)
        harmless = have is not None and (
            have.entry.same_content(row.entry) or (remote is not None and have.entry.same_content(remote.entry))
        )
        if not harmless and self._policy != "repair":
            self.held[row.path] = disk.stat if disk else None
            self._report_drift(row.path)
            return
        if not harmless:
            self._report_drift(row.path)
        if have is None:
            self._index.drop_local([row.path])  # gone, or another kind of thing, which the plan then finds in its way
        else:
            self._index.put_local([have])

    def _read_back(self, path: str, disk: Disk) -> LocalRow | None:
        """Describe what is at a path now; ``None`` where that is nothing that syncd could have written."""
        stat = disk.stat
        if disk.kind is Kind.DIR:
            return LocalRow(path, Entry(Kind.DIR, disk.mode, stat.mtime_ns), stat)
        if disk.kind is Kind.SYMLINK:
            return LocalRow(path, Entry(Kind.SYMLINK, 0o777, stat.mtime_ns, target=disk.target), stat)
        if disk.kind is not Kind.FILE:
            return None
        try:
            digest, sha256, stat = self._mirror.read_digests(path)
        except SyncdError as error:
            self.problems.note(Problem(path, "unreadable", error.message))
            return None
        return LocalRow(path, Entry(Kind.FILE, disk.mode, stat.mtime_ns, stat.size, digest, sha256), stat)

    def _report_drift(self, path: str, *, again: bool = False) -> None:
        if not again:
            self._log.warning("drift", path=path, policy=self._policy)
        if self._policy == "report":
            self.problems.note(Problem(path, "drift", "changed in the mirror by somebody else"))


def _fields(entry: Entry) -> tuple[str | int, ...]:
    """Return what astuple() does, ten times as fast."""
    return (entry.kind, entry.mode, entry.mtime_ns, entry.size, entry.digest, entry.sha256, entry.target)


def _read_note(text: str) -> list[tuple[str, Entry | None]]:
    """Read what :meth:`DriftCheck.expect` wrote; nothing where it is damaged: the comparison by content remains."""
    try:
        lines = json.loads(text) if text else []
        return [(path, None if entry is None else Entry(Kind(entry[0]), *entry[1:])) for path, entry in lines]
    except (ValueError, TypeError, IndexError):
        return []


def _unchanged(row: LocalRow, disk: Disk) -> bool:
    """Tell whether the quick check holds; a directory's and a symlink's own fields are all there is to compare."""
    if disk.kind is not row.entry.kind:
        return False
    if disk.kind is Kind.FILE:
        # Not the device number: it may be another one after a reboot.
        return disk.mode == row.entry.mode and disk.stat._replace(dev=row.stat.dev) == row.stat
    if disk.kind is Kind.SYMLINK:
        return disk.target == row.entry.target and disk.stat.mtime_ns == row.entry.mtime_ns
    return disk.mode == row.entry.mode and disk.stat.mtime_ns == row.entry.mtime_ns
