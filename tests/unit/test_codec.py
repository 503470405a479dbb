"""Blobs as they travel: what is sent is read back, and no payload makes a reader allocate or accept what it should not.

tests/vectors/blobs.json holds the same for readers in other languages; `python -m tests.unit.test_codec` writes it.
"""

from __future__ import annotations

import json
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd import errors
from syncd.errors import ObjectCorrupt, ObjectGone
from syncd.nodes import BLOB_MAX, digest_of
from syncd.store.codec import MISSES, RAW, SAMPLE_EVERY, ZSTD, Codec, decode

VECTORS = Path(__file__).parents[2] / "tests/vectors/blobs.json"
TEXT = b"the same line again and again\n" * 100
NOISE = random.Random(3).randbytes(4000)


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def claiming(size: int) -> bytes:
    """The header of a frame that states a size, with one block of a repeated byte behind it."""
    magic, descriptor = b"\x28\xb5\x2f\xfd", b"\xe0"  # single segment, a size of eight bytes
    last_block_of_repeats = (1 | 1 << 1 | (128 * 1024) << 3).to_bytes(3, "little")
    return magic + descriptor + size.to_bytes(8, "little") + last_block_of_repeats + b"x"


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


ACCEPTED = {
    "raw": (RAW + b"hi", b"hi"),
    "raw, no bytes": (RAW, b""),
    "zstd, level 3": (ZSTD + frame(TEXT), TEXT),
    "zstd, level 19, with a checksum": (ZSTD + frame(TEXT, level=19, write_checksum=True), TEXT),
    "zstd of what does not compress": (ZSTD + frame(NOISE[:100]), NOISE[:100]),
    "zstd of the largest blob": (ZSTD + frame(bytes(BLOB_MAX)), bytes(BLOB_MAX)),
}
DICTIONARY = zstandard.ZstdCompressionDict(TEXT[:1000], dict_type=zstandard.DICT_TYPE_RAWCONTENT)
REFUSED = {
    "no payload: the blob was removed": (b"", TEXT, "ObjectGone"),
    "an unknown codec": (b"\2" + TEXT, TEXT, "ObjectCorrupt"),
    "the codec 0x30": (b"0" + TEXT, TEXT, "ObjectCorrupt"),
    "other bytes than the digest's": (RAW + TEXT[:-1], TEXT, "ObjectCorrupt"),
    "other bytes than the digest's, compressed": (ZSTD + frame(TEXT[:-1]), TEXT, "ObjectCorrupt"),
    "a frame of no bytes": (ZSTD + frame(b""), b"", "ObjectCorrupt"),
    "no frame": (ZSTD, b"", "ObjectCorrupt"),
    "no frame but noise": (ZSTD + NOISE[:50], TEXT, "ObjectCorrupt"),
    "a frame that is cut off": (ZSTD + frame(TEXT)[:-1], TEXT, "ObjectCorrupt"),
    "a frame without its content size": (ZSTD + frame(TEXT, write_content_size=False), TEXT, "ObjectCorrupt"),
    "a frame with a byte behind it": (ZSTD + frame(TEXT) + b"\0", TEXT, "ObjectCorrupt"),
    "two frames": (ZSTD + frame(TEXT[:30]) + frame(TEXT[30:]), TEXT, "ObjectCorrupt"),
    "a frame and an empty one": (ZSTD + frame(TEXT) + frame(b""), TEXT, "ObjectCorrupt"),
    "an empty frame and one": (ZSTD + frame(b"") + frame(TEXT), TEXT, "ObjectCorrupt"),
    "an empty frame with a byte behind it": (ZSTD + frame(b"") + b"\0", b"", "ObjectCorrupt"),
    "a skippable frame before": (ZSTD + skippable(b"hidden") + frame(TEXT), TEXT, "ObjectCorrupt"),
    "a skippable frame behind": (ZSTD + frame(TEXT) + skippable(b"hidden"), TEXT, "ObjectCorrupt"),
    "a skippable frame alone": (ZSTD + skippable(b"hidden"), b"", "ObjectCorrupt"),
    "a frame that states one byte more than a blob holds": (
        ZSTD + frame(bytes(BLOB_MAX + 1)),
        bytes(BLOB_MAX + 1),
        "ObjectCorrupt",
    ),
    "a frame that states a terabyte": (ZSTD + claiming(1 << 40), TEXT, "ObjectCorrupt"),
    "a frame that states 2^64 - 1": (ZSTD + claiming((1 << 64) - 1), TEXT, "ObjectCorrupt"),
    "a frame that states 2^64 - 2": (ZSTD + claiming((1 << 64) - 2), TEXT, "ObjectCorrupt"),
    "a frame that holds more than it states": (ZSTD + claiming(100), b"x" * 100, "ObjectCorrupt"),
    "a frame that holds less than it states": (ZSTD + claiming(200_000), b"x" * (128 * 1024), "ObjectCorrupt"),
    "a frame that needs a dictionary": (
        ZSTD + zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(TEXT),
        TEXT,
        "ObjectCorrupt",
    ),
}


def vectors() -> list[dict[str, str]]:
    """What is accepted, with the blob's bytes, then what is refused, with the error."""
    rows = [
        {"name": name, "digest": digest_of(data), "payload": payload.hex(), "bytes": data.hex()}
        for name, (payload, data) in ACCEPTED.items()
        if len(data) < BLOB_MAX
    ]
    return rows + [
        {"name": name, "digest": digest_of(data), "payload": payload.hex(), "error": error}
        for name, (payload, data, error) in REFUSED.items()
    ]


def test_the_vectors_are_read_as_they_say() -> None:
    """Other libraries may compress otherwise: what counts is what a payload decodes to."""
    rows = json.loads(VECTORS.read_text())
    assert [row["name"] for row in rows] == [row["name"] for row in vectors()]
    for row in rows:
        payload = bytes.fromhex(row["payload"])
        if "bytes" in row:
            assert decode(payload, row["digest"]).hex() == row["bytes"]
        else:
            with pytest.raises(getattr(errors, row["error"])):
                decode(payload, row["digest"])


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_payload_is_accepted(name: str) -> None:
    payload, data = ACCEPTED[name]
    assert decode(payload, digest_of(data)) == data


@pytest.mark.parametrize("name", REFUSED)
def test_a_payload_is_refused(name: str) -> None:
    """By one error, and nothing near a claimed size is allocated."""
    payload, data, error = REFUSED[name]
    tracemalloc.start()
    try:
        with pytest.raises(getattr(errors, error)) as caught:
            decode(payload, digest_of(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(caught.value).__name__ == error
    assert peak < 2 * BLOB_MAX


def test_a_raw_blob_that_is_too_large_is_refused() -> None:
    """Even with the right digest."""
    data = bytes(BLOB_MAX + 1)
    with pytest.raises(ObjectCorrupt):
        decode(RAW + data, digest_of(data))
    assert decode(RAW + data[1:], digest_of(data[1:])) == data[1:]


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_what_compresses_is_compressed_and_the_rest_is_not() -> None:
    """Noise is sent as it is; only after some in a row are blobs sent untried, and every so many is tried again."""
    codec = Codec()
    assert codec.encode(TEXT)[:1] == ZSTD
    for _ in range(MISSES - 1):
        assert codec.encode(NOISE) == RAW + NOISE
    assert codec.encode(TEXT)[:1] == ZSTD
    for _ in range(MISSES):
        assert codec.encode(NOISE) == RAW + NOISE
    tried = [codec.encode(TEXT)[:1] for _ in range(SAMPLE_EVERY + 1)]
    assert tried == [RAW] * SAMPLE_EVERY + [ZSTD]
    assert codec.encode(TEXT)[:1] == ZSTD


def test_compression_can_be_off() -> None:
    """Everything is raw then; a view of bytes is as good as bytes."""
    codec = Codec(compress=False)
    assert codec.encode(TEXT) == RAW + TEXT
    assert codec.encode(memoryview(TEXT)[1:]) == RAW + TEXT[1:]


def test_threads_do_not_disturb_one_another() -> None:
    """Several threads decode and encode at once; each blob is itself."""
    blobs = [bytes([number]) * 50_000 + NOISE[:number] for number in range(8)]
    wrong: list[int] = []

    def work(number: int) -> None:
        codec, data = Codec(), blobs[number]
        if any(decode(codec.encode(data), digest_of(data)) != data for _ in range(20)):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@given(st.lists(st.binary(max_size=200) | st.sampled_from([TEXT, NOISE, bytes(BLOB_MAX)]), max_size=20), st.booleans())
def test_blobs_survive_their_payload(blobs: list[bytes], compress: bool) -> None:
    """Whatever the order of what compresses and what does not."""
    codec = Codec(compress=compress)
    for data in blobs:
        payload = codec.encode(data)
        assert decode(payload, digest_of(data)) == data
        assert len(payload) <= len(data) + 1


GOOD = ZSTD + frame(TEXT)


@settings(max_examples=300)
@given(
    st.binary(max_size=100)
    | st.binary(max_size=100).map(lambda tail: GOOD[:12] + tail)
    | st.builds(lambda at, new: GOOD[:at] + new + GOOD[at + 1 :], st.integers(0, len(GOOD)), st.binary(max_size=2))
)
def test_any_payload_is_the_blob_or_refused(payload: bytes) -> None:
    """Nothing else escapes."""
    try:
        data = decode(payload, digest_of(TEXT))
    except (ObjectCorrupt, ObjectGone):
        return
    assert data == TEXT


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(row) for row in vectors())
    VECTORS.write_text(f"[\n{lines}\n]\n")
