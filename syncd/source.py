"""What the source has: brings the index up to the disk. Blocking; confined to the folder's own thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import structlog

from syncd.index import LocalRow
from syncd.model import Entry, Kind, Problem, Stat
from syncd.paths import ancestors, is_private, parent
from syncd.problems import ProblemBook
from syncd.rules import IGNORE_FILE
from syncd.scan import Found, Scanner

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from syncd.index import Index
    from syncd.scan import Vanished

log = structlog.get_logger()

LOOK_LIMIT = 5000
"""More hinted paths than this in one round: a full scan is cheaper."""
FLUSH_ROWS = 1000
SKIPPED = {"not_utf8", "bad_name", "special_file", "symlink_outside", "bad_ignore_file"}
"""Problems of paths that are never distributed. All others mean: it is there, and we could not look."""


class ScanStopped(Exception):
    """The service is stopping; the scan's transaction is rolled back."""


class Looked(NamedTuple):
    """What a look at some paths came to.

    :ivar touched: every path whose row may have changed.
    :ivar gone: paths that were known and were not found, without what was below them.
    """

    touched: set[str]
    gone: list[str]


class Source:
    """A source directory and the ``local`` half of the index.

    Problems are kept by path until the path is looked at again without one. What the bucket has of a path with a
    problem stays as it is: unreadable is not deleted.
    """

    def __init__(self, scanner: Scanner, index: Index, folder: str) -> None:
        self.scanner = scanner
        self.stopping = False
        self._index = index
        self.problems = ProblemBook(log.bind(folder=folder, role="publish"), "path_problem")

    def scan(self) -> list[str]:
        """Compare everything.

        :returns: what was known and was not found, without what was below that.
        :raises DiskProblem: the root is missing or unreadable: nothing is concluded from that.
        """
        self.scanner.check_root()
        self.problems.begin()
        scan = self._index.next_scan()
        with self._index.transaction():
            self._take(self.scanner.scan("", self._index.local_children), scan, None)
            return _topmost(self._index.drop_unseen(scan))

    def look(self, paths: Collection[str]) -> Looked:
        """Look at hinted paths, at all below those that are directories, and at their parents.

        :raises DiskProblem: the root is missing or unreadable.
        """
        self.scanner.check_root()
        looked = Looked(set(), [])
        hinted = {path for path in paths if path and not is_private(path)}
        # Another .syncdignore is another verdict on everything beside and below it.
        hinted |= {parent(path) for path in hinted if path.endswith("/" + IGNORE_FILE)}
        wanted = set(hinted)
        for path in hinted:
            # A new directory whose own event was lost, and the parent, whose time changed.
            wanted.update(above for above in ancestors(path) if self._index.local(above) is None)
            if parent(path):
                wanted.add(parent(path))
        with self._index.transaction():
            for path in sorted(wanted, key=len):
                self._look_at(path, looked, deep=path in hinted)
        return looked

    def note_problem(self, problem: Problem, path: str, *, scan: int = 0) -> None:
        """Report a path that could not be read or sent."""
        self.problems.note(problem)
        if problem.code in SKIPPED:
            return
        # A row with a problem keeps itself and everything below it out of every diff.
        row = self._index.local(path)
        if row is None:
            row = LocalRow(path, Entry(Kind.FILE, 0, 0), Stat(0, 0, 0, 0))
        self._index.mark_tree_seen(path, scan)
        self._index.put_local([row._replace(problem=problem.code)], scan=scan)

    def _take(
        self,
        found: Iterator[Found | Problem | Vanished],
        scan: int,
        touched: set[str] | None,
    ) -> None:
        """Write what a scan yields into the index, marked with ``scan``; add changed paths to ``touched`` if given."""
        seen: list[str] = []
        rows: list[LocalRow] = []
        for item in found:
            if self.stopping:
                raise ScanStopped
            if isinstance(item, Problem):
                self.note_problem(item, item.path, scan=scan)
            elif isinstance(item, Found):
                self.problems.clear(item.row.path)
                if item.fresh:
                    seen.append(item.row.path)
                else:
                    rows.append(item.row)
                    if touched is not None:
                        touched.add(item.row.path)
            if len(seen) + len(rows) >= FLUSH_ROWS:
                self._index.mark_seen(seen, scan)
                self._index.put_local(rows, scan=scan)
                seen, rows = [], []
        self._index.mark_seen(seen, scan)
        self._index.put_local(rows, scan=scan)

    def _look_at(self, path: str, looked: Looked, *, deep: bool) -> None:
        known = self._index.local(path)
        item = self.scanner.look(path, known)
        touched = looked.touched
        touched.add(path)
        if item is None:
            if known is not None:
                looked.gone.append(path)
            self.problems.clear(path)
            touched.update(row.path for row in self._index.iter_local(path))
            self._index.drop_local_tree(path)
            return
        if isinstance(item, Problem):
            self.note_problem(item, path)
            if item.code in SKIPPED:  # something else was here before: that is gone
                touched.update(row.path for row in self._index.iter_local(path))
                self._index.drop_local_tree(path)
            return
        self.problems.clear(path)
        was_dir = known is not None and known.entry.kind is Kind.DIR
        is_dir = item.row.entry.kind is Kind.DIR
        if was_dir and not is_dir:
            touched.update(row.path for row in self._index.iter_local(path))
            self._index.drop_local_tree(path)
        if not item.fresh:
            self._index.put_local([item.row])
        if is_dir and (deep or not was_dir):
            scan = self._index.next_scan()
            self._index.mark_seen([path], scan)
            self._take(self.scanner.scan(path, self._index.local_children), scan, touched)
            unseen = self._index.drop_unseen(scan, path)
            touched.update(unseen)
            looked.gone.extend(_topmost(unseen))


def _topmost(paths: Iterable[str]) -> list[str]:
    """Leave out what is below another one of the paths, which are in component order."""
    kept: list[str] = []
    for path in paths:
        if not kept or not path.startswith(kept[-1] + "/"):
            kept.append(path)
    return kept
