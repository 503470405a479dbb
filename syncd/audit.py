"""``syncd verify``: every file of a mirror is read and compared with what its bucket says, in either layout.

Rules kept here:
 * nothing is changed and no lock is taken: it works beside a running daemon;
 * what the bucket does not name is no fault of the mirror's;
 * memory is bounded: the objects of a bucket go through a scratch index, a generation's tree is merged with the walk
   of the disk, both in path order.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from syncd.errors import SyncdError
from syncd.history import History
from syncd.index import Index, LocalRow
from syncd.mirror import Mirror
from syncd.model import Entry, Kind
from syncd.nodes import Child, digest_of, identity
from syncd.paths import parent, sort_key
from syncd.store.base import HEAD, BadMeta
from syncd.store.mapping import remote_row
from syncd.treediff import entries
from syncd.trees import layout_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.mirror.root import Disk, View
    from syncd.modes import ModePolicy
    from syncd.rollout import Mode
    from syncd.rules import Rules
    from syncd.store.base import Bucket

BATCH: Final = 1000
"""Paths that are compared, or put into the index, in one go."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """One path where a mirror is not what the bucket says: ``missing``, ``content``, ``kind``, ``mode``, ``mtime``."""

    path: str
    what: str


@dataclass(slots=True)
class Verdict:
    """What an audit found; ``extraneous`` paths are not syncd's and no fault.

    :ivar generation: what the mirror was compared with, 0 in the objects layout.
    :ivar tree: the tree digest of that generation, "" in the objects layout.
    :ivar found: the tree digest of what is on disk, without what is extraneous; "" in the objects layout, and where
        the mirror takes a part of the tree only.
    """

    checked: int = 0
    extraneous: int = 0
    deviations: list[Deviation] = field(default_factory=list)
    generation: int = 0
    tree: str = ""
    found: str = ""

    @property
    def sound(self) -> bool:
        """Whether the mirror is what the bucket says."""
        return not self.deviations and self.found in {"", self.tree}


@dataclass(frozen=True, slots=True)
class Takes:
    """How a mirror takes what its folder has.

    :ivar rules: which part of the tree.
    :ivar modes: with which modes.
    :ivar mode: where it is kept.
    """

    rules: Rules
    modes: ModePolicy
    mode: Mode = "mirror"


async def audit(bucket: Bucket, directory: Path, takes: Takes, *, generation: int = 0, applied: int = 0) -> Verdict:
    """Compare a mirror with its bucket.

    :param generation: what to compare with; 0: what was applied, else the head.
    :param applied: the generation that this mirror has as far as this host knows, 0 if it does not.
    :raises UsageError: there is no such generation, or the bucket keeps none.
    :raises DiskProblem, FileChanged: the mirror cannot be read.
    """
    if generation or await layout_of(bucket, await bucket.state()) == "generations":
        return await _audit_generation(await History.open(bucket), directory, takes, generation, applied)
    with tempfile.TemporaryDirectory(prefix="syncd-verify-") as scratch:
        index = await asyncio.to_thread(Index, Path(scratch) / "verify.db")
        try:
            await _list_into(index, bucket, takes)
            return await asyncio.to_thread(_compare, index, directory)
        finally:
            await asyncio.to_thread(index.close)


# -- generations -----------------------------------------------------------------------------------------------------


async def _audit_generation(history: History, directory: Path, takes: Takes, generation: int, applied: int) -> Verdict:
    rules = takes.rules
    if not generation and applied and await history.reader.generation(applied) is not None:
        generation = applied
    commit = await history.commit(generation or HEAD)
    root = commit.generation.root
    partial = False
    with await asyncio.to_thread(Mirror.peek, directory, mode=takes.mode) as mirror:
        comparison = Comparison(mirror, takes.modes)
        batch: list[tuple[str, Child, bool]] = []
        async for path, child in entries(history.reader, root, enter=rules.may_descend):
            is_dir = child.entry.kind is Kind.DIR
            taken = rules.takes(path, is_dir=is_dir)
            partial = partial or not taken
            if taken or (is_dir and rules.may_descend(path)):
                batch.append((path, child, taken))
            if len(batch) >= BATCH:
                await asyncio.to_thread(comparison.feed, batch)
                batch = []
        await asyncio.to_thread(comparison.feed, batch)
        verdict = await asyncio.to_thread(comparison.finish)
    verdict.generation, verdict.tree = commit.generation.number, root.tree
    if partial:
        verdict.found = ""
    return verdict


class Comparison:
    """Merges a tree, in path order, with what is on disk. Blocking.

    A mode that is as the mirror's policy makes it counts as the tree's own, so that the tree digest can be compared.
    """

    def __init__(self, mirror: View, modes: ModePolicy) -> None:
        self._mirror = mirror
        self._modes = modes
        self._walk = mirror.walk()
        self._next = next(self._walk, None)
        self._verdict = Verdict()
        self._found = TreeDigester()

    def feed(self, batch: list[tuple[str, Child, bool]]) -> None:
        """Compare some paths of the tree: path, what is there, and whether it takes part or only leads to others."""
        for path, child, taken in batch:
            key = sort_key(path)
            while self._next is not None and sort_key(self._next[0]) < key:
                self._pass_extraneous()
            disk = None
            if self._next is not None and self._next[0] == path:
                disk = self._next[1]
                self._next = next(self._walk, None)
            if taken:
                self._verdict.checked += 1
                self._compare(path, child.entry, disk)

    def finish(self) -> Verdict:
        """Return the verdict; all of the tree was fed."""
        while self._next is not None:
            self._pass_extraneous()
        self._verdict.found = self._found.finish()
        return self._verdict

    def _pass_extraneous(self) -> None:
        assert self._next is not None
        self._verdict.extraneous += self._next[1].kind is not None
        self._next = next(self._walk, None)

    def _compare(self, path: str, want: Entry, disk: Disk | None) -> None:
        if disk is None or disk.kind is None:
            self._verdict.deviations.append(Deviation(path, "missing"))
            return
        have = self._read(path, disk)
        kept = self._modes.apply(want)
        self._found.add(path, have._replace(mode=want.mode) if have.mode == kept.mode else have)
        if not have.same(kept):
            self._verdict.deviations.append(Deviation(path, _what(have, kept)))

    def _read(self, path: str, disk: Disk) -> Entry:
        assert disk.kind is not None
        if disk.kind is not Kind.FILE:
            mode = 0o777 if disk.kind is Kind.SYMLINK else disk.mode
            return Entry(disk.kind, mode, disk.stat.mtime_ns, target=disk.target)
        digest, _, stat = self._mirror.read_digests(path, sha256=False)
        return Entry(disk.kind, disk.mode, stat.mtime_ns, stat.size, digest)


class TreeDigester:
    """Computes a root's tree digest from paths in path order; holds the identities of the directories along one path.

    A path whose directory was not added is ignored with it.
    """

    def __init__(self) -> None:
        self._frames: list[tuple[str, Entry | None, bytearray]] = [("", None, bytearray())]

    def add(self, path: str, entry: Entry) -> None:
        """Add the next path."""
        above = parent(path)
        while self._frames[-1][0] != above and not _is_below(above, self._frames[-1][0]):
            self._close()
        if self._frames[-1][0] != above:
            return
        if entry.kind is Kind.DIR:
            self._frames.append((path, entry, bytearray()))
        else:
            self._frames[-1][2].extend(identity(Child(path.rpartition("/")[2], entry)))

    def finish(self) -> str:
        """Return the tree digest of everything that was added."""
        while len(self._frames) > 1:
            self._close()
        return digest_of(memoryview(self._frames[0][2]))

    def _close(self) -> None:
        path, entry, identities = self._frames.pop()
        assert entry is not None
        child = Child(path.rpartition("/")[2], entry, tree=digest_of(memoryview(identities)))
        self._frames[-1][2].extend(identity(child))


def _is_below(path: str, directory: str) -> bool:
    return not directory or path.startswith(directory + "/")


# -- objects ---------------------------------------------------------------------------------------------------------


async def _list_into(index: Index, bucket: Bucket, takes: Takes) -> None:
    async for page in bucket.changes(0):
        rows = []
        for item in page.items:
            if isinstance(item, BadMeta) or item.deleted or item.link is not None:
                continue
            with contextlib.suppress(SyncdError):  # refused objects are the daemon's report, not a mirror's fault
                row = remote_row(item)
                if takes.rules.takes(row.path, is_dir=row.entry.kind is Kind.DIR):
                    rows.append(row._replace(entry=takes.modes.apply(row.entry)))
        await asyncio.to_thread(index.put_remote, rows)


def _compare(index: Index, directory: Path) -> Verdict:
    with Mirror.peek(directory) as mirror:

        def rows() -> Iterator[LocalRow]:
            for path, disk in mirror.walk():
                if disk.kind is None:
                    continue
                digest = sha256 = ""
                if disk.kind is Kind.FILE and index.remote(path) is not None:
                    digest, sha256, _ = mirror.read_digests(path)
                mode = 0o777 if disk.kind is Kind.SYMLINK else disk.mode
                entry = Entry(disk.kind, mode, disk.stat.mtime_ns, disk.stat.size, digest, sha256, disk.target)
                yield LocalRow(path, entry, disk.stat)

        found = rows()
        while batch := list(islice(found, BATCH)):
            index.put_local(batch)
    extraneous = 0
    deviations: list[Deviation] = []
    for path, local, remote in index.diff():
        if remote is None:
            extraneous += 0 if index.has_remote_below(path) else 1
        elif local is None:
            deviations.append(Deviation(path, "missing"))
        else:
            deviations.append(Deviation(path, _what(local.entry, remote.entry)))
    return Verdict(index.count_remote(), extraneous, deviations)


def _what(have: Entry, want: Entry) -> str:
    if have.kind is not want.kind:
        return "kind"
    if not have.same_content(want):
        return "content"
    return "mode" if have.mode != want.mode else "mtime"
