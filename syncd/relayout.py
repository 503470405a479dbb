"""A bucket changes its layout: what it holds in the other one goes, because a person asked for that."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

from syncd.crashpoints import crash_point
from syncd.store.base import CHANNELS, GENERATIONS, NUID_PREFIX, BadMeta
from syncd.store.mapping import GENERATION, KEY_SET, KIND, PUBLISHER
from syncd.trust import KEYS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from syncd.store.base import Bucket, ObjectInfo

PAGE: Final = 500
AT_ONCE: Final = 32
_BLOB = re.compile(r"[0-9a-f]{64}")


def is_blob(name: str) -> bool:
    """Tell whether a chunk subject's last token is that of a blob."""
    return _BLOB.fullmatch(name) is not None


def is_history(info: ObjectInfo) -> bool:
    """Tell whether an object belongs to the generations layout."""
    if info.name.startswith(GENERATIONS):
        return info.metadata.get(KIND) == GENERATION
    link = info.link
    return info.name.startswith(CHANNELS) and link is not None and (link.name or "").startswith(GENERATIONS)


def _is_key_set(info: ObjectInfo) -> bool:
    return info.name.startswith(KEYS) and info.metadata.get(KIND) == KEY_SET


async def drop_generations(bucket: Bucket, freeing: Callable[[Collection[str]], Awaitable[None]]) -> None:
    """Remove channels, generations and blobs, then mark the bucket as of the objects layout.

    Channels go first: a subscriber that finds none waits, and takes nothing for deleted.

    :param freeing: told of blobs before they are removed: for a moment longer the server refuses them as duplicates,
        and whoever changes the layout back must not take that for "it is there".
    """
    found = [info async for info in _live(bucket) if is_history(info) or _is_key_set(info)]
    found.sort(key=lambda info: info.name)  # channels/ before generations/
    await _delete(bucket, found)
    crash_point("history_dropped")
    await bucket.set_layout("objects")
    crash_point("layout_marked")
    async for page in bucket.list_chunks():
        blobs = [name for name in page if is_blob(name)]
        for start in range(0, len(blobs), PAGE):
            some = blobs[start : start + PAGE]
            await freeing(some)
            await bucket.remove_blobs(some)
            crash_point("layout_blobs_dropped")


async def drop_objects(bucket: Bucket) -> int:
    """Remove the objects that syncd wrote in the objects layout; return how many. Others' are left alone."""
    found: list[ObjectInfo] = []
    count = 0
    async for info in _live(bucket):
        if is_history(info) or not info.metadata.get(PUBLISHER):
            continue
        found.append(info)
        if len(found) == PAGE:
            await _delete(bucket, found)
            count += len(found)
            found = []
    await _delete(bucket, found)
    crash_point("objects_dropped")
    return count + len(found)


async def _live(bucket: Bucket) -> AsyncIterator[ObjectInfo]:
    async for page in bucket.changes(0):
        for item in page.items:
            if not isinstance(item, BadMeta) and not item.deleted:
                yield item


async def _delete(bucket: Bucket, infos: list[ObjectInfo]) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(info: ObjectInfo) -> None:
        async with gate:
            await bucket.delete(info.name, expected_seq=None, metadata={})
            crash_point("layout_meta_dropped")
            if info.nuid.startswith(NUID_PREFIX) and info.chunks:
                await bucket.remove_chunks(info.nuid)

    await asyncio.gather(*map(one, infos))
