"""ADR-20 on the wire: subjects, and the JSON of a metadata message. Pure: no clock, no network.

Format: https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-20.md, and what the Go, JavaScript
and Python clients really read and write (docs/format.md). Rules kept here:
 * whatever comes from the wire either becomes an :class:`ObjectInfo` whose every field has the annotated type and a
   sane range, or raises :class:`ObjectCorrupt`; nothing else escapes;
 * what we write, every client reads: ``digest`` is ``SHA-256=<padded base64url>``, header values are lists, metadata
   is an object of strings, ``nuid`` is always there, tombstones have no ``mtime`` (Go cannot parse an empty one);
 * unknown fields are ignored, a repeated key counts by its last value, absent optional fields and ``null`` are equal.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from calendar import timegm
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from syncd.errors import BadName, ConfigError, ObjectCorrupt, StoreRejected
from syncd.paths import printable, subject_token
from syncd.store.base import (
    CHUNK_SIZE,
    EMPTY_SHA256,
    BadMeta,
    Link,
    ObjectInfo,
    ObjectMeta,
    Stored,
    hex_to_digest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SUBJECT_BYTES = 3900
"""nats-server closes a connection whose control line (verb, subject, reply inbox, sizes) exceeds 4096 bytes."""
MAX_META_BYTES = 1024 * 1024 - 4096
"""The server's default ``max_payload`` less room for headers."""
MAX_READ_META_BYTES = 1 << 20
"""What a server takes in one message unless it is told otherwise; others may write up to that."""
MAX_OBJECT_BYTES = 1 << 53
"""A size that JavaScript readers still count exactly; far above any disk."""
MAX_CHUNK_BYTES = 64 * 1024 * 1024
"""nats-server's largest possible ``max_payload``."""
MAX_NUID = 256

_BUCKET = re.compile(r"[A-Za-z0-9_-]{1,200}")
_NUID = re.compile(r"[!-~]{1,256}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NOT_IN_TOKEN = frozenset(".*>")
_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)")


def check_bucket(name: str) -> str:
    """Return ``name`` if it can be a bucket's name.

    :raises ConfigError: it cannot.
    """
    if not _BUCKET.fullmatch(name):
        raise ConfigError(
            f"{printable(name)!r} is not a bucket name",
            hint="use letters, digits, - and _, at most 200 of them",
        )
    return name


def is_bucket(name: str) -> bool:
    """Tell whether ``name`` can be a bucket's name."""
    return _BUCKET.fullmatch(name) is not None


def stream_of(bucket: str) -> str:
    """Return the stream that holds a bucket."""
    return f"OBJ_{bucket}"


def meta_filter(bucket: str) -> str:
    """Return the subject filter of all metadata messages."""
    return f"$O.{bucket}.M.>"


def chunk_filter(bucket: str) -> str:
    """Return the subject filter of all chunks."""
    return f"$O.{bucket}.C.>"


def chunk_prefix(bucket: str) -> str:
    """Return what precedes the nuid in a chunk subject."""
    return f"$O.{bucket}.C."


CLAIM = "publisher"
"""Chunk token of the message that says who publishes to a bucket: no nuid of anybody's, and no metadata names it."""


def chunk_subject(bucket: str, nuid: str) -> str:
    """Return the subject of an object's chunks; the nuid must have passed :func:`is_nuid`."""
    return f"$O.{bucket}.C.{nuid}"


def meta_subject(bucket: str, name: str) -> str:
    """Return the subject of an object's metadata.

    :raises BadName: empty, not UTF-8, or too long for the server's control line.
    """
    if not name:
        raise BadName("empty object name")
    try:
        subject = f"$O.{bucket}.M.{subject_token(name)}"
    except UnicodeEncodeError:
        raise BadName(f"object name {printable(name)!r} is not valid UTF-8") from None
    if len(subject) > MAX_SUBJECT_BYTES:
        raise BadName(f"object name of {len(name.encode())} bytes is too long for a subject")
    return subject


def is_nuid(text: str) -> bool:
    """Tell whether a nuid can stand as one token of a subject."""
    return _NUID.fullmatch(text) is not None and not _NOT_IN_TOKEN.intersection(text)


_INT64: Final = 1 << 63


def parse_time(text: str) -> int:
    """Read an RFC 3339 time as nanoseconds since the epoch; 0 where it is none."""
    found = _TIME.fullmatch(text)
    if found is None:
        return 0
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    try:
        datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC)
    except ValueError:
        return 0
    seconds = timegm((year, month, day, hour, minute, second, 0, 0, 0))
    zone = found[8]
    if zone != "Z":
        offset = int(zone[1:3]) * 3600 + int(zone[4:6]) * 60
        seconds += -offset if zone[0] == "+" else offset
    nanoseconds = seconds * 1_000_000_000 + int((found[7] or "").ljust(9, "0"))
    return nanoseconds if -_INT64 <= nanoseconds < _INT64 else 0


def format_time(ns: int) -> str:
    """Write nanoseconds since the epoch as RFC 3339 with microseconds, as nats-py does."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000).isoformat(timespec="microseconds")


def blob_subject(bucket: str, digest: str) -> str:
    """Return the subject of a blob.

    :raises StoreRejected: that is no digest; as a subject it could be anything.
    """
    if not _DIGEST.fullmatch(digest):
        raise StoreRejected(f"{printable(digest[:80])!r} is no digest")
    return chunk_subject(bucket, digest)


# -- writing --------------------------------------------------------------------------------------------------------


def encode_put(bucket: str, meta: ObjectMeta, stored: Stored, *, nuid: str, now_ns: int) -> bytes:
    """Write the metadata message that announces ``stored`` under ``meta.name``.

    :param nuid: that of ``stored``, or a fresh one for empty content.
    :raises StoreRejected: larger than a message may be.
    """
    return _dump(
        {
            **_common(bucket, meta.name, nuid, meta.description),
            "size": stored.size,
            "mtime": format_time(now_ns),
            "chunks": stored.chunks,
            "digest": hex_to_digest(stored.sha256),
            "headers": {key: list(values) for key, values in meta.headers.items()},
            "metadata": dict(meta.metadata),
            "options": {"max_chunk_size": stored.chunk_size},
        }
    )


def encode_tombstone(bucket: str, name: str, *, nuid: str, metadata: Mapping[str, str]) -> bytes:
    """Write a delete marker."""
    return _dump(
        {
            **_common(bucket, name, nuid, ""),
            "size": 0,
            "chunks": 0,
            "digest": "",
            "deleted": True,
            "metadata": dict(metadata),
            "options": {"max_chunk_size": CHUNK_SIZE},
        }
    )


def encode_link(
    bucket: str, name: str, link: Link, *, nuid: str, now_ns: int, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Write a link to an object, or to a bucket.

    :raises StoreRejected: larger than a message may be.
    """
    target = {"bucket": link.bucket} if link.name is None else {"bucket": link.bucket, "name": link.name}
    return _dump(
        {
            **_common(bucket, name, nuid, ""),
            "size": 0,
            "mtime": format_time(now_ns),
            "chunks": 0,
            "digest": hex_to_digest(EMPTY_SHA256),
            **({"metadata": dict(metadata)} if metadata else {}),
            "options": {"link": target, "max_chunk_size": CHUNK_SIZE},
        }
    )


def _common(bucket: str, name: str, nuid: str, description: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": name, "bucket": bucket, "nuid": nuid}
    if description:
        fields["description"] = description
    return fields


def _dump(fields: dict[str, Any]) -> bytes:
    try:
        payload = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise StoreRejected("an object's metadata is not valid UTF-8") from None
    if len(payload) > MAX_META_BYTES:
        raise StoreRejected(f"an object's metadata of {len(payload)} bytes is more than one message holds")
    return payload


# -- reading --------------------------------------------------------------------------------------------------------


def read_meta(
    bucket: str, subject: str, payload: bytes, headers: Mapping[str, str], *, seq: int, time_ns: int
) -> ObjectInfo | BadMeta:
    """Read one stored metadata message; what cannot be read is said, not raised.

    :param headers: the message's own headers; ``Nats-Marker-Reason`` makes an empty payload a tombstone.
    """
    try:
        return decode_info(bucket, subject, payload, headers, seq=seq, time_ns=time_ns)
    except ObjectCorrupt as error:
        return BadMeta(seq=seq, subject=subject, reason=error.message)


def decode_info(
    bucket: str, subject: str, payload: bytes, headers: Mapping[str, str], *, seq: int, time_ns: int
) -> ObjectInfo:
    """Read one stored metadata message.

    :raises ObjectCorrupt: for everything that is not an object.
    """
    token = subject.removeprefix(f"$O.{bucket}.M.")
    if token == subject:
        raise ObjectCorrupt("not a metadata subject of this bucket")
    if not payload and headers.get("Nats-Marker-Reason"):
        return _marker(bucket, token, seq, time_ns)
    fields = _parse_object(payload)
    name = _text(fields, "name")
    if not _is_token_of(token, name):
        raise ObjectCorrupt("name does not match its subject")
    deleted = _flag(fields, "deleted")
    link, chunk_size = _options(fields)
    nuid = _text(fields, "nuid")
    size = _number(fields, "size", MAX_OBJECT_BYTES)
    chunks = _number(fields, "chunks", MAX_OBJECT_BYTES)
    if deleted or link is not None:
        size = chunks = 0  # other clients' leftovers mean nothing here
    if (size and not chunks) or chunks > max(size, 1):
        raise ObjectCorrupt(f"{size} bytes in {chunks} chunks")
    if chunks and not is_nuid(nuid):
        raise ObjectCorrupt("nuid is missing or no subject token")
    return ObjectInfo(
        bucket=bucket,
        name=name,
        nuid=nuid if is_nuid(nuid) else "",
        size=size,
        chunks=chunks,
        digest=_text(fields, "digest"),
        deleted=deleted,
        mtime_ns=time_ns,
        seq=seq,
        description=_text(fields, "description"),
        chunk_size=chunk_size,
        headers=_headers(fields),
        metadata=_metadata(fields),
        link=None if deleted else link,
    )


def _marker(bucket: str, token: str, seq: int, time_ns: int) -> ObjectInfo:
    """Read a server's limit marker (ADR-43): the object expired."""
    raw = _token_bytes(token)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = raw.decode("latin-1")
    if not name:
        raise ObjectCorrupt("empty name")
    return ObjectInfo(
        bucket=bucket,
        name=name,
        nuid="",
        size=0,
        chunks=0,
        digest="",
        deleted=True,
        mtime_ns=time_ns,
        seq=seq,
    )


def _parse_object(payload: bytes) -> dict[str, Any]:
    if not payload:
        raise ObjectCorrupt("empty metadata")
    if len(payload) > MAX_READ_META_BYTES:  # as objects it takes some twenty times that
        raise ObjectCorrupt(f"{len(payload)} bytes of metadata")
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        raise ObjectCorrupt("metadata is not JSON") from None
    if not isinstance(fields, dict):
        raise ObjectCorrupt("metadata is not a JSON object")
    return fields


def _token_bytes(token: str) -> bytes:
    try:
        bare = token.rstrip("=").encode("ascii")
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise ObjectCorrupt("subject is not base64url") from None


def _is_token_of(token: str, name: str) -> bool:
    """Tell whether a subject's last token is that of ``name``, written by any client.

    The JavaScript client (3.4) encodes names as Latin-1 instead of UTF-8.
    """
    if not name:
        raise ObjectCorrupt("name is missing")
    try:
        utf8 = name.encode()
    except UnicodeEncodeError:
        raise ObjectCorrupt("name is not valid Unicode") from None
    raw = _token_bytes(token)
    return raw == utf8 or raw.decode("latin-1") == name


def _value(fields: Mapping[str, Any], key: str, default: object) -> Any:
    value = fields.get(key)
    return default if value is None else value


def _is_text(value: object) -> bool:
    """Tell whether a JSON value is a string that is valid Unicode (JSON can hold lone surrogates)."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = _value(fields, key, "")
    if not _is_text(value):
        raise ObjectCorrupt(f"{key} is not a string")
    return str(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = _value(fields, key, default=False)
    if not isinstance(value, bool):
        raise ObjectCorrupt(f"{key} is not true or false")
    return value


def _number(fields: Mapping[str, Any], key: str, limit: int) -> int:
    value = _value(fields, key, 0)
    if type(value) is not int:  # bool is an int, and a float is no size
        raise ObjectCorrupt(f"{key} is not an integer")
    if not 0 <= value <= limit:
        raise ObjectCorrupt(f"{key} is out of range")
    return int(value)


def _options(fields: Mapping[str, Any]) -> tuple[Link | None, int]:
    options = _value(fields, "options", {})
    if not isinstance(options, dict):
        raise ObjectCorrupt("options is not an object")
    chunk_size = _number(options, "max_chunk_size", MAX_CHUNK_BYTES) or CHUNK_SIZE
    link = _value(options, "link", None)
    if link is None:
        return None, chunk_size
    if not isinstance(link, dict):
        raise ObjectCorrupt("link is not an object")
    bucket = _text(link, "bucket")
    if not is_bucket(bucket):
        raise ObjectCorrupt("link names no bucket")
    return Link(bucket, _text(link, "name") or None), chunk_size


def _headers(fields: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    headers = _value(fields, "headers", {})
    if not isinstance(headers, dict):
        raise ObjectCorrupt("headers is not an object")
    result: dict[str, tuple[str, ...]] = {}
    for key, value in headers.items():
        values = value if isinstance(value, list) else [value]
        if not _is_text(key) or not all(map(_is_text, values)):
            raise ObjectCorrupt("a header is not a list of strings")
        result[key] = tuple(values)
    return result


def _metadata(fields: Mapping[str, Any]) -> dict[str, str]:
    metadata = _value(fields, "metadata", {})
    if not isinstance(metadata, dict):
        raise ObjectCorrupt("metadata is not an object")
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value):
            raise ObjectCorrupt("a metadata value is not a string")
    return metadata
