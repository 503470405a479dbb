"""Everything that reads bytes of a bucket, against bytes that nobody sane wrote.

Honest bytes are spoiled (flipped, cut, grown, spliced, their numbers replaced) or made up; what reads them answers with
the errors of its contract and no others, in bounded time and memory, and what it accepts is written again as it was
where there is one form. ``SYNCD_FUZZ_EXAMPLES=100000`` makes each of these tests a long one; hypothesis remembers
what failed in .hypothesis and prints how to repeat it.

The vectors, and simpler changes to them, are in the tests of each module (test_nodes.py, test_codec.py, ...).
"""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from syncd.errors import BadName, BadSignatures, FormatTooNew, ObjectCorrupt, ObjectGone, SyncdError
from syncd.index import Index
from syncd.model import MODE_BITS, Kind
from syncd.nodes import (
    BESIDE,
    BLOB_MAX,
    RECIPE_LEVELS,
    Generation,
    Node,
    NodeRef,
    decode_recipe,
    decode_record,
    digest_of,
    encode_node,
    encode_recipe,
    encode_record,
    identity,
    node_bound,
)
from syncd.paths import check_path
from syncd.signatures import decode_signatures, encode_signatures
from syncd.store import api, wire
from syncd.store.base import BadMeta, Link, ObjectInfo, ObjectMeta, SmallPut, Stored, digest_to_hex
from syncd.store.blobs import Blobs
from syncd.store.bucket import NatsBucket, newest_of
from syncd.store.codec import ZSTD, Codec, decode
from syncd.store.content import Meter
from syncd.store.mapping import object_info, remote_row
from syncd.store.memory import MemoryStore
from syncd.store.transport import Transport
from syncd.trees import TreeReader, generation_name, layout_of
from syncd.trust import MOVE, SIGNATURES, decode_keys, decode_move, encode_keys, encode_move
from tests.support.fuzz import EXAMPLES, MEMORY, SECONDS, bounded, flip, fuzz, lie, noise, spoiled, swap
from tests.support.generations import Forge, Publisher, file, folder, link
from tests.unit import test_nodes, test_signatures, test_trust
from tests.unit.test_codec import ACCEPTED, claiming, frame, skippable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

pytestmark = [pytest.mark.timeout(0)] if EXAMPLES else []


@dataclass
class Format:
    """One thing that is read.

    :ivar valid: honest bytes.
    :ivar read: given any bytes, what a hostile writer would have them taken for.
    :ivar errors: what it may answer instead; nothing else, not even another SyncdError.
    :ivar write: the one form of what was read, ``None`` where there are several.
    :ivar mend: makes lengths fit again that have nothing to do with what was spoiled, given a number to be off by.
    """

    valid: list[bytes]
    read: Callable[[bytes], Any]
    errors: tuple[type[SyncdError], ...] = (ObjectCorrupt, FormatTooNew)
    write: Callable[[Any], bytes] | None = None
    mend: Callable[[bytes, int], bytes] = lambda data, _: data


def mend_node(data: bytes, off: int) -> bytes:
    """Let the identities reach to the end of the bytes, or so many bytes before."""
    size = max(0, len(data) - 13 - 32 * int.from_bytes(data[9:13], "little") - off)
    return data[:5] + (size % (1 << 32)).to_bytes(4, "little") + data[9:]


def mend_recipe(data: bytes, off: int) -> bytes:
    """Claim the size that the pieces make."""
    lengths = [int.from_bytes(data[at + 32 : at + 40], "little") for at in range(10, len(data) - 39, 40)]
    return data[:2] + ((sum(lengths) + off // 8) % (1 << 64)).to_bytes(8, "little") + data[10:]


def body_of(data: bytes) -> bytes:
    """What a forger would hash for a node's tree digest."""
    size, packs = (int.from_bytes(data[at : at + 4], "little") for at in (5, 9))
    return data[13 + 32 * packs : 13 + 32 * packs + size]


def read_node(data: bytes, pack: str) -> tuple[Node, list[Any]]:
    node = Node(data, digest_of(body_of(data)), pack=pack)
    children = list(node.children())
    assert len(children) == node.count
    assert all(len(check_path(child.name)) for child in children if child.name != ".syncd")
    assert len(data) <= node_bound(len(children), sum(len(identity(child)) for child in children))
    return node, children


def write_node(read: tuple[Node, list[Any]], pack: str) -> bytes:
    children = read[1]
    places = [
        child.location._replace(blob=BESIDE) if pack and child.location.blob == pack else child.location
        for child in children
    ]
    stored = [(child.entry.kind, place, child.length) for child, place in zip(children, places, strict=True)]
    return encode_node([identity(child) for child in children], stored)


def read_recipe(data: bytes, below: int) -> Any:
    """The size that its own header claims, as in a parent that lies along."""
    recipe = decode_recipe(data, size=int.from_bytes(data[2:10], "little"), below=below)
    assert recipe.level < below
    assert recipe.size == sum(length for _, length in recipe.pieces)
    return recipe


def read_text(data: bytes) -> Any:
    return decode_signatures(data.decode("utf-8", "surrogateescape"))


def stored(name: str) -> list[bytes]:
    return [bytes.fromhex(row["bytes"]) for row in test_nodes.stored(name)]


PACK = test_nodes.PACK
NODE_ERRORS = (ObjectCorrupt, FormatTooNew)
FORMATS = {
    "node": Format(stored("nodes"), partial(read_node, pack=""), NODE_ERRORS, partial(write_node, pack=""), mend_node),
    "node in a pack": Format(
        stored("nodes"), partial(read_node, pack=PACK), NODE_ERRORS, partial(write_node, pack=PACK), mend_node
    ),
    "recipe": Format(
        stored("recipes"), partial(read_recipe, below=RECIPE_LEVELS), NODE_ERRORS, encode_recipe, mend_recipe
    ),
    "recipe of chunks": Format(
        stored("recipes"), partial(read_recipe, below=1), NODE_ERRORS, encode_recipe, mend_recipe
    ),
    "record": Format([encode_record(one) for one in test_nodes.RECORDS.values()], decode_record, write=encode_record),
    "move": Format([encode_move(one) for one in test_trust.MOVES.values()], decode_move, write=encode_move),
    "key set": Format([encode_keys(one) for one in test_trust.KEY_SETS.values()], decode_keys, write=encode_keys),
    "signatures": Format(
        [test_signatures.ONE.encode(), test_signatures.TWO.encode()],
        read_text,
        (BadSignatures,),
        lambda found: encode_signatures(found).encode(),
    ),
}


@pytest.mark.fault("O1 O5 K10")
@pytest.mark.parametrize("name", FORMATS)
@fuzz(600)
@given(data=st.data())
def test_any_bytes_are_refused_or_have_one_form(name: str, data: st.DataObject) -> None:
    """Honest nodes, recipes, records, moves, key sets and signatures are flipped, cut, spliced or made up.

    Each is refused by its decoder's own errors, or what was read is written again as the same bytes.
    """
    form = FORMATS[name]
    raw = data.draw(spoiled(form.valid) | noise)
    if data.draw(st.booleans()):
        raw = form.mend(raw, data.draw(st.integers(0, 40)))
    found = bounded(lambda: form.read(raw), form.errors)
    if found is not None and form.write is not None:
        assert form.write(found) == raw


@pytest.mark.fault("O5")
@pytest.mark.parametrize("name", FORMATS)
@fuzz(100)
@given(data=st.data())
def test_no_bytes_make_a_reader_allocate_what_they_claim(name: str, data: st.DataObject) -> None:
    """Honest bytes of each format are spoiled: lengths and counts replaced, bits flipped, parts cut and doubled.

    Reading them never allocates more than 3 MiB and fifty times their size.
    """
    form = FORMATS[name]
    raw = data.draw(spoiled(form.valid))
    tracemalloc.start()
    try:
        bounded(lambda: form.read(raw), form.errors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY + 50 * len(raw)


def test_the_honest_bytes_are_accepted() -> None:
    """So what is refused is refused for what was done to it."""
    for name, form in FORMATS.items():
        if name not in {"node", "node in a pack", "recipe of chunks"}:
            assert all(form.write(form.read(raw)) == raw for raw in form.valid if form.write is not None), name
    assert sum(_is_read(FORMATS["node"], raw) for raw in FORMATS["node"].valid) >= len(FORMATS["node"].valid) - 1
    assert any(_is_read(FORMATS["recipe of chunks"], raw) for raw in FORMATS["recipe of chunks"].valid)


def _is_read(form: Format, raw: bytes) -> bool:
    return bounded(lambda: form.read(raw), form.errors) is not None


# -- blobs -------------------------------------------------------------------------------------------------------------

TEXT = b"the same line again and again\n" * 100
PAYLOADS = [
    *(payload for payload, data in ACCEPTED.values() if len(data) < BLOB_MAX),
    ZSTD + frame(TEXT, write_content_size=False),
    ZSTD + frame(TEXT) + frame(TEXT),
    ZSTD + claiming(BLOB_MAX),
    ZSTD + claiming(100),
    ZSTD + skippable(b"hidden") + frame(TEXT),
]


@pytest.mark.fault("O1 O5")
@fuzz(1000)
@given(spoiled(PAYLOADS) | noise, st.sampled_from([digest_of(TEXT), digest_of(b""), digest_of(bytes(BLOB_MAX))]))
def test_a_payload_is_a_blob_of_its_digest_or_refused(payload: bytes, digest: str) -> None:
    """Stored payloads, among them zstd frames that lie about their size, are spoiled and read under some digest.

    What is read has that digest and the size of a blob at most, and memory stays bounded.
    """
    for named in (digest, digest_of(payload[1:])):
        tracemalloc.start()
        try:
            data = bounded(partial(decode, payload, named), (ObjectCorrupt, ObjectGone))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MEMORY + 2 * len(payload)
        if data is not None:
            assert digest_of(data) == named
            assert len(data) <= BLOB_MAX


# -- metadata messages -------------------------------------------------------------------------------------------------

NOW = 1_763_681_271_138_292_000
STORED = Stored("syncd-n", 3, 300_000, "b3", "12e1b9b17cb29a6a3d7bdd8b1857b1ef54a5f6ee6c4a8e9ad1d011b1b7a3f1aa")
NAMES = [
    "n",
    "a/b/c",
    "../x",
    "/etc/x",
    "a//b",
    ".syncd/journal",
    "-rf $(id)",
    "caf\u00e9\u202e",
    "a" * 300,
    "\n\x1b[2J",
]
META = {"syncd-kind": "file", "syncd-mode": "0644", "syncd-mtime": str(NOW), "syncd-digest": digest_of(b"x")}
LINKED = {MOVE: encode_move(next(iter(test_trust.MOVES.values()))).decode(), SIGNATURES: test_signatures.ONE}
put = partial(wire.encode_put, "B", nuid="syncd-n", now_ns=NOW)


def messages_of(name: str, bucket: str = "B") -> list[bytes]:
    """What syncd and others write for a name."""
    put = partial(wire.encode_put, bucket, nuid="syncd-n", now_ns=NOW)
    dump = {"name": name, "nuid": "js", "size": 5, "chunks": 1, "headers": {"a": "plain"}, "options": None}
    return [
        put(ObjectMeta(name, "d", {"Content-Type": ("text/plain",)}, META), STORED),
        put(ObjectMeta(name, metadata={**META, "syncd-kind": "symlink", "syncd-target": "../t"}), STORED),
        put(ObjectMeta(name, metadata={**META, "syncd-kind": "dir", "syncd-mode": "0755"}), replace(STORED, size=0)),
        wire.encode_tombstone(bucket, name, nuid="n", metadata={"syncd-allowed": "1"}),
        wire.encode_link(bucket, name, Link(bucket, "generations/0000000001"), nuid="n", now_ns=NOW, metadata=LINKED),
        wire.encode_link(bucket, name, Link("other", None), nuid="n", now_ns=NOW),
        json.dumps({**dump, "digest": "sha-256=" + "A" * 43}).encode(),
        json.dumps({**dump, "metadata": META, "mtime": "2026-11-21T02:02:45Z"}).encode(),
        b"",
    ]


MESSAGES = {name: messages_of(name) for name in NAMES}
odd_metadata = st.fixed_dictionaries(
    {},
    optional={
        "syncd-kind": st.sampled_from(["file", "dir", "symlink", "device", ""]),
        "syncd-mode": st.sampled_from(["0644", "7777", "177777", "-1", "0o7", "\u0667", "9"]),
        "syncd-mtime": st.sampled_from(["0", "-1", str(-(1 << 63)), str(1 << 63), "9" * 20, "1.5", ""]),
        "syncd-digest": st.sampled_from([digest_of(b"x"), digest_of(b"x").upper(), "x", ""]),
        "syncd-target": st.sampled_from(["../t", "", "\0", "t" * 4096, "\u0667"]),
        "syncd-publisher": st.sampled_from(["web-1:/srv", ""]),
    },
)
header_texts = st.sampled_from(["", "0", "7", "-1", "x", "\u0663", "9" * 19, "1" * 20, str(1 << 63), "MaxAge", "404"])
stamps = st.sampled_from(
    ["2026-11-21T02:02:45.600984Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-02-30T00:00:00Z", "", "now"]
)


def stored_as(name: str, payload: bytes, *, seq: str = "7", stamp: str = "2026-11-21T02:02:45.600984Z") -> Any:
    """A message as nats-py hands it over."""
    headers = {"Nats-Subject": wire.meta_subject("B", name), "Nats-Sequence": seq, "Nats-Time-Stamp": stamp}
    return SimpleNamespace(data=payload, headers=headers, subject="inbox")


PLAIN = MESSAGES["n"][6]


@st.composite
def stored_messages(draw: st.DrawFn) -> Any:
    """A message of the bucket as nats-py hands it over: subject, headers and payload, each perhaps hostile."""
    name = draw(st.sampled_from(NAMES))
    odd = odd_metadata.map(lambda metadata: put(ObjectMeta(name, metadata=metadata), STORED))
    payload = draw(st.sampled_from(MESSAGES[name]) | spoiled(MESSAGES[name]) | odd | noise)
    subjects = st.just(name)
    try:  # a forger names it as its own metadata does
        inside = json.loads(payload)["name"]
        subjects = subjects | st.just(inside) if isinstance(inside, str) else subjects
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    try:
        subject = wire.meta_subject("B", draw(subjects))
    except BadName:
        subject = "$O.B.M."
    subject = draw(st.sampled_from([subject] * 8 + [subject + "=", "$O.B.M.", "$O.X.M.bg==", "$O.B.M.\u00e4", ""]))
    headers = {"Nats-Subject": subject, "Nats-Sequence": draw(header_texts), "Nats-Time-Stamp": draw(stamps)}
    headers |= draw(st.dictionaries(st.sampled_from(["Nats-Marker-Reason", "Status", "x"]), header_texts, max_size=2))
    return SimpleNamespace(data=payload, headers=draw(st.sampled_from([headers] * 8 + [None, {}])), subject="inbox")


def reader_of(bucket: str) -> NatsBucket:
    """A bucket without a server: what it was asked for is handed to it."""
    return NatsBucket(bucket, SimpleNamespace(), SimpleNamespace(), lambda: "syncd-fresh")  # type: ignore[arg-type]


def in_range(info: ObjectInfo) -> None:
    """Every field has its type and range; everything can be written down as UTF-8."""
    texts = [info.name, info.nuid, info.digest, info.description, *info.metadata, *info.metadata.values()]
    texts += [one for key, values in info.headers.items() for one in (key, *values)]
    for text in texts:
        assert type(text) is str
        text.encode()
    assert type(info.size) is type(info.chunks) is type(info.chunk_size) is int
    assert 0 <= info.chunks <= max(info.size, 1)
    assert 0 <= info.size <= 1 << 53
    assert 0 < info.chunk_size <= wire.MAX_CHUNK_BYTES
    assert not info.chunks or wire.is_nuid(info.nuid)
    assert info.link is None or (wire.is_bucket(info.link.bucket) and not info.deleted)
    assert len(info.sha256) in {0, 64}


@pytest.mark.fault("O1 O5 P1 P2 P6")
@fuzz(1200)
@given(stored_messages())
def test_any_message_is_an_object_or_bad_metadata(message: Any) -> None:
    """Metadata messages are spoiled or made up: JSON, names such as `../x`, subjects, sequences, time stamps.

    Each is told as bad, or all its fields are in range and the same when written and read again.
    """
    info = bounded(lambda: reader_of("B")._read_meta(message), ())
    if isinstance(info, BadMeta):
        return
    in_range(info)
    if info.deleted or info.link is not None or not info.sha256:
        return
    meta = ObjectMeta(info.name, info.description, info.headers, info.metadata)
    content = Stored(info.nuid or "n", info.chunks, info.size, "", info.sha256, info.chunk_size)
    again = put(meta, content, nuid=content.nuid)
    subject = wire.meta_subject("B", info.name)
    back = wire.decode_info("B", subject, again, {}, seq=info.seq, time_ns=info.mtime_ns)
    assert back == replace(info, nuid=content.nuid, digest=back.digest)
    assert back.sha256 == info.sha256


@pytest.mark.fault("O1 P1 P2 P6")
@fuzz(1000)
@given(message=stored_messages(), path=st.sampled_from([None, "via/link", "../via", ""]))
@example(message=stored_as("n", PLAIN, stamp="9999-12-31T23:59:59Z"), path=None)
@example(message=stored_as("n", PLAIN, seq="9" * 19), path=None)
def test_any_object_is_a_row_that_a_mirror_can_hold_or_refused(message: Any, path: str | None) -> None:
    """Spoiled metadata messages with hostile names, modes and times are made rows of a mirror's index.

    Each is refused, or its path is safe, its mode in range, and the index gives it back as it is.
    """
    info = reader_of("B")._read_meta(message)
    if isinstance(info, BadMeta) or info.deleted or info.link is not None:
        return
    row = bounded(lambda: remote_row(info, path=path), (BadName, ObjectCorrupt))
    if row is None:
        return
    assert check_path(row.path) == row.path
    entry = row.entry
    assert 0 <= entry.mode <= MODE_BITS
    assert entry.kind is Kind.FILE or not entry.size
    assert (entry.kind is Kind.SYMLINK) is bool(entry.target)
    assert "\0" not in entry.target
    assert digest_to_hex(object_info(row).digest) == entry.sha256
    index = Index(None)
    try:
        with index.transaction():
            index.put_remote([row])
        assert index.remote(row.path) == row
    finally:
        index.close()


@fuzz(200)
@given(st.lists(stored_messages(), max_size=6))
def test_a_page_keeps_the_newest_of_each_name(messages: list[Any]) -> None:
    """Whatever else is on it; nothing comes twice."""
    reader = reader_of("B")
    metas = [reader._read_meta(message) for message in messages]
    kept = newest_of(metas)
    names = [meta.name if isinstance(meta, ObjectInfo) else ("bad", meta.subject) for meta in kept]
    assert len(set(names)) == len(names)
    assert set(kept) <= set(metas) if all(isinstance(meta, BadMeta) for meta in metas) else True
    assert not metas or kept[-1] is metas[-1]


# -- the server's answers ----------------------------------------------------------------------------------------------

ANSWERS = [
    b'{"stream":"OBJ_B","seq":7,"batch":"x","count":3}',
    b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"OBJ_B","seq":0}',
    b'{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"}}',
    json.dumps(
        {
            "config": {
                "name": "OBJ_B",
                "subjects": ["$O.B.C.>", "$O.B.M.>"],
                "max_bytes": -1,
                "metadata": {"syncd.layout": "generations", "syncd.format": "1"},
                "republish": {"src": "$O.B.M.>", "dest": "syncd.B.meta.>"},
                "allow_direct": True,
                "sealed": False,
            },
            "created": "2026-11-21T02:02:45Z",
            "state": {"messages": 3, "bytes": 5, "last_seq": 3, "subjects": {"$O.B.C.n": 3}},
            "total": 1,
        }
    ).encode(),
]


def subclasses(error: type[SyncdError]) -> Iterable[type[SyncdError]]:
    yield error
    for below in error.__subclasses__():
        yield from subclasses(below)


ALL_ERRORS = tuple(subclasses(SyncdError))


UNHASHABLE = b'{"error":{"code":[],"err_code":[]}}'


@pytest.mark.fault("O5")
@fuzz(300)
@given(spoiled(ANSWERS) | noise)
@example(UNHASHABLE)
def test_any_answer_of_the_server_is_read_or_an_error_of_ours(payload: bytes) -> None:
    """The server's JSON answers (acknowledgement, refusal, stream information) are spoiled or made up.

    Each is read as an object, or is an error of ours.
    """
    answer = bounded(lambda: api.read_json(payload, "ask"), ALL_ERRORS)
    if answer is not None:
        assert isinstance(answer, dict)
        assert type(api.number(answer, "seq")) is int


def with_config(**fields: Any) -> dict[str, Any]:
    info = json.loads(ANSWERS[-1])
    return {**info, "config": {**info["config"], **fields}}


@st.composite
def infos(draw: st.DrawFn) -> dict[str, Any]:
    """Stream information in which one field is of any kind."""
    info: dict[str, Any] = json.loads(ANSWERS[-1])
    part = draw(st.sampled_from([info["config"], info["state"], info["config"]["metadata"]]))
    part[draw(st.sampled_from(sorted(part)))] = draw(
        st.sampled_from([None, True, -1, 1 << 70, 1.5, "x", "2", [], ["x"], {}, {"x": {}}])
    )
    return info


@fuzz(200)
@given(infos())
@example(with_config(metadata={"syncd.format": 2}))
@example(with_config(metadata={"syncd.format": "1" * 5000}))
@example(with_config(subjects=7))
def test_any_state_of_a_stream_is_read_or_an_error_of_ours(info: dict[str, Any]) -> None:
    """What a bucket is, which layout it has, and what it lacks."""
    state = bounded(lambda: api.read_state("B", info), ALL_ERRORS)
    bounded(lambda: api.missing_flags("B", info["config"]), ALL_ERRORS)
    assert all(type(one) is int for one in (state.last_seq, state.messages, state.size))
    bucket = MemoryStore().bucket("B")
    bucket.get_info = lambda name: asyncio.sleep(0)  # type: ignore[method-assign]
    bounded(lambda: asyncio.run(layout_of(bucket, state)), ALL_ERRORS)


@pytest.mark.fault("O5")
@fuzz(300)
@given(
    spoiled(ANSWERS) | noise, st.none() | st.dictionaries(st.sampled_from(["Status", "x"]), header_texts, max_size=2)
)
@example(UNHASHABLE, None)
def test_any_acknowledgement_ends_the_wait_for_it(payload: bytes, headers: dict[str, str] | None) -> None:
    """A message under way is answered by a spoiled or made-up acknowledgement with odd headers.

    Its wait ends with a sequence or an error of ours, or its lane is held to try again.
    """

    async def acknowledge() -> None:
        transport = Transport(SimpleNamespace(on_denied=lambda *_: lambda: None))  # type: ignore[arg-type]
        out = await an_outgoing(transport)
        transport._on_ack(out, SimpleNamespace(data=payload, headers=headers))  # type: ignore[arg-type]
        if not out.acked.done():  # refused for now: the lane tries again
            assert transport._lanes["lane"].held
            return
        error = out.acked.exception()
        assert isinstance(error, SyncdError) if error else type(out.acked.result()) is int

    asyncio.run(acknowledge())


async def an_outgoing(transport: Transport) -> Any:
    """One message under way on a lane of its own; nothing is sent."""
    from syncd.store.lanes import Lane, Outgoing  # noqa: PLC0415 - only here

    acked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    out = Outgoing(1, "$O.B.M.bg==", b"x", {}, "lane", acked, again=True, head=(), size=1)
    transport._out[1] = out
    transport._lanes["lane"] = Lane()
    transport._lanes["lane"].add(out)
    await transport.writing.take(1)
    return out


page_headers = st.none() | st.dictionaries(
    st.sampled_from(
        ["Status", "Description", "Nats-Stream", "Nats-Num-Pending", "Nats-Last-Sequence", "Nats-UpTo-Sequence"]
    ),
    header_texts | st.sampled_from(["204", "404", "408", "413", "503"]),
)


@fuzz(300)
@given(st.lists(page_headers, max_size=4))
def test_any_page_ends_or_goes_on(answers: list[dict[str, str] | None]) -> None:
    """A message that is not the end is a part of the page; the end says how much there is still, in whole numbers."""

    async def hand_over() -> None:
        from syncd.store.transport import _PageWait  # noqa: PLC0415 - only here

        transport = Transport(SimpleNamespace())  # type: ignore[arg-type]
        taken: list[Any] = []
        done = asyncio.get_running_loop().create_future()
        transport._pages[5] = _PageWait(taken.append, done, "subject", 1.0, 0.0)
        for headers in answers:
            transport._on_answer(5, SimpleNamespace(data=b"x", headers=headers))  # type: ignore[arg-type]
        if done.done() and done.exception() is None:
            end = done.result()
            assert all(type(one) is int and one >= 0 for one in (end.pending, end.last_seq, end.up_to_seq))
        elif done.done():
            assert isinstance(done.exception(), SyncdError)
        else:
            assert len(taken) == len(answers)

    asyncio.run(hand_over())


class Pages:
    """A stream that answers every question with the same pages."""

    bucket = "B"

    def __init__(self, pages: list[list[Any]]) -> None:
        self._pages = pages

    async def newest(self, subjects: list[str], silence: float) -> AsyncIterator[list[Any]]:
        for page in self._pages:
            yield page


BLOBS = [b"one", b"two" * 100, TEXT]
CODED = {digest_of(blob): Codec().encode(blob) for blob in BLOBS}
blob_messages = st.builds(
    lambda digest, payload, headers: SimpleNamespace(data=payload, headers=headers and {"Nats-Subject": digest}),
    st.sampled_from([*(f"$O.B.C.{digest}" for digest in CODED), "$O.B.C.x", "$O.X.C.one", ""]),
    st.sampled_from([*CODED.values(), b""]) | spoiled([*CODED.values()]),
    st.sampled_from([True] * 6 + [None, {}]),
)


@pytest.mark.fault("O1")
@fuzz(200)
@given(pages=st.lists(st.lists(blob_messages, max_size=5), max_size=3))
def test_any_pages_of_blobs_give_each_blob_once_or_say_that_it_is_gone(pages: list[list[Any]]) -> None:
    """Three blobs are asked for, and pages come with doubled, foreign, damaged, empty and headless messages.

    Each digest is answered once, by its own bytes or by an error.
    """

    async def fetch() -> dict[str, Any]:
        blobs = Blobs(Pages(pages), lambda: "n")  # type: ignore[arg-type]
        outcomes = [outcome async for outcome in blobs.get(list(CODED))]
        assert len(outcomes) == len(CODED)
        return dict(outcomes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("syncd.store.blobs.STALE_STEP", 0)
        found = asyncio.run(fetch())
    assert found.keys() == CODED.keys()
    for digest, data in found.items():
        assert digest_of(data) == digest if isinstance(data, bytes) else isinstance(data, ObjectGone | ObjectCorrupt)


@pytest.mark.fault("O1 O5")
@fuzz(200)
@given(
    st.builds(replace, st.just(STORED), size=st.integers(0, 9), chunks=st.integers(0, 4)),
    st.lists(st.lists(st.binary(max_size=4), max_size=3), max_size=4),
)
def test_chunks_are_never_more_than_the_metadata_says(content: Stored, pages: list[list[bytes]]) -> None:
    """Chunks come in numbers and sizes that have nothing to do with those in the object's metadata.

    They are refused before more is counted than the metadata says.
    """
    info = ObjectInfo("B", "n", "n", content.size, content.chunks, "", deleted=False, mtime_ns=0, seq=1)
    meter = Meter(info)
    for page in pages:
        if meter.complete:
            break
        try:
            meter.count(page, 1)
        except (ObjectCorrupt, ObjectGone):
            return
        assert meter.size <= info.size
        assert meter.chunks <= info.chunks
        assert not meter.complete or meter.size == info.size


# -- whole trees -------------------------------------------------------------------------------------------------------

TREE = {
    "a": file("first"),
    "b": file("second"),
    "d": folder({"e": folder({"deep": file("deep")}), "f": file(b"f" * 70_000), "l": link("../a")}),
    "large": file(bytes(range(256)) * 2500),
}


async def walk(reader: TreeReader, generation: Generation) -> int:
    """Read all of a tree as a host does; return the bytes of its contents."""
    size, left = 0, [generation.root]
    for _ in range(1000):
        if not left:
            return size
        ref = left.pop()
        (node,) = await reader.nodes([ref])
        for child in node.children():
            if child.entry.kind is Kind.DIR:
                left.append(NodeRef(child.tree, child.location, child.length))
            elif child.entry.kind is Kind.FILE:
                parts = [part async for part in reader.content(child.location, child.entry.size, child.entry.digest)]
                assert sum(map(len, parts)) == child.entry.size
                size += child.entry.size
    raise AssertionError("a tree without end")


@pytest.mark.fault("O1 O5 K1")
@fuzz(400)
@given(data=st.data())
def test_any_tree_is_read_whole_or_refused(data: st.DataObject) -> None:
    """Nodes, recipes, payloads, record or head link of a tree are spoiled as a hostile publisher writes them.

    A walk as a host does it reads the tree whole, or refuses it, in bounded time.
    """
    target = data.draw(st.sampled_from(["node", "places", "recipe", "payload", "record", "link"]))

    def at_times(value: bytes) -> bytes:
        return data.draw(spoiled([value])) if data.draw(st.integers(0, 2)) == 0 else value

    def places(_: str, node: bytes) -> bytes:
        """Spoil what the tree digest does not cover."""
        begin = 13 + 32 * int.from_bytes(node[9:13], "little")
        end = begin + int.from_bytes(node[5:9], "little")
        if len(node) == end or data.draw(st.booleans()):
            return node
        return node[:end] + data.draw(spoiled([node[end:]], [flip, lie, swap]))

    forge = Forge()
    if target == "node":
        forge.node = lambda _, node: at_times(node)
    elif target == "places":
        forge.node = places
    elif target == "recipe":
        forge.recipe = at_times
    elif target == "record":
        numbers, folders = st.sampled_from([1, 1, 2]), st.sampled_from(["app", "app", "other"])
        forge.record = lambda one: replace(one, number=data.draw(numbers), folder=data.draw(folders))
    elif target == "payload":
        forge.blob = lambda _digest, _data, payload: at_times(payload)

    async def read() -> int | None:
        store = MemoryStore()
        publisher = Publisher(store)
        try:
            await publisher.commit(TREE, forge)
        except ValueError:  # nothing that even a hostile publisher could write down: a node of four bytes
            return None
        stream = store.stream("app")
        if target in {"record", "link"}:
            head = wire.meta_subject("app", "channels/head")
            message = stream.metas[head]
            if target == "link":
                stream.metas[head] = replace(message, payload=at_times(message.payload))
            else:  # announced anew, so that its SHA-256 is right
                meta = ObjectMeta(generation_name(1))
                record = at_times(encode_record(publisher.commits[0]))
                await store.bucket("app").put_many([SmallPut(meta, record, None, None)])
        bucket = store.bucket("app")
        try:
            await layout_of(bucket, await bucket.state())
            reader = TreeReader(bucket)
            commit = await reader.channel("head")
            if commit is None:
                return None
            assert (commit.generation.folder, commit.generation.number) == ("app", 1)
            return await walk(reader, commit.generation)
        except (ObjectCorrupt, ObjectGone, FormatTooNew):
            return None

    began = time.process_time()
    size = asyncio.run(read())
    assert size is None or size <= 64 * BLOB_MAX
    assert time.process_time() - began < SECONDS
