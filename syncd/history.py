"""Looking into a bucket of the generations layout: which there are, what they hold, what two of them do not share.

Rules kept here:
 * the list of generations is read from metadata alone, whatever they hold; it is a summary for people and decides
   nothing. Everything else is read from the records and nodes, checked against their digests;
 * memory is bounded by the number of generations, never by the size of a tree or a content.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from syncd.errors import ObjectCorrupt, SyncdError, Unavailable, UsageError
from syncd.model import Kind
from syncd.nodes import NodeRef, digest_of
from syncd.paths import printable
from syncd.records import good_signers
from syncd.store import mapping
from syncd.store.base import CHANNELS, HEAD, BadMeta
from syncd.store.content import Hashes
from syncd.treediff import Mark, differences, entries
from syncd.trees import TreeReader, layout_of, number_of
from syncd.trust import Statement, check_move, decode_move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from syncd.nodes import Child
    from syncd.store.base import Bucket, ObjectInfo, Sink
    from syncd.treediff import Change
    from syncd.trees import Commit

MAX_DIGITS: Final = 10
"""Digits of a generation's number."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One generation as its object's metadata tells it; ``None`` and "" where that does not say.

    :ivar created: RFC 3339, UTC, by the publisher's clock.
    :ivar files, bytes: regular files and symlinks of the tree; bytes of the files.
    :ivar added, changed, removed: paths against the generation before, directories not counted.
    :ivar channels: the channels that point at it, sorted.
    """

    number: int
    created: str
    files: int | None
    bytes: int | None
    added: int | None
    changed: int | None
    removed: int | None
    note: str
    publisher: str
    tree: str
    channels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"channels": list(self.channels)}


@dataclass(slots=True)
class Counts:
    """Paths of one mark, and the bytes of their files (afterwards; of removed ones before)."""

    paths: int = 0
    bytes: int = 0


@dataclass(slots=True)
class DiffStat:
    """Changes counted by their mark."""

    marks: dict[Mark, Counts] = field(default_factory=lambda: {mark: Counts() for mark in Mark})

    def add(self, change: Change) -> None:
        """Count one."""
        counts = self.marks[change.mark]
        counts.paths += 1
        child = change.after or change.before
        counts.bytes += child.entry.size if child is not None else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {mark.name.lower(): asdict(counts) for mark, counts in self.marks.items()}


@dataclass(frozen=True, slots=True)
class Side:
    """One of two generations that are compared: what a person looks at, and may sign then.

    :ivar record: BLAKE3 of its record, and so of all that it holds.
    :ivar signers: keys with a good signature over the record, trusted or not.
    :ivar channel: the channel that led to it; "" where it was named by its number.
    :ivar count, move: which move of the channel led here, and BLAKE3 of that, which names the record as well; 0 and ""
        where the channel's move is not readable, or leads elsewhere.
    """

    generation: int
    record: str
    signers: tuple[str, ...] = ()
    channel: str = ""
    count: int = 0
    move: str = ""

    def __str__(self) -> str:
        """Return it in words."""
        by = f", signed by {', '.join(self.signers)}" if self.signers else ""
        text = f"generation {self.generation}, record {self.record}{by}"
        if not self.channel:
            return text
        move = f"move {self.count}, digest {self.move}" if self.move else "no move that leads here"
        return f"{text}; channel {self.channel}: {move}"


class History:
    """The generations of one bucket.

    :param bucket: of the generations layout, see :meth:`open`.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.reader = TreeReader(bucket)

    @classmethod
    async def open(cls, bucket: Bucket) -> History:
        """Look at a bucket's layout first.

        :raises UsageError: it has the objects layout, which keeps no history.
        :raises BucketNotFound, FormatTooNew: there is none, or a newer version wrote it.
        """
        history = await cls.find(bucket)
        if history is None:
            raise UsageError(
                f"folder {bucket.name!r} has the objects layout, which keeps no generations",
                hint=f"what it holds now: syncd ls {bucket.name}",
            )
        return history

    @classmethod
    async def find(cls, bucket: Bucket) -> History | None:
        """Look at a bucket's layout; ``None`` where it is the objects layout.

        :raises BucketNotFound, FormatTooNew: there is no bucket, or a newer version wrote it.
        """
        generations = await layout_of(bucket, await bucket.state()) == "generations"
        return cls(bucket) if generations else None

    # -- which there are ---------------------------------------------------------------------------------------------

    async def log(self) -> list[Summary]:
        """Return all generations, the newest first.

        :raises Unavailable: there is none yet.
        """
        infos, channels = await self._listed()
        if not infos:
            raise self._nothing_yet()
        found = [_summary(number, info, channels.get(number, [])) for number, info in infos.items()]
        return sorted(found, key=lambda one: -one.number)

    async def _listed(self) -> tuple[dict[int, ObjectInfo], dict[int, list[str]]]:
        """Return generation objects by number, and the names of the channels that point at each."""
        infos: dict[int, ObjectInfo] = {}
        channels: dict[int, list[str]] = {}
        async for page in self._bucket.changes(0):
            for item in page.items:
                if isinstance(item, BadMeta) or item.deleted:
                    continue
                link = item.link
                if link is None and (number := number_of(item.name)):
                    infos[number] = item
                elif link is not None and item.name.startswith(CHANNELS) and link.bucket == self._bucket.name:
                    channels.setdefault(number_of(link.name or ""), []).append(item.name.removeprefix(CHANNELS))
        return infos, channels

    async def commit(self, which: str | int = HEAD) -> Commit:
        """Return a generation by its number or by the name of a channel.

        :raises UsageError: there is none (any more), or no such channel; the message says which there are.
        :raises Unavailable: the folder has no generation yet.
        """
        number = _number(which)
        if number is not None:
            found = await self.reader.generation(number)
        else:
            found = await self.reader.channel(str(which))
        if found is not None:
            return found
        infos, channels = await self._listed()
        if not infos:
            raise self._nothing_yet()
        folder = self._bucket.name
        if number is not None:
            raise UsageError(
                f"folder {folder!r} has no generation {number}: the oldest is {min(infos)}, the newest {max(infos)}",
                hint=f"see: syncd log {folder}",
            )
        names = sorted(printable(name) for names in channels.values() for name in names)
        raise UsageError(
            f"folder {folder!r} has no channel {printable(str(which))!r}",
            hint=f"channels: {', '.join(names)}" if names else f"see: syncd log {folder}",
        )

    def _nothing_yet(self) -> Unavailable:
        folder = self._bucket.name
        return Unavailable(
            f"folder {folder!r} has no generation yet", hint=f"its publisher makes the first: syncd push {folder}"
        )

    # -- what they hold ----------------------------------------------------------------------------------------------

    async def entries(self, which: str | int = HEAD) -> AsyncIterator[tuple[str, Child]]:
        """Yield a generation's paths in path order.

        :raises ObjectGone, ObjectCorrupt: the tree cannot be read further.
        """
        commit = await self.commit(which)
        async for path, child in entries(self.reader, commit.generation.root):
            yield path, child

    async def differences(
        self, one: str | int, other: str | int, sides: Callable[[Side, Side], None] | None = None
    ) -> AsyncIterator[Change]:
        """Yield what two generations do not share, in path order, without directories that were only touched.

        :param sides: told first which two were read.
        """
        before, after = await self.commit(one), await self.commit(other)
        if sides is not None:
            sides(self._side(one, before), self._side(other, after))
        async for change in differences(self.reader, before.generation.root, after.generation.root):
            if not change.only_touched:
                yield change

    def _side(self, which: str | int, commit: Commit) -> Side:
        number, record = commit.generation.number, commit.digest
        by = good_signers(Statement.GENERATION, commit.record, commit.signatures)
        if _number(which) is not None:
            return Side(number, record, by)
        channel = str(which)
        data = commit.move.encode("utf-8", "surrogatepass")
        try:
            move = decode_move(data)
            check_move(move, folder=self._bucket.name, channel=channel, number=number, record=record)
        except SyncdError:
            return Side(number, record, by, channel)
        return Side(number, record, by, channel, move.count, digest_of(data))

    async def save(self, path: str, out: Sink, which: str | int = HEAD) -> None:
        """Write a file's content to ``out``, which must be thrown away if this raises: the end decides.

        :raises UsageError: there is no such path, or it is no file.
        :raises ObjectCorrupt: the content does not match its digest.
        """
        commit = await self.commit(which)
        child = await self._find(commit.generation.root, path)
        number = commit.generation.number
        if child is None:
            raise UsageError(
                f"no path {printable(path)!r} in generation {number} of folder {self._bucket.name!r}",
                hint=f"see: syncd ls {self._bucket.name} --generation {number}",
            )
        entry = child.entry
        if entry.kind is not Kind.FILE:
            raise UsageError(f"{printable(path)!r} is a {entry.kind}, it has no content")
        hashes = Hashes()
        async for data in self.reader.content(child.location, entry.size, entry.digest):
            await asyncio.to_thread(hashes.pass_on, (data,), out)
        if hashes.blake3.hexdigest() != entry.digest:
            raise ObjectCorrupt(f"the content of {printable(path)!r} does not match its digest")

    async def _find(self, root: NodeRef, path: str) -> Child | None:
        """Walk from the root to a path, one node per component."""
        *above, name = path.split("/")
        ref = root
        for part in above:
            child = await self._child(ref, part)
            if child is None or child.entry.kind is not Kind.DIR:
                return None
            ref = NodeRef(child.tree, child.location, child.length)
        return await self._child(ref, name)

    async def _child(self, ref: NodeRef, name: str) -> Child | None:
        (node,) = await self.reader.nodes([ref])

        def look() -> Child | None:
            found = None
            for child in node.children():  # to the end: only then is what it said sound
                found = child if child.name == name else found
            return found

        return await asyncio.to_thread(look)


def _number(which: str | int) -> int | None:
    """Return the generation number that is asked for, ``None`` where it is a channel's name."""
    if isinstance(which, int):
        return which
    return int(which) if which.isascii() and which.isdigit() and len(which) <= MAX_DIGITS else None


def _summary(number: int, info: ObjectInfo, channels: list[str]) -> Summary:
    metadata = info.metadata

    def count(key: str) -> int | None:
        text = metadata.get(key, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None  # noqa: PLR2004 - 64 bits

    return Summary(
        number=number,
        created=metadata.get(mapping.CREATED, ""),
        files=count(mapping.FILES),
        bytes=count(mapping.BYTES),
        added=count(mapping.ADDED),
        changed=count(mapping.CHANGED),
        removed=count(mapping.REMOVED),
        note=metadata.get(mapping.NOTE, ""),
        publisher=metadata.get(mapping.PUBLISHER, ""),
        tree=metadata.get(mapping.TREE, ""),
        channels=tuple(sorted(channels)),
    )
