"""Blobs as they travel: one codec byte, then the bytes, compressed where that is worth it (docs/format.md, "Blob")."""

from __future__ import annotations

import threading
from typing import Final

import zstandard
from blake3 import blake3

from syncd.errors import ObjectCorrupt, ObjectGone
from syncd.nodes import BLOB_MAX

RAW: Final = b"\0"
ZSTD: Final = b"\1"
LEVEL: Final = 5
WORTH: Final = 0.95
"""A blob that keeps more than this share of its size is sent as it is."""
MISSES: Final = 4
SAMPLE_EVERY: Final = 16
"""Once so many blobs in a row did not compress, every so many is tried: a large file is of one kind."""

_local = threading.local()


class Codec:
    """Encodes the blobs of one stream of content; thread-safe where each stream has its own.

    :param compress: ``False``: everything is sent raw.
    """

    def __init__(self, *, compress: bool = True) -> None:
        self._compress = compress
        self._misses = 0
        self._skip = 0

    def encode(self, data: bytes | memoryview) -> bytes:
        """Return what is stored for a blob's bytes. Blocking: it compresses."""
        if self._compress and self._skip == 0:
            packed = _compressor().compress(data)
            if len(packed) < WORTH * len(data):
                self._misses = 0
                return ZSTD + packed
            self._misses += 1
            self._skip = SAMPLE_EVERY if self._misses >= MISSES else 0
            return b"".join((RAW, data))
        self._skip = max(0, self._skip - 1)
        return b"".join((RAW, data))


def decode(payload: bytes, digest: str) -> bytes:
    """Return a blob's bytes, checked against its digest. Blocking: it decompresses and hashes.

    :raises ObjectGone: the empty message that replaces a removed blob.
    :raises ObjectCorrupt: an unknown codec, more than a blob may hold, or other bytes than the digest's.
    """
    if not payload:
        raise ObjectGone(f"blob {digest[:12]} was removed")
    codec = payload[:1]
    if codec == RAW:
        data = payload[1:]
    elif codec == ZSTD:
        data = _decompress(payload[1:], digest)
    else:
        raise ObjectCorrupt(f"blob {digest[:12]} has the unknown codec {payload[0]}")
    if len(data) > BLOB_MAX or blake3(data).hexdigest() != digest:
        raise ObjectCorrupt(f"blob {digest[:12]} does not match its digest")
    return data


def _decompress(packed: bytes, digest: str) -> bytes:
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 < size <= BLOB_MAX:  # without a size, skippable, or a bomb: nothing is allocated for it
            raise ObjectCorrupt(f"blob {digest[:12]} does not say its size, or one that no blob has")
        return _decompressor().decompress(packed, max_output_size=BLOB_MAX, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ObjectCorrupt(f"blob {digest[:12]} does not decompress: {error}") from None


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    return _local.compressor  # type: ignore[no-any-return]


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor  # type: ignore[no-any-return]
