"""Signatures from the publisher to the mirror: every attack goes through a real bucket (on the memory twin)."""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from syncd.channels import Channels
from syncd.errors import DiskProblem, ObjectCorrupt, Unavailable, Untrusted
from syncd.guard import Guard, TrustNote, _version_of
from syncd.index import Index
from syncd.keysets import KeyChange, KeySets
from syncd.moves import move_metadata, read_move
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.service import FolderThread
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import CHANNELS, GENERATIONS, HEAD, Link
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.subscriber import TRUST_FILE, SubscribeOptions, Subscriber
from syncd.trees import TreeReader, generation_name
from syncd.trust import MOVE, SIGNATURES, Seen, Trust, keys_name
from tests.support.signing import sign_generation, sign_move

if TYPE_CHECKING:
    from syncd.upstream import PullResult

HOUR = 3600.0


class Fleet:
    """A publisher with a key, a host that trusts it, and a bucket that anybody may write to."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.bucket = self.store.bucket("app")
        self.source = tmp / "source"
        self.source.mkdir()
        self.mirror = tmp / "mirror"
        self.signer = Signer(generate()[0])
        self.other = Signer(generate()[0])
        self.trust: Trust | None = Trust(frozenset({self.signer.public}), 1)
        self.now = time.time()
        self.publish: dict[str, Any] = {"signer": self.signer}
        self.state = tmp / "state" / "index.db"
        self.state.parent.mkdir()
        self.problems: list[str] = []

    async def push(self, text: str, *, folder: str = "app") -> int:
        file = self.source / "f"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        options = PublishOptions(folder, self.source, Rules(), "here:/source", **self.publish)
        status = StatusKeeper(FolderStatus("publish", folder, "/"), clock=time.time, report=lambda _: None)
        index = self.tmp / f"publish-{folder}.db"
        publisher = Publisher(options, self.store, index, status=status, clock=lambda: self.now)
        return (await publisher.push()).generation

    async def pull(self, **arguments: Any) -> PullResult:
        options = SubscribeOptions("app", self.mirror, Rules(), trust=self.trust)
        status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
        subscriber = Subscriber(options, self.store, self.state, status=status, clock=lambda: self.now)
        result = await subscriber.pull(**arguments)
        self.problems = [problem.code for problem in result.problems]
        return result

    def has(self) -> str:
        file = self.mirror / "f"
        return file.read_text() if file.exists() else ""

    async def head(self) -> dict[str, str]:
        info = await self.bucket.get_info(CHANNELS + HEAD)
        assert info is not None
        return dict(info.metadata)

    async def point(self, number: int, metadata: dict[str, str]) -> None:
        """Write the head's link as whoever has the NATS password can."""
        await self.bucket.put_link(CHANNELS + HEAD, Link("app", generation_name(number)), metadata=metadata)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


async def test_what_a_trusted_key_signed_is_followed(fleet: Fleet) -> None:
    """Signed commits arrive, one after the other; the note outlives the process."""
    for text in ("one", "two"):
        await fleet.push(text)
        await fleet.pull()
        assert fleet.has() == text
    seen = json.loads(fleet.state.with_name(TRUST_FILE).read_text())["seen"]["head"]
    assert (seen["count"], seen["highest"]) == (2, 2)


@pytest.mark.fault("K1")
async def test_k1_arbitrary_content(fleet: Fleet) -> None:
    """Generations without a signature, then by a foreign key, are committed where a host trusts one key.

    It follows neither, and still repairs what was overwritten in its mirror.
    """
    await fleet.push("good")
    await fleet.pull()
    fleet.publish = {}
    await fleet.push("evil")
    (fleet.mirror / "f").write_text("drifted")
    with pytest.raises(Untrusted, match="0 good signatures"):
        await fleet.pull()
    assert fleet.has() == "good"
    fleet.publish = {"signer": fleet.other}
    await fleet.push("evil again")
    with pytest.raises(Untrusted):
        await fleet.pull()
    assert fleet.has() == "good"


@pytest.mark.fault("K1")
async def test_k1_a_new_host_takes_nothing_that_is_not_signed(fleet: Fleet) -> None:
    """A new host that trusts a key pulls an unsigned folder, by its head and by number.

    Both are refused, and nothing appears.
    """
    fleet.publish = {}
    await fleet.push("evil")
    with pytest.raises(Untrusted):
        await fleet.pull()
    with pytest.raises(Untrusted):
        await fleet.pull(generation=1)
    assert fleet.has() == ""


@pytest.mark.fault("K2")
async def test_k2_an_old_move_is_shown_again(fleet: Fleet) -> None:
    """When generation 2 was followed, the head's link and signed move of generation 1 are written back as they were.

    Every pull is refused, also after a restart and with the index deleted; the mirror stays.
    """
    await fleet.push("one")
    old = await fleet.head()
    await fleet.pull()
    await fleet.push("two")
    await fleet.pull()
    await fleet.point(1, old)
    for lost in (False, True):
        if lost:
            fleet.state.unlink()
        with pytest.raises(Untrusted, match="rollback or replay"):
            await fleet.pull()
        assert fleet.has() == "two"


@pytest.mark.fault("K2")
async def test_k2_the_link_alone_is_moved(fleet: Fleet) -> None:
    """The head's link is pointed at generation 1 and keeps the newest signed move, which says 2.

    The pull is refused, and the mirror stays.
    """
    await fleet.push("one")
    await fleet.push("two")
    await fleet.pull()
    await fleet.point(1, await fleet.head())
    with pytest.raises(Untrusted, match="points at 1"):
        await fleet.pull()
    assert fleet.has() == "two"


async def test_a_signed_rollback_is_followed(fleet: Fleet) -> None:
    """An operator with a key may go back; the publisher lets it stand until the source changes."""
    for text in ("one", "two"):
        await fleet.push(text)
    await fleet.pull()
    await Channels(fleet.bucket, time.time).rollback(HEAD, to=1, who="me", why="worse", signer=fleet.signer)
    assert ((await fleet.pull()).generation, fleet.has()) == (1, "one")
    assert await fleet.push("two") == 2  # nothing changed: the rollback stands
    assert ((await fleet.pull()).generation, fleet.has()) == (1, "one")
    assert await fleet.push("three") == 3
    assert ((await fleet.pull()).generation, fleet.has()) == (3, "three")


@pytest.mark.fault("K2")
async def test_k2_a_second_history_is_no_pins_either(fleet: Fleet) -> None:
    """A bucket is put back to generation 1 and gets another generation 2, well signed; the host had the first one.

    No pull by number leads to that 2; generation 1, of both histories, may be gone to.
    """
    await fleet.push("one")
    once = pickle.dumps(fleet.store._streams)
    await fleet.push("two")
    await fleet.pull()
    fleet.store._streams = pickle.loads(once)
    (fleet.tmp / "publish-app.db").unlink()
    assert await fleet.push("another two") == 2
    for _ in range(2):
        with pytest.raises(Untrusted, match="two generations 2"):
            await fleet.pull(generation=2)
        assert fleet.has() == "two"
    assert (await fleet.pull(generation=1)).generation == 1
    assert fleet.has() == "one"


@pytest.mark.fault("K3")
async def test_k3_fast_forward_and_recovery(fleet: Fleet) -> None:
    """A stolen key signs a move with the highest count there is, which is followed; then a key set replaces the key.

    The new key's move with a count of 7 is followed again.
    """
    await fleet.push("good")
    await fleet.pull()
    head = await TreeReader(fleet.bucket).channel(HEAD)
    assert head is not None
    move = read_move(head.move)
    assert move is not None
    await fleet.point(1, move_metadata(replace(move, count=(1 << 53) - 1), fleet.signer))
    await fleet.pull()
    before = Trust(frozenset({fleet.signer.public}), 1)
    change = KeyChange((fleet.other.public,), (fleet.signer.public,), 0, "stolen")
    await KeySets(fleet.bucket, time.time).change(before, change, [fleet.signer])
    fleet.publish = {"signer": fleet.other}
    (fleet.tmp / "publish-app.db").unlink()
    honest = move_metadata(replace(move, count=7), fleet.other)
    await sign_generation(fleet.bucket, 1, fleet.other)
    await fleet.point(1, honest)
    assert (await fleet.pull()).generation == 1


@pytest.mark.fault("K4")
async def test_k4_freeze(fleet: Fleet) -> None:
    """Moves are good for 24 hours; the clock goes 25 hours on, and no newer one is shown.

    The host tells it as stale, a new host refuses; once the publisher renews its word, all is well.
    """
    fleet.publish["expire_seconds"] = 24 * HOUR
    await fleet.push("one")
    await fleet.pull()
    assert fleet.problems == []
    fleet.now += 25 * HOUR
    await fleet.pull()
    assert fleet.problems == ["stale"]
    fresh = fleet.state.with_name("other")
    fresh.mkdir()
    fleet.state, fleet.mirror = fresh / "index.db", fleet.tmp / "other"
    with pytest.raises(Untrusted, match="not fresh"):
        await fleet.pull()
    await fleet.push("one")  # nothing changed, but its word is renewed
    await fleet.pull()
    assert (fleet.problems, fleet.has()) == ([], "one")
    assert await TreeReader(fleet.bucket).generation(2) is None


@pytest.mark.fault("K5", "K7")
async def test_k5_another_folders_generation(fleet: Fleet) -> None:
    """Record, move and signatures of one folder are committed as the next generation of another, of the same key.

    It is refused, and the mirror stays.
    """
    await fleet.push("mine")
    await fleet.pull()
    await fleet.push("theirs", folder="lib")
    lib = fleet.store.bucket("lib")
    stolen = await TreeReader(lib).channel(HEAD)
    assert stolen is not None
    await fleet.bucket.commit_generation(
        2,
        stolen.record,
        {SIGNATURES: stolen.signatures},
        channel=HEAD,
        expected_seq=(await fleet.bucket.get_info(CHANNELS + HEAD)).seq,  # type: ignore[union-attr]
        link_metadata={MOVE: stolen.move, SIGNATURES: stolen.move_signatures},
    )
    with pytest.raises((Untrusted, ObjectCorrupt)):
        await fleet.pull()
    assert fleet.has() == "mine"


@pytest.mark.fault("K8")
async def test_k8_two_signatures_are_two_keys(fleet: Fleet) -> None:
    """A threshold of two keys meets a generation that one key has signed.

    It is refused, also once that key has signed a second time, until another key has signed generation and move.
    """
    fleet.trust = Trust(frozenset({fleet.signer.public, fleet.other.public}), 2)
    await fleet.push("one")
    channels = Channels(fleet.bucket, time.time)
    for signer in (fleet.signer, fleet.other):
        with pytest.raises(Untrusted, match="1 good signatures"):
            await fleet.pull()
        await sign_generation(fleet.bucket, 1, signer)
        await sign_move(channels, HEAD, signer)
    assert (await fleet.pull()).generation == 1


@pytest.mark.fault("K9", "K11")
async def test_k9_a_replaced_key_is_of_no_more_use(fleet: Fleet) -> None:
    """A signed key set replaces a key; generations come by the new key, and then by the old one.

    The new one is followed; the old one is refused twice, though the configuration still names it.
    """
    await fleet.push("one")
    await fleet.pull()
    before = Trust(frozenset({fleet.signer.public}), 1)
    change = KeyChange((fleet.other.public,), (fleet.signer.public,), 0, "yearly")
    await KeySets(fleet.bucket, time.time).change(before, change, [fleet.signer])
    fleet.publish = {"signer": fleet.other}
    await fleet.push("two")
    assert ((await fleet.pull()).generation, fleet.has()) == (2, "two")
    fleet.publish = {"signer": fleet.signer}
    await fleet.push("three")
    for _ in range(2):
        with pytest.raises(Untrusted):
            await fleet.pull()
    assert fleet.has() == "two"


@pytest.mark.fault("K9")
async def test_k9_a_key_set_that_old_keys_did_not_sign(fleet: Fleet) -> None:
    """A thief puts a key set into the bucket that only his own key has signed, and a generation by that key.

    The generation is refused, and the mirror stays.
    """
    await fleet.push("one")
    await fleet.pull()
    thief = Trust(frozenset({fleet.other.public}), 1)
    change = KeyChange((Signer(generate()[0]).public,), (), 0, "")
    await KeySets(fleet.bucket, time.time).change(thief, change, [fleet.other])
    fleet.publish = {"signer": fleet.other}
    await fleet.push("evil")
    with pytest.raises(Untrusted):
        await fleet.pull()
    assert fleet.has() == "one"


@pytest.mark.fault("K11", "C6")
async def test_k11_a_damaged_note_stops_the_folder(fleet: Fleet) -> None:
    """The note of what was seen is emptied, cut short, or filled with other JSON or bytes that are no text.

    Every pull is refused until the good note is back: a replay could not be told.
    """
    await fleet.push("one")
    await fleet.pull()
    note = fleet.state.with_name(TRUST_FILE)
    good = note.read_bytes()
    for damage in (b"", b"{}", good[:-3], b"\xff\xfe", b'{"trust": {}, "seen": []}'):
        note.write_bytes(damage)
        with pytest.raises(Untrusted, match="cannot be read"):
            await fleet.pull()
    note.write_bytes(good)
    await fleet.pull()


async def test_without_trusted_keys_everything_is_believed(fleet: Fleet) -> None:
    """Unsigned folders work as they always did, and nothing is noted."""
    fleet.trust = None
    fleet.publish = {}
    await fleet.push("one")
    assert (await fleet.pull()).generation == 1
    assert (await fleet.pull(generation=1)).generation == 1
    assert not fleet.state.with_name(TRUST_FILE).exists()
    thread = FolderThread("test")
    guard = Guard(fleet.bucket, HEAD, None, TrustNote(None), thread, time.time)
    await guard.judge_kept(b"no record", "no signatures")
    await thread.close(lambda: None)


@pytest.mark.fault("K4")
async def test_k4_freeze_of_a_folder_without_signatures(fleet: Fleet) -> None:
    """An unsigned folder is published for 24 hours, and the clock goes 25 hours on.

    The pull tells it as stale, and the mirror stays.
    """
    fleet.trust = None
    fleet.publish = {"expire_seconds": 24 * HOUR}
    await fleet.push("one")
    await fleet.pull()
    assert fleet.problems == []
    fleet.now += 25 * HOUR
    await fleet.pull()
    assert (fleet.problems, fleet.has()) == (["stale"], "one")


class CountedNote(TrustNote):
    """:ivar loads, saves: how often it was read and replaced."""

    loads = saves = 0

    def load(self) -> tuple[Trust | None, dict[str, Any]]:
        self.loads += 1
        return super().load()

    def save(self, trust: Trust, seen: dict[str, Any]) -> None:
        super().save(trust, seen)
        self.saves += 1


async def test_k11_what_is_known_is_not_written_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes of the note are counted over rounds, new moves, new starts and another configuration.

    It is read once, written at the start and for each new move, and in no other round.
    """
    thread = FolderThread("test")

    def guard(note: TrustNote) -> Guard:
        return Guard(fleet.bucket, HEAD, fleet.trust, note, thread, lambda: fleet.now)

    async def events(one: Guard) -> list[str]:
        with capture_logs() as logs:
            one.begin(await fleet.bucket.state())
            await one.follow()
        return [line["event"] for line in logs]

    await fleet.push("one")
    note = CountedNote(fleet.tmp / TRUST_FILE)
    first = guard(note)
    with monkeypatch.context() as patched:
        patched.setattr(MemoryBucket, "changes", None)  # keys were never replaced: nothing is listed
        assert await events(first) == []
    assert (note.loads, note.saves) == (1, 1)
    for text, saves in (("one", 2), ("two", 3)):
        await fleet.push(text)
        head = await TreeReader(fleet.bucket).channel(HEAD)
        assert head is not None
        for _ in range(3):
            first.begin(await fleet.bucket.state())
            await first.judge(head)
            await first.follow()
            assert (note.loads, note.saves) == (1, saves)
    assert await events(guard(note)) == []  # a start is no change of the configuration
    fleet.trust = Trust(frozenset({fleet.signer.public, fleet.other.public}), 1)
    assert await events(guard(note)) == ["trust_reconfigured"]
    change = KeyChange(drop=(fleet.other.public,))
    await KeySets(fleet.bucket, time.time).change(fleet.trust, change, [fleet.signer])
    assert await events(guard(note)) == ["keys_changed"]
    monkeypatch.setattr(MemoryBucket, "changes", None)  # only what may come next is looked for: nothing is listed
    assert await events(guard(note)) == []
    await thread.close(lambda: None)


@pytest.mark.fault("K9", "O5")
async def test_k9_key_sets_without_end_are_read_some_in_each_round(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thief of the one key writes key sets, five in all, where two are read in one round.

    The host follows two in each round, and the rest later.
    """
    monkeypatch.setattr("syncd.guard.MAX_KEY_SETS", 2)
    thread = FolderThread("test")
    await fleet.push("one")
    assert fleet.trust is not None
    guard = Guard(fleet.bucket, HEAD, fleet.trust, TrustNote(None), thread, lambda: fleet.now)
    keys = KeySets(fleet.bucket, time.time)
    versions = []
    for written in (1, 4, 0, 0):
        for _ in range(written):
            await keys.change(fleet.trust, KeyChange(add=(Signer(generate()[0]).public,)), [fleet.signer])
        guard.begin(await fleet.bucket.state())
        await guard.follow()
        assert guard._trust is not None
        versions.append(guard._trust.version)
    assert versions == [1, 3, 5, 5]
    await thread.close(lambda: None)


@pytest.mark.fault("K9", "N5")
async def test_k9_key_sets_of_a_restored_bucket_are_found(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket is put back as it was, and a key set comes with a sequence that was seen before.

    It is found and followed; what is known stays known, and is not read again.
    """
    thread = FolderThread("test")
    await fleet.push("one")
    late = Trust(frozenset({fleet.other.public}), 1)
    keys = KeySets(fleet.bucket, time.time)
    both = Trust(frozenset({fleet.signer.public, fleet.other.public}), 1)
    await keys.change(both, KeyChange(drop=(fleet.signer.public,)), [fleet.signer])
    backup = pickle.dumps(fleet.store._streams)
    for text in ("two", "three"):
        await fleet.push(text)
    guard = Guard(fleet.bucket, HEAD, late, TrustNote(None), thread, lambda: fleet.now)

    async def version() -> int:
        guard.begin(await fleet.bucket.state())
        await guard.follow()
        assert guard._trust is not None
        return guard._trust.version

    assert await version() == 0
    with monkeypatch.context() as patched:
        patched.setattr(MemoryBucket, "download_many", None)
        assert await version() == 0
    before = await fleet.bucket.state()
    fleet.store._streams = pickle.loads(backup)
    await keys.change(late, KeyChange(add=(fleet.signer.public,)), [fleet.other])
    after = await fleet.bucket.state()
    assert (after.created, after.last_seq < before.last_seq) == (before.created, True)
    assert await version() == 2
    await thread.close(lambda: None)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("keys/0000000001", 1),
        ("keys/9999999999", 9_999_999_999),
        *(
            (name, 0)
            for name in ("0000000001", "keys/1", "keys/00000000001", "keys/000000000x", "keys/", "a/0000000001")
        ),
        *((name, 0) for name in ("keys/000000000\N{ARABIC-INDIC DIGIT ONE}", "keys/000000000\N{SUPERSCRIPT ONE}")),
    ],
)
def test_only_ten_digits_name_a_key_set(name: str, version: int) -> None:
    """Whatever else is below keys/, or looks like a number, is none."""
    assert _version_of(cast("Any", SimpleNamespace(name=name))) == version


@pytest.mark.fault("K9")
async def test_k9_a_key_set_that_was_deleted_ends_the_chain(fleet: Fleet) -> None:
    """The second of two key sets is deleted from the bucket, which leaves a tombstone.

    The first one is followed, the tombstone is not, and nobody is warned of it.
    """
    thread = FolderThread("test")
    await fleet.push("one")
    assert fleet.trust is not None
    keys = KeySets(fleet.bucket, time.time)
    for _ in range(2):
        await keys.change(fleet.trust, KeyChange(add=(Signer(generate()[0]).public,)), [fleet.signer])
    await fleet.bucket.delete(keys_name(2), expected_seq=None, metadata={})
    guard = Guard(fleet.bucket, HEAD, fleet.trust, TrustNote(None), thread, lambda: fleet.now)
    with capture_logs() as logs:
        guard.begin(await fleet.bucket.state())
        await guard.follow()
    assert [(line["event"], line["version"]) for line in logs] == [("keys_changed", 1)]
    await thread.close(lambda: None)


@pytest.mark.fault("K1", "K9")
async def test_k9_what_is_kept_here_is_judged_by_what_is_known_of_keys(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key set drops the key of a generation that is kept here; then the server is away (calls raise).

    It is refused from the next round on, also by what was noted; where nothing was, the configuration counts.
    """
    thread = FolderThread("test")
    await fleet.push("one")
    kept = await TreeReader(fleet.bucket).generation(1)
    assert kept is not None
    fleet.trust = Trust(frozenset({fleet.signer.public, fleet.other.public}), 1)
    note = TrustNote(fleet.tmp / TRUST_FILE)

    async def judge(guard: Guard) -> bool:
        try:
            await guard.judge_kept(kept.record, kept.signatures)
        except Untrusted:
            return False
        return True

    def guard(note: TrustNote) -> Guard:
        return Guard(fleet.bucket, HEAD, fleet.trust, note, thread, lambda: fleet.now)

    async def away(*_: Any) -> None:
        raise Unavailable("the server is away")

    running, unnoted = guard(note), guard(TrustNote(None))
    for one in (running, unnoted):
        one.begin(await fleet.bucket.state())
        assert await judge(one)
    change = KeyChange(drop=(fleet.signer.public,))
    await KeySets(fleet.bucket, time.time).change(fleet.trust, change, [fleet.other])
    for one in (running, unnoted):
        assert await judge(one), "once in a round is enough"
        one.begin(await fleet.bucket.state())
        assert not await judge(one)
    assert not await judge(guard(TrustNote(None))), "at a start, before any round"
    monkeypatch.setattr(MemoryBucket, "get_info", away)
    assert not await judge(running)
    assert not await judge(unnoted)
    assert not await judge(guard(note))
    assert await judge(guard(TrustNote(None))), "nothing was noted: the configuration counts"
    with pytest.raises(Untrusted):
        await guard(TrustNote(None)).judge_kept(kept.record, "")
    await thread.close(lambda: None)


async def test_signatures_are_beside_the_record_and_the_move(fleet: Fleet) -> None:
    """Where format.md says; the move says who, where to, and since which count."""
    await fleet.push("one")
    generation = await fleet.bucket.get_info(f"{GENERATIONS}{1:010d}")
    assert generation is not None
    assert generation.metadata[SIGNATURES]
    head = await fleet.head()
    move = read_move(head[MOVE])
    assert move is not None
    assert (move.folder, move.channel, move.count, move.number, move.who) == ("app", "head", 1, 1, "here:/source")


@pytest.mark.fault("K11", "X1")
async def test_k11_what_cannot_be_written_down_is_not_followed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the note of what was seen is made to fail, with a new generation at hand.

    It is not applied, in this round or the next; once the note is written, it is.
    """
    await fleet.push("one")
    await fleet.pull()
    await fleet.push("two")

    def refuse(*_: Any) -> None:
        raise DiskProblem("no space")

    subscriber_of = TrustNote.save
    monkeypatch.setattr(TrustNote, "save", refuse)
    for _ in range(2):
        with pytest.raises(DiskProblem):
            await fleet.pull()
        assert fleet.has() == "one"
    monkeypatch.setattr(TrustNote, "save", subscriber_of)
    await fleet.pull()
    assert fleet.has() == "two"


@pytest.mark.fault("K11", "X1")
async def test_k11_the_same_process_does_not_believe_before_it_wrote(fleet: Fleet) -> None:
    """Writing the note of what was seen is made to fail, and one process judges the same move twice.

    It fails both times: what was not written was not seen.
    """
    await fleet.push("one")
    head = await TreeReader(fleet.bucket).channel(HEAD)
    assert head is not None
    saved: list[int] = []

    class Note(TrustNote):
        def save(self, trust: Trust, seen: dict[str, Any]) -> None:
            saved.append(len(seen))
            if seen:
                raise DiskProblem("no space")

    thread = FolderThread("test")
    guard = Guard(fleet.bucket, HEAD, fleet.trust, Note(None), thread, lambda: fleet.now)
    for _ in range(2):
        with pytest.raises(DiskProblem):
            await guard.judge(head)
    assert saved == [0, 1, 1]
    await thread.close(lambda: None)


@pytest.mark.fault("K11", "C2")
def test_k11_the_note_is_durable_before_anything_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fsync of writing the note is looked at, for what is on disk at that moment.

    First the draft's, with all bytes written, then the directory's after the rename; nothing is left open.
    """
    note, state = tmp_path / TRUST_FILE, TrustNote(tmp_path / TRUST_FILE)
    synced: list[tuple[str, str]] = []
    descriptors: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append((path.name, (note if path == tmp_path else path).read_text()))
        descriptors.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for count in (1, 2):
        state.save(Trust(frozenset({Signer(generate()[0]).public}), 1), {})
        text = note.read_text()
        assert json.loads(text)["step"] == count
        assert synced == [(f".{TRUST_FILE}.new", text), (tmp_path.name, text)]
        synced.clear()
    assert descriptors[:2] == descriptors[2:], "one was left open"


@pytest.mark.fault("K11", "C6")
@pytest.mark.parametrize("step", [-1, True, 1.5, "2", None, []], ids=str)
def test_k11_a_note_that_counts_otherwise_is_damaged(tmp_path: Path, step: Any) -> None:
    """The number of times that the note was written is set to -1, true, 1.5, text, nothing or a list.

    The note is refused: which of note and copy is newer could not be told.
    """
    note = tmp_path / TRUST_FILE
    TrustNote(note).save(Trust(frozenset({Signer(generate()[0]).public}), 1), {})
    fields = json.loads(note.read_text())
    note.write_text(json.dumps(fields | {"step": step}))
    with pytest.raises(Untrusted, match="cannot be read"):
        TrustNote(note).load()
    note.write_text(json.dumps(fields | {"step": 0}))
    trust, seen = TrustNote(note).load()
    assert (trust is not None, seen) == (True, {})


@pytest.mark.fault("K1")
async def test_k1_a_folder_without_signatures_is_no_way_around(fleet: Fleet) -> None:
    """A thief changes the bucket of a signed folder to the objects layout, where nothing is signed.

    A host that trusts a key refuses every pull, and the mirror stays.
    """
    await fleet.push("good")
    await fleet.pull()
    options = PublishOptions("app", fleet.source, Rules(), "here:/source", layout="objects")
    status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
    (fleet.source / "f").write_text("evil")
    await Publisher(options, fleet.store, fleet.tmp / "thief.db", status=status).push(
        change_layout=True, take_over=True
    )
    for _ in range(2):
        with pytest.raises(Untrusted, match="nothing is signed"):
            await fleet.pull()
    assert fleet.has() == "good"


@pytest.mark.fault("K2", "K4")
async def test_k2_the_publisher_lends_no_signature_to_a_thief(fleet: Fleet) -> None:
    """Without a key the head is rolled back in the bucket, and the honest publisher renews its word 20 hours later.

    The rollback is refused all the same; the next real generation is followed.
    """
    fleet.publish["expire_seconds"] = 24 * HOUR
    for text in ("one", "two"):
        await fleet.push(text)
    await fleet.pull()
    await Channels(fleet.bucket, lambda: fleet.now).rollback(HEAD, to=1, who="thief", valid_seconds=60)
    fleet.now += 20 * HOUR
    await fleet.push("two")
    with pytest.raises(Untrusted):
        await fleet.pull()
    assert fleet.has() == "two"
    await fleet.push("three")
    assert ((await fleet.pull()).generation, fleet.has()) == (3, "three")


@pytest.mark.fault("K11")
def test_a_trust_note_and_a_copy_of_one_step_that_differ_are_damage(tmp_path: Path) -> None:
    """One bit of the highest number in trust.json flips on the disk; the copy in the index is as it was written.

    Reading the note is refused.
    """
    index = Index(None)
    file = tmp_path / "trust.json"
    trust = Trust(frozenset({Signer(generate()[0]).public}), 1)
    TrustNote(file, index).save(trust, {"head": replace(Seen(), highest=7, record="0" * 64, signed_by=("U",))})
    text = file.read_text()
    file.write_text(text.replace('"highest": 7', '"highest": 3'))  # 0x37 -> 0x33
    try:
        with pytest.raises(Untrusted):
            TrustNote(file, index).load()
    finally:
        index.close()
