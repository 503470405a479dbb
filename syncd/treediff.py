"""What two trees do not share: both walked at once, into directories whose tree digests differ and no others.

Rules kept here:
 * the order is that of paths component by component: a directory, then what is below it, then its next sibling;
 * memory is bounded by the directories along one path and the reader's cache, whatever the trees hold;
 * nothing is trusted: a path that no mirror may have ends the walk, which also bounds its depth.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Final

from syncd.model import Kind
from syncd.nodes import Child, NodeRef, Where
from syncd.paths import check_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from syncd.nodes import Node
    from syncd.trees import TreeReader

LOOK_AHEAD: Final = 64
"""Children of a directory that are looked at together: the nodes of those to enter are fetched in one request."""
WARM_BLOBS: Final = 32
"""Blobs fetched so at most: they have to fit the reader's cache."""

_Pair = tuple[Child | None, Child | None]


class Mark(StrEnum):
    """What happened to a path, as one letter."""

    ADDED = "A"
    CONTENT = "M"
    META = "m"
    """Mode or time only."""
    REMOVED = "D"
    KIND = "T"

    @property
    def words(self) -> str:
        """The same in words."""
        return _WORDS[self]


_WORDS: Final = {
    Mark.ADDED: "added",
    Mark.CONTENT: "content changed",
    Mark.META: "only mode or time changed",
    Mark.REMOVED: "removed",
    Mark.KIND: "another kind of entry",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One path that the two trees do not share; one side is set at least.

    A directory that differs in nothing but what is below it is no change.
    """

    path: str
    before: Child | None
    after: Child | None

    @property
    def mark(self) -> Mark:
        """What happened."""
        if self.before is None:
            return Mark.ADDED
        if self.after is None:
            return Mark.REMOVED
        if self.before.entry.kind is not self.after.entry.kind:
            return Mark.KIND
        return Mark.META if self.before.entry.same_content(self.after.entry) else Mark.CONTENT

    @property
    def only_touched(self) -> bool:
        """Whether it is a directory with another time and nothing else: every change below it does that."""
        if self.before is None or self.after is None:
            return False
        before, after = self.before.entry, self.after.entry
        return before.kind is after.kind is Kind.DIR and before.mode == after.mode


class _Frame:
    """A pair of directories that is being walked.

    :ivar prefix: what the names are appended to: "" or a path that ends with a slash.
    """

    def __init__(self, prefix: str, before: Node | None, after: Node | None) -> None:
        self.prefix = prefix
        self._pairs = _paired(_children(before), _children(after))
        self._ready: deque[_Pair] = deque()

    def ahead(self, enter: Callable[[str], bool]) -> list[NodeRef]:
        """Look ahead if there is nothing ready; return the directories to enter among what was found."""
        if self._ready:
            return []
        self._ready.extend(islice(self._pairs, LOOK_AHEAD))
        found: list[NodeRef] = []
        for pair in self._ready:
            refs = [ref for ref in _to_enter(pair) if ref is not None]
            if refs and enter(self.prefix + _name(pair)):
                found += refs
        return found

    def next(self) -> _Pair | None:
        """Return the next pair of children, ``None`` at the end."""
        return self._ready.popleft() if self._ready else None


async def differences(
    reader: TreeReader,
    before: NodeRef | None,
    after: NodeRef | None,
    *,
    enter: Callable[[str], bool] = lambda _: True,
) -> AsyncIterator[Change]:
    """Yield what two trees do not share, in path order. ``None`` is a tree without entries.

    :param before, after: their roots.
    :param enter: asked for each directory path whether to look below it.
    :raises ObjectGone, ObjectCorrupt: a node cannot be had; what was yielded until then is true, and not all.
    :raises BadName: a tree names a path that must not be used.
    """
    if _same(before, after):
        return
    frames = [await _open(reader, "", before, after)]
    while frames:
        frame = frames[-1]
        await _warm(reader, frame.ahead(enter))
        pair = frame.next()
        if pair is None:
            frames.pop()
            continue
        one, other = pair
        path = check_path(frame.prefix + _name(pair))
        if one is None or other is None or one.entry != other.entry:
            yield Change(path, one, other)
        old, new = _to_enter(pair)
        if (old or new) and enter(path):
            frames.append(await _open(reader, path + "/", old, new))


async def entries(
    reader: TreeReader, root: NodeRef, *, enter: Callable[[str], bool] = lambda _: True
) -> AsyncIterator[tuple[str, Child]]:
    """Yield everything in a tree with its path, in path order; parameters and errors as in :func:`differences`."""
    async for change in differences(reader, None, root, enter=enter):
        assert change.after is not None
        yield change.path, change.after


async def _open(reader: TreeReader, prefix: str, before: NodeRef | None, after: NodeRef | None) -> _Frame:
    nodes = iter(await reader.nodes([ref for ref in (before, after) if ref is not None]))
    return _Frame(prefix, *(next(nodes) if ref is not None else None for ref in (before, after)))


async def _warm(reader: TreeReader, refs: list[NodeRef]) -> None:
    """Fetch the blobs of small nodes together; they stay in the reader's cache, which is bounded, until needed."""
    blobs = {ref.location.blob: ref for ref in refs if ref.location.where is not Where.RECIPE}
    if len(blobs) > 1:
        await reader.nodes(list(blobs.values())[:WARM_BLOBS])


def _name(pair: _Pair) -> str:
    child = pair[0] or pair[1]
    assert child is not None
    return child.name


def _to_enter(pair: _Pair) -> tuple[NodeRef | None, NodeRef | None]:
    old, new = map(_ref, pair)
    return (None, None) if _same(old, new) else (old, new)


def _same(one: NodeRef | None, other: NodeRef | None) -> bool:
    return one is not None and other is not None and one.tree == other.tree


def _ref(child: Child | None) -> NodeRef | None:
    if child is None or child.entry.kind is not Kind.DIR:
        return None
    return NodeRef(child.tree, child.location, child.length)


def _children(node: Node | None) -> Iterator[Child]:
    return iter(()) if node is None else node.children()


def _paired(before: Iterator[Child], after: Iterator[Child]) -> Iterator[_Pair]:
    """Merge two directories by name; names are valid UTF-8, of which the order of code points is that of the bytes."""
    one, other = next(before, None), next(after, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one.name < other.name):
            yield one, None
            one = next(before, None)
        elif one is None or other.name < one.name:
            yield None, other
            other = next(after, None)
        else:
            yield one, other
            one, other = next(before, None), next(after, None)
