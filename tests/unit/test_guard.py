"""Signatures from the publisher to the mirror: every attack goes through a real bucket (on the memory twin)."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd.channels import Channels
from syncd.errors import DiskProblem, ObjectCorrupt, Untrusted
from syncd.guard import Guard, TrustNote
from syncd.keysets import KeyChange, KeySets
from syncd.moves import move_metadata, read_move
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.service import FolderThread
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import CHANNELS, GENERATIONS, HEAD, Link
from syncd.store.memory import MemoryStore
from syncd.subscriber import TRUST_FILE, SubscribeOptions, Subscriber
from syncd.trees import TreeReader, generation_name
from syncd.trust import MOVE, SIGNATURES, Trust
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
    """Whoever has the password but no key commits: nobody goes there, and what is here is kept as it must be."""
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
    """An unsigned folder against trusted keys: nothing appears."""
    fleet.publish = {}
    await fleet.push("evil")
    with pytest.raises(Untrusted):
        await fleet.pull()
    with pytest.raises(Untrusted):
        await fleet.pull(generation=1)
    assert fleet.has() == ""


@pytest.mark.fault("K2", "K7")
async def test_k2_an_old_move_is_shown_again(fleet: Fleet) -> None:
    """Replayed as it was, the old head leads nobody back; not after a restart, not with the index lost."""
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
    """The newest move beside a link to an older generation: the two do not fit."""
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


@pytest.mark.fault("K3")
async def test_k3_fast_forward_and_recovery(fleet: Fleet) -> None:
    """A stolen key moves the head to the highest count; once it is replaced, honest moves are followed again."""
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
    """Newer moves are held back: reported here, refused where it is seen for the first time, mended by fresh ones."""
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
    """Record, move and signatures of one folder are shown as another's."""
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
    """With a threshold of two, one publisher is not enough, however often it signs; a second person's word is."""
    fleet.trust = Trust(frozenset({fleet.signer.public, fleet.other.public}), 2)
    await fleet.push("one")
    with pytest.raises(Untrusted, match="1 good signatures"):
        await fleet.pull()
    channels = Channels(fleet.bucket, time.time)
    for signer in (fleet.signer, fleet.other):
        await sign_generation(fleet.bucket, 1, signer)
        await sign_move(channels, HEAD, signer)
    assert (await fleet.pull()).generation == 1


@pytest.mark.fault("K9", "K11")
async def test_k9_a_replaced_key_is_of_no_more_use(fleet: Fleet) -> None:
    """The new key is followed, the old one refused, also after a restart and where the configuration still names it."""
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
    """A thief's key introduces itself: it is not followed."""
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
    """Without what was seen a replay could not be told: a person has to decide."""
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
    assert not fleet.state.with_name(TRUST_FILE).exists()


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
    """A disk that refuses the note: the generation is not applied, in this round or the next."""
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
    """Within one process, too: a failed note leaves what was seen as it was."""
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


@pytest.mark.fault("K1")
async def test_k1_a_folder_without_signatures_is_no_way_around(fleet: Fleet) -> None:
    """Whoever may write to the bucket gives it the objects layout, where nothing is signed: nobody follows."""
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
    """A rollback without a key is not made good by the publisher's renewal of its word."""
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
