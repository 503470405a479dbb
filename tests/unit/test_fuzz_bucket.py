"""Those who read a bucket and believe it or not: commands, publishers, subscribers, with what nobody sane put there.

One bucket is filled honestly: generations, channels, key sets, all signed. Then some of it is spoiled by whoever may
write to it, with a stolen key or without any; and everything that reads it goes on with an error of ours, or as if
nothing had been done, in bounded time. Nothing else is right: another exception ends a daemon.

The decoders themselves are in test_fuzz.py. :data:`DECODERS` names every function of the program that reads bytes of
somebody else, and the test that gets there: a new one wants a line, and a test.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import hashlib
import importlib
import itertools
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from syncd import channels, publisher, standing
from syncd import checkout as checkout_module
from syncd.announced import Announced
from syncd.channels import Channels
from syncd.checkout import APPLIED, BEHIND, TARGET, Checkout, Target, _Count, _target
from syncd.drift import _read_note
from syncd.errors import DiskProblem, FormatTooNew, ObjectCorrupt, StoreRejected, SyncdError, Untrusted
from syncd.guard import TrustNote, _noted
from syncd.history import History, _summary
from syncd.index import Index
from syncd.keysets import KeyChange, KeySets, read_keys
from syncd.mirror import journal
from syncd.model import Kind
from syncd.modes import ModePolicy
from syncd.nodes import Generation, Location, Node, NodeRef, Where, decode_record, digest_of, encode_record
from syncd.outlet import Claim, PublishOptions, Wish
from syncd.paths import check_path
from syncd.publisher import Publisher
from syncd.records import generation_to_sign, read_record
from syncd.relayout import drop_generations, drop_objects, is_history
from syncd.rules import Rules
from syncd.service import FolderThread
from syncd.signatures import Signer, encode_signatures, generate
from syncd.standing import STANDING
from syncd.statedir import FileAllowance, Pin, StateDir
from syncd.status import FolderStatus, StatusKeeper
from syncd.store import connection, wire
from syncd.store.api import header_int
from syncd.store.base import CHANNELS, HEAD, BadMeta, BucketSpec, Link, ObjectInfo, ObjectMeta, Stored
from syncd.store.codec import Codec
from syncd.store.hints import consumer_seq
from syncd.store.mapping import GENERATION, KIND
from syncd.store.memory import MemoryStore
from syncd.subscriber import TRUST_FILE, SubscribeOptions, Subscriber
from syncd.trees import Commit, generation_name, number_of
from syncd.trust import (
    MOVE,
    SIGNATURES,
    Move,
    Seen,
    Statement,
    Trust,
    _move_bytes,
    check_signed,
    encode_move,
    keys_name,
    statement_of,
)
from tests.support.fuzz import (
    EXAMPLES,
    NUMBERS,
    SECONDS,
    bounded,
    cut,
    double,
    flip,
    fuzz,
    lie,
    nest,
    noise,
    retype,
    splice,
    spoiled,
    swap,
)
from tests.support.generations import Builder, Forge, file, folder
from tests.unit.test_fuzz import (
    MESSAGES,
    NAMES,
    body_of,
    header_texts,
    mend_node,
    messages_of,
    reader_of,
    stored,
    stored_messages,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

pytestmark = [pytest.mark.timeout(0)] if EXAMPLES else []
DAY = 86_400.0
ODD_TEXTS = [
    "",
    "0",
    "-1",
    "9" * 25,
    "\u0663",
    "\u00b2",
    "\u202ecod.exe",
    "\x1b[2J\n",
    "x" * 60_000,
    "\\ud800",
    "[[[[",
    "{}",
]


def survives(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run it to its end; ``None``: an error of ours, that can be shown. Anything else, and long work, are failures."""
    began = time.process_time()
    found, told = None, ""
    try:
        found = asyncio.run(work())
    except SyncdError as error:
        told = str(error)
    assert time.process_time() - began < SECONDS
    assert len(told.encode()) < 10_000
    return found


def shown(value: Any) -> None:
    """What people and scripts get to see can be written down, whatever was in it."""
    json.dumps(value, ensure_ascii=False).encode()


def keeper(role: Any) -> StatusKeeper:
    return StatusKeeper(FolderStatus(role, "app", "/"), clock=time.time, report=lambda _: None)


# -- an honest bucket, and what is done to it --------------------------------------------------------------------------


class Scene:
    """A bucket of three signed generations, two channels and a key set, and a source that has changed since.

    :ivar trees: what a mirror may have: nothing, or one of the generations.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.signer, self.other, self.stranger = (Signer(generate()[0]) for _ in range(3))
        self.trust = Trust(frozenset({self.signer.public}), 1)
        self.source = directory / "source"
        self.index = directory / "publish.db"
        self._numbers = itertools.count()
        self.trees: list[dict[str, bytes]] = [{}]
        asyncio.run(self._fill())

    async def _fill(self) -> None:
        store = MemoryStore()
        (self.source / "d").mkdir(parents=True)
        (self.source / "large").write_bytes(os.urandom(600_000))
        for number in range(1, 4):
            (self.source / "d/f").write_text(f"content {number}")
            (self.source / f"new{number}").write_text("x" * number)
            await self.publisher(store, self.index).push(note="honest")
            self.trees.append(contents(self.source))
        bucket = store.bucket("app")
        await Channels(bucket, time.time).promote(2, "stable", who="me", signer=self.signer, valid_seconds=DAY)
        await KeySets(bucket, time.time).change(self.trust, KeyChange(add=(self.other.public,)), [self.signer])
        (self.source / "d/f").write_text("changed since")
        self._stream = store.stream("app")

    def publisher(self, store: MemoryStore, index: Path | None) -> Publisher:
        options = PublishOptions(
            "app", self.source, Rules(), "here:/source", signer=self.signer, expire_seconds=DAY, grace_seconds=0.0,
            keep_generations=1, bucket=BucketSpec(layout="generations"),
        )  # fmt: skip
        return Publisher(options, store, index, status=keeper("publish"))

    def subscriber(self, store: MemoryStore, mirror: Path, trust: Trust | None) -> Subscriber:
        index = mirror.with_name("state") / "index.db"
        index.parent.mkdir(exist_ok=True)
        options = SubscribeOptions("app", mirror, Rules(), trust=trust)
        return Subscriber(options, store, index, status=keeper("subscribe"))

    def store(self) -> MemoryStore:
        """A copy of the honest bucket, in a store of its own."""
        store = MemoryStore()
        store._nuids = itertools.count(1000)
        stream = copy.copy(self._stream)
        stream.metas = dict(stream.metas)
        stream.chunks = {name: list(messages) for name, messages in stream.chunks.items()}
        stream.removed = {}
        store._streams["app"] = stream
        return store

    def place(self) -> Path:
        """A directory of one example's own."""
        place = self.directory / f"example-{next(self._numbers)}"
        place.mkdir()
        return place


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".syncd" not in path.parts
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


Draw = st.DrawFn


def odd_text(draw: Draw, honest: str = "x") -> str:
    """A text for a field of metadata: made up, or an honest one spoiled."""
    raw = draw(
        st.sampled_from(ODD_TEXTS)
        | spoiled([honest.encode("utf-8", "replace")]).map(lambda raw: raw.decode("utf-8", "replace"))
    )
    return raw[:60_000]


def announce(stream: Any, name: str, data: bytes, metadata: dict[str, str]) -> None:
    """Put an object of one chunk, as whoever may write can."""
    nuid = f"forged{stream.last_seq}"
    content = Stored(nuid, 1, len(data), "", hashlib.sha256(data).hexdigest())
    payload = wire.encode_put("app", ObjectMeta(name, metadata=metadata), content, nuid=nuid, now_ns=time.time_ns())
    stream.chunks[nuid] = [stream.store(data)]
    stream.put_meta(wire.meta_subject("app", name), payload, None, {})


def link(stream: Any, name: str, to: Link, metadata: dict[str, str]) -> None:
    payload = wire.encode_link(
        "app", name, to, nuid=f"forged{stream.last_seq}", now_ns=time.time_ns(), metadata=metadata
    )
    stream.put_meta(wire.meta_subject("app", name), payload, None, {})


def fields_of(stream: Any, name: str) -> dict[str, Any]:
    """The JSON of a name's metadata message; nothing where that was spoiled before."""
    try:
        fields = json.loads(stream.metas[wire.meta_subject("app", name)].payload)
        assert isinstance(fields, dict)
        assert isinstance(fields.setdefault("metadata", {}), dict)
    except (KeyError, ValueError, RecursionError, AssertionError):
        return {"metadata": {}}
    return fields


def signed(key: Signer, kind: Statement, data: bytes) -> dict[str, str]:
    return {SIGNATURES: encode_signatures([key.sign(statement_of(kind, data))])}


RECORDS = [*map(generation_name, (1, 2, 3)), keys_name(1)]
LINKS = [CHANNELS + HEAD, CHANNELS + "stable"]
STRANGE_NAMES = [
    *NAMES,
    *(generation_name(number) for number in (0, 4, 9_999_999_999)),
    "generations/x",
    "generations/00000000011",
    CHANNELS,
    CHANNELS + "new",
    CHANNELS + "\u202e\n",
    CHANNELS + "7",
    *map(keys_name, (2, 9_999_999_999)),
    "keys/x",
]


def spoil_payload(draw: Draw, scene: Scene, stream: Any) -> None:
    """A metadata message is not what it was."""
    subject = draw(st.sampled_from(sorted(stream.metas)))
    stream.metas[subject] = replace(stream.metas[subject], payload=draw(spoiled([stream.metas[subject].payload])))


def spoil_metadata(draw: Draw, scene: Scene, stream: Any) -> None:
    """Another value for one key of an object's metadata."""
    name = draw(st.sampled_from(RECORDS + LINKS))
    fields = fields_of(stream, name)
    keys = sorted({*fields["metadata"], MOVE, SIGNATURES, "syncd-kind", "syncd-publisher"})
    key = draw(st.sampled_from(keys))
    value = odd_text(draw, str(fields["metadata"].get(key, "")))
    fields["metadata"] = {
        **fields["metadata"],
        key: draw(st.sampled_from([value, value, value, None, 7, [], "\ud800"])),
    }
    stream.put_meta(wire.meta_subject("app", name), json.dumps(fields).encode(), None, {})


def spoil_link(draw: Draw, scene: Scene, stream: Any) -> None:
    """A channel leads elsewhere, with the move it had."""
    name = draw(st.sampled_from([*LINKS, *LINKS, CHANNELS + "new", "plain"]))
    target = draw(
        st.sampled_from([*RECORDS, generation_name(9_999_999_999), generation_name(0), CHANNELS + HEAD, None])
    )
    metadata = {key: value for key, value in fields_of(stream, name)["metadata"].items() if isinstance(value, str)}
    try:
        link(stream, name, Link(draw(st.sampled_from(["app", "app", "app", "other"])), target), metadata)
    except StoreRejected:
        return


def spoil_record(draw: Draw, scene: Scene, stream: Any) -> None:
    """Another record under its name, perhaps with the signature of a stolen key."""
    name = draw(st.sampled_from([*RECORDS, generation_name(4), keys_name(2), generation_name(9_999_999_999)]))
    honest = scene_record(stream, name if name in RECORDS else generation_name(3))
    data = honest
    if draw(st.booleans()):
        data = draw(spoiled([honest]))
    else:
        try:
            record = decode_record(honest)
            number = draw(st.sampled_from([1, 3, 4, 9_999_999_999]))
            publisher = draw(st.sampled_from(["here:/source", "\u202e\x1b[2J", "", "x" * 30_000]))
            root = draw(st.sampled_from([record.root, odd_root(draw, record.root)]))
            sizes: Any = {"files": draw(st.sampled_from([0, 2, (1 << 53) - 1])), "size": draw(st.sampled_from([0, 9]))}
            allowed = draw(st.booleans())
            data = encode_record(
                replace(record, number=number, publisher=publisher, root=root, allowed=allowed, **sizes)
            )
        except (SyncdError, ValueError):
            pass
    kind = Statement.KEYS if name.startswith("keys/") else Statement.GENERATION
    metadata = {key: str(value) for key, value in fields_of(stream, name)["metadata"].items()}
    metadata.setdefault("syncd-kind", "keys" if kind is Statement.KEYS else "generation")
    if draw(st.booleans()):
        metadata |= signed(scene.signer, kind, data)
    try:
        announce(stream, name, data, metadata)
    except StoreRejected:
        return
    if draw(st.booleans()) and kind is Statement.GENERATION:
        move_to(draw, scene, stream, name, digest_of(data))


def scene_record(stream: Any, name: str) -> bytes:
    """The bytes of an honest record, as far as they are still there."""
    nuid = fields_of(stream, name).get("nuid", "")
    messages = stream.chunks.get(nuid) if isinstance(nuid, str) else None
    return messages[0].payload if messages else b"{}"


def odd_root(draw: Draw, root: NodeRef) -> NodeRef:
    where = draw(st.sampled_from([Where.BLOB, Where.RECIPE, Where.PACK]))
    length = draw(st.sampled_from([root.length, 13, 600_000, *NUMBERS]))
    return NodeRef(root.tree, Location(where, root.location.blob, draw(st.sampled_from([0, 1, 1 << 31]))), length)


def move_to(draw: Draw, scene: Scene, stream: Any, name: str, record: str) -> None:
    """The head's link leads to it, with a move that is signed or not."""
    counts = st.sampled_from([1, 4, 5, 6, 1 << 40, (1 << 53) - 1])
    times = st.sampled_from(["2026-11-21T02:02:45Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z"])
    number = int(name.rpartition("/")[2]) or 1
    who = draw(st.sampled_from(["me", "\u202e", "x" * 200]))
    expires = draw(st.sampled_from(["", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z"]))
    move = Move("app", HEAD, draw(counts), number, record, draw(times), who, "why", expires)
    data = _move_bytes(move)  # also such as nobody honest would write
    metadata = {MOVE: data.decode()}
    if draw(st.booleans()):
        metadata |= signed(scene.signer, Statement.MOVE, data)
    link(stream, CHANNELS + HEAD, Link("app", name), metadata)


def spoil_move(draw: Draw, scene: Scene, stream: Any) -> None:
    """The head's own move, made anew."""
    move_to(draw, scene, stream, draw(st.sampled_from(RECORDS[:3])), digest_of(scene_record(stream, RECORDS[2])))


def commit(draw: Draw, scene: Scene, stream: Any, key: Signer | None) -> None:
    """A whole generation of somebody else's, with the head moved to it."""
    builder = Builder(Forge())
    root = builder.directory("", {"d": folder({"f": file("evil")}), "evil": file("evil")})
    for digest, data in builder.blobs.items():
        stream.chunks[digest] = [stream.store(Codec().encode(data))]
    number = draw(st.sampled_from([3, 4, 5]))
    sizes: Any = {"files": builder.files, "size": builder.size}
    record = encode_record(Generation("app", number, root, "2026-11-21T02:02:45Z", "here:/source", **sizes))
    count = draw(st.sampled_from([4, 5, 1 << 40]))
    move = encode_move(Move("app", HEAD, count, number, digest_of(record), "2026-11-21T02:02:45Z"))
    said, metadata = {KIND: GENERATION}, {MOVE: move.decode()}
    if key is not None:
        said |= signed(key, Statement.GENERATION, record)
        metadata |= signed(key, Statement.MOVE, move)
    announce(stream, generation_name(number), record, said)
    link(stream, CHANNELS + HEAD, Link("app", generation_name(number)), metadata)


def spoil_commit(draw: Draw, scene: Scene, stream: Any) -> None:
    """Unsigned, or signed by a key that nobody trusts."""
    commit(draw, scene, stream, draw(st.sampled_from([None, scene.stranger])))


def steal_commit(draw: Draw, scene: Scene, stream: Any) -> None:
    """Signed by a key that everybody trusts."""
    commit(draw, scene, stream, scene.signer)


def spoil_chunk(draw: Draw, scene: Scene, stream: Any) -> None:
    """A blob or a record is gone, doubled, or other bytes."""
    name = draw(st.sampled_from(sorted(stream.chunks)))
    payload = stream.chunks[name][0].payload
    message = replace(stream.chunks[name][0], payload=draw(spoiled([payload[:100_000]])))
    stream.chunks[name] = draw(st.sampled_from([[message], [message, message], [message, *stream.chunks[name]], []]))
    if not stream.chunks[name]:
        del stream.chunks[name]


def spoil_name(draw: Draw, scene: Scene, stream: Any) -> None:
    """An object that nobody expects, or nobody expects there."""
    name = draw(st.sampled_from(STRANGE_NAMES))
    payload = draw(st.sampled_from(messages_of(name, "app")) | spoiled(messages_of(name, "app")))
    stream.put_meta(wire.meta_subject("app", name), payload, None, {})


def spoil_head(draw: Draw, scene: Scene, stream: Any) -> None:
    """A channel, generation or key set is deleted, with or without a tombstone."""
    name = draw(st.sampled_from([*LINKS, *LINKS, *RECORDS]))
    subject = wire.meta_subject("app", name)
    if draw(st.booleans()):
        stream.metas.pop(subject, None)
        return
    metadata = {MOVE: odd_text(draw)[:1000]} if draw(st.booleans()) else {}
    stream.put_meta(subject, wire.encode_tombstone("app", name, nuid="n", metadata=metadata), None, {})


WAYS = [
    spoil_payload,
    spoil_metadata,
    spoil_link,
    spoil_record,
    spoil_move,
    spoil_chunk,
    spoil_name,
    spoil_head,
    spoil_commit,
    steal_commit,
]
KEYLESS = [spoil_payload, spoil_metadata, spoil_link, spoil_chunk, spoil_name, spoil_head, spoil_commit]
"""What takes no key."""


def spoil(data: st.DataObject, scene: Scene, ways: list[Any] = WAYS, first: Any = None) -> MemoryStore:
    """A copy of the honest bucket in which something is not as it was.

    :param first: the way in which it is spoiled at any rate: so few examples would leave some out.
    """
    store = scene.store()
    chosen = [first] if first is not None else [data.draw(st.sampled_from(ways))]
    chosen += [data.draw(st.sampled_from(ways)) for _ in range(data.draw(st.integers(0, 2)))]
    for way in chosen:
        way(cast("Draw", data.draw), scene, store.stream("app"))
    return store


def name_of(way: Any) -> str:
    return str(way.__name__)


# -- those who read ----------------------------------------------------------------------------------------------------


class Counted:
    """Takes what is written, and counts it."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)


async def read_log(store: MemoryStore, scene: Scene) -> None:
    history = await History.open(store.bucket("app"))
    shown([one.to_json() for one in await history.log()])


async def read_tree(store: MemoryStore, scene: Scene, which: str | int = HEAD) -> None:
    history = History(store.bucket("app"))
    count = 0
    async for path, _ in history.entries(which):
        assert check_path(path) == path
        count += 1
        assert count < 100, "a tree without end"


async def read_difference(store: MemoryStore, scene: Scene) -> None:
    sides: list[str] = []
    async for change in History(store.bucket("app")).differences(
        1, "stable", lambda *both: sides.extend(map(str, both))
    ):
        shown([change.path, change.mark.name])
    shown(sides)


async def read_content(store: MemoryStore, scene: Scene) -> None:
    await History(store.bucket("app")).save("d/f", Counted(), 3)


async def read_channels(store: MemoryStore, scene: Scene) -> None:
    shown([asdict(one) for one in await Channels(store.bucket("app"), time.time).show()])


async def read_counts(store: MemoryStore, scene: Scene) -> None:
    """The count and the term of the next move, whatever the present one says."""
    async for page in store.bucket("app").changes(0):
        for item in page.items:
            if isinstance(item, BadMeta):
                continue
            assert channels.term_of(item) >= 0.0
            assert is_history(item) in {True, False}
            try:
                assert 0 < channels.next_count(item, folder="app", channel=HEAD) < 1 << 53
            except (ObjectCorrupt, FormatTooNew) as error:
                shown(str(error))


def moving(action: Callable[[Channels], Coroutine[Any, Any, Any]]) -> Any:
    async def move(store: MemoryStore, scene: Scene) -> None:
        await action(Channels(store.bucket("app"), time.time))

    return move


async def read_generation(store: MemoryStore, scene: Scene) -> None:
    record = await read_record(store.bucket("app"), 3)
    if record is not None:
        assert (record.generation.folder, record.generation.number) == ("app", 3)
        shown(record.signers)
    await generation_to_sign(store.bucket("app"), 2)


async def read_key_sets(store: MemoryStore, scene: Scene) -> None:
    """None leads anywhere that a key of the configuration has not signed."""
    sets = KeySets(store.bucket("app"), time.time)
    found = await sets.show(scene.trust)
    shown([asdict(one) for one in found])
    assert len(await read_keys(store.bucket("app"))) == len(found)
    assert (await sets.trusted(scene.trust)).version <= len(found)


async def sign_key_set(store: MemoryStore, scene: Scene) -> None:
    sets = KeySets(store.bucket("app"), time.time)
    one = await sets.to_sign(1)
    shown(one.signers)
    await sets.change(scene.trust, KeyChange(drop=(scene.other.public,)), [scene.signer])


async def collect(store: MemoryStore, scene: Scene) -> None:
    """What channels point at stays, wherever they point by then."""
    before, _ = await history_of(store)
    await scene.publisher(store, None).collect()
    after, pointed = await history_of(store)
    assert before & pointed <= after


async def history_of(store: MemoryStore) -> tuple[set[str], set[str]]:
    """Names of the generations that are there, and of those that channels point at."""
    names: set[str] = set()
    pointed: set[str] = set()
    async for page in store.bucket("app").changes(0):
        for item in page.items:
            if isinstance(item, BadMeta) or item.deleted:
                continue
            if item.link is None and number_of(item.name):
                names.add(item.name)
            elif item.link is not None and item.name.startswith(CHANNELS) and item.link.bucket == "app":
                pointed.add(item.link.name or "")
    return names, pointed


async def leave_generations(store: MemoryStore, scene: Scene) -> None:
    async def freeing(_: Any) -> None:
        await asyncio.sleep(0)

    await drop_generations(store.bucket("app"), freeing)
    await drop_objects(store.bucket("app"))


READERS: dict[str, Callable[[MemoryStore, Scene], Coroutine[Any, Any, None]]] = {
    "log": read_log,
    "tree": read_tree,
    "difference": read_difference,
    "content": read_content,
    "channels": read_channels,
    "counts": read_counts,
    "generation": read_generation,
    "key sets": read_key_sets,
    "to sign": moving(lambda them: them.to_sign(HEAD)),
    "promote": moving(lambda them: them.promote(3, "stable", who="me")),
    "rollback": moving(lambda them: them.rollback(HEAD, who="me")),
    "remove": moving(lambda them: them.remove("stable")),
    "sign key set": sign_key_set,
    "collect": collect,
    "another layout": leave_generations,
}


@pytest.mark.fault("O1 O5 K10")
@fuzz(60)
@given(data=st.data())
def test_any_bucket_is_read_by_every_command_or_refused(scene: Scene, data: st.DataObject) -> None:
    """A signed bucket is spoiled up to three times: messages, links, records, moves, blobs, whole forged commits.

    All that reads, moves, signs or collects is done or ends with an error of ours, in bounded time.
    """
    store = spoil(data, scene)
    for read in READERS.values():
        survives(lambda read=read: read(store, scene))  # type: ignore[misc]


@pytest.mark.fault("O1 K10")
@fuzz(300)
@given(data=st.data(), number=st.sampled_from([0, 2, 3, 9]), deleted=st.booleans())
def test_any_words_of_a_link_or_generation_are_shown_and_counted(
    scene: Scene, data: st.DataObject, number: int, deleted: bool
) -> None:
    """Moves, signatures and other metadata of a link or generation are replaced by odd or spoiled texts.

    What people are shown can be written down, and counts and terms stay in range.
    """
    stream, draw = scene.store().stream("app"), cast("Draw", data.draw)
    words = fields_of(stream, data.draw(st.sampled_from(LINKS + RECORDS)))["metadata"]
    for key in data.draw(st.lists(st.sampled_from(sorted({*words, MOVE, SIGNATURES})), min_size=1, max_size=3)):
        words = {**words, key: odd_text(draw, str(words.get(key, "")))}
    link = Link("app", generation_name(number))
    info = ObjectInfo("app", CHANNELS + HEAD, "n", 0, 0, "", deleted, 1, 7, metadata=words, link=link)
    bucket: Any = SimpleNamespace(name="app")
    shown(asdict(channels._state(bucket, info, {2, 3})))
    assert 0.0 <= channels.term_of(info) <= channels.MAX_TERM
    found = bounded(lambda: channels.next_count(info, folder="app", channel=HEAD), (ObjectCorrupt, FormatTooNew))
    assert found is None or 0 < found < 1 << 53
    summary = _summary(number, info, ["head"])
    shown(summary.to_json())
    assert all(
        one is None or 0 <= one < 10**20 for one in (summary.files, summary.bytes, summary.added, summary.removed)
    )
    record = scene_record(stream, generation_name(3))
    texts = [words.get(key, "") for key in (SIGNATURES, MOVE, SIGNATURES)]
    shown(str(History(bucket)._side(HEAD, Commit(decode_record(record), digest_of(record), 7, record, *texts))))


def test_the_honest_bucket_is_read_by_all_of_them(scene: Scene) -> None:
    """So what is refused is refused for what was done to it."""
    for name, read in READERS.items():
        if name != "sign key set":  # the second one waits for nobody
            asyncio.run(read(scene.store(), scene))


# -- the publisher -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "PUSH_RETRIES", 1)
    monkeypatch.setattr(publisher, "backoff", lambda *_: itertools.repeat(0.0))


async def published(store: MemoryStore) -> dict[str, str]:
    return {
        path: child.entry.digest
        async for path, child in History(store.bucket("app")).entries(HEAD)
        if child.entry.kind is Kind.FILE
    }


def push_once(scene: Scene, store: MemoryStore, *, remembers: bool) -> Any:
    """A publisher, with its index or without; what it says that it committed is the source."""
    place = scene.place()
    index = Path(shutil.copy(scene.index, place / "publish.db")) if remembers else None
    try:
        done = survives(lambda: scene.publisher(store, index).push(allow_delete=True))
        if done is not None and not done.problems and not done.again:
            wanted = {path: digest_of(data) for path, data in contents(scene.source).items()}
            assert asyncio.run(published(store)) == wanted
    finally:
        shutil.rmtree(place)
    return done


@pytest.mark.fault("O1 O5 K1 K10")
@pytest.mark.usefixtures("hasty")
@fuzz(60)
@given(data=st.data(), remembers=st.booleans())
def test_a_publisher_survives_any_bucket(scene: Scene, data: st.DataObject, remembers: bool) -> None:
    """A signed bucket is spoiled, also with a stolen key; a publisher with its index or without pushes to it.

    It ends with an error of ours, or what it commits is the source, whole.
    """
    push_once(scene, spoil(data, scene), remembers=remembers)


@pytest.mark.usefixtures("hasty")
def test_a_publisher_goes_on_from_the_honest_bucket(scene: Scene) -> None:
    for remembers in (True, False):
        assert push_once(scene, scene.store(), remembers=remembers).generation == 4


@pytest.mark.fault("O5")
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("how", ["name", "record"])
def test_no_number_is_left_after_the_highest(scene: Scene, how: str, remembers: bool) -> None:
    """A forged generation of the last number is put there, as a name or as a whole record, and a publisher pushes.

    It says that no number is left, and commits nothing: all that the bucket announces is as it was.
    """
    store = scene.store()
    stream = store.stream("app")
    last = generation_name(9_999_999_999)
    record = replace(decode_record(scene_record(stream, generation_name(3))), number=9_999_999_999)
    data = encode_record(record) if how == "record" else b"x"
    announce(stream, last, data, signed(scene.signer, Statement.GENERATION, data))
    if how == "record":
        link(stream, CHANNELS + HEAD, Link("app", last), {})
    else:
        stream.metas.pop(wire.meta_subject("app", CHANNELS + HEAD))
    before = dict(stream.metas)
    place = scene.place()
    index = Path(shutil.copy(scene.index, place / "publish.db")) if remembers else None
    with pytest.raises(ObjectCorrupt, match="has a generation 9999999999, and no number is left after it"):
        asyncio.run(scene.publisher(store, index).push(allow_delete=True))
    shutil.rmtree(place)
    assert stream.metas == before


# -- subscribers -------------------------------------------------------------------------------------------------------


def pull_twice(scene: Scene, store: MemoryStore, trust: Trust | None) -> dict[str, bytes]:
    """A new host, and its next round; return what it has then."""
    place = scene.place()
    try:
        for _ in range(2):
            survives(lambda: scene.subscriber(store, place / "mirror", trust).pull())
        assert {path.name for path in place.iterdir()} <= {"mirror", "state"}
        return contents(place / "mirror") if (place / "mirror").exists() else {}
    finally:
        shutil.rmtree(place)


async def trees_of(store: MemoryStore, trust: Trust | None) -> list[dict[str, str]]:
    """What a mirror may have: nothing, or one generation of the bucket that can be read, and is signed if it checks."""
    trees: list[dict[str, str]] = [{}]
    history = History(store.bucket("app"))
    for number in map(number_of, (await history_of(store))[0]):
        try:
            record = await read_record(store.bucket("app"), number)
            if record is None or not (trust is None or trust.keys.intersection(record.signers)):
                continue
            files = {path: one.entry async for path, one in history.entries(number) if one.entry.kind is Kind.FILE}
            trees.append({path: entry.digest for path, entry in files.items()})
        except SyncdError:
            continue
    return trees


@pytest.mark.fault("O1 O5 K1 K2 K5 K10")
@pytest.mark.parametrize("way", KEYLESS, ids=name_of)
@fuzz(6)
@given(data=st.data())
def test_no_keyless_change_gets_into_a_mirror_that_checks(scene: Scene, way: Any, data: st.DataObject) -> None:
    """A signed bucket is spoiled by all that takes no key: messages, links, blobs, names, deletes, forged commits.

    After two pulls a mirror that checks has nothing, or one of the signed generations, whole.
    """
    assert pull_twice(scene, spoil(data, scene, KEYLESS, way), scene.trust) in scene.trees


@pytest.mark.fault("O1 O5 K10")
@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=name_of)
@fuzz(2)
@given(data=st.data())
def test_a_subscriber_survives_any_bucket(scene: Scene, way: Any, checks: bool, data: st.DataObject) -> None:
    """A signed bucket is spoiled, with a stolen key or without; a mirror that checks or does not pulls twice.

    Each pull is done or ends with an error of ours, in bounded time. The mirror then has nothing or one generation
    of the bucket, whole, and one that a trusted key has signed where it checks; beside the mirror there is nothing.
    """
    store, trust = spoil(data, scene, first=way), scene.trust if checks else None
    found = pull_twice(scene, store, trust)
    assert {path: digest_of(data) for path, data in found.items()} in asyncio.run(trees_of(store, trust))


def test_a_subscriber_takes_the_honest_bucket(scene: Scene) -> None:
    assert pull_twice(scene, scene.store(), scene.trust) == scene.trees[3]


PARENTS = ["", "d", "d/e", "\u202e", "x" * 255, "/".join(["y" * 250] * 16), ".syncd-not", "a\nb"]


@pytest.mark.fault("O1 O5 P1 P2")
@fuzz(400)
@given(
    raw=spoiled(stored("nodes")) | st.sampled_from(stored("nodes")),
    off=st.integers(0, 40),
    parent=st.sampled_from(PARENTS),
    files=st.sampled_from([0, 1, 5, 1 << 53]),
    size=st.sampled_from([0, 10, 1 << 53]),
    policy=st.sampled_from([ModePolicy(), ModePolicy(read_only=True)]),
)
def test_any_children_are_paths_of_that_directory_or_refused(
    raw: bytes, off: int, parent: str, files: int, size: int, policy: ModePolicy
) -> None:
    """A node's bytes are spoiled and listed below odd, long and deep directories.

    Its children are safe paths there, no larger than the record says, or the node is refused.
    """
    walker: Any = SimpleNamespace(_rules=Rules(exclude=["*.swp"]), _modes=policy)
    raw = mend_node(raw, off)

    def read() -> list[Any]:
        node = Node(raw, digest_of(body_of(raw)))
        count = _Count(target_of(files, size))
        return list(Checkout._children(walker, parent, node, count))

    for child in bounded(read, (ObjectCorrupt, FormatTooNew)) or ():
        path = f"{parent}/{child.name}" if parent else child.name
        assert check_path(path) == path
        assert child.size <= size
        assert 0 <= child.mode <= 0o7777


def target_of(files: int, size: int) -> Target:
    return replace(_target(""), files=files, size=size)


@pytest.mark.fault("O1 O5 P1 P2 P6")
@fuzz(120)
@given(
    here=st.lists(stored_messages(), max_size=5),
    there=st.lists(st.sampled_from(sorted(MESSAGES)), max_size=3),
    to=st.sampled_from([None, None, None, "n", "a/b/c", "../x", "other", "link"]),
    bucket=st.sampled_from(["other", "other", "B", "missing"]),
    hinted=st.integers(0, 1 << 64),
)
def test_any_objects_and_links_are_rows_that_a_mirror_can_hold(
    here: list[Any], there: list[str], to: str | None, bucket: str, hinted: int
) -> None:
    """A bucket is filled with spoiled messages and a link to an object or bucket: present, foreign or missing.

    What gets into the index are safe paths, and the problems can be shown.
    """

    async def look() -> None:
        store = MemoryStore()
        for name in ("B", "other"):
            await store.create_bucket(name, BucketSpec(layout="objects"))
        for message in here:
            subject = (message.headers or {}).get("Nats-Subject", "")
            store.stream("B").put_meta(subject, message.data, None, {})
        for number, name in enumerate(there):
            payload = messages_of(name, "other")[number]
            store.stream("other").put_meta(wire.meta_subject("other", name), payload, None, {})
        now = time.time_ns()
        payload = wire.encode_link("B", "link", Link(bucket, to), nuid="n", now_ns=now)
        store.stream("B").put_meta(wire.meta_subject("B", "link"), payload, None, {})
        thread = FolderThread("fuzz")
        index = await thread.run(lambda: Index(None))
        announced = Announced(store, store.bucket("B"), index, Rules(exclude=["*.swp"]), thread, ModePolicy())
        try:
            for full in (True, False):
                state = await store.bucket("B").state()
                await announced.catch_up(state, full=full, hinted=hinted)
                for row in await thread.run(lambda: list(index.iter_remote())):
                    assert check_path(row.path) == row.path
                    assert row.bucket in {"B", "other"}
                shown([asdict(problem) for problem in announced.problems.all()])
        finally:
            await thread.close(index.close)

    survives(look)


# -- rules that come with a tree ---------------------------------------------------------------------------------------

PATTERNS = [
    "*a" * 40,
    "**/a/" * 30 + "b",
    "a**" * 30,
    "?*" * 40 + "x",
    "[" + "a-z" * 50 + "]" * 3,
    "[!" + "]" * 20,
    "[[:alpha:]]*[[:nope:]]",
    "[a-\\]",
    "\\" * 33,
    "!" * 40,
    "/" * 40,
    "**",
    "!**/",
    "*/" * 60,
    "a" * 5000,
    "(a+)+$",
    "{a,b}{c,d}",
    "a\\ ",
    "#x",
    "\ufeffx",
    "\x00",
    "\udcff",
]
HOSTILE_PATHS = [
    "a" * 250,
    "/".join("a" * 100),
    "/".join(["a"] * 300),
    "/".join(["a" * 60] * 60) + "/b",
    "x" * 250 + "!",
    "a\nb/c\r",
    ".syncdignore",
    "d/.syncd/x",
    "caf\u00e9/\u202e",
    "]",
    "\\",
]
patterns = st.sampled_from(PATTERNS) | st.text(st.sampled_from("a*?[]!\\/-^.: #"), max_size=60) | st.text(max_size=20)


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")  # of re, about sets that git reads in another way
@pytest.mark.fault("O5")
@fuzz(150)
@given(
    lines=st.lists(patterns, max_size=8),
    directory=st.sampled_from(["", "d", "a", "a/a"]),
    paths=st.lists(st.sampled_from(HOSTILE_PATHS) | st.text(max_size=40), min_size=1, max_size=3),
)
@example(lines=["*a" * 40 + "b"], directory="", paths=["a" * 250])
@example(lines=["**/a/" * 40 + "b"], directory="", paths=["/".join(["a"] * 200)])
@example(lines=["*"], directory="", paths=["/".join(["a"] * 2000)])
@example(lines=["?*" * 60 + "x"], directory="a", paths=["a/" + "y" * 250])
def test_any_ignore_file_is_asked_in_bounded_time(lines: list[str], directory: str, paths: list[str]) -> None:
    """A `.syncdignore` of hostile patterns (stars upon stars, broken sets) is asked about hostile paths.

    All its answers come within two seconds of processor time.
    """
    skipped: list[str] = []

    def ask() -> None:
        rules = Rules().with_ignore_file(directory, "\n".join(lines), skipped=skipped)
        for path in paths:
            for is_dir in (True, False):
                assert rules.takes(path, is_dir=is_dir) in {True, False}
            assert rules.may_descend(path) in {True, False}

    bounded(ask, ())
    assert len(skipped) <= sum(line.count("\n") + 1 for line in lines)


@pytest.mark.fault("O5")
def test_a_huge_ignore_file_is_read_in_bounded_time() -> None:
    """Ignore files of 20,000 lines, and of one line of 100,000 characters, are read and asked.

    Each is read, and answers, within two seconds of processor time.
    """
    for text in ("a*b\n" * 20_000, "*a" * 50_000, "[" * 100_000, "!" * 100_000, "a/" * 50_000):
        rules = bounded(lambda text=text: Rules().with_ignore_file("", text, skipped=[]), ())  # type: ignore[misc]
        bounded(lambda rules=rules: rules.takes("a" * 200, is_dir=False), ())  # type: ignore[misc]


# -- the claim, and hints ----------------------------------------------------------------------------------------------


@pytest.mark.fault("C5 O5")
@fuzz(100)
@given(
    holder=spoiled([b"here:/source", "caf\u00e9:/\u202e".encode()])
    | noise
    | st.sampled_from([b"", b"\xff", b"x" * 100_000]),
    headers=st.none() | st.dictionaries(st.just("Nats-Sequence"), header_texts),
    takes_over=st.booleans(),
)
def test_any_claim_is_somebody_elses_or_ours(holder: bytes, headers: dict[str, str] | None, takes_over: bool) -> None:
    """What a publisher finds as the holder of its folder is spoiled, made up, empty or 100,000 bytes long.

    It is the holder itself or is refused with an error of ours; a take-over always makes it the holder.
    """

    async def claim() -> None:
        bucket = reader_of("B")

        async def last(_: str) -> Any:
            return SimpleNamespace(data=holder, headers=headers)

        async def send(_subject: str, payload: bytes, sent: dict[str, str], **_: Any) -> int:
            assert payload == b"here:/source"
            json.dumps(sent)
            return 1

        bucket._stream = SimpleNamespace(last=last)  # type: ignore[assignment]
        bucket._transport = SimpleNamespace(send_and_wait=send)  # type: ignore[assignment]
        found = await bucket.claim("here:/source", take_over=takes_over)
        assert found == "here:/source" or not takes_over
        store = MemoryStore()
        await store.create_bucket("app", BucketSpec(layout="generations"))
        twin = store.bucket("app")
        twin.claim = lambda *_, **__: asyncio.sleep(0, found)  # type: ignore[method-assign]
        options = PublishOptions("app", Path("/"), Rules(), "here:/source")
        await Claim(options, store, twin).hold(Wish())
        assert found == "here:/source"

    survives(claim)


@pytest.mark.fault("N8")
@fuzz(300)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["$JS", "ACK", "7", "9" * 19, "1" * 400, "\u0663", "", "-1", "x"]), max_size=14).map(
        ".".join
    ),
    st.none() | st.dictionaries(st.sampled_from(["Nats-Sequence", "Status"]), header_texts, max_size=2),
)
def test_any_hint_names_a_sequence_or_none(reply: str, headers: dict[str, str] | None) -> None:
    """Reply subjects and headers of notifications are made of odd texts, and of huge and negative numbers.

    What is read of them is a whole number from 0 on, below 10^20.
    """
    for seq in (consumer_seq(reply), header_int(headers or {}, "Nats-Sequence")):
        assert type(seq) is int
        assert 0 <= seq < 10**20


@pytest.mark.fault("O5")
@fuzz(150)
@given(spoiled([b'{"error":{"code":503,"err_code":10039,"description":"x"}}', b'{"memory":0}']) | noise)
@example(b'{"error":{"err_code":[]}}')
@example(b"[" * 3000)
@example(b'{"error":7}')
def test_any_account_information_is_read_or_an_error_of_ours(payload: bytes) -> None:
    """The server's answer about JetStream, when a publisher begins, is spoiled, made up or nested 3,000 deep.

    It is read, or is an error of ours.
    """

    async def ask() -> None:
        async def request(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(data=payload)

        async def version() -> tuple[int, int, int]:
            return (2, 12, 1)

        conn: Any = SimpleNamespace(request=request, server_version=version, host="h", api="$JS.API")
        await connection.require_jetstream(conn)

    survives(ask)


# -- what a host remembers, damaged ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noted(scene: Scene) -> list[bytes]:
    """An honest trust note, and the one that was written after it."""
    place, texts = scene.place(), []
    note = TrustNote(place / TRUST_FILE)
    for highest in (2, 3):
        seen = replace(Seen(), highest=highest, record=str(highest) * 64, signed_by=("U",))
        note.save(scene.trust, {HEAD: Seen(), "stable": seen})
        texts.append((place / TRUST_FILE).read_bytes())
    shutil.rmtree(place)
    return texts


def word_of(raw: bytes, errors: str = "strict") -> Any:
    """What a trust note says, and how often it was written; ``None``: it cannot be read."""
    try:
        return _noted(raw.decode("utf-8", errors))
    except ValueError:
        return None


@pytest.mark.fault("K10 K11")
@fuzz(150)
@given(data=st.data())
def test_any_trust_note_is_what_was_seen_or_stops_the_host(
    scene: Scene, noted: list[bytes], data: st.DataObject
) -> None:
    """The trust note's file and its copy in the index are each old, spoiled, emptied or made up, or there is no file.

    What is read is what the later one says of those that can be read, whole. The host stops with Untrusted where the
    file is damaged, or is missing and the copy is damaged, or where both were written at once and differ.
    """
    place = scene.place()
    texts = st.sampled_from([*noted, b"", b"[" * 3000]) | spoiled(noted) | noise
    file, copied, there = data.draw(texts), data.draw(texts), data.draw(st.integers(0, 4)) > 0
    if there:
        (place / TRUST_FILE).write_bytes(file)
    index = Index(None)
    index.set_note("trust", copied.decode("utf-8", "replace"))
    try:
        found = bounded(TrustNote(place / TRUST_FILE, index).load, (Untrusted, DiskProblem))
    finally:
        index.close()
        shutil.rmtree(place)
    words = [word_of(file)] if there else [word_of(copied, "replace")] if copied else []
    if None in words:
        assert found is None
        return
    if there:
        words += [one for one in [word_of(copied, "replace")] if one is not None]
    if len(words) == 2 and words[0].step == words[1].step and words[0] != words[1]:
        assert found is None
        return
    said = max(words, key=lambda one: one.step) if words else None
    assert found == ((None, {}) if said is None else (said.trust, said.seen))


BAD_DISK = [flip, cut, swap, lie, double, splice]
"""What no hostile bucket gets to: nobody nests anything there."""
NOTES: dict[str, list[Any]] = {
    STANDING: [asdict(standing._State(3, "r" * 64, "t", 2, "g" * 64, refused={"x": "why"}))],
    TARGET: [asdict(replace(_target(""), number=3, record="r" * 64))],
    APPLIED: [{"number": 3, "record": "r" * 64, "root": "t" * 64, "exact": True, "rules": ""}],
    BEHIND: [1.5, "nan", "inf", -1],
}
NOTE_TOKENS = [b"{}", b"[]", b"7", b"null", b'"x"']


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout_module, "STALE_TRIES", ())  # no replica will catch up here


@pytest.mark.fault("C6")
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", NOTES)
@fuzz(25)
@given(data=st.data())
def test_any_note_of_an_index_is_read_or_forgotten(scene: Scene, name: str, data: st.DataObject) -> None:
    """A note in a mirror's index is another one's, spoiled as by a bad disk, or made up; an honest bucket is pulled.

    The pull is done or ends with an error of ours, and the honest generation arrives.
    """
    honest = [json.dumps(one).encode() for one in NOTES[name]]
    texts = st.sampled_from(honest + NOTE_TOKENS) | spoiled(honest, [*BAD_DISK, retype, nest]) | noise
    text = data.draw(texts).decode("utf-8", "replace")
    place = scene.place()
    subscriber = scene.subscriber(scene.store(), place / "mirror", None)
    index = Index(place / "state/index.db")
    index.set_note(name, text)
    index.close()
    try:
        survives(subscriber.pull)
        assert contents(place / "mirror") == scene.trees[3]
    finally:
        shutil.rmtree(place)


@pytest.mark.fault("K10 K11")
@fuzz(150)
@given(data=st.data())
def test_any_kept_record_is_trusted_or_not(scene: Scene, data: st.DataObject) -> None:
    """The record that is noted of a release here is spoiled as by a bad disk, or made up.

    Only the very bytes that a key of today has signed are trusted.
    """
    stream = scene.store().stream("app")
    record = scene_record(stream, generation_name(2))
    text = fields_of(stream, generation_name(2))["metadata"][SIGNATURES]
    honest = json.dumps({"record": record.decode(), "signatures": text}).encode()
    raw = data.draw(st.just(honest) | spoiled([honest], BAD_DISK) | st.sampled_from(NOTE_TOKENS) | noise)

    async def judge_kept(kept: bytes, signatures: str) -> None:
        check_signed(scene.trust, Statement.GENERATION, kept, signatures)
        assert (kept, signatures) == (record, text)

    checkout: Any = SimpleNamespace(
        _guard=SimpleNamespace(active=True, judge_kept=judge_kept), _standing=SimpleNamespace(at=(2, digest_of(record)))
    )
    found = bounded(lambda: asyncio.run(Checkout.trusts(checkout, raw.decode("utf-8", "replace"))), ())
    assert found in {True, False}
    assert found or raw != honest


@fuzz(200)
@given(st.binary(max_size=40) | spoiled([b"17\n", b'{"folder":"app"}'], BAD_DISK))
@example("\u0663".encode())
@example(b"9" * 10)
def test_any_file_of_a_person_is_a_pin_an_allowance_or_nothing(scene: Scene, data: bytes) -> None:
    """Files that people write, and the daemon's own: what is none of these means nothing."""
    place = scene.place()
    state = StateDir(place)
    (place / "status").mkdir()
    for name in ("pin", "allow", "status/app.json", "status/daemon.json"):
        (place / name).write_bytes(data)
    try:
        assert 0 <= (bounded(Pin(place / "pin").number, (DiskProblem,)) or 0) < 10**10
        assert FileAllowance(place / "allow").given()
        state.read_status()
    finally:
        shutil.rmtree(place)


LOCAL: dict[str, tuple[Callable[[bytes], Any], tuple[type[Exception], ...], list[bytes]]] = {
    "journal": (
        journal.decode,
        (journal.TornJournalError, journal.ForeignJournalError),
        [b'{"syncd_journal":3,"drift":"repair","steps":0}\n{"blake3":""}\n'],
    ),
    "expected drift": (
        lambda raw: _read_note(raw.decode("utf-8", "replace")),
        (),
        [b'[["a",null],["b",["file",420,1,2,"","",""]]]'],
    ),
    "expected drift, odd": (lambda raw: _read_note(raw.decode("utf-8", "replace")), (), NOTE_TOKENS),
}


@pytest.mark.fault("C6")
@pytest.mark.parametrize("name", LOCAL)
@fuzz(100)
@given(data=st.data())
def test_what_syncd_wrote_itself_is_read_or_set_aside(name: str, data: st.DataObject) -> None:
    """A journal or a note of expected drift is spoiled as by a bad disk, or made up.

    It is read or refused by the journal's own errors, in bounded time.
    """
    read, errors, honest = LOCAL[name]
    raw = data.draw(spoiled(honest, BAD_DISK) | st.sampled_from(honest) | noise)
    bounded(lambda: read(raw), errors)


# -- every decoder -----------------------------------------------------------------------------------------------------

OWN = "own: "
"""Bytes of whoever runs syncd, or of syncd itself where nobody else writes: why nothing hostile gets there."""
FORMS = "test_fuzz:test_any_bytes_are_refused_or_have_one_form"
ANSWERS = "test_fuzz:test_any_answer_of_the_server_is_read_or_an_error_of_ours"
MESSAGE = "test_fuzz:test_any_message_is_an_object_or_bad_metadata"
NOTE = "test_fuzz_bucket:test_any_note_of_an_index_is_read_or_forgotten"
TRUST = "test_fuzz_bucket:test_any_trust_note_is_what_was_seen_or_stops_the_host"
CONFIG = OWN + "the configuration, by who runs syncd"
DECODERS = {
    "checkout:Checkout.trusts": "test_fuzz_bucket:test_any_kept_record_is_trusted_or_not",
    "checkout:_noted": NOTE,
    "drift:_read_note": "test_fuzz_bucket:test_what_syncd_wrote_itself_is_read_or_set_aside",
    "embedded:EmbeddedServer._occupant": OWN + "the greeting of whatever listens on this host",
    "embedded:EmbeddedServer._ports": OWN + "a file of our own child",
    "guard:TrustNote.save": OWN + "what to_json has written the line before",
    "guard:_noted": TRUST,
    "index.blobs:Blobs.strays_since": OWN + "a note of the index, which is ours",
    "index.checkout:CheckoutTables.adopted": OWN + "a temporary table of this process",
    "mirror.journal:decode": "test_fuzz_bucket:test_what_syncd_wrote_itself_is_read_or_set_aside",
    "nodes:Node.__init__": FORMS,
    "nodes:Node._rows": FORMS,
    "nodes:NodeWriter.finish": OWN + "places that were packed by the same object",
    "nodes:_Places._location": FORMS,
    "nodes:_Places.of_directory": FORMS,
    "nodes:decode_recipe": FORMS,
    "nodes:decode_record": FORMS,
    "oneshot:_applied": OWN + "a note of the index, which is ours; any damage is no generation",
    "paths:object_name": MESSAGE,
    "rollout:Rollout._kept": OWN + "a file of ours beside the index",
    "settings:_from_text": CONFIG,
    "settings:_parse": CONFIG,
    "signatures:_bytes_of": FORMS,
    "signatures:decode_signatures": FORMS,
    "standing:_read": NOTE,
    "statedir:_read_json": "test_fuzz_bucket:test_any_file_of_a_person_is_a_pin_an_allowance_or_nothing",
    "store.api:Api._ask": ANSWERS,
    "store.api:read_json": ANSWERS,
    "store.base:digest_to_hex": MESSAGE,
    "store.client:OneClient.unsent": OWN + "a number of the kernel's",
    "store.connection:require_jetstream": ("test_fuzz_bucket:test_any_account_information_is_read_or_an_error_of_ours"),
    "store.hints:NatsHints._make_consumer": ANSWERS,
    "store.transport:Transport._is_gone": ANSWERS,
    "store.transport:Transport._on_ack": "test_fuzz:test_any_acknowledgement_ends_the_wait_for_it",
    "store.wire:_parse_object": MESSAGE,
    "store.wire:_token_bytes": MESSAGE,
    "tomllines:_Scanner.key": CONFIG,
    "trust:_Fields.__init__": FORMS,
    "trust:_Note.__init__": TRUST,
}
"""Function -> the test in which it meets hostile bytes."""
SIGNS_OF_A_DECODER = {"loads", "unpack", "unpack_from", "iter_unpack", "b64decode", "urlsafe_b64decode", "read_json"}
SOURCE = Path(__file__).parents[2] / "syncd"


def decoders() -> set[str]:
    """Every function of the program that takes bytes apart, as ``module:function``."""
    return {found for file in SOURCE.rglob("*.py") for found in _decoding(file)}


def _decoding(file: Path) -> Iterator[str]:
    module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)

    def visit(node: ast.AST, inside: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = (*inside, node.name)
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in SIGNS_OF_A_DECODER:
            yield f"{module}:{'.'.join(inside)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(file.read_text()), ())


def test_every_decoder_is_fuzzed_or_reads_what_is_ours() -> None:
    """A function that takes bytes apart and is not in the table: add it, with the test that gets there."""
    assert decoders() - DECODERS.keys() == set()


def test_the_table_of_decoders_names_what_there_is() -> None:
    """Functions that are gone leave the table; its tests exist, and draw their input."""
    assert DECODERS.keys() - decoders() == set()
    for where in DECODERS.values():
        if not where.startswith(OWN):
            module, _, test = where.partition(":")
            assert hasattr(getattr(importlib.import_module(f"tests.unit.{module}"), test), "hypothesis")


@pytest.mark.fault("C6")
@pytest.mark.parametrize("fields", [{"highest": ""}, {"highest": None}, {"rules": []}, {"number": "3"}])
def test_a_target_of_other_types_is_forgotten(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A mirror's note of its target has a field of another type; an honest bucket is pulled."""
    scene = Scene(tmp_path)
    place = scene.place()
    subscriber = scene.subscriber(scene.store(), place / "mirror", None)
    index = Index(place / "state/index.db")
    index.set_note(TARGET, json.dumps(asdict(replace(_target(""), number=3, record="r" * 64)) | fields))
    index.close()
    survives(subscriber.pull)
    assert contents(place / "mirror") == scene.trees[3]


@pytest.mark.fault("C6")
@pytest.mark.parametrize("fields", [{"number": "3"}, {"exact": "x"}, {"rules": 7}])
def test_what_is_applied_of_other_types_is_forgotten(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A mirror's note of what it has, with a field of another type; an honest bucket is pulled."""
    scene = Scene(tmp_path)
    place = scene.place()
    subscriber = scene.subscriber(scene.store(), place / "mirror", None)
    index = Index(place / "state/index.db")
    note = {"number": 3, "record": "r" * 64, "root": "t" * 64, "exact": True, "rules": ""}
    index.set_note(APPLIED, json.dumps(note | fields))
    index.close()
    survives(subscriber.pull)
    assert contents(place / "mirror") == scene.trees[3]
