"""Entry <-> object of the objects layout, and what a generation's object says of it (docs/format.md).

What syncd writes into an object's ``metadata``: ``syncd-kind``, ``syncd-mode`` (octal), ``syncd-mtime``
(nanoseconds since the epoch, decimal), ``syncd-digest`` (BLAKE3 hex, files), ``syncd-target`` (symlinks),
``syncd-publisher``. An object without them, from any other client, gets sane defaults. Values out of range are
treated as absent: they come from the wire.
"""

from __future__ import annotations

import mimetypes
import re
from typing import TYPE_CHECKING

from syncd.errors import ObjectCorrupt
from syncd.index import RemoteRow
from syncd.model import DEFAULT_DIR_MODE, DEFAULT_FILE_MODE, MODE_BITS, Entry, Kind
from syncd.paths import check_path
from syncd.store.base import EMPTY_BLAKE3, EMPTY_SHA256, ObjectInfo, ObjectMeta, Stored, hex_to_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from syncd.nodes import Generation

KIND = "syncd-kind"
MODE = "syncd-mode"
MTIME = "syncd-mtime"
DIGEST = "syncd-digest"
TARGET = "syncd-target"
PUBLISHER = "syncd-publisher"
ALLOWED = "syncd-allowed"
"""On a tombstone: a person allowed this deletion at the publisher, subscribers need not ask again."""

GENERATION = "generation"
"""The kind of generation objects; the keys below repeat their records, for listings."""
KEY_SET = "keys"
"""The kind of key sets."""
NUMBER = "syncd-number"
TREE = "syncd-tree"
CREATED = "syncd-created"
FILES = "syncd-files"
BYTES = "syncd-bytes"
ADDED = "syncd-added"
CHANGED = "syncd-changed"
REMOVED = "syncd-removed"
NOTE = "syncd-note"

MAX_TARGET_BYTES = 4095
_HEX64 = re.compile(r"[0-9a-f]{64}")
_OCTAL = re.compile(r"[0-7]{1,6}")
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = 1 << 63


def object_meta(path: str, entry: Entry, *, publisher: str, extra: Mapping[str, str]) -> ObjectMeta:
    """Describe an entry as an object; ``extra`` are the folder's own key/values."""
    metadata = {key: value for key, value in extra.items() if not key.startswith("syncd-")}
    metadata[KIND] = entry.kind.value
    metadata[MODE] = f"{entry.mode:04o}"
    metadata[MTIME] = str(entry.mtime_ns)
    metadata[PUBLISHER] = publisher
    headers: dict[str, tuple[str, ...]] = {}
    if entry.kind is Kind.FILE:
        metadata[DIGEST] = entry.digest
        headers["Content-Type"] = (content_type(path),)
    elif entry.kind is Kind.SYMLINK:
        metadata[TARGET] = entry.target
    return ObjectMeta(name=path, headers=headers, metadata=metadata)


def generation_metadata(generation: Generation, extra: Mapping[str, str]) -> dict[str, str]:
    """Return what a generation object's metadata repeats of its record; ``extra`` are the folder's own key/values."""
    own = {key: value for key, value in extra.items() if not key.startswith("syncd-")}
    return own | {
        KIND: GENERATION,
        PUBLISHER: generation.publisher,
        NUMBER: str(generation.number),
        TREE: generation.root.tree,
        CREATED: generation.created,
        FILES: str(generation.files),
        BYTES: str(generation.size),
        ADDED: str(generation.added),
        CHANGED: str(generation.changed),
        REMOVED: str(generation.removed),
        NOTE: generation.note,
    }


def content_type(path: str) -> str:
    """Guess a media type from a name; ``application/octet-stream`` where there is no guess."""
    guess, encoding = mimetypes.guess_type(path, strict=True)
    return "application/octet-stream" if guess is None or encoding is not None else guess


def remote_row(info: ObjectInfo, *, path: str | None = None, via: str = "") -> RemoteRow:
    """Read an object (not a link, not a tombstone) as what a mirror should hold.

    :param path: where it goes, if not under its own name (links).
    :raises BadName: the name must not become a path.
    :raises ObjectCorrupt: the metadata is of no use (unknown kind, a symlink without target, no digest).
    """
    where = check_path(info.name if path is None else path)
    metadata = info.metadata
    try:
        kind = Kind(metadata.get(KIND, Kind.FILE))
    except ValueError:
        raise ObjectCorrupt(f"{where}: kind {metadata[KIND]!r} is not known to this version") from None
    mtime_ns = _mtime(metadata, info.mtime_ns)
    if kind is Kind.SYMLINK:
        target = metadata.get(TARGET, "")
        if not target or "\0" in target or len(target.encode("utf-8", "replace")) > MAX_TARGET_BYTES:
            raise ObjectCorrupt(f"{where}: symlink without a usable target")
        entry = Entry(kind, 0o777, mtime_ns, target=target)
    elif kind is Kind.DIR:
        entry = Entry(kind, _mode(metadata, DEFAULT_DIR_MODE), mtime_ns)
    else:
        digest = metadata.get(DIGEST, "")
        sha256 = info.sha256
        if info.size == 0 and info.chunks == 0:
            digest, sha256 = EMPTY_BLAKE3, EMPTY_SHA256
        if not sha256:
            raise ObjectCorrupt(f"{where}: object has no SHA-256 digest, its content cannot be verified")
        entry = Entry(
            kind,
            _mode(metadata, DEFAULT_FILE_MODE),
            mtime_ns,
            size=info.size,
            digest=digest if _HEX64.fullmatch(digest) else "",
            sha256=sha256,
        )
    return RemoteRow(
        path=where,
        entry=entry,
        bucket=info.bucket,
        name=info.name,
        nuid=info.nuid,
        chunks=info.chunks,
        chunk_size=info.chunk_size,
        seq=info.seq,
        publisher=metadata.get(PUBLISHER, ""),
        via=via,
    )


def object_info(row: RemoteRow) -> ObjectInfo:
    """Return what a download needs to know of a row."""
    return ObjectInfo(
        bucket=row.bucket,
        name=row.name,
        nuid=row.nuid,
        size=row.entry.size,
        chunks=row.chunks,
        digest=hex_to_digest(row.entry.sha256) if row.entry.sha256 else "",
        deleted=False,
        mtime_ns=row.entry.mtime_ns,
        seq=row.seq,
        chunk_size=row.chunk_size,
    )


def stored_of(row: RemoteRow) -> Stored:
    """Return the content a row announces, to be announced again under another name."""
    return Stored(row.nuid, row.chunks, row.entry.size, row.entry.digest, row.entry.sha256, row.chunk_size)


def _mode(metadata: Mapping[str, str], default: int) -> int:
    text = metadata.get(MODE, "")
    return int(text, 8) & MODE_BITS if _OCTAL.fullmatch(text) else default


def _mtime(metadata: Mapping[str, str], default: int) -> int:
    text = metadata.get(MTIME, "")
    if not _INTEGER.fullmatch(text):
        return default
    value = int(text)
    return value if -_INT64 <= value < _INT64 else default
