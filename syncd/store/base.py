"""What the services know of a store: plain values and Protocols, no word of nats.

The live implementation is :mod:`syncd.store.bucket`; its honest twin in memory is :mod:`syncd.store.memory`. Both
pass the same contract suite (``tests/contract``).

All methods of the Protocols raise only :class:`syncd.errors.SyncdError` (and ``asyncio.CancelledError``); every one
has a deadline or a bound on silence of its own.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from syncd.errors import SyncdError

CHUNK_SIZE = 128 * 1024
"""Bytes per chunk message: ADR-20's default; larger ones gained nothing (docs/performance.md)."""

GENERATIONS = "generations/"
"""Prefix of the names of generation objects; ten digits follow."""
CHANNELS = "channels/"
"""Prefix of the names of channel links."""
HEAD = "head"
"""The channel that moves with every commit."""

NUID_PREFIX = "syncd-"
"""Every nuid that syncd makes starts so: the sweeper knows its own orphans and never touches other clients'."""


_SHA256_PREFIX = "sha-256="
_SHA256_BYTES = 32


def digest_to_hex(text: str) -> str:
    """Read ADR-20's digest; "" unless it is a SHA-256 in base64url or base64, with or without padding."""
    if text[: len(_SHA256_PREFIX)].lower() != _SHA256_PREFIX:
        return ""
    encoded = text[len(_SHA256_PREFIX) :].rstrip("=").replace("+", "-").replace("/", "_")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return ""
    return raw.hex() if len(raw) == _SHA256_BYTES else ""


def hex_to_digest(sha256: str) -> str:
    """Write ADR-20's digest as every client accepts it: ``SHA-256=`` and padded base64url."""
    return "SHA-256=" + base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode()


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """How to create a bucket; also which stream flags to add to an existing one where we may.

    :ivar max_bytes: upper bound of the stream's bytes; ``None`` for unlimited.
    :ivar ttl_seconds: objects older than this vanish; ``None`` for never.
    :ivar placement_tags: server tags of a cluster.
    :ivar compression: s2 on the server's disk.
    """

    description: str = ""
    storage: str = "file"  # file | memory
    replicas: int = 1
    max_bytes: int | None = None
    ttl_seconds: float | None = None
    placement_cluster: str = ""
    placement_tags: tuple[str, ...] = ()
    compression: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: str = "objects"  # objects | generations: what a new bucket is marked with


@dataclass(frozen=True, slots=True)
class BucketState:
    """What the server says of a bucket now.

    :ivar created: the stream's creation time, an opaque string: another value means another bucket of that name.
    :ivar last_seq: the stream's last sequence; lower than one seen before means restored from an old backup.
    :ivar size: bytes stored, metadata and old chunks included.
    :ivar now_ns: the server's clock, nanoseconds since the epoch; 0 where it does not say (before 2.10).
    """

    created: str
    last_seq: int
    messages: int
    size: int
    sealed: bool
    max_bytes: int | None
    description: str
    metadata: Mapping[str, str]
    republished: bool
    ttl_messages: bool
    atomic: bool
    now_ns: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Link:
    """An ADR-20 link: to an object, or to a whole bucket where ``name`` is ``None``."""

    bucket: str
    name: str | None


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object's metadata message, as stored by any client.

    :ivar digest: ADR-20's digest string as stored (``SHA-256=<base64url>``); "" where absent.
    :ivar mtime_ns: the server's timestamp of the metadata message (ADR-20: the stored mtime is not to be trusted).
    :ivar seq: stream sequence of the metadata message; the compare-and-set token of :meth:`Bucket.put_meta`.
    """

    bucket: str
    name: str
    nuid: str
    size: int
    chunks: int
    digest: str
    deleted: bool
    mtime_ns: int
    seq: int
    description: str = ""
    chunk_size: int = CHUNK_SIZE
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    link: Link | None = None

    @property
    def sha256(self) -> str:
        """The SHA-256 as lower-case hex; "" where the digest is absent or of another kind or shape."""
        return digest_to_hex(self.digest)


@dataclass(frozen=True, slots=True)
class BadMeta:
    """A metadata message that cannot be read as an object (wrong JSON, wrong types, empty payload)."""

    seq: int
    subject: str
    reason: str


@dataclass(frozen=True, slots=True)
class Page:
    """One page of catch-up: metadata messages in sequence order, at most one per name.

    :ivar last_seq: the sequence to ask after next time.
    """

    items: tuple[ObjectInfo | BadMeta, ...]
    last_seq: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Content that is in the bucket under ``nuid``: what a metadata message needs to announce it.

    :ivar digest: BLAKE3 hex of the bytes that were sent.
    :ivar sha256: SHA-256 hex of the bytes that were sent.
    """

    nuid: str
    chunks: int
    size: int
    digest: str
    sha256: str
    chunk_size: int = CHUNK_SIZE


EMPTY_BLAKE3 = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
EMPTY = Stored(nuid="", chunks=0, size=0, digest=EMPTY_BLAKE3, sha256=EMPTY_SHA256)
"""Empty content: no chunk message at all. A metadata message still gets a nuid of its own (other readers want one)."""


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """What a writer says of an object besides its content."""

    name: str
    description: str = ""
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SmallPut:
    """One object whose content is at most one chunk, for :meth:`Bucket.put_many`.

    Exactly one of ``data`` (content to send) and ``stored`` (content the bucket has; ``EMPTY`` included) is set.

    :ivar expected_seq: see :meth:`Bucket.put_meta`.
    """

    meta: ObjectMeta
    data: bytes | None
    stored: Stored | None
    expected_seq: int | None


@dataclass(frozen=True, slots=True)
class PutResult:
    """What became of one object of :meth:`Bucket.put_many`: ``error`` is ``None`` exactly when it is stored."""

    seq: int
    stored: Stored | None
    error: Exception | None = None


class Source(Protocol):
    """Content to upload. Methods are called in a worker thread, one at a time."""

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; ``b""`` at the end. May raise OSError or SyncdError."""
        ...


class Sink(Protocol):
    """Where downloaded content goes. Methods are called in a worker thread, one at a time, in order."""

    def write(self, data: bytes) -> object:
        """Take all of ``data``. May raise OSError or SyncdError."""
        ...


class BlobSink(Protocol):
    """A pipeline of blobs on their way into a bucket (generations layout). Used by one task at a time."""

    @property
    def stored(self) -> int:
        """Blobs that the server took so far."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of these as sent, codec byte included."""
        ...

    @property
    def duplicates(self) -> int:
        """Blobs that the bucket had already."""
        ...

    async def put(self, digest: str, payload: bytes, *, replace: bool = False) -> None:
        """Send one blob; returns as soon as there is room for the next one.

        :param digest: BLAKE3 hex of the blob's bytes before compression.
        :param payload: codec byte and bytes (:mod:`syncd.store.codec`).
        :param replace: write over what is stored under this digest (it was removed a moment ago, or is damaged).
        :raises SyncdError: this one, or an earlier one, could not be stored; the sink is of no more use.
        """
        ...

    async def flush(self) -> None:
        """Wait until everything is acknowledged.

        :raises SyncdError: something could not be stored.
        """
        ...


class Hints(Protocol):
    """Wake-up calls: "something may have changed". They may be lost, doubled or forged without harm."""

    async def wait(self, max_seconds: float) -> int:
        """Return when a hint arrives, the connection was renewed, or ``max_seconds`` have passed.

        :returns: the highest metadata sequence hinted since the last call, 0 where none was named.
        """
        ...


class Bucket(Protocol):
    """One ADR-20 Object Store bucket. Bound to a name, not to a connection: it survives reconnects."""

    @property
    def name(self) -> str:
        """The bucket's name."""
        ...

    async def state(self) -> BucketState:
        """Ask the server for the bucket's state now.

        :raises BucketNotFound: no such bucket (any more).
        """
        ...

    async def claim(self, publisher: str, *, take_over: bool = False) -> str:
        """Say who publishes to this bucket, unless somebody else said so before; return who does.

        The word stays until it is taken over: a publisher that is down for a month is still the publisher.

        :param publisher: the identity of a publisher, stable across its restarts.
        :param take_over: write over another publisher's claim.
        """
        ...

    def changes(self, after: int, *, at_least: int = 0) -> AsyncIterator[Page]:
        """Catch up: the newest metadata message of every name changed after sequence ``after``, in pages.

        ``after=0`` lists the bucket. Deleted objects appear as tombstones while the bucket keeps them.

        :param at_least: a hinted sequence; a replica that has not got so far yet is asked again, for a bounded time.
        """
        ...

    def hints(self) -> AbstractAsyncContextManager[Hints]:
        """Subscribe to wake-up calls: republished notifications where the stream has them, else a consumer.

        Works while the bucket does not exist yet or again (then only the timer and reconnects wake).
        """
        ...

    async def get_info(self, name: str) -> ObjectInfo | None:
        """Return the newest metadata of a name (a tombstone included), ``None`` where there is none.

        :raises ObjectCorrupt: the metadata message is not readable.
        """
        ...

    async def upload(self, source: Source, *, progress: Callable[[int], None] | None = None) -> Stored:
        """Send content in chunks under a fresh nuid; nothing announces it yet.

        Bounded memory. On failure or cancellation the chunks sent so far are removed where that is possible at
        once, and are an orphan for :meth:`list_chunks` otherwise.

        :param progress: called in the event loop with the number of bytes acknowledged since its last call.
        :raises StoreFull, BucketSealed, StoreTimeout, NotPermitted, Unavailable: and whatever ``source`` raises.
        """
        ...

    async def put_meta(self, meta: ObjectMeta, stored: Stored, *, expected_seq: int | None) -> int:
        """Announce stored content under a name; return the metadata message's sequence.

        :param expected_seq: the sequence of the name's metadata message that we last saw, 0 for "there is none";
            ``None`` writes over whatever is there. A lost acknowledgement is resolved by reading back.
        :raises WriteConflict: somebody else wrote the name since.
        """
        ...

    async def put_many(self, items: Sequence[SmallPut]) -> list[PutResult]:
        """Store many small objects; one result per item, in order. A failure belongs to its item.

        Chunks are acknowledged (or in the same atomic batch) before their metadata can be seen. At most 500 items
        and 8 MiB of data per call.
        """
        ...

    async def delete(self, name: str, *, expected_seq: int | None, metadata: Mapping[str, str]) -> int:
        """Write a tombstone (it keeps ``metadata``; it does not remove chunks); return its sequence.

        :raises WriteConflict: as in :meth:`put_meta`.
        """
        ...

    async def put_link(
        self, name: str, link: Link, *, expected_seq: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> int:
        """Write an ADR-20 link; return its metadata message's sequence.

        :param expected_seq: as in :meth:`put_meta`.
        :param metadata: the link's own; what the one before had is not kept.
        :raises WriteConflict: as in :meth:`put_meta`.
        """
        ...

    async def download(
        self, info: ObjectInfo, sink: Sink, *, progress: Callable[[int], None] | None = None
    ) -> tuple[str, str]:
        """Stream an object's content into ``sink`` and verify size, chunk count and SHA-256.

        Bounded memory. The caller must discard what the sink got when this raises.

        :returns: (BLAKE3 hex, SHA-256 hex) of the bytes written.
        :raises ObjectGone: chunks missing or replaced meanwhile: read the metadata again.
        :raises ObjectCorrupt: the content does not match the metadata, or the metadata has no usable digest.
        """
        ...

    def download_many(self, infos: Sequence[ObjectInfo]) -> AsyncIterator[tuple[ObjectInfo, bytes | Exception]]:
        """Fetch many objects of at most one chunk each; yields in any order, each exactly once.

        Data is verified as in :meth:`download`; ObjectGone and ObjectCorrupt are yielded in place of the data.
        At most 1000 items per call; the caller groups them to a bounded sum of sizes.

        :raises SyncdError: the store itself fails; what was not yielded by then is undecided.
        """
        ...

    def list_chunks(self) -> AsyncIterator[dict[str, int]]:
        """List nuid -> number of chunk messages in pages."""
        ...

    async def remove_chunks(self, nuid: str) -> None:
        """Free the chunks of a nuid: rollup with a TTL of one second where the stream allows it, else a purge."""
        ...

    async def seal(self) -> None:
        """Make the bucket read-only for ever."""
        ...

    # -- the generations layout (docs/format.md) ---------------------------------------------------------------------

    def blob_sink(self) -> AbstractAsyncContextManager[BlobSink]:
        """Open a pipeline for blobs; leaving it forgets what is not acknowledged. See :class:`BlobSink`."""
        ...

    def get_blobs(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes | SyncdError]]:
        """Fetch blobs: decoded, each checked against its digest, each digest exactly once, in any order.

        ObjectGone and ObjectCorrupt are yielded in place of a blob's bytes; a replica that is behind is asked again
        for a short time before a blob counts as gone. Memory is bounded by some pages, whatever the number.

        :param digests: without doubles.
        :raises SyncdError: the store itself fails; what was not yielded by then is undecided.
        """
        ...

    async def remove_blobs(self, digests: Sequence[str]) -> None:
        """Free blobs that nothing reaches, in a pipeline: as :meth:`remove_chunks` does it."""
        ...

    async def commit_generation(
        self,
        number: int,
        record: bytes,
        metadata: Mapping[str, str],
        *,
        channel: str,
        expected_seq: int,
        link_metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Store a generation object and point a channel at it, all in one atomic batch (ADR-50).

        A lost acknowledgement is resolved by reading back.

        :param record: canonical JSON; its content is the object ``generations/<10 digits>``.
        :param metadata: the object's own metadata.
        :param expected_seq: sequence of the channel's metadata message that we last saw, 0 for none.
        :param link_metadata: metadata of the channel's link.
        :returns: the sequence of the channel's new metadata message.
        :raises WriteConflict: somebody else moved the channel since; nothing is stored.
        """
        ...

    async def set_layout(self, layout: str) -> None:
        """Mark the bucket as ``objects`` or ``generations`` in its stream's metadata.

        :raises NotPermitted: we may not change the stream.
        """
        ...


class Store(Protocol):
    """The server's buckets."""

    def bucket(self, name: str) -> Bucket:
        """Return a handle; no request is made."""
        ...

    async def create_bucket(self, name: str, spec: BucketSpec) -> BucketState:
        """Create the bucket, or adopt an existing one (flags it lacks are added where we may; never removed).

        :raises NotPermitted: it does not exist and we may not create it.
        """
        ...

    async def list_buckets(self) -> list[str]:
        """Return the names of all Object Store buckets, sorted."""
        ...
