"""Buckets on a live nats-server: the store's contract (:mod:`syncd.store.base`) in terms of JetStream.

Rules kept here:
 * nats-py's ObjectStore is not used: it hangs, leaks and is quadratic (docs/performance.md);
 * chunks are acknowledged before the metadata that announces them is sent, or are in the same atomic batch;
 * a metadata message has a nuid or expected sequence by which a lost acknowledgement is resolved by reading back;
 * reading is batched direct gets alone, so it works on replicas and mirrors, and from an account without JetStream;
 * every page is bounded in bytes, every stream of pages in silence, every object by what its metadata says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import nats.nuid
import structlog
from blake3 import blake3

from syncd.errors import (
    BucketNotFound,
    BucketSealed,
    NotPermitted,
    ObjectCorrupt,
    ObjectGone,
    StoreFull,
    StoreRejected,
    StoreTimeout,
    SyncdError,
    Unavailable,
    WriteConflict,
)
from syncd.retry import backoff
from syncd.store import wire
from syncd.store.base import (
    CHUNK_SIZE,
    EMPTY,
    NUID_PREFIX,
    BadMeta,
    BucketSpec,
    BucketState,
    Hints,
    Link,
    ObjectInfo,
    ObjectMeta,
    Page,
    PutResult,
    Sink,
    SmallPut,
    Source,
    Stored,
)
from syncd.store.connection import Connection, NoResponders
from syncd.store.hints import open_hints
from syncd.store.transport import (
    ATOMIC_DISABLED,
    CHUNK_SILENCE_SECONDS,
    META_SILENCE_SECONDS,
    NO_JETSTREAM,
    REQUEST_SECONDS,
    REQUEST_TRIES,
    TTL_DISABLED,
    ApiError,
    Outgoing,
    Transport,
    header_int,
    read_json,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from nats.aio.msg import Msg

log = structlog.get_logger()

T = TypeVar("T")

UPLOAD_BLOCK: Final = 16 * CHUNK_SIZE
META_PAGE_BYTES: Final = 1024 * 1024
META_PAGE_MESSAGES: Final = 1000
MANY_BYTES: Final = 4 * 1024 * 1024
MANY_SUBJECTS: Final = 1000
"""The server answers 413 to more than 1024 subjects."""
BATCH_MESSAGES: Final = 1000
STALE_SECONDS: Final = 2.0
"""How long a replica may be behind what another one announced."""
STALE_STEP: Final = 0.2
CLEANUP_SECONDS: Final = 2.0
DUPLICATE_SECONDS: Final = 120

ROLLUP: Final = {"Nats-Rollup": "sub"}
EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"


class NatsStore:
    """The buckets that one connection reaches. Bound to the event loop it is made in."""

    def __init__(self, conn: Connection) -> None:
        self._transport = Transport(conn)
        self._api = _Api(conn)
        self._nuids = nats.nuid.NUID()
        self._buckets: dict[str, NatsBucket] = {}

    def bucket(self, name: str) -> NatsBucket:
        """Return a handle; no request is made.

        :raises ConfigError: no bucket can have this name.
        """
        if name not in self._buckets:
            self._buckets[name] = NatsBucket(wire.check_bucket(name), self._transport, self._api, self._fresh_nuid)
        return self._buckets[name]

    def _fresh_nuid(self) -> str:
        return NUID_PREFIX + self._nuids.next().decode()

    async def create_bucket(self, name: str, spec: BucketSpec) -> BucketState:
        """Create the bucket, or adopt an existing one (flags it lacks are added where we may; never removed).

        :raises NotPermitted: it does not exist and we may not create it.
        :raises StoreRejected: the server refuses such a bucket, or a stream of that name is something else.
        """
        bucket = self.bucket(name)
        try:
            info = await self._api.stream_info(name)
        except BucketNotFound:
            subject = f"STREAM.CREATE.{wire.stream_of(name)}"
            try:
                await self._api.call(subject, new_stream(name, spec))
            except ApiError as error:
                if error.code != _NAME_IN_USE:
                    raise
            return await bucket.state()
        await self._adopt(name, info)
        return await bucket.state()

    async def _adopt(self, name: str, info: Mapping[str, Any]) -> None:
        config = dict(info["config"])
        changes = missing_flags(name, config)
        if not changes:
            return
        try:
            await self._api.call(f"STREAM.UPDATE.{wire.stream_of(name)}", config | changes)
        except (NotPermitted, StoreRejected, NoResponders) as error:
            log.info("bucket_adopted_as_is", bucket=name, lacking=sorted(changes), reason=error.message)
        else:
            log.info("bucket_flags_added", bucket=name, flags=sorted(changes))

    async def list_buckets(self) -> list[str]:
        """Return the names of all Object Store buckets, sorted."""
        names: set[str] = set()
        while True:
            answer = await self._api.call("STREAM.NAMES", {"subject": "$O.*.C.>", "offset": len(names)})
            streams = answer.get("streams") or []
            fresh = {stream.removeprefix("OBJ_") for stream in streams if str(stream).startswith("OBJ_")}
            if not fresh - names or len(names | fresh) >= int(answer.get("total", 0)):
                return sorted(name for name in names | fresh if wire.is_bucket(name))
            names |= fresh


_NAME_IN_USE: Final = 10058


def new_stream(name: str, spec: BucketSpec) -> dict[str, Any]:
    """Return the stream configuration of a new bucket: ADR-20's, and what makes syncd's work cheap."""
    config: dict[str, Any] = {
        "name": wire.stream_of(name),
        "subjects": [wire.chunk_filter(name), wire.meta_filter(name)],
        "retention": "limits",
        "storage": spec.storage,
        "discard": "new",
        "num_replicas": spec.replicas,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": -1 if spec.max_bytes is None else spec.max_bytes,
        "max_age": 0 if spec.ttl_seconds is None else int(spec.ttl_seconds * 1_000_000_000),
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "duplicate_window": DUPLICATE_SECONDS * 1_000_000_000,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "allow_atomic": True,
        "allow_msg_ttl": True,
        "republish": _republish(name),
        "metadata": {**spec.metadata, "syncd.layout": "objects", "syncd.format": "1"},
    }
    if spec.ttl_seconds is not None:
        config["duplicate_window"] = min(config["duplicate_window"], config["max_age"])
    if spec.description:
        config["description"] = spec.description
    if spec.compression:
        config["compression"] = "s2"
    if spec.placement_cluster or spec.placement_tags:
        config["placement"] = {"cluster": spec.placement_cluster, "tags": list(spec.placement_tags)}
    return config


def _republish(name: str) -> dict[str, str]:
    return {"src": wire.meta_filter(name), "dest": f"syncd.{name}.meta.>"}


def missing_flags(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that make an existing bucket as useful as a new one, and change nothing else.

    :raises StoreRejected: the stream is no bucket.
    """
    if config.get("mirror") or config.get("sources"):
        return {}
    subjects = config.get("subjects") or []
    if wire.chunk_filter(name) not in subjects or wire.meta_filter(name) not in subjects:
        raise StoreRejected(f"stream {wire.stream_of(name)!r} exists but is no Object Store bucket")
    if config.get("sealed"):
        return {}
    wanted = ("allow_direct", "allow_rollup_hdrs", "allow_atomic", "allow_msg_ttl")
    changes: dict[str, Any] = {flag: True for flag in wanted if not config.get(flag)}
    if changes.get("allow_rollup_hdrs") and config.get("deny_purge"):
        del changes["allow_rollup_hdrs"]
    if not config.get("republish"):
        changes["republish"] = _republish(name)
    return changes


class _Api:
    """The JetStream API as JSON."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self._mapped: set[str] = set()

    async def call(self, subject: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask, and ask again while the server is away or elects a leader; idempotent requests only.

        :raises SyncdError: what the server refused, or that it could not be asked.
        """
        return await self._ask(f"{self.conn.api}.{subject}", request)

    async def _ask(self, subject: str, request: Mapping[str, Any] | None) -> dict[str, Any]:
        payload = b"" if request is None else json.dumps(request).encode()
        waits = backoff(0.25, 2.0)
        for attempt in range(REQUEST_TRIES):
            try:
                answer = await self.conn.request(subject, payload, max_seconds=REQUEST_SECONDS)
                if len(answer.data) > _LARGE_ANSWER:
                    return await asyncio.to_thread(read_json, answer.data, subject)
                return read_json(answer.data, subject)
            except (BucketNotFound, NoJetStream):
                raise
            except (Unavailable, StoreTimeout):
                if attempt == REQUEST_TRIES - 1:
                    raise
            await asyncio.sleep(next(waits))
        raise AssertionError("unreachable")

    async def stream_info(self, bucket: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for a bucket's stream: by the API, or, in an account without JetStream, by the import mapping
        ``syncd.<bucket>.info``. What worked is asked first next time.

        :raises BucketNotFound: there is none.
        """
        direct = f"{self.conn.api}.STREAM.INFO.{wire.stream_of(bucket)}"
        mapped = f"syncd.{bucket}.info"
        order = [mapped, direct] if bucket in self._mapped else [direct, mapped]
        try:
            info = await self._ask(order[0], request)
        except (NotPermitted, NoResponders, NoJetStream) as error:
            try:
                info = await self._ask(order[1], request)
            except (NotPermitted, NoResponders, NoJetStream):
                raise error from None
            (self._mapped.add if order[1] == mapped else self._mapped.discard)(bucket)
        return info
