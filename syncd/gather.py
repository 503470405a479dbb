"""Content of a whole generation: from the mirror, from what an interrupted run staged, else from the bucket.

Rules kept here:
 * the mirror is only read; what is gathered is staged, verified and noted, so that the next run goes on with it;
 * each blob is asked for once, however many files it holds content of: what is wanted is fetched in the order of its
   locations, not of its paths;
 * memory is bounded whatever the number and size of the files: some pages of rows, some blobs on their way;
 * a location is a hint: what it yields counts only if it has the content's own digest.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, Self, TypeVar

from syncd.crashpoints import crash_point
from syncd.errors import DiskProblem, FileChanged, FormatTooNew, ObjectCorrupt, ObjectGone, SyncdError
from syncd.index import LocalRow
from syncd.index.checkout import ChunkPlace, Staged, Wanted, parse_location
from syncd.mirror import is_unreadable
from syncd.model import Entry, Kind
from syncd.nodes import PACK_ITEM_MAX, Where, digest_of
from syncd.trees import TreeReader, cut
from syncd.upstream import Fetch, Overtaken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
    from typing import Any

    from syncd.index import Index
    from syncd.index.checkout import CheckoutTables
    from syncd.mirror import Assembly, Disk, Mirror
    from syncd.nodes import Piece
    from syncd.progress import Meter
    from syncd.service import FolderThread
    from syncd.store.base import Bucket
    from syncd.upstream import Pages, PullResult, Row

T = TypeVar("T")

STAGE_FILES: Final = 500
STAGE_BYTES: Final = 4 * 1024 * 1024
"""Content handed to the disk at once."""
WINDOW_FILES: Final = 8192
WINDOW_BLOBS: Final = 256
WINDOW_PIECES: Final = 512
WINDOW_BYTES: Final = 64 * 1024 * 1024
WINDOW_ASSEMBLIES: Final = 64
"""Large files that are open at once."""
RECIPES_AT_ONCE: Final = 32
SOURCES_OPEN: Final = 16
SPARE_PARTS: Final = 2
"""Half-made large files of generations that were overtaken: sources for the next one."""
UNLEARNED_AT_ONCE: Final = 64
ROOM: Final = 256 * 1024
"""Bytes that must stay free."""


UNREADABLE: Final = (ObjectCorrupt, ObjectGone, FormatTooNew)
"""What is wrong with a generation, not with the way to it."""


class Unfetchable(Exception):
    """A content cannot be had.

    :ivar path: a file that wants it.
    """

    def __init__(self, path: str, error: SyncdError) -> None:
        super().__init__(path)
        self.path = path
        self.error = error


@dataclass(slots=True)
class _Large:
    """A large file in the making."""

    file: Wanted
    assembly: Assembly


@dataclass(slots=True)
class _Slot:
    """One chunk's place in a large file.

    :ivar last: the file is complete with it.
    """

    large: _Large
    at: int
    piece: Piece
    last: bool


@dataclass(slots=True)
class _Tally:
    """What one run of :meth:`Gatherer.gather` counts into."""

    result: PullResult
    meter: Meter
    overtaken: Callable[[], Awaitable[bool]]

    async def check(self) -> None:
        if await self.overtaken():
            raise Overtaken


class _Background:
    """At most one piece of work beside the one that goes on; its failure is raised at the next step."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            await self.settle()
        elif self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def settle(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            try:
                await task
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await self.settle()
        except BaseException:
            work.close()
            raise
        self._task = asyncio.create_task(work)


def _nothing_at_hand(digest: str) -> bytes | None:  # noqa: ARG001
    return None


class Gatherer:
    """Stages the content of generations for one mirror.

    :ivar at_hand: returns a blob that was fetched a moment ago, ``None`` where it was not.
    """

    def __init__(
        self, bucket: Bucket, index: Index, tables: CheckoutTables, mirror: Mirror, thread: FolderThread
    ) -> None:
        self._bucket = bucket
        self._index = index
        self._tables = tables
        self._mirror = mirror
        self._thread = thread
        self.at_hand: Callable[[str], bytes | None] = _nothing_at_hand
        self._missing = False
        self._staged_any = self._large_any = True  # by an earlier run, until the first tidying up

    async def gather(
        self, pages: Pages, result: PullResult, meter: Meter, overtaken: Callable[[], Awaitable[bool]]
    ) -> None:
        """Stage all content that the differences need.

        :raises Unfetchable: some content cannot be had; what is staged stays for the next try.
        :raises Overtaken: something newer is announced.
        :raises DiskProblem: the disk refused, or has no room for all of it.
        """
        tally = _Tally(result, meter, overtaken)
        try:
            await self._gather(pages, tally)
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Keep no blobs at hand."""
        self.at_hand = _nothing_at_hand

    async def _gather(self, pages: Pages, tally: _Tally) -> None:
        await self._thread.run(self._tables.begin_gather)
        after: str | None = ""
        while after is not None:
            rows, after = await pages(after)
            await self._take_local(rows, tally)
            await tally.check()
        await self._thread.run(self._check_room)
        await self._fetch_small(tally)
        await self._fetch_large(tally)
        await self._thread.run(lambda: self._copy_staged(tally))

    # -- what is here already ------------------------------------------------------------------------------------------

    async def _take_local(self, rows: list[Row], tally: _Tally) -> None:
        if not rows:
            return
        found, size = await self._thread.run(lambda: self._find_local(rows))
        tally.result.reused_bytes += size
        for _ in range(found):
            tally.meter.done(0)
        tally.meter.add(size)

    def _find_local(self, rows: list[Row]) -> tuple[int, int]:
        """Take from this mirror what it has; note the rest as wanted. Return files and bytes that were found."""
        needed = {
            path: (local, remote)
            for path, local, remote in rows
            if remote is not None
            and remote.entry.kind is Kind.FILE
            and not (local is not None and local.entry.same_content(remote.entry))
        }
        staged = self._tables.staged(needed)
        here = self._tables.local_contents({remote.entry.digest for _, remote in needed.values()})
        unknown = (path for path, (local, _) in needed.items() if local is None or not local.entry.digest)
        disks = dict(self._mirror.look_all(path for path in unknown if path not in staged))
        wanted: list[Wanted] = []
        adopted: list[LocalRow] = []
        done: list[tuple[str, Staged]] = []
        empty: list[tuple[str, Entry]] = []
        files = size = 0
        for path, (_, remote) in needed.items():
            want = remote.entry
            if want.size == 0:
                empty.append((path, want))
                continue
            have = self._resume(path, staged.get(path), want)
            row = self._adopt(path, disks.get(path), want) if have is None else None
            if row is not None:
                adopted.append(row)
            elif have is None:
                have = self._copy(here.get(want.digest), want)
            if have is not None:
                done.append((path, have))
            if have is None and row is None:
                wanted.append(Wanted(path, want, parse_location(remote.nuid)))
            else:
                files += 1
                size += want.size
        done += self._stage_empty(empty)
        self._tables.put_staged(done)
        self._tables.put_adopted(adopted)
        for file in wanted:
            if file.location.where is Where.EMPTY:
                raise Unfetchable(file.path, ObjectCorrupt("its content is stored nowhere"))
        self._tables.want(wanted)
        self._staged_any = self._staged_any or bool(done)
        return files, size

    def _resume(self, path: str, staged: Staged | None, want: Entry) -> Staged | None:
        """Take what is staged for a path: by this run verified, by an earlier one read again."""
        if staged is None:
            return None
        run = self._mirror.run
        if staged.digest == want.digest and self._mirror.refit_staged(staged.name, want, reread=staged.run != run):
            return Staged(staged.name, staged.digest, run)
        self._tables.drop_staged([path])  # swept when the generation is in place
        return None

    def _adopt(self, path: str, disk: Disk | None, want: Entry) -> LocalRow | None:
        """Recognise by digest a file that is there already (lost state, another layout, copied there by hand)."""
        if disk is None or disk.kind is not Kind.FILE or disk.stat.size != want.size:
            return None
        try:
            digest, _, stat = self._mirror.read_digests(path, sha256=False)
        except SyncdError:
            return None
        if digest != want.digest:
            return None
        return LocalRow(path, Entry(Kind.FILE, disk.mode, stat.mtime_ns, stat.size, digest), stat)

    def _copy(self, source: str | None, want: Entry) -> Staged | None:
        """Stage a copy of another file of the mirror, or of what is staged for another path."""
        try:
            if source is not None:
                return Staged(self._mirror.stage_copy(source, want), want.digest, self._mirror.run)
        except FileChanged:
            pass  # it changed since the index saw it
        except DiskProblem as error:
            if not is_unreadable(error):
                raise
        if want.size <= PACK_ITEM_MAX:
            return None  # cheaper to write again than to look for
        staged = self._tables.staged_content(want.digest, self._mirror.run)
        if staged is None:
            return None
        try:
            return Staged(self._mirror.stage_copy_staged(staged.name, want), want.digest, self._mirror.run)
        except FileChanged:
            return None

    def _stage_empty(self, files: list[tuple[str, Entry]]) -> list[tuple[str, Staged]]:
        outcomes = self._mirror.stage_bytes([(want, b"") for _, want in files])
        done = []
        for (path, want), outcome in zip(files, outcomes, strict=True):
            done.append((path, Staged(_name_of(path, outcome), want.digest, self._mirror.run)))
        return done

    def _check_room(self) -> None:
        needed, free = self._tables.wanted_bytes(), self._mirror.free_bytes()
        if needed + ROOM > free and needed + ROOM > free + self._mirror.part_bytes():
            raise DiskProblem(
                f"no space for the generation: it needs {needed} bytes, {free} are free",
                hint="free some space; the work goes on by itself then",
            )

    # -- small contents ------------------------------------------------------------------------------------------------

    async def _fetch_small(self, tally: _Tally) -> None:
        """Fetch whole blobs and packs, each once; one batch is staged while the next is fetched."""
        windows = _windows(self._tables.wanted(recipes=False))
        batch: list[tuple[Wanted, bytes]] = []
        size = 0
        last: dict[str, bytes] = {}
        async with _Background() as staging:
            while window := await self._thread.run(lambda: next(windows, None)):
                before, last, cut_off = last, {}, next(reversed(window))
                async with _closing(self._blobs(list(window), before)) as blobs:
                    async for digest, data in blobs:
                        files = window.pop(digest)
                        if not isinstance(data, bytes):
                            raise _unfetchable(files[0].path, data)
                        if digest == cut_off:
                            last = {digest: data}
                        if digest not in before:
                            tally.result.downloaded_bytes += len(data)
                        for file in files:
                            content = _cut(data, file)
                            batch.append((file, content))
                            size += len(content)
                            if size >= STAGE_BYTES or len(batch) >= STAGE_FILES:
                                await staging.start(self._stage_small(batch, tally))
                                batch, size = [], 0
                for files in window.values():
                    raise _unfetchable(files[0].path, ObjectGone("its blob was not delivered"))
                await tally.check()
            await staging.start(self._stage_small(batch, tally))

    async def _blobs(self, digests: list[str], last: dict[str, bytes]) -> AsyncIterator[tuple[str, bytes | SyncdError]]:
        """Yield blobs, those first that were just fetched: by the walk over the nodes, or for the window before."""
        missing: list[str] = []
        for digest in digests:
            data = last.get(digest) or self.at_hand(digest)
            if data is None:
                missing.append(digest)
            else:
                yield digest, data
        if missing:
            async with _closing(self._bucket.get_blobs(missing)) as blobs:
                async for outcome in blobs:
                    yield outcome

    async def _stage_small(self, batch: list[tuple[Wanted, bytes]], tally: _Tally) -> None:
        await self._thread.run(lambda: self._stage_batch(batch))
        for file, _ in batch:
            tally.meter.done(file.entry.size)
        crash_point("content_staged")

    def _stage_batch(self, batch: list[tuple[Wanted, bytes]]) -> None:
        outcomes = self._mirror.stage_bytes([(file.entry, data) for file, data in batch])
        run = self._mirror.run
        good = [
            (file.path, Staged(outcome, file.entry.digest, run))
            for (file, _), outcome in zip(batch, outcomes, strict=True)
            if isinstance(outcome, str)
        ]
        self._tables.put_staged(good)
        self._staged_any = True
        for (file, _), outcome in zip(batch, outcomes, strict=True):
            _name_of(file.path, outcome)

    # -- large contents ------------------------------------------------------------------------------------------------

    async def _fetch_large(self, tally: _Tally) -> None:
        """Put large files together from chunks: what is on disk anywhere first, the rest from the bucket."""
        await self._thread.run(lambda: self._mirror.sweep_parts(self._tables.is_announced, SPARE_PARTS))
        window: list[_Slot] = []
        size = 0
        open_files: dict[str, _Large] = {}
        try:
            async with _Background() as verifying:
                async with _closing(self._slots(tally, open_files)) as slots:
                    async for slot in slots:
                        window.append(slot)
                        size += slot.piece.length
                        if len(window) >= WINDOW_PIECES or size >= WINDOW_BYTES or len(open_files) >= WINDOW_ASSEMBLIES:
                            await self._fill(window, tally)
                            await verifying.start(self._verify(window, tally, open_files))
                            window, size = [], 0
                            await tally.check()
                await self._fill(window, tally)
                await verifying.start(self._verify(window, tally, open_files))
        finally:
            for large in open_files.values():
                large.assembly.close()

    async def _slots(self, tally: _Tally, open_files: dict[str, _Large]) -> AsyncIterator[_Slot]:
        """Yield the chunks of all large contents that are wanted, each content once."""
        source = self._tables.wanted(recipes=True)
        while files := await self._thread.run(lambda: list(islice(source, RECIPES_AT_ONCE))):
            first: dict[str, Wanted] = {}
            for file in files:
                if file.entry.digest not in open_files:
                    first.setdefault(file.entry.digest, file)
            there = await self._thread.run(lambda first=first: self._are_staged(first))  # type: ignore[misc]
            once = [file for digest, file in first.items() if digest not in there]
            recipes = await self._recipes(once, tally)
            for file in once:
                large = _Large(file, await self._thread.run(lambda file=file: self._mirror.assemble(file.entry)))  # type: ignore[misc]
                open_files[file.entry.digest] = large
                at = 0
                try:
                    async for piece in recipes.pieces(file.location.blob, file.entry.size):
                        end = at + piece.length
                        yield _Slot(large, at, piece, last=end == file.entry.size)
                        at = end
                except UNREADABLE as error:
                    raise Unfetchable(file.path, error) from error

    def _are_staged(self, digests: Iterable[str]) -> set[str]:
        return {one for one in digests if self._tables.staged_content(one, self._mirror.run) is not None}

    async def _recipes(self, files: list[Wanted], tally: _Tally) -> TreeReader:
        """Fetch the recipes of some files together; return a reader that has them at hand."""
        kept = _Kept()
        paths = {file.location.blob: file.path for file in files}
        if paths:
            async with _closing(self._bucket.get_blobs(list(paths))) as blobs:
                async for digest, data in blobs:
                    if not isinstance(data, bytes):
                        raise _unfetchable(paths[digest], data)
                    tally.result.downloaded_bytes += len(data)
                    kept.blobs[digest] = data
        return TreeReader(self._bucket, kept)

    async def _fill(self, window: list[_Slot], tally: _Tally) -> None:
        """Write the chunks of a window to their places."""
        missing = await self._thread.run(lambda: self._fill_locally(window))
        reused = sum(slot.piece.length for slot in window) - sum(
            slot.piece.length for slots in missing.values() for slot in slots
        )
        tally.result.reused_bytes += reused
        tally.meter.add(reused)
        batch: list[tuple[list[_Slot], bytes]] = []
        size = 0
        async with _Background() as writing:
            async with _closing(self._bucket.get_blobs(list(missing))) as blobs:
                async for digest, data in blobs:
                    slots = missing.pop(digest)
                    path = slots[0].large.file.path
                    if not isinstance(data, bytes):
                        raise _unfetchable(path, data)
                    if any(slot.piece.length != len(data) for slot in slots):
                        raise Unfetchable(path, ObjectCorrupt("a chunk is not as long as its recipe says"))
                    tally.result.downloaded_bytes += len(data)
                    batch.append((slots, data))
                    size += len(data)
                    if size >= STAGE_BYTES:
                        await writing.start(self._write(batch, tally))
                        batch, size = [], 0
            for slots in missing.values():
                raise _unfetchable(slots[0].large.file.path, ObjectGone("a chunk was not delivered"))
            await writing.start(self._write(batch, tally))
        await self._thread.run(lambda: self._tables.put_chunks(_places(window)))

    async def _write(self, batch: list[tuple[list[_Slot], bytes]], tally: _Tally) -> None:
        def write() -> None:
            for slots, data in batch:
                for slot in slots:
                    slot.large.assembly.write(slot.at, data)

        await self._thread.run(write)
        for slots, data in batch:
            tally.meter.add(len(data) * len(slots))
        crash_point("content_staged")

    def _fill_locally(self, window: list[_Slot]) -> dict[str, list[_Slot]]:
        """Write what is on disk already, checked chunk by chunk; return the rest by digest."""
        missing: dict[str, list[_Slot]] = {}
        for slot in window:
            if not slot.large.assembly.holds(slot.at, slot.piece.length, slot.piece.digest):
                missing.setdefault(slot.piece.digest, []).append(slot)
        places = self._tables.find_chunks(missing)
        if not places:
            return missing
        contents = {place.content for some in places.values() for place in some}
        sources = _Sources(self._mirror, self._tables.local_contents(contents))
        try:
            for digest, some in places.items():
                data = sources.read(digest, some)
                if data is None or any(slot.piece.length != len(data) for slot in missing[digest]):
                    continue
                for slot in missing.pop(digest):
                    slot.large.assembly.write(slot.at, data)
        finally:
            sources.close()
        return missing

    async def _verify(self, window: list[_Slot], tally: _Tally, open_files: dict[str, _Large]) -> None:
        """Read back what a window completed; finish the files that it completed."""
        ends = {slot.large.file.entry.digest: slot for slot in window}
        for digest, slot in ends.items():
            assembly, file = slot.large.assembly, slot.large.file
            end = slot.at + slot.piece.length
            await asyncio.shield(asyncio.to_thread(assembly.advance, end))
            if not slot.last:
                continue
            try:
                name = await asyncio.shield(asyncio.to_thread(assembly.finish))
            except ObjectCorrupt as error:
                raise Unfetchable(file.path, error) from error
            staged = Staged(name, digest, self._mirror.run)
            await self._thread.run(lambda file=file, staged=staged: self._tables.put_staged([(file.path, staged)]))  # type: ignore[misc]
            self._staged_any = self._large_any = True
            del open_files[digest]  # finish() has let go of it
            tally.meter.done(0)

    def _copy_staged(self, tally: _Tally) -> None:
        """Stage the large contents that several paths have, from the first of them."""
        source = self._tables.wanted(recipes=True)
        while files := list(islice(source, STAGE_FILES)):
            staged = self._tables.staged(file.path for file in files)
            for file in files:
                if file.path in staged:
                    continue
                have = self._copy(None, file.entry)
                if have is None:
                    raise DiskProblem(f"the staged content of {file.path} is gone", hint="it is staged again")
                self._tables.put_staged([(file.path, have)])
                tally.result.reused_bytes += file.entry.size
                tally.meter.done(file.entry.size)

    # -- applying ------------------------------------------------------------------------------------------------------

    def staged(self, rows: list[Row]) -> dict[str, Fetch]:
        """Return what is staged for a batch, or in place already. Blocking."""
        needed = {
            path: remote
            for path, local, remote in rows
            if remote is not None
            and remote.entry.kind is Kind.FILE
            and not (local is not None and local.entry.same_content(remote.entry))
        }
        staged = self._tables.staged(needed)
        adopted = self._tables.adopted(path for path in needed if path not in staged)
        fetches: dict[str, Fetch] = {}
        for path, remote in needed.items():
            fetch = fetches[path] = Fetch(remote)
            have, there = staged.get(path), adopted.get(path)
            if have is not None and have.digest == remote.entry.digest:
                if have.run == self._mirror.run or self._mirror.refit_staged(have.name, remote.entry, reread=True):
                    fetch.staged = have.name
            elif there is not None and there.entry.same_content(remote.entry):
                fetch.in_place = there
            self._missing = self._missing or not (fetch.staged or fetch.in_place)
        return fetches

    def take_missing(self) -> bool:
        """Tell whether staged content was not there when a batch needed it, and forget it."""
        missing, self._missing = self._missing, False
        return missing

    def tidy(self) -> None:
        """The generation is in place: let go of everything that was staged. Blocking."""
        if not self._staged_any:
            return
        self._tables.clear_staged()
        self._mirror.discard_staged()
        self._staged_any = False
        if self._large_any:
            self._tables.drop_lost_chunks()
            self._large_any = False

    # -- chunks of the mirror's files ----------------------------------------------------------------------------------

    async def learn(self) -> None:
        """Note the chunks of large files that came here otherwise, so that a later edit costs only its chunks."""
        while found := await self._thread.run(lambda: self._tables.unlearned(UNLEARNED_AT_ONCE)):
            reader = TreeReader(self._bucket)
            for recipe, content, size in found:
                places = []
                at = 0
                async for piece in reader.pieces(recipe, size):
                    places.append(ChunkPlace(piece.digest, content, at, piece.length))
                    at += piece.length
                await self._thread.run(lambda places=places: self._tables.put_chunks(places))  # type: ignore[misc]


class _Kept:
    """Recipes at hand, as a :class:`syncd.trees.BlobCache`."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def get(self, digests: Collection[str]) -> dict[str, bytes]:
        return {digest: self.blobs[digest] for digest in digests if digest in self.blobs}

    def put(self, blobs: dict[str, bytes]) -> None:
        """Recipes below the first level are read once: not kept."""


class _Sources:
    """Files of the mirror, and large files in the making, to take chunks from; a few are open at once."""

    def __init__(self, mirror: Mirror, paths: dict[str, str]) -> None:
        self._mirror = mirror
        self._paths = paths
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, digest: str, places: list[ChunkPlace]) -> bytes | None:
        """Return a chunk from the first place that has it; ``None`` where none has."""
        for place in places:
            fd = self._descriptor(place.content)
            if fd < 0:
                continue
            with suppress(OSError):
                data = os.pread(fd, place.length, place.at)
                if digest_of(data) == digest:
                    return data
        return None

    def _descriptor(self, content: str) -> int:
        if content in self._open:
            self._open.move_to_end(content)
            return self._open[content]
        path = self._paths.get(content)
        try:
            fd = self._mirror.open_source(path) if path is not None else self._mirror.open_part(content)
        except (FileChanged, DiskProblem):
            fd = -1
        self._open[content] = fd
        if len(self._open) > SOURCES_OPEN:
            _, oldest = self._open.popitem(last=False)
            if oldest >= 0:
                os.close(oldest)
        return fd

    def close(self) -> None:
        for fd in self._open.values():
            if fd >= 0:
                os.close(fd)
        self._open.clear()


@asynccontextmanager
async def _closing(source: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Let an iteration end what it has under way, also where it is left early."""
    try:
        yield source
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def _windows(files: Iterator[Wanted]) -> Iterator[dict[str, list[Wanted]]]:
    """Group files by the blob that holds their content, some blobs at a time, and some files even of a single one.

    The last blob of a window may go on as the first of the next one.
    """
    window: dict[str, list[Wanted]] = {}
    count = 0
    for file in files:
        if count >= WINDOW_FILES or (len(window) >= WINDOW_BLOBS and file.location.blob not in window):
            yield window
            window, count = {}, 0
        window.setdefault(file.location.blob, []).append(file)
        count += 1
    if window:
        yield window


def _places(window: list[_Slot]) -> Iterator[ChunkPlace]:
    for slot in window:
        yield ChunkPlace(slot.piece.digest, slot.large.file.entry.digest, slot.at, slot.piece.length)


def _cut(blob: bytes, file: Wanted) -> bytes:
    try:
        return cut(blob, file.location, file.entry.size)
    except ObjectCorrupt as error:
        raise Unfetchable(file.path, error) from error


def _name_of(path: str, outcome: str | Exception) -> str:
    """Return the staged name; raise what stands in its place."""
    if isinstance(outcome, str):
        return outcome
    if isinstance(outcome, ObjectCorrupt):
        raise Unfetchable(path, outcome)
    raise outcome


def _unfetchable(path: str, error: SyncdError) -> Exception:
    """Return what to raise for a blob that could not be had."""
    return Unfetchable(path, error) if isinstance(error, UNREADABLE) else error
