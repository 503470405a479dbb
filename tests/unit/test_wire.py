"""ADR-20's JSON: what we write is read back, what anybody writes is read or refused, and nothing else happens."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.errors import BadName, ConfigError, ObjectCorrupt, StoreRejected
from syncd.store import wire
from syncd.store.base import (
    CHUNK_SIZE,
    BadMeta,
    Link,
    ObjectInfo,
    ObjectMeta,
    Stored,
    digest_to_hex,
    hex_to_digest,
)
from tests.unit.test_bounds import peak

NOW = 1_763_681_271_138_292_000
SHA = "12e1b9b17cb29a6a3d7bdd8b1857b1ef54a5f6ee6c4a8e9ad1d011b1b7a3f1aa"
STORED = Stored("syncd-n", 3, 300_000, "b3", SHA)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
object_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
nuids = st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True)
metas = st.builds(
    ObjectMeta,
    name=object_names,
    description=text,
    headers=st.dictionaries(text, st.lists(text, max_size=3).map(tuple), max_size=3),
    metadata=st.dictionaries(text, text, max_size=4),
)


@st.composite
def stored_contents(draw: st.DrawFn) -> Stored:
    chunks = draw(st.integers(0, 1 << 30))
    size = 0 if not chunks else draw(st.integers(chunks, 1 << 50))
    return Stored(draw(nuids), chunks, size, "", draw(st.binary(min_size=32, max_size=32)).hex())


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        "name",
        "nuid",
        "size",
        "chunks",
        "digest",
        "deleted",
        "description",
        "headers",
        "metadata",
        "options",
        "bucket",
        "mtime",
    ]
)


def read(payload: bytes, name: str = "n", headers: dict[str, str] | None = None) -> ObjectInfo | BadMeta:
    subject = wire.meta_subject("B", name)
    return wire.read_meta("B", subject, payload, headers or {}, seq=7, time_ns=NOW)


def changed(**changes: Any) -> bytes:
    good = json.loads(wire.encode_put("B", ObjectMeta("n"), STORED, nuid="syncd-n", now_ns=NOW))
    return json.dumps(good | changes).encode()


@given(metas, stored_contents())
def test_what_is_written_is_read_back(meta: ObjectMeta, stored: Stored) -> None:
    """Every object survives the way to the wire and back."""
    payload = wire.encode_put("B", meta, stored, nuid=stored.nuid, now_ns=NOW)
    info = read(payload, meta.name)
    assert isinstance(info, ObjectInfo)
    assert ObjectMeta(info.name, info.description, info.headers, info.metadata) == meta
    assert (info.nuid, info.size, info.chunks, info.sha256) == (
        stored.nuid,
        stored.size,
        stored.chunks,
        stored.sha256,
    )
    assert (info.bucket, info.seq, info.mtime_ns, info.deleted, info.link) == ("B", 7, NOW, False, None)


@given(object_names, nuids, st.dictionaries(text, text, max_size=3))
def test_a_tombstone_is_read_back(name: str, nuid: str, metadata: dict[str, str]) -> None:
    """Deleted objects keep their name and what the deleter says."""
    info = read(wire.encode_tombstone("B", name, nuid=nuid, metadata=metadata), name)
    assert isinstance(info, ObjectInfo)
    assert (info.name, info.deleted, info.size, info.metadata) == (name, True, 0, metadata)


@given(object_names, st.none() | object_names, st.none() | st.dictionaries(text, text, max_size=4))
def test_a_link_is_read_back(name: str, target: str | None, metadata: dict[str, str] | None) -> None:
    """Links name a bucket, or an object in one, and have metadata as objects do."""
    link = Link("other", target)
    info = read(wire.encode_link("B", name, link, nuid="n", now_ns=NOW, metadata=metadata), name)
    assert isinstance(info, ObjectInfo)
    assert (info.link, info.metadata, info.deleted) == (link, metadata or {}, False)


@pytest.mark.fault("O1 O5")
@settings(max_examples=500)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    """Random bytes and random JSON are read as an object's metadata message.

    Each is an object or bad metadata; nothing else comes out.
    """
    assert isinstance(read(payload), ObjectInfo | BadMeta)


@pytest.mark.fault("O1 O5")
@settings(max_examples=500)
@given(st.dictionaries(fields, json_values, max_size=4), object_names)
def test_any_value_in_any_field_is_read_or_refused(changes: dict[str, Any], name: str) -> None:
    """Up to four fields of a good metadata message are replaced by random JSON values.

    The message is bad, or all that is read has its type and range.
    """
    info = read(changed(**changes), name)
    if isinstance(info, ObjectInfo):
        assert all(isinstance(value, str) for value in (info.name, info.nuid, info.digest, info.description))
        assert type(info.size) is type(info.chunks) is type(info.chunk_size) is int
        assert 0 <= info.chunks <= max(info.size, 1)
        assert not info.chunks or wire.is_nuid(info.nuid)
        assert all(isinstance(value, tuple) for value in info.headers.values())
        info.name.encode()


@given(st.text(max_size=30))
def test_any_subject_is_read_or_refused(token: str) -> None:
    """A subject that nobody of sound mind writes is a bad message as well."""
    for subject in (token, f"$O.B.M.{token}"):
        assert isinstance(wire.read_meta("B", subject, changed(), {}, seq=1, time_ns=0), ObjectInfo | BadMeta)
        marker = wire.read_meta("B", subject, b"", {"Nats-Marker-Reason": "x"}, seq=1, time_ns=0)
        assert isinstance(marker, ObjectInfo | BadMeta)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"size": 1 << 60},
        {"size": 3.0},
        {"size": "3"},
        {"size": True},
        {"chunks": -1},
        {"chunks": 0},
        {"chunks": 300_001},
        {"nuid": "a.b"},
        {"nuid": "a b"},
        {"nuid": "*"},
        {"nuid": ""},
        {"nuid": "x" * 257},
        {"nuid": 5},
        {"name": "other"},
        {"name": ""},
        {"name": None},
        {"name": "\ud800"},
        {"deleted": "no"},
        {"description": "\udfff"},
        {"headers": []},
        {"headers": {"a": 1}},
        {"headers": {"a": ["x", 1]}},
        {"metadata": {"a": 1}},
        {"metadata": ["a"]},
        {"options": 1},
        {"options": {"max_chunk_size": -5}},
        {"options": {"link": "x"}},
        {"options": {"link": {"bucket": "a.b"}}},
        {"options": {"link": {}}},
        {"digest": 5},
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_refused(changes: dict[str, Any]) -> None:
    """One bad field makes a bad message; nothing is guessed."""
    assert isinstance(read(changed(**changes)), BadMeta)


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": None, "metadata": None, "options": None, "description": None},
        {"headers": {"a": "plain"}},
        {"mtime": ""},
        {"mtime": 5},
        {"bucket": "renamed", "future": [{}]},
        {"digest": ""},
        {"deleted": True, "size": 7, "chunks": 900, "nuid": ""},
    ],
)
def test_what_other_clients_write_is_read(changes: dict[str, Any]) -> None:
    """Absent, null and unknown fields, stale times and leftovers in tombstones do no harm."""
    assert isinstance(read(changed(**changes)), ObjectInfo)


def test_what_nats_py_wrote_is_read() -> None:
    """A message recorded from nats-py 2.16."""
    payload = (
        b'{"name":"h\\u00e9 llo/x","bucket":"B","nuid":"SDdEJOgdSyPDUIbEBc8c9g","size":300000,'
        b'"mtime":"2026-11-20T23:27:51.138292+00:00","chunks":3,'
        b'"digest":"SHA-256=EuG5sXmymk9-WImxhdescb_wrR9Jp7OR0JEbc3oPU4E=","deleted":false,'
        b'"description":"d","headers":{"k":["v"]},"options":{"max_chunk_size":131072}}'
    )
    info = wire.decode_info("B", "$O.B.M.aMOpIGxsby94", payload, {}, seq=1, time_ns=2)
    assert (info.name, info.size, info.headers) == ("hé llo/x", 300_000, {"k": ("v",)})
    assert info.sha256 == base64.urlsafe_b64decode("EuG5sXmymk9-WImxhdescb_wrR9Jp7OR0JEbc3oPU4E=").hex()


def test_the_javascript_clients_latin_1_subjects_are_read() -> None:
    """It encodes names as Latin-1; the name inside is right. Any other mismatch is refused."""
    payload = changed(name="café.txt")
    latin = base64.urlsafe_b64encode("café.txt".encode("latin-1")).decode()
    info = wire.read_meta("B", f"$O.B.M.{latin}", payload, {}, seq=1, time_ns=2)
    assert isinstance(info, ObjectInfo)
    assert info.name == "café.txt"
    assert isinstance(wire.read_meta("B", "$O.B.M.Y2Fm", payload, {}, seq=1, time_ns=2), BadMeta)


def test_a_repeated_key_counts_by_its_last_value() -> None:
    """As in Go and JavaScript."""
    payload = changed().replace(b'"size": 300000', b'"size": 1, "size": 300000')
    info = read(payload)
    assert isinstance(info, ObjectInfo)
    assert info.size == 300_000


def test_what_is_written_is_what_every_client_reads() -> None:
    """The exact bytes: padded digest, lists in headers, real time, nuid always, no mtime in tombstones."""
    meta = ObjectMeta("a/b", "d", {"Content-Type": ("text/plain",)}, {"k": "v"})
    assert json.loads(wire.encode_put("B", meta, STORED, nuid="syncd-n", now_ns=NOW)) == {
        "name": "a/b",
        "bucket": "B",
        "nuid": "syncd-n",
        "description": "d",
        "size": 300_000,
        "mtime": "2025-11-20T23:27:51.138292+00:00",
        "chunks": 3,
        "digest": hex_to_digest(SHA),
        "headers": {"Content-Type": ["text/plain"]},
        "metadata": {"k": "v"},
        "options": {"max_chunk_size": CHUNK_SIZE},
    }
    tombstone = json.loads(wire.encode_tombstone("B", "a", nuid="x", metadata={}))
    assert (tombstone["deleted"], tombstone["nuid"], "mtime" in tombstone) == (True, "x", False)
    link = json.loads(wire.encode_link("B", "a", Link("c", None), nuid="x", now_ns=NOW))
    assert link["options"]["link"] == {"bucket": "c"}
    assert link["digest"].endswith("=")
    assert "metadata" not in link
    link = json.loads(wire.encode_link("B", "a", Link("c", "d"), nuid="x", now_ns=NOW, metadata={"k": "v"}))
    assert (link["metadata"], link["options"]["link"]) == ({"k": "v"}, {"bucket": "c", "name": "d"})


def test_metadata_larger_than_a_message_is_refused_before_it_is_sent() -> None:
    """The server would refuse it, or worse."""
    with pytest.raises(StoreRejected):
        wire.encode_put("B", ObjectMeta("n", metadata={"k": "x" * (1 << 20)}), STORED, nuid="n", now_ns=NOW)
    with pytest.raises(StoreRejected):
        wire.encode_put("B", ObjectMeta("n", metadata={"k": "\ud800"}), STORED, nuid="n", now_ns=NOW)
    for value in ("x" * (1 << 20), "\ud800"):
        with pytest.raises(StoreRejected):
            wire.encode_link("B", "n", Link("c", None), nuid="n", now_ns=NOW, metadata={"k": value})


def test_a_name_that_is_no_subject_is_refused() -> None:
    """Empty, too long for the server's control line, or not UTF-8."""
    for name in ("", "x" * 3000, "\udc80"):
        with pytest.raises(BadName):
            wire.meta_subject("B", name)


@pytest.mark.parametrize("name", ["a\n", "", "a.b", "a b", "*", "ä", "x" * 201])
def test_a_bucket_name_is_matched_as_a_whole(name: str) -> None:
    """``$`` in a pattern would let a trailing newline pass."""
    with pytest.raises(ConfigError):
        wire.check_bucket(name)
    assert not wire.is_bucket(name)


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        (hex_to_digest(SHA), SHA),
        (hex_to_digest(SHA).rstrip("="), SHA),
        ("sha-256=" + hex_to_digest(SHA)[8:], SHA),
        ("SHA-256=" + base64.b64encode(bytes.fromhex(SHA)).decode(), SHA),
        ("SHA-256=" + SHA, ""),
        ("SHA-1=2jmj7l5rSw0yVb_vlWAYkK_YBwk=", ""),
        ("", ""),
        ("SHA-256=", ""),
        ("SHA-256=!!!!", ""),
    ],
)
def test_a_digest_is_read_with_and_without_padding_and_nothing_else(digest: str, expected: str) -> None:
    """Clients differ in padding and alphabet; another kind of digest is none."""
    assert digest_to_hex(digest) == expected


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)))
def test_times_are_read_back_to_the_microsecond(moment: datetime) -> None:
    """Written as RFC 3339 in UTC."""
    ns = round(moment.replace(tzinfo=UTC).timestamp() * 1_000_000) * 1000
    assert wire.parse_time(wire.format_time(ns)) == ns


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("2026-11-20T23:27:51.138292123Z", 1_795_217_271_138_292_123),
        ("2026-11-20T23:27:51Z", 1_795_217_271_000_000_000),
        ("2026-11-21T00:27:51+01:00", 1_795_217_271_000_000_000),
        ("2026-11-20T18:27:51.5-05:00", 1_795_217_271_500_000_000),
        ("0001-01-01T00:00:00Z", 0),
        ("", 0),
        ("yesterday", 0),
        ("2026-13-41T00:00:00Z", 0),
    ],
)
def test_the_servers_times_are_read(text: str, ns: int) -> None:
    """With up to nine digits, and in any zone; what is no time is 0."""
    assert wire.parse_time(text) == ns


def test_the_decoder_names_its_reason() -> None:
    """A bad message says in a word why, for the log."""
    with pytest.raises(ObjectCorrupt, match="size is out of range"):
        wire.decode_info("B", "$O.B.M.bg==", changed(size=-1), {}, seq=1, time_ns=0)


@pytest.mark.fault("O5")
def test_metadata_larger_than_any_servers_default_is_refused_unread() -> None:
    """A metadata message of nested lists is larger than the limit; once read it would take twenty times its size.

    It is refused for its size, and nothing of it is read: not even a hundredth of it is allocated.
    """
    payload = b'{"name":"n","z":[' + b"[]," * (wire.MAX_READ_META_BYTES // 3) + b"[]]}"
    with peak() as found, pytest.raises(ObjectCorrupt, match="bytes of metadata"):
        wire.decode_info("B", "$O.B.M.bg==", payload, {}, seq=1, time_ns=0)
    assert found[0] < len(payload) // 100


@pytest.mark.fault("O5")
def test_metadata_leaves_room_for_the_headers_of_its_message() -> None:
    """An object's metadata is between max_payload less 4 KiB, which headers need, and max_payload: refused unsent."""
    meta = ObjectMeta("n", metadata={"k": "x" * (1024 * 1024 - 1024)})
    with pytest.raises(StoreRejected):
        wire.encode_put("app", meta, Stored("n", 0, 0, "", ""), nuid="n", now_ns=0)
