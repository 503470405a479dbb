"""The generations layout's way into the bucket: blobs first, then one atomic commit of the whole tree.

Rules kept here (docs/architecture.md, docs/format.md):
 * No generation is announced before every blob that it reaches is acknowledged by the server.
 * The commit is one batch, fenced by the head that we last saw: of two publishers the second is told.
 * The index remembers a generation only after its acknowledgement. A crash before the commit leaves blobs that the
   next round finds in the bucket and does not send again; a crash after it, a head that the next catch-up reads back.
 * A round that changes nothing makes no generation.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final

import structlog

from syncd.build import Blob, Builder
from syncd.crashpoints import crash_point
from syncd.errors import FolderTaken, LayoutMismatch, ObjectCorrupt, SafetyHalt, StoreFull, WriteConflict
from syncd.index import LocalRow, RemoteRow
from syncd.index.blobs import UNSETTLED, Blobs
from syncd.model import Entry, Kind
from syncd.moves import (
    Word,
    count_after,
    generation_signature,
    is_record_signed,
    move_metadata,
    read_move,
    time_text,
    word_of,
)
from syncd.nodes import MAX_GENERATION, NOTE_MAX, Generation, Node, NodeRef, Where, digest_of, encode_record
from syncd.outlet import Claim, DeletionGuard, PublishOptions, PushResult, Wish
from syncd.paths import printable
from syncd.progress import Meter, Progress
from syncd.relayout import drop_objects, is_blob
from syncd.retention import Collected, Retention
from syncd.store.base import CHANNELS, HEAD, BadMeta, Link
from syncd.store.codec import Codec
from syncd.store.mapping import generation_metadata
from syncd.trees import Commit, TreeReader, generation_name, layout_of, number_of
from syncd.trust import MOVE, SIGNATURES, WHO_MAX, Move, is_expired

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator

    from syncd.index import Index
    from syncd.service import FolderThread
    from syncd.source import Source
    from syncd.store.base import BlobSink, Bucket, BucketState, Store

log = structlog.get_logger()

BATCH_BLOBS: Final = 64
BATCH_BYTES: Final = 2 * 1024 * 1024
BATCHES_AHEAD: Final = 3
WALK_AT_ONCE: Final = 64
SOIL_AT_ONCE: Final = 500
REMEMBER_AT_ONCE: Final = 1000
LIST_SECONDS: Final = 3600.0
"""How often the bucket's blobs are listed without any doubt."""
NUMBER: Final = "number"
"""The note of the highest number that was used; like the next one it outlives the bucket."""
COUNT: Final = "count"
"""The note of how many moves of the head were made."""
STRANGE: Final = "strange"
"""The note that the generation which the index describes is nobody's whose word counts: see :meth:`_is_strange`."""
RESERVE_BYTES: Final = 256 * 1024
RESERVE_SHARE: Final = 16
"""What blobs leave free of a limited bucket, at most this part of it: deletes need a commit, too."""


@dataclass(slots=True)
class _Tally:
    """What a commit changes against the generation before; directories are not counted."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    size: int = 0


class Committer:
    """Commits the state of a source as generations; an :class:`syncd.outlet.Outlet`."""

    def __init__(
        self,
        options: PublishOptions,
        store: Store,
        bucket: Bucket,
        index: Index,
        source: Source,
        *,
        thread: FolderThread,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._bucket = bucket
        self._index = index
        self._blobs = Blobs(index)
        self._source = source
        self._thread = thread
        self._clock = clock
        self._claim = Claim(options, store, bucket)
        self._guard = DeletionGuard(options.max_delete_percent, clock)
        self._reader = TreeReader(bucket)
        self._codec = Codec(compress=options.compress)
        self._retention = Retention(options, bucket, self._blobs, thread, clock)
        self._log = log.bind(folder=options.folder, role="publish")
        self._head: Commit | None = None
        self._pointed: Commit | None = None
        self._strange = False
        self._judged = self._foreign = 0  # sequences of the head's link that were looked at, and told
        self._last_seq = 0
        self._list_at = 0.0
        self._room: int | None = None
        self._heal = False
        self._healed = False

    # -- the bucket ----------------------------------------------------------------------------------------------------

    @property
    def last_seq(self) -> int:
        """See :class:`syncd.outlet.Outlet`."""
        return self._last_seq

    def wrote(self, *seqs: int) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        self._last_seq = max((self._last_seq, *seqs))

    def doubt(self) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        self._list_at = 0.0
        self._retention.doubt()

    async def catch_up(self, wish: Wish) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        state = await self._claim.hold(wish)
        await self._thread.run(lambda: self._recognise(state))
        pointed = await self._reader.channel(HEAD)
        known = await self._thread.run(lambda: self._index.note("head"))
        head = await self._base(pointed, known)
        if head is None and known:
            self._log.warning("head_lost", bucket=self._options.folder)
            await self._thread.run(self._forget_head)
        elif head is not None and head.digest != known:
            await self._adopt(head)
        self._strange = await self._thread.run(lambda: bool(self._index.note(STRANGE)))
        self._head, self._pointed = head, pointed
        if head is not None and pointed is not None:
            self.wrote(pointed.seq)
            await self._stand_by(head, pointed)
        await self._learn_room(state)
        if self._clock() >= self._list_at or await self._is_unsettled():
            await self._list()

    async def _base(self, pointed: Commit | None, known: str) -> Commit | None:
        """Return the generation that the next one follows: the head's, unless somebody else moved that.

        :param known: digest of the record that the index describes.
        """
        if pointed is None:
            return None
        position = await self._thread.run(lambda: int(self._index.note("position", "0")))
        if pointed.digest == known and pointed.seq == position:
            return pointed
        if pointed.seq == self._judged and self._head is not None:
            return self._head
        self._judged = pointed.seq
        return await self._newest(pointed)

    async def _newest(self, pointed: Commit) -> Commit:
        """Return the newest generation, which the next one follows: a person may have moved the head back since.

        Such a move stands until the source changes: what is in the source was committed already.
        """
        number = await self._highest()  # also one that was committed right before a crash, and never remembered
        if number <= pointed.generation.number:
            return pointed
        newest = await self._reader.generation(number)
        return pointed if newest is None else newest

    async def _stand_by(self, head: Commit, pointed: Commit) -> None:
        """Keep the head where it was put, by us or by a person, and fresh where it is ours."""
        count = await self._thread.run(lambda: int(self._index.note(COUNT, "0")))
        word = word_of(pointed, self._options.signer, folder=self._options.folder, channel=HEAD, count=count)
        if word is Word.OURS:
            await self._renew(pointed, count)
        elif word is Word.FORGED:
            if not self._strange:  # else the next generation is about to be committed
                await self._point(head, pointed, "restored")
                self._log.warning("head_restored", generation=head.generation.number)
        elif self._options.expire_seconds and pointed.seq != self._foreign:
            self._log.warning("head_not_renewed", reason="its move is not signed by this publisher's key")
            self._foreign = pointed.seq

    async def _renew(self, pointed: Commit, count: int) -> None:
        """Say anew, in time, that the head is where it is: hosts raise an alarm when nothing fresh arrives.

        :param count: of our last move. Where it is not remembered, an old move may have been put back: then nothing is
            renewed before the source was found to be what the head says (:meth:`_vouch`).
        """
        term = self._options.expire_seconds
        if not term or (self._options.signer is not None and not count):
            return
        move = read_move(pointed.move)
        now = self._clock()
        due = move is None or is_expired(move.expires, now, slack=-term / 2)
        too_late = move is not None and not is_expired(move.expires, now, slack=-term * 1.1)  # a clock was set right
        if due or too_late:
            await self._point(pointed, pointed, "renewed")
            self._log.info("head_renewed", generation=pointed.generation.number)

    async def _point(self, to: Commit, pointed: Commit, why: str) -> None:
        """Move the head, which is as ``pointed`` says, to a generation that there is."""
        number = to.generation.number
        metadata = await self._move_to(number, to.digest, why)
        link = Link(self._bucket.name, generation_name(number))
        seq = await self._bucket.put_link(CHANNELS + HEAD, link, expected_seq=pointed.seq, metadata=metadata)
        self._pointed = replace(to, seq=seq, move=metadata[MOVE], move_signatures=metadata.get(SIGNATURES, ""))
        self.wrote(seq)

    async def _vouch(self) -> None:
        """Count on from the head's move, where ours are not remembered: the source is what it leads to."""
        head, pointed, options = self._head, self._pointed, self._options
        move = read_move(pointed.move) if pointed is not None else None
        if head is None or pointed is None or move is None or self._strange or head.digest != pointed.digest:
            return
        if word_of(pointed, options.signer, folder=options.folder, channel=HEAD, count=0) is Word.OURS:
            await self._thread.run(partial(self._begin_count, move.count))

    def _begin_count(self, count: int) -> None:
        if not self._index.note(COUNT):
            self._index.set_note(COUNT, str(count))

    async def _move_to(self, number: int, record: str, why: str) -> dict[str, str]:
        """Return the metadata that the head's link gets with its next move."""
        options, now = self._options, self._clock()
        used = await self._thread.run(lambda: int(self._index.note(COUNT, "0")))
        count = count_after(self._pointed, options.signer, used, number)
        await self._thread.run(lambda: self._index.set_note(COUNT, str(count)))
        move = Move(
            folder=options.folder,
            channel=HEAD,
            count=count,
            number=number,
            record=record,
            at=time_text(now),
            who=options.publisher[:WHO_MAX],
            why=why,
            expires=time_text(now + options.expire_seconds) if options.expire_seconds else "",
        )
        return move_metadata(move, options.signer)

    async def _is_unsettled(self) -> bool:
        return bool(await self._thread.run(lambda: self._index.note(UNSETTLED)))

    def _recognise(self, state: BucketState) -> None:
        """Begin with an empty memory where the bucket is another one, or was restored from a backup."""
        position = int(self._index.note("position", "0"))
        if self._index.note("bucket") == state.created and position <= state.last_seq:
            return
        if self._index.note("bucket"):
            self._log.warning("bucket_replaced", bucket=self._options.folder)
        with self._index.transaction():
            self._blobs.clear()
            self._index.clear_remote()
            self._index.set_note("head", "")
            self._index.set_note(STRANGE, "")
            self._index.set_note("bucket", state.created)
            self._index.set_note("position", "0")
            self._index.set_note(UNSETTLED, "1")
        self._last_seq = self._judged = 0

    def _forget_head(self) -> None:
        with self._index.transaction():
            self._index.clear_remote()
            self._blobs.clear_nodes()
            self._index.set_note("head", "")
            self._index.set_note(STRANGE, "")

    async def _learn_room(self, state: BucketState) -> None:
        self._room = None
        if state.max_bytes is not None:
            self._room = state.max_bytes - min(RESERVE_BYTES, state.max_bytes // RESERVE_SHARE) - state.size

    def _is_strange(self, head: Commit) -> bool:
        """Tell whether a generation that the index does not describe is one of which nothing may be signed unseen.

        Where we sign: one that our key has not signed, or one of before the last that we know of. What is in it is
        compared with the source like any other's, so that too many deletes are held; but nothing of it is taken over.
        """
        signer = self._options.signer
        if signer is None:
            return False
        return not is_record_signed(head, signer) or head.generation.number < int(self._index.note(NUMBER, "0"))

    async def _adopt(self, head: Commit) -> None:
        """Read the newest generation into the index: ours of before the index was lost, or another publisher's."""
        who = head.generation.publisher
        if who != self._options.publisher:
            if self._head is not None:
                raise FolderTaken(
                    f"another publisher ({printable(who[:WHO_MAX])}) writes to folder {self._options.folder!r}",
                    hint="stop one of the two, then restart this one",
                )
            self._log.warning("publisher_changed", before=who)
        strange = await self._thread.run(lambda: self._is_strange(head))
        await self._thread.run(self._forget_head)
        stack = [("", head.generation.root)]
        while stack:
            some = [stack.pop() for _ in range(min(WALK_AT_ONCE, len(stack)))]
            nodes = await self._reader.nodes([ref for _, ref in some])
            pairs = list(zip(some, nodes, strict=True))
            stack.extend(await self._thread.run(partial(self._take_nodes, pairs, head, strange=strange)))
        await self._thread.run(lambda: self._note_head(head, strange=strange))
        if strange:
            self._log.warning("head_not_ours", generation=head.generation.number, publisher=printable(who[:WHO_MAX]))
        else:
            self._log.info("head_adopted", generation=head.generation.number)

    def _note_head(self, head: Commit, *, strange: bool) -> None:
        with self._index.transaction():
            self._index.set_note("head", head.digest)
            self._index.set_note(STRANGE, "1" if strange else "")
            used = int(self._index.note(NUMBER, "0"))
            self._index.set_note(NUMBER, str(max(used, head.generation.number)))

    def _take_nodes(
        self, pairs: Iterable[tuple[tuple[str, NodeRef], Node]], head: Commit, *, strange: bool
    ) -> list[tuple[str, NodeRef]]:
        below: list[tuple[str, NodeRef]] = []
        with self._index.transaction():
            for (path, ref), node in pairs:
                rows: list[RemoteRow] = []
                located = []
                for child in node.children():
                    where = f"{path}/{child.name}" if path else child.name
                    rows.append(_remote(where, child.entry, self._options, head.generation.number))
                    if child.entry.kind is Kind.DIR:
                        below.append((where, NodeRef(child.tree, child.location, child.length)))
                    elif child.location.where is not Where.EMPTY:
                        located.append((child.entry.digest, child.location, child.entry.size))
                self._index.put_remote(rows)
                if not strange:
                    self._blobs.locate(located)
                    self._blobs.put_nodes([(path, ref)])
        return below

    async def _list(self) -> None:
        """Learn which blobs the bucket has: after a crash, a failure, a reconnect, and now and then."""
        await self._thread.run(self._blobs.begin_listing)
        async for page in self._bucket.list_chunks():
            names = [name for name in page if is_blob(name)]
            await self._thread.run(partial(self._blobs.listed, names))

        def finish() -> int:
            lost = self._blobs.end_listing()
            self._index.set_note(UNSETTLED, "")
            return lost

        lost = await self._thread.run(finish)
        if lost:
            self._log.warning("blobs_lost", blobs=lost)
        self._heal = True  # cheap where nothing is missing, and it finds what earlier runs left
        self._list_at = self._clock() + LIST_SECONDS

    # -- publishing ----------------------------------------------------------------------------------------------------

    async def publish(
        self,
        touched: Collection[str] | None,
        result: PushResult,
        wish: Wish,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """See :class:`syncd.outlet.Outlet`.

        :raises SafetyHalt: the generation would delete too much; nothing is committed.
        :raises WriteConflict: the head moved under us.
        :raises Untrusted: a path cannot be read, and the newest generation is not ours to keep it from.
        """
        await self._publish(touched, result, wish, progress)
        if touched is None and not result.committed and not result.again:
            await self._vouch()

    async def _publish(
        self,
        touched: Collection[str] | None,
        result: PushResult,
        wish: Wish,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        if await self._is_unsettled():
            await self._list()
        changes, size, allowed = await self._thread.run(lambda: self._judge(touched, wish))
        heal = self._heal
        if self._head is not None:
            result.generation, result.root = self._head.generation.number, self._head.generation.root.tree
        first = self._head is None or self._strange
        if not changes and not heal and not first:
            return
        await self._learn_room(await self._bucket.state())  # also: a server that is away is found out at once
        self._heal = False
        builder = Builder(self._index, self._blobs, self._source, result, keep=not self._strange)
        meter = Meter(progress, changes, size)
        try:
            async with self._bucket.blob_sink() as sink:
                await self._thread.run(lambda: self._index.set_note(UNSETTLED, "1"))
                await self._send(self._build(builder, touched, heal=heal, first=first), sink, meter)
                await sink.flush()
                result.uploaded_bytes += sink.stored_bytes
            crash_point("blobs_stored")
            await self._thread.run(lambda: self._index.set_note(UNSETTLED, ""))
            if builder.root is not None:
                await self._commit(builder.root, touched, result, wish, allowed=allowed)
        except BaseException:
            self._heal = self._heal or heal
            raise
        if wish.change_layout:
            dropped = await drop_objects(self._bucket)
            self._log.info("layout_converted", layout="generations", objects=dropped)

    def _judge(self, touched: Collection[str] | None, wish: Wish) -> tuple[int, int, bool]:
        """Count what changes; hold a plan that deletes too much.

        :returns: changed paths, bytes of changed content, whether a person allowed deletes that were held otherwise.
        """
        changes = size = deletes = 0
        for _, local, remote in self._index.diff(touched):
            changes += 1
            if local is None:
                deletes += 1
            elif remote is None or not local.entry.same_content(remote.entry):
                size += local.entry.size
        reason = ""
        if deletes or touched is None:
            reason = self._guard.judge(deletes, self._index.count_remote())
        if reason and not wish.allow_delete:
            raise SafetyHalt(
                f"folder {self._options.folder!r}: {reason}",
                hint=f"if that is meant: syncd allow {self._options.folder}, or syncd push --allow-delete",
            )
        if reason:
            self._guard.forget()
        return changes, size, bool(reason)

    def _build(self, builder: Builder, touched: Collection[str] | None, *, heal: bool, first: bool) -> Generator[Blob]:
        """Read contents, then mark what is to be built and build it; nothing where nothing differs."""
        self._healed = heal and self._blobs.find_moved() > 0
        yield from builder.contents(touched, moved=heal)
        self._blobs.begin_build()
        dirty = False
        page: list[str] = []
        for path in chain((row[0] for row in self._index.diff(touched)), self._blobs.moved() if heal else ()):
            dirty = True
            page.append(path)
            if len(page) >= SOIL_AT_ONCE:
                self._blobs.soil(page)
                page.clear()
        if dirty or first:
            self._blobs.soil(page)
            yield from builder.nodes()

    async def _send(self, blobs: Generator[Blob], sink: BlobSink, meter: Meter) -> None:
        """Read, encode and send side by side, a few batches apart."""
        queue: asyncio.Queue[list[tuple[Blob, bytes]] | None] = asyncio.Queue()
        gate = asyncio.Semaphore(BATCHES_AHEAD)

        async def read() -> None:
            try:
                while batch := await self._thread.run(lambda: _take(blobs)):
                    queue.put_nowait(await asyncio.to_thread(self._encode, batch))
                    await gate.acquire()
            finally:
                queue.put_nowait(None)

        reading = asyncio.create_task(read())
        sent = 0
        try:
            while (batch := await queue.get()) is not None:
                gate.release()
                for blob, payload in batch:
                    sent += len(payload)
                    self._check_room(sent)
                    await sink.put(blob.digest, payload, replace=blob.replace)
                    meter.add(len(blob.data))
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await asyncio.shield(self._thread.run(blobs.close))

    def _check_room(self, sent: int) -> None:
        if self._room is not None and sent > self._room:
            raise StoreFull(
                f"bucket {self._options.folder!r} has no room for this generation",
                hint="raise max_bytes of the bucket, keep fewer generations, or remove files",
            )

    def _encode(self, batch: list[Blob]) -> list[tuple[Blob, bytes]]:
        return [(blob, self._codec.encode(blob.data)) for blob in batch]

    # -- committing ----------------------------------------------------------------------------------------------------

    async def _commit(
        self, root: NodeRef, touched: Collection[str] | None, result: PushResult, wish: Wish, *, allowed: bool
    ) -> None:
        head = self._head
        before = head.generation if head is not None else None
        same = before is not None and root == before.root and not self._strange
        if same and not self._healed:  # whoever missed a blob is told to look again
            await self._thread.run(lambda: self._remember(touched, None))
            return
        tally = await self._thread.run(lambda: self._tally(touched))
        # Counted, not added up from record to record: a subscriber refuses a tree that holds more than its record says.
        files, size = await self._thread.run(self._index.count_remote_files)
        files += tally.added - tally.removed
        generation = Generation(
            folder=self._options.folder,
            number=await self._next_number(before),
            root=root,
            created=time_text(self._clock()),
            publisher=self._options.publisher,
            parent=head.digest if head is not None else "",
            files=files,
            size=size + tally.size,
            added=tally.added,
            changed=tally.changed,
            removed=tally.removed,
            note=wish.note[:NOTE_MAX],
            # Whoever was away meanwhile shall not ask again why everything is gone.
            allowed=allowed or (before is not None and before.allowed and files <= 0),
        )
        record = encode_record(generation)
        digest = digest_of(record)
        signed = generation_signature(record, self._options.signer)
        move = await self._move_to(generation.number, digest, "committed")
        crash_point("before_commit")
        try:
            seq = await self._bucket.commit_generation(
                generation.number,
                record,
                generation_metadata(generation, self._options.metadata) | signed,
                channel=HEAD,
                expected_seq=self._pointed.seq if self._pointed is not None else await self._absent_head(),
                link_metadata=move,
            )
        except WriteConflict as error:
            await self._tell_conflict(error)
            raise
        crash_point("generation_committed")
        signatures = move.get(SIGNATURES, "")
        self._head = Commit(generation, digest, seq, record, signed.get(SIGNATURES, ""), move[MOVE], signatures)
        self._strange = False
        self._pointed = self._head
        self.wrote(seq)
        await self._thread.run(lambda: self._remember(touched, self._head))
        await self._thread.run(self._index.sync)  # a number is used once, whoever else loses power with us
        crash_point("generation_remembered")
        result.generation, result.root, result.committed = generation.number, root.tree, True
        result.puts += tally.added + tally.changed
        result.deletes += tally.removed
        self._log.info(
            "committed",
            generation=generation.number,
            root=root.tree[:16],
            added=tally.added,
            changed=tally.changed,
            removed=tally.removed,
        )

    async def _next_number(self, before: Generation | None) -> int:
        """Return a number that was never used: not in this bucket, and not in one of its name that was lost.

        :raises ObjectCorrupt: none is left: nobody honest counted up to the highest.
        """
        used = await self._thread.run(lambda: int(self._index.note(NUMBER, "0")))
        highest = max(used, before.number if before is not None else await self._highest())
        if highest >= MAX_GENERATION:
            raise ObjectCorrupt(
                f"folder {self._options.folder!r} has a generation {highest}, and no number is left after it",
                hint="find out who wrote that; then publish to another folder, or delete the bucket",
            )
        return highest + 1

    async def _highest(self) -> int:
        """Return the highest number that was ever used, for a bucket that has lost its head: numbers only grow."""
        highest = 0
        async for page in self._bucket.changes(0):
            for item in page.items:
                if not isinstance(item, BadMeta):
                    highest = max(highest, number_of(item.name))
        return highest

    async def _absent_head(self) -> int:
        """Return the sequence to expect where there is no head: that of a tombstone, or of something else's object."""
        info = await self._bucket.get_info(CHANNELS + HEAD)
        return 0 if info is None else info.seq

    async def _tell_conflict(self, error: WriteConflict) -> None:
        """Find out who moved the head.

        :raises FolderTaken: another publisher did.
        """
        head = await self._reader.channel(HEAD)
        if head is not None and head.generation.publisher != self._options.publisher:
            raise FolderTaken(
                f"another publisher ({printable(head.generation.publisher[:WHO_MAX])}) committed generation "
                f"{head.generation.number} of folder {self._options.folder!r}",
                hint="stop one of the two; nothing of yours is lost, the next push commits it",
            ) from error

    def _committed(self, touched: Collection[str] | None) -> Iterator[tuple[str, LocalRow | None, RemoteRow | None]]:
        """Yield the differences that the tree that was built has: not those whose content could not be had."""
        for path, local, remote in self._index.diff(touched):
            if local is not None and local.entry.kind is Kind.FILE:
                entry = local.entry
                if not entry.digest or (entry.size and self._blobs.location(entry.digest) is None):
                    continue
            yield path, local, remote

    def _tally(self, touched: Collection[str] | None) -> _Tally:
        tally = _Tally()
        for _, local, remote in self._committed(touched):
            new = local is not None and not _is_dir(local)
            old = remote is not None and not _is_dir(remote)
            tally.added += new and not old
            tally.removed += old and not new
            tally.changed += new and old
            tally.size += (local.entry.size if local else 0) - (remote.entry.size if remote else 0)
        return tally

    def _remember(self, touched: Collection[str] | None, commit: Commit | None) -> None:
        """The bucket has what was built: the remote half and the nodes say so."""
        newest = commit or self._head
        number = newest.generation.number if newest is not None else 0
        rows: list[RemoteRow] = []
        gone: list[str] = []
        with self._index.transaction():
            for path, local, remote in self._committed(touched):
                if _is_dir(remote) and not _is_dir(local):
                    self._blobs.drop_nodes([path])
                if local is None:
                    gone.append(path)
                else:
                    rows.append(_remote(path, local.entry, self._options, number))
                    self._source.problems.clear(path)
                if len(rows) + len(gone) >= REMEMBER_AT_ONCE:
                    self._index.drop_remote(gone)
                    self._index.put_remote(rows)
                    rows, gone = [], []
            self._index.drop_remote(gone)
            self._index.put_remote(rows)
            self._blobs.take_built()
            if commit is not None:
                self._index.set_note("head", commit.digest)
                self._index.set_note(STRANGE, "")
                self._index.set_note("position", str(commit.seq))
                self._index.set_note(NUMBER, str(number))

    # -- collection ----------------------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """See :class:`syncd.outlet.Outlet`."""
        if self._head is not None and await self._retention.run():
            self._heal = True

    async def collect(self, *, dry_run: bool) -> Collected:
        """Free what no kept generation reaches, now.

        :param dry_run: only look: the bucket is neither made nor claimed nor marked.
        """
        if dry_run:
            await self._check_readable()
        else:
            await self.catch_up(Wish())
        return await self._retention.collect(dry_run=dry_run)

    async def _check_readable(self) -> None:
        """Make sure that there is something to look at.

        :raises BucketNotFound, FormatTooNew: see there.
        :raises LayoutMismatch: the bucket has no generations.
        """
        if await layout_of(self._bucket, await self._bucket.state()) != "generations":
            raise LayoutMismatch(
                f"bucket {self._options.folder!r} has no generations, the configuration says that it has",
                hint=f"nothing was pushed there yet, or in the objects layout: syncd ls {self._options.folder}",
            )


def _take(blobs: Iterator[Blob]) -> list[Blob]:
    """Take the next few blobs."""
    batch: list[Blob] = []
    size = 0
    for blob in blobs:
        batch.append(blob)
        size += len(blob.data)
        if len(batch) >= BATCH_BLOBS or size >= BATCH_BYTES:
            break
    return batch


def _is_dir(row: LocalRow | RemoteRow | None) -> bool:
    return row is not None and row.entry.kind is Kind.DIR


def _remote(path: str, entry: Entry, options: PublishOptions, number: int) -> RemoteRow:
    return RemoteRow(path, entry, options.folder, path, "", 0, 0, number, options.publisher)
