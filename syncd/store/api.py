"""The JetStream API as JSON: requests, refusals in our words, and what a bucket's stream looks like.

Rules kept here:
 * every refusal becomes a :class:`SyncdError`; the code decides, never the text;
 * a request is repeated only where that is harmless, a bounded number of times;
 * in an account without JetStream a bucket's state comes through the import mapping ``syncd.<bucket>.info``;
 * a bucket that exists is never changed but for flags that it lacks.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

from syncd.errors import (
    BucketNotFound,
    BucketSealed,
    NotPermitted,
    StoreFull,
    StoreRejected,
    StoreTimeout,
    SyncdError,
    Unavailable,
    WriteConflict,
)
from syncd.nodes import FORMAT
from syncd.retry import backoff
from syncd.store import wire
from syncd.store.base import BucketSpec, BucketState
from syncd.store.reasons import NoResponders, check_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from syncd.store.connection import Connection

REQUEST_SECONDS: Final = 10.0
REQUEST_TRIES: Final = 4
LARGE_ANSWER: Final = 256 * 1024
"""Bytes of an answer above which it is parsed in a thread."""
DUPLICATE_SECONDS: Final = 120

_FULL: Final = frozenset({10077, 10047, 10023, 10122})
_CONFLICT: Final = frozenset({10071, 10070})
_SEALED: Final = frozenset({10109})
_NOT_FOUND: Final = frozenset({10059})
_BUSY: Final = frozenset({10158, 10164})  # a message of this id, or subject, is being stored this moment (clusters)
_NO_JETSTREAM: Final = frozenset({10039, 10076})
TTL_DISABLED: Final = 10166
ATOMIC_DISABLED: Final = 10174
ATOMIC_INCOMPLETE: Final = 10176
NAME_IN_USE: Final = 10058


class ApiError(StoreRejected):
    """The server's refusal with a code that has no word of ours."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class NoJetStream(Unavailable):
    """Our account has no JetStream; that of the bucket may share what is needed (service imports)."""


class Busy(Unavailable):
    """The server sheds load; the same message may be taken in a moment."""


def api_error(error: object, doing: str) -> SyncdError:
    """Translate the ``error`` object of a JetStream answer (https://docs.nats.io, "JetStream API errors")."""
    fields = error if isinstance(error, dict) else {}
    code = number(fields, "err_code")
    status = number(fields, "code")
    text = str(fields.get("description", "no reason given"))[:300]
    if code in _FULL:
        return StoreFull(f"{doing}: {text}", hint="raise max_bytes of the bucket, or free space on the server")
    if code in _CONFLICT:
        return WriteConflict(f"{doing}: somebody else wrote it since ({text})")
    if code in _SEALED:
        return BucketSealed(f"{doing}: the bucket is sealed")
    if code in _NOT_FOUND:
        return BucketNotFound(f"{doing}: the bucket does not exist")
    if code in _NO_JETSTREAM:
        return NoJetStream(f"{doing}: {text}")
    if status in {429, 503} or code in _BUSY:
        return Busy(f"{doing}: {text}")
    return ApiError(f"{doing}: {text} (code {code})", code)


def read_json(payload: bytes, doing: str) -> dict[str, Any]:
    """Read an answer of the JetStream API.

    :raises SyncdError: the answer is an error, or unreadable.
    """
    try:
        answer = json.loads(payload)
    except (ValueError, RecursionError):
        raise Unavailable(f"{doing}: the server's answer is not readable") from None
    if not isinstance(answer, dict):
        raise Unavailable(f"{doing}: the server's answer is not readable")
    if answer.get("error"):
        raise api_error(answer["error"], doing)
    return answer


_INT64: Final = 1 << 63


def header_int(headers: Mapping[str, str], name: str) -> int:
    """Read a decimal header, 0 where it is absent or something else."""
    text = headers.get(name, "")
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0  # noqa: PLR2004 - an uint64
    return value if value < _INT64 else 0


def number(fields: Mapping[str, Any], name: str) -> int:
    """Read a number of an answer, 0 where it is absent or something else."""
    value = fields.get(name)
    return value if type(value) is int and -_INT64 <= value < _INT64 else 0


class Api:
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
                if len(answer.data) > LARGE_ANSWER:
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
        """Ask for a bucket's stream; what worked is asked first next time.

        By the API, or, in an account without JetStream, by the import mapping ``syncd.<bucket>.info``.

        :raises BucketNotFound: there is none.
        :raises Unavailable: the server is older than this version needs.
        """
        check_version(await self.conn.server_version(), self.conn.host)
        try:
            return await self._stream_info(bucket, request)
        except BucketNotFound as error:
            raise BucketNotFound(
                f"bucket {bucket!r} does not exist", hint="its publisher makes it; is the folder's name right?"
            ) from error

    async def _stream_info(self, bucket: str, request: Mapping[str, Any] | None) -> dict[str, Any]:
        direct = f"{self.conn.api}.STREAM.INFO.{wire.stream_of(bucket)}"
        mapped = f"syncd.{bucket}.info"
        order = [mapped, direct] if bucket in self._mapped else [direct, mapped]
        try:
            info = await self._ask(order[0], request)
        except (NotPermitted, NoResponders, NoJetStream) as error:
            try:
                info = await self._ask(order[1], request)
            except (NotPermitted, NoResponders, NoJetStream):
                if not isinstance(error, NoResponders):
                    raise error from None
                raise Unavailable(
                    f"JetStream does not answer at {self.conn.host}: it is not enabled there, or has no leader now",
                    hint="add a jetstream block to the server's configuration",
                ) from error
            (self._mapped.add if order[1] == mapped else self._mapped.discard)(bucket)
        if not isinstance(info.get("config"), dict) or not isinstance(info.get("state"), dict):
            raise Unavailable(f"stream info of bucket {bucket!r} is not readable")
        return info


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
        "republish": republish_of(name),
        "metadata": {**spec.metadata, **layout_metadata(spec.layout)},
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


def layout_metadata(layout: str) -> dict[str, str]:
    """Return what marks a bucket's layout in its stream's metadata."""
    return {"syncd.layout": layout, "syncd.format": str(FORMAT)}


def republish_of(name: str) -> dict[str, str]:
    """Return the republish setting that turns every metadata message into a notification."""
    return {"src": wire.meta_filter(name), "dest": f"syncd.{name}.meta.>"}


def missing_flags(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that make an existing bucket as useful as a new one, and change nothing else.

    :raises StoreRejected: the stream is no bucket.
    """
    if config.get("mirror") or config.get("sources"):
        return {}
    subjects = config.get("subjects")
    subjects = subjects if isinstance(subjects, list) else []
    if wire.chunk_filter(name) not in subjects or wire.meta_filter(name) not in subjects:
        raise StoreRejected(f"stream {wire.stream_of(name)!r} exists but is no Object Store bucket")
    if config.get("sealed"):
        return {}
    wanted = ("allow_direct", "allow_rollup_hdrs", "allow_atomic", "allow_msg_ttl")
    changes: dict[str, Any] = {flag: True for flag in wanted if not config.get(flag)}
    if changes.get("allow_rollup_hdrs") and config.get("deny_purge"):
        del changes["allow_rollup_hdrs"]
    if not config.get("republish"):
        changes["republish"] = republish_of(name)
    return changes


def _texts(value: object) -> dict[str, str]:
    """Return a table's texts; what is something else is left out."""
    return {key: text for key, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}


def read_state(bucket: str, info: Mapping[str, Any]) -> BucketState:
    """Read what :meth:`Api.stream_info` returned."""
    config, state = (found if isinstance(found := info.get(key), dict) else {} for key in ("config", "state"))
    metadata = config.get("metadata")
    max_bytes = number(config, "max_bytes")
    return BucketState(
        created=str(info.get("created", "")),
        last_seq=number(state, "last_seq"),
        messages=number(state, "messages"),
        size=number(state, "bytes"),
        sealed=bool(config.get("sealed")),
        max_bytes=max_bytes if max_bytes > 0 else None,
        description=str(config.get("description") or ""),
        metadata=_texts(metadata),
        republished=config.get("republish") == republish_of(bucket),
        ttl_messages=bool(config.get("allow_msg_ttl")),
        atomic=bool(config.get("allow_atomic")),
        now_ns=wire.parse_time(str(info.get("ts", ""))),
    )
