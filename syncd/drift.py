"""What the mirror has: compares its files with the index and decides what is drift. Blocking.

Rules kept here:
 * a drift is told with evidence: what syncd left there, and what was found;
 * the quick check (stat fields) runs over everything, or over the paths that a watch names. It is blind to what the
   disk spoils by itself and to who sets a clock back, so the audit re-reads what the quick check passes, slowly;
 * the audit only finds. What it found is dealt with by the next check, so that the index never changes within a round;
 * whose a path is counts like its content: what belongs to somebody else, he may change at any moment, and a stat that
   shows no change would not show that one either;
 * a failure belongs to its path.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import structlog

from syncd.errors import BadName, DiskProblem, SyncdError
from syncd.index import LocalRow
from syncd.model import Entry, Kind, Problem, Stat
from syncd.paths import is_usable, printable, sort_key
from syncd.plan import parents_of
from syncd.problems import ProblemBook
from syncd.reread import Audited, Finding, Reread, comparable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator

    from syncd.index import Index
    from syncd.mirror import Disk, Mirror
    from syncd.plan import MirrorPlan

log = structlog.get_logger()

DriftPolicy = Literal["repair", "report", "keep"]
Evidence = dict[str, str | int]
"""What a log line says of a path."""
IN_FLIGHT = "in_flight"
PAGE = 1000
"""Paths looked at together."""
MAX_TOUCHED: Final = 10_000
"""More paths than that are not named one by one."""
MAX_FINDINGS: Final = 10_000
"""So many findings are enough: the audit waits until they are dealt with."""
AUDIT_SLICE: Final = 8 * 1024 * 1024
"""Bytes read between two looks of others at the thread."""
PAUSE_SECONDS: Final = 1.0
AUDIT_PASS_SECONDS: Final = 3600.0
"""One pass over a mirror takes at least so long: a small one need not be read all day."""
_OURS: Final = {"drift", "unreadable"}
"""Codes of problems that a look at a path brings up, and clears."""


class _Unseen:
    """The disk did not tell."""


_UNSEEN = _Unseen()


# -- evidence ----------------------------------------------------------------------------------------------------------


def evidence(entry: Entry | None, disk: Disk | None = None) -> Evidence:
    """Return what a log line says of a path: kind, mode, size, the digest's first 12 characters, link text.

    :param entry: what is known of it; ``None``: no more than ``disk`` tells (nothing, or what cannot be read).
    """
    if entry is None:
        if disk is None:
            return {"kind": "nothing"}
        entry = Entry(disk.kind or Kind.FILE, disk.mode, disk.stat.mtime_ns, disk.stat.size, target=disk.target)
    kind = "special" if disk is not None and disk.kind is None else str(entry.kind)
    if entry.kind is Kind.SYMLINK:
        return {"kind": kind, "target": printable(entry.target)}
    fields: Evidence = {"kind": kind, "mode": f"{entry.mode:04o}"}
    if kind == "file":
        fields["size"] = entry.size
        if digest := entry.digest or entry.sha256:
            fields["digest"] = digest[:12]
    return fields


def told(fields: Evidence) -> str:
    """Return the same for a person: ``file 0644 of 12 bytes (3f2a19bc01d4)``."""
    text = str(fields["kind"])
    if "mode" in fields:
        text += f" {fields['mode']}"
    if "size" in fields:
        text += f" of {fields['size']} byte{'' if fields['size'] == 1 else 's'}"
    if "digest" in fields:
        text += f" ({fields['digest']})"
    if "target" in fields:
        text += f" to {fields['target']}"
    if "uid" in fields:
        text += f" of uid {fields['uid']}"
    return text


# -- results -----------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A drifted path that stays as it is.

    :ivar stat: what was found; ``None``: nothing.
    :ivar text: the evidence; "" where the disk does not tell what is there.
    """

    stat: Stat | None
    text: str


class DriftCheck:
    """A mirror directory and the ``local`` half of its index. Confined to the folder's thread.

    :ivar held: drifted paths that stay as they are by policy or because the disk does not tell.
    :ivar problems: paths that could not be read, brought up or, under "report", have drifted.
    :ivar drifted: how many paths the last check found drifted that had not been before.
    """

    def __init__(self, mirror: Mirror, index: Index, policy: DriftPolicy, folder: str) -> None:
        self._mirror = mirror
        self._index = index
        self._policy = policy
        self._log = log.bind(folder=folder, role="subscribe")
        self.problems = ProblemBook(self._log, "path_problem")
        self.held: dict[str, Held] = {}
        self.drifted = 0
        self.stopping = False
        self._in_flight: dict[str, Entry | None] = {}
        self._findings: dict[str, Finding] = {}
        self._reread = Reread(mirror, index)

    # -- after a crash -------------------------------------------------------------------------------------------------

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
        self._index.sync()  # the mirror may be on another disk: a power cut must not leave it ahead of what is noted

    def remembered(self) -> None:
        """The commit is in the index."""
        self._in_flight.clear()
        self._index.set_note(IN_FLIGHT, "")

    def settle(self) -> None:
        """After a crash: take into the index what the last commit did, as far as it is there to be seen."""
        rows: list[LocalRow] = []
        gone: list[str] = []
        for path, expected in _read_note(self._index.note(IN_FLIGHT)):
            if not is_usable(path):  # an older version could write there
                continue
            try:
                disk = self._mirror.look(path)
            except DiskProblem:  # unknown: the check says so, and compares by content once it can be looked at
                continue
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

    def leave(self) -> None:
        """Another tree takes the place of the one that was looked at: what was held there is not held here."""
        for path in self.held:
            if self.problems.code(path) in _OURS:
                self.problems.clear(path)
        self.held.clear()

    # -- the quick check -----------------------------------------------------------------------------------------------

    def check(self, paths: Collection[str] | None = None) -> set[str] | None:
        """Compare the mirror's files with the index by their stat fields, and what differs by content.

        :param paths: look at these, and at what their kind makes doubtful: a directory that is gone takes with it what
            was below; ``None``: look at everything.
        :returns: the paths whose rows were changed, which is what must be brought up; ``None``: everything, because
            everything was looked at or too much has changed to name it.
        """
        self.drifted = 0
        if paths is not None:
            return self._check_some(paths)
        self.problems.begin()
        before, self.held = self.held, {}
        for row, seen in self._looked(self._index.iter_local()):
            if self.stopping:
                return None
            self._check_row(row, seen, before.get(row.path))
        return None

    def suspects(self, paths: Iterable[str]) -> set[str]:
        """Return those of hinted paths that are not as syncd left them, by their stat fields; nothing is read.

        What the index does not know is none, and neither is the time of a directory: whoever keeps files of his own in
        a mirrored directory changes it all day. The next full check sets it right.
        """
        usable = sorted({path for path in paths if is_usable(path)}, key=sort_key)
        seen = dict(self._mirror.look_all(usable))
        return {path for path in usable if self._is_news(path, seen.get(path, _UNSEEN))}

    def _is_news(self, path: str, seen: Disk | _Unseen | None) -> bool:
        row, held = self._index.local(path), self.held.get(path)
        if row is None:
            return False
        if isinstance(seen, _Unseen):
            return held is None
        if held is not None and held.text:
            return held.stat != (seen.stat if seen is not None else None)
        if seen is None or not self._mirror.is_settled(seen):
            return True
        if seen.kind is Kind.DIR and row.entry.kind is Kind.DIR:
            return (seen.mode, seen.stat.ino) != (row.entry.mode, row.stat.ino)
        return not _unchanged(row, seen)

    def _check_some(self, paths: Collection[str]) -> set[str] | None:
        touched: set[str] = set()
        too_many = False
        for row, seen in self._looked(self._doubtful({path for path in paths if is_usable(path)})):
            if self.stopping:
                break
            if self._check_row(row, seen, self.held.pop(row.path, None)):
                too_many = too_many or len(touched) >= MAX_TOUCHED
                if not too_many:
                    touched.add(row.path)
            if self.problems.code(row.path) in _OURS and row.path not in self.held and row.path not in self._findings:
                self.problems.clear(row.path)
        return None if too_many else touched

    def _doubtful(self, paths: set[str]) -> Iterator[LocalRow]:
        """Yield the rows of hinted paths, of their directories, and of all below what is no longer that directory."""
        whole = ""
        for path in sorted(paths | parents_of(paths), key=sort_key):
            if whole and path.startswith(whole + "/"):
                continue  # among those below it
            row = self._index.local(path)
            if path in paths and not self._is_same_directory(path, row):
                whole = path
                yield from self._index.iter_local(path)
            elif row is not None:
                yield row

    def _is_same_directory(self, path: str, row: LocalRow | None) -> bool:
        try:
            disk = self._mirror.look(path)
        except DiskProblem:  # _check_row() meets the same, and says so
            return False
        return disk is not None and disk.kind is Kind.DIR and row is not None and row.stat.ino == disk.stat.ino

    def _looked(self, rows: Iterator[LocalRow]) -> Iterator[tuple[LocalRow, Disk | _Unseen | None]]:
        """Yield what the index has with what is there, a page at a time: paths in order are looked at much faster."""
        while page := list(islice(rows, PAGE)):
            seen = dict(self._mirror.look_all(row.path for row in page))
            for row in page:
                yield row, seen.get(row.path, _UNSEEN)

    def _check_row(self, row: LocalRow, seen: Disk | _Unseen | None, before: Held | None) -> bool:
        """Compare one path with its row; return whether the index was changed."""
        try:
            disk = self._mirror.look(row.path) if isinstance(seen, _Unseen) else seen
        except DiskProblem as error:  # below a directory that we may not search: unknown, not gone
            self.problems.note(Problem(row.path, "unreadable", error.message))
            self.held[row.path] = Held(None, "")
            return False
        except BadName:  # an older version could keep what this one must not touch
            self._index.drop_local([row.path])
            return True
        if disk is not None and _unchanged(row, disk) and self._is_settled(row.path, disk):
            finding = self._findings.get(row.path) if self._findings else None
            return finding is not None and self._act_on(row, disk, finding, before)
        if before is not None and before.text and before.stat == (disk.stat if disk is not None else None):
            self._hold(row.path, before)  # left as it is by policy, and the same as last time
            return False
        return self._recheck(row, disk)

    def _recheck(self, row: LocalRow, disk: Disk | None) -> bool:
        """Read a path whose stat fields changed, and decide whether that is drift."""
        have = None if disk is None else self._read_back(row.path, disk)
        remote = self._index.remote(row.path)
        foreign = disk is not None and remote is not None and self._mirror.is_foreign(disk)
        harmless = (
            have is not None
            and not foreign
            and (have.entry.same_content(row.entry) or (remote is not None and have.entry.same_content(remote.entry)))
        )
        if not harmless:
            self.drifted += 1
            expected, found = evidence(row.entry), evidence(have.entry if have is not None else None, disk)
            if foreign and disk is not None:
                found["uid"] = disk.uid
            self._log.warning("drift", path=row.path, policy=self._policy, expected=expected, found=found)
            if self._policy != "repair":
                text = f"{told(expected)} expected, {told(found)} found"
                self._hold(row.path, Held(disk.stat if disk is not None else None, text))
                return False
        if have is not None and disk is not None and not self._is_settled(row.path, disk):
            have = _to_be_replaced(have)
        if have is None:
            self._index.drop_local([row.path])  # gone, or another kind of thing, which the plan then finds in its way
        else:
            self._index.put_local([have])
        return True

    def _is_settled(self, path: str, disk: Disk) -> bool:
        """Tell whether a path belongs to whom it must; what the bucket does not announce goes, whosever it is."""
        return self._mirror.is_settled(disk) or self._index.remote(path) is None

    def _hold(self, path: str, held: Held) -> None:
        self.held[path] = held
        if self._policy == "report":
            self.problems.note(Problem(path, "drift", held.text))

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

    # -- the audit -----------------------------------------------------------------------------------------------------

    def audit(self, budget_bytes: int) -> Audited:
        """Go on re-reading files whose stat fields are as the index has them, see :class:`syncd.reread.Reread`.

        Neither index nor mirror are changed: what is found is dealt with by :meth:`check`.
        """
        if len(self._findings) >= MAX_FINDINGS:
            return Audited()
        done = self._reread.go(budget_bytes)
        for path in (*done.sound, *done.changed):
            self._findings.pop(path, None)
        self._findings |= {finding.row.path: finding for finding in done.findings}
        if done.wrapped:  # paths that are gone since, or were written anew
            stale = [path for path, finding in self._findings.items() if self._index.local(path) != finding.row]
            for path in stale:
                del self._findings[path]
        return done

    def _act_on(self, row: LocalRow, disk: Disk, finding: Finding, before: Held | None) -> bool:
        """Deal with what the audit found; return whether the index was changed."""
        if finding.row != row:
            del self._findings[row.path]  # written anew since
            return False
        have = finding.have
        if have is None:
            found: Evidence = {"kind": "unreadable", "error": os.strerror(finding.error)}
            text = f"cannot be read: {found['error']}"
        else:
            found = evidence(have.entry)
            text = f"{told(evidence(comparable(row.entry)))} expected, {told(found)} read, its times as they were"
        if not finding.is_rot:
            self.problems.note(Problem(row.path, "unreadable", text))
            return False
        held = Held(disk.stat, text)
        if before != held:
            self.drifted += 1
            expected = evidence(comparable(row.entry))
            self._log.warning("silent_corruption", path=row.path, policy=self._policy, expected=expected, found=found)
        if self._policy != "repair":
            self._hold(row.path, held)
            return False
        del self._findings[row.path]
        if have is None:
            self._index.drop_local([row.path])
        else:
            self._index.put_local([have])
        return True


async def keep_auditing(
    check: DriftCheck,
    run: Callable[[Callable[[], Audited]], Awaitable[Audited]],
    tell: Callable[[set[str]], None],
    *,
    rate: int,
    pass_seconds: float = AUDIT_PASS_SECONDS,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Audit for ever, at most ``rate`` bytes per second.

    :param run: runs blocking work in the folder's thread.
    :param tell: given paths that the next check must look at.
    :param pass_seconds: one pass takes at least so long.
    """
    began = now()
    while True:
        try:
            done = await run(lambda: check.audit(min(rate, AUDIT_SLICE)))
        except SyncdError:  # the index or the disk: the rounds meet the same, and say so
            await sleep(PAUSE_SECONDS)
            continue
        if done.found:
            tell(done.found)
        await sleep(done.cost / rate if done.cost else PAUSE_SECONDS)
        if done.wrapped:
            await sleep(max(0.0, began + pass_seconds - now()))
            began = now()


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


def _to_be_replaced(have: LocalRow) -> LocalRow | None:
    """Describe what has the wrong owner as nothing that anybody could want; ``None``: as nothing at all.

    Its stat stays, so that the plan replaces the very inode that was looked at, under every policy.
    """
    if have.entry.kind is Kind.DIR:
        return None
    return have._replace(entry=have.entry._replace(digest="", sha256="", target=""))


def _unchanged(row: LocalRow, disk: Disk) -> bool:
    """Tell whether the quick check holds; a directory's and a symlink's own fields are all there is to compare.

    Their time is the one that is wanted, or what the filesystem made of it when it was set: it may know whole seconds.
    """
    if disk.kind is not row.entry.kind:
        return False
    if disk.kind is Kind.FILE:
        # Not the device number: it may be another one after a reboot.
        return disk.mode == row.entry.mode and disk.stat._replace(dev=row.stat.dev) == row.stat
    if disk.stat.mtime_ns not in {row.entry.mtime_ns, row.stat.mtime_ns}:
        return False
    return disk.target == row.entry.target if disk.kind is Kind.SYMLINK else disk.mode == row.entry.mode
