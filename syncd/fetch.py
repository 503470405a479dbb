"""Where content comes from: this mirror if it has it, else the bucket; staged and verified, never yet in place."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from syncd.errors import DiskProblem, ObjectCorrupt, ObjectGone, SyncdError
from syncd.index import LocalRow
from syncd.mirror import is_unreadable
from syncd.model import Entry, Kind
from syncd.store.mapping import object_info, remote_row
from syncd.upstream import Fetch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from syncd.index import Index
    from syncd.mirror import Mirror
    from syncd.progress import Meter
    from syncd.service import FolderThread
    from syncd.store.base import Bucket, Store
    from syncd.upstream import PullResult, Row

SMALL_FILE = 64 * 1024
FETCH_ITEMS = 500
FETCH_BYTES = 4 * 1024 * 1024
PARALLEL_DOWNLOADS = 4
PARALLEL_REFETCHES = 64
FETCH_TRIES = 4


class Fetcher:
    """Stages the content of a batch."""

    def __init__(self, store: Store, index: Index, mirror: Mirror, thread: FolderThread) -> None:
        self._store = store
        self._index = index
        self._mirror = mirror
        self._thread = thread

    def find_local(self, rows: Iterable[Row], result: PullResult) -> dict[str, Fetch]:
        """For every file whose content changes: take it from this mirror where it is there already."""
        fetches: dict[str, Fetch] = {}
        for path, local, remote in rows:
            if remote is None or remote.entry.kind is not Kind.FILE:
                continue
            if local is not None and local.entry.same_content(remote.entry):
                continue
            fetch = fetches[path] = Fetch(remote)
            if local is None or not (local.entry.sha256 or (local.entry.digest and remote.entry.digest)):
                fetch.in_place = self._adopt(path, remote.entry)
            if fetch.in_place is None:
                fetch.staged = self._copy_from_mirror(remote.entry)
            if fetch.in_place or fetch.staged:
                result.reused_bytes += remote.entry.size
        return fetches

    def _adopt(self, path: str, want: Entry) -> LocalRow | None:
        """Recognise by digest a file that is there already (lost state, another layout, copied there by hand)."""
        try:
            disk = self._mirror.look(path)
        except SyncdError:
            return None  # the commit finds the same and reports it
        if disk is None or disk.kind is not Kind.FILE or disk.stat.size != want.size:
            return None
        try:
            digest, sha256, stat = self._mirror.read_digests(path)
        except SyncdError:
            return None
        have = Entry(Kind.FILE, disk.mode, stat.mtime_ns, stat.size, digest, sha256)
        return LocalRow(path, have, stat) if have.same_content(want) else None

    def _copy_from_mirror(self, want: Entry) -> str:
        """Stage a copy of another file of the mirror with the same content; "" where there is none."""
        row = self._index.find_local_content(want.digest, want.sha256, want.size)
        if row is None or want.size == 0:
            return ""
        try:
            return self._mirror.stage_copy(row.path, want)
        except DiskProblem as error:
            if not is_unreadable(error):
                raise
            return ""
        except SyncdError:
            return ""  # it changed since the index saw it: download instead

    async def download(self, fetches: list[Fetch], result: PullResult, meter: Meter) -> None:
        """Stage the content of all ``fetches``; a failure of one object is noted in it.

        :raises SyncdError: the store or the disk failed: the batch is given up, the mirror is as it was.
        """
        await self._download_small([fetch for fetch in fetches if _is_small(fetch)], result, meter)
        large = [fetch for fetch in fetches if not _is_small(fetch)]
        await self._download_side_by_side(large, PARALLEL_DOWNLOADS, result, meter)

    async def _download_side_by_side(
        self, fetches: list[Fetch], at_once: int, result: PullResult, meter: Meter
    ) -> None:
        gate = asyncio.Semaphore(at_once)

        async def one(fetch: Fetch) -> None:
            async with gate:
                await self._download_large(fetch, result, meter)

        tasks = [asyncio.create_task(one(fetch)) for fetch in fetches]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _download_small(self, fetches: list[Fetch], result: PullResult, meter: Meter) -> None:
        by_bucket: dict[str, list[Fetch]] = {}
        for fetch in fetches:
            by_bucket.setdefault(fetch.row.bucket, []).append(fetch)
        staging: asyncio.Task[None] | None = None
        try:
            for name, of_bucket in by_bucket.items():
                for group in _groups(of_bucket):  # one is staged while the next is fetched
                    got = await self._fetch_small(self._store.bucket(name), group)
                    if staging is not None:
                        await staging
                    staging = asyncio.create_task(self._stage_small(got, result, meter))
            if staging is not None:
                await staging
        finally:
            if staging is not None:
                staging.cancel()
                await asyncio.gather(staging, return_exceptions=True)
        # Replaced meanwhile: their metadata is read again. Or broken, however many: that must not hold up the others.
        gone = [fetch for fetch in fetches if isinstance(fetch.error, ObjectGone)]
        await self._download_side_by_side(gone, PARALLEL_REFETCHES, result, meter)

    async def _fetch_small(self, bucket: Bucket, fetches: list[Fetch]) -> list[tuple[Fetch, bytes]]:
        """Return the content of each, asked for once where several paths announce the same object."""
        got: list[tuple[Fetch, bytes]] = []
        waiting: dict[tuple[str, str, int], list[Fetch]] = {}
        for fetch in fetches:
            waiting.setdefault((fetch.row.name, fetch.row.nuid, fetch.row.seq), []).append(fetch)
        async for info, data in bucket.download_many([object_info(same[0].row) for same in waiting.values()]):
            for fetch in waiting[info.name, info.nuid, info.seq]:
                if isinstance(data, bytes):
                    got.append((fetch, data))
                elif isinstance(data, ObjectGone | ObjectCorrupt):
                    fetch.error = data
                else:
                    raise data
        return got

    async def _stage_small(self, got: list[tuple[Fetch, bytes]], result: PullResult, meter: Meter) -> None:
        items = [(fetch.row.entry, data) for fetch, data in got]
        outcomes = await self._thread.run(lambda: self._mirror.stage_bytes(items))
        for (fetch, data), outcome in zip(got, outcomes, strict=True):
            if isinstance(outcome, str):
                fetch.staged = outcome
                result.downloaded_bytes += len(data)
                meter.done(len(data))
            elif isinstance(outcome, DiskProblem):
                raise outcome
            else:
                fetch.error = ObjectCorrupt(f"{fetch.row.path}: {outcome}")

    async def _download_large(self, fetch: Fetch, result: PullResult, meter: Meter) -> None:
        bucket = self._store.bucket(fetch.row.bucket)
        for _ in range(FETCH_TRIES):
            try:
                await self._download_once(bucket, fetch, meter)
            except ObjectGone as error:
                fetch.error = error
                if not await self._refresh(bucket, fetch):
                    return  # deleted, which the next catch-up tells; or broken: tried again later
            except ObjectCorrupt as error:
                fetch.error = error
                return
            else:
                fetch.error = None
                result.downloaded_bytes += fetch.row.entry.size
                meter.done(0)
                return

    async def _download_once(self, bucket: Bucket, fetch: Fetch, meter: Meter) -> None:
        entry = fetch.row.entry
        staged = await self._thread.run(lambda: self._mirror.stage(entry))
        try:
            digest, _ = await bucket.download(object_info(fetch.row), staged, progress=meter.add)
            if entry.digest and digest != entry.digest:
                raise ObjectCorrupt(f"{fetch.row.path}: content does not match the BLAKE3 digest in its metadata")
            fetch.staged = await asyncio.to_thread(staged.finish)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(staged.discard))
            raise

    async def _refresh(self, bucket: Bucket, fetch: Fetch) -> bool:
        """Read the metadata again after chunks vanished; tell whether it names other content now."""
        info = await bucket.get_info(fetch.row.name)
        if info is None or info.deleted or info.link is not None or info.nuid == fetch.row.nuid:
            return False
        try:
            row = remote_row(info, path=fetch.row.path, via=fetch.row.via)
        except SyncdError:
            return False  # the next catch-up reports it
        fetch.row = row
        await self._thread.run(lambda: self._index.put_remote([row]))
        return True


def _is_small(fetch: Fetch) -> bool:
    """Tell whether it is fetched together with others."""
    return fetch.row.entry.size <= SMALL_FILE and fetch.row.chunks <= 1


def _groups(fetches: Iterable[Fetch]) -> Iterator[list[Fetch]]:
    """Group small files to bounded requests."""
    group: list[Fetch] = []
    size = 0
    for fetch in fetches:
        if group and (len(group) >= FETCH_ITEMS or size + fetch.row.entry.size > FETCH_BYTES):
            yield group
            group, size = [], 0
        group.append(fetch)
        size += fetch.row.entry.size
    if group:
        yield group
