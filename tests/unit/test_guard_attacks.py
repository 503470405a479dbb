"""What a host remembers, under attack: shown old states, with keys removed, with its own notes lost. Memory twin."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from syncd import rollout
from syncd.channels import Channels
from syncd.checkout import BEHIND_SECONDS, Held, NoGeneration
from syncd.errors import Untrusted
from syncd.guard import MAX_TRIED_AGAIN, Guard, TrustNote
from syncd.index import Index
from syncd.keysets import KeyChange, KeySets
from syncd.moves import move_metadata, read_move, time_text
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.service import FolderThread
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store import wire
from syncd.store.base import CHANNELS, HEAD, ObjectMeta, SmallPut
from syncd.store.memory import MemoryBucket
from syncd.subscriber import TRUST_FILE, SubscribeOptions, Subscriber
from syncd.trees import TreeReader
from syncd.trust import MOVE, RECORD_MAX, Trust, keys_name
from tests.support.signing import sign_generation, sign_move
from tests.unit.test_guard import HOUR, Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DAY = 24 * HOUR


class Host(Fleet):
    """Two keys count, of which ``other`` is the one that stays."""

    rollout = RolloutOptions()
    shown: tuple[str, ...] = ()

    def __init__(self, tmp: Path) -> None:
        super().__init__(tmp)
        self.trust = Trust(frozenset({self.signer.public, self.other.public}), 1)

    async def pull(self, **arguments: Any) -> Any:
        options = SubscribeOptions("app", self.mirror, Rules(), trust=self.trust, rollout=self.rollout)
        status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=lambda _: None)
        subscriber = Subscriber(options, self.store, self.state, status=status, clock=lambda: self.now)
        try:
            result = await subscriber.pull(**arguments)
        finally:
            self.problems = [problem.code for problem in subscriber._problems()]
            self.shown = tuple(problem.code for problem in status.now.problems)
        return result

    async def change(self, change: KeyChange, signer: Signer) -> None:
        assert self.trust is not None
        await KeySets(self.bucket, lambda: self.now).change(self.trust, change, [signer])

    async def drop(self, gone: Signer, by: Signer) -> None:
        await self.change(KeyChange(drop=(gone.public,)), by)

    async def sign_head(self, number: int, signer: Signer) -> None:
        await sign_generation(self.bucket, number, signer)
        await sign_move(Channels(self.bucket, lambda: self.now), HEAD, signer)

    def has(self) -> str:
        file = self.mirror / "current/f" if self.rollout.mode == "release" else self.mirror / "f"
        return file.read_text() if file.exists() else ""

    @property
    def note(self) -> Path:
        return self.state.with_name(TRUST_FILE)

    def noted(self) -> dict[str, Any]:
        return json.loads(self.note.read_text())["seen"]["head"]  # type: ignore[no-any-return]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# -- counts of keys that stay ------------------------------------------------------------------------------------------


@pytest.mark.fault("K2", "K9")
async def test_k2_a_removed_key_makes_no_host_go_back_to_a_move_it_saw(host: Host) -> None:
    """A key set drops a key, and an old move by the remaining one, followed long ago, is written back.

    It is refused, also twice; the newest head and new generations are followed.
    """
    host.publish["signer"] = host.other
    await host.push("one: vulnerable")
    old = await host.head()
    await host.pull()
    host.publish["signer"] = host.signer
    for text in ("two", "three: fixed"):
        await host.push(text)
        await host.pull()
    await host.sign_head(3, host.other)
    now = await host.head()
    await host.drop(host.signer, by=host.other)
    await host.point(1, old)
    for _ in range(2):
        with pytest.raises(Untrusted, match="rollback or replay"):
            await host.pull()
        assert host.has() == "three: fixed"
    await host.point(3, now)
    await host.pull()
    host.publish["signer"] = host.other
    await host.push("four")
    await host.pull()
    assert (host.has(), host.problems) == ("four", [])


@pytest.mark.fault("K2", "K9")
async def test_k2_a_removed_key_makes_no_host_go_back_to_a_move_it_never_saw(host: Host) -> None:
    """A key set drops the key of generation 2, and an older move by the other key is shown, which this host never saw.

    It is refused: it was made before the key set. The mirror stays.
    """
    host.publish["signer"] = host.other
    await host.push("one: vulnerable")
    old = await host.head()
    host.publish["signer"] = host.signer
    await host.push("two: fixed")
    await host.pull()
    host.now += HOUR
    await host.drop(host.signer, by=host.other)
    await host.point(1, old)
    with pytest.raises(Untrusted, match="before the keys that vouched for that were removed"):
        await host.pull()
    assert host.has() == "two: fixed"


@pytest.mark.fault("K2", "K9")
async def test_k2_a_raised_threshold_makes_no_host_go_back(host: Host) -> None:
    """A key set raises the threshold to two, and an old move that both keys had signed is shown again.

    It is refused: what was followed with one signature is remembered.
    """
    await host.push("one: vulnerable")
    await host.sign_head(1, host.other)
    old = await host.head()
    await host.pull()
    await host.push("two: fixed")
    await host.pull()
    await host.change(KeyChange(threshold=2), host.signer)
    await host.point(1, old)
    with pytest.raises(Untrusted, match="rollback or replay"):
        await host.pull()
    assert host.has() == "two: fixed"


@pytest.mark.fault("K3", "K9")
async def test_k3_a_key_set_from_the_future_does_not_keep_the_fleet_from_recovering(host: Host) -> None:
    """After a stolen key's move of count 2^50, a key set by a clock a year ahead drops that key.

    A remaining key's move is followed if made since the host followed the key set, and refused if before.
    """
    await host.push("good")
    head = await TreeReader(host.bucket).channel(HEAD)
    assert head is not None
    move = read_move(head.move)
    assert move is not None
    await host.point(1, move_metadata(replace(move, count=1 << 50), host.signer))
    await host.pull()
    host.now += 365 * DAY
    await host.drop(host.signer, by=host.other)
    host.now -= 365 * DAY
    with pytest.raises(Untrusted, match="0 good signatures"):
        await host.pull()
    assert host.noted()["doubted"] == time_text(host.now)
    await sign_generation(host.bucket, 1, host.other)
    host.now += HOUR
    await host.point(1, move_metadata(replace(move, count=7, at=time_text(host.now - 2 * HOUR)), host.other))
    with pytest.raises(Untrusted, match="before the keys that vouched for that were removed"):
        await host.pull()
    await host.point(1, move_metadata(replace(move, count=7, at=time_text(host.now)), host.other))
    assert (await host.pull()).generation == 1
    assert (host.noted()["count"], host.noted()["doubted"]) == (7, "")


@pytest.mark.fault("K2", "K11")
async def test_k2_a_changed_configuration_leads_nobody_back_either(host: Host) -> None:
    """The configuration drops a key, and an old move by the remaining one, followed long ago, is shown again.

    It is refused; another move by that key, which was never shown here, is followed.
    """
    host.publish["signer"] = host.other
    await host.push("one: vulnerable")
    old = await host.head()
    await host.pull()
    host.publish["signer"] = host.signer
    await host.push("two: fixed")
    await host.pull()
    host.trust = Trust(frozenset({host.other.public}), 1)
    await host.point(1, old)
    with pytest.raises(Untrusted, match="rollback or replay"):
        await host.pull()
    assert host.has() == "two: fixed"
    # what the person had made ready before the configuration was changed here is followed
    move = read_move(old[MOVE])
    assert move is not None
    ready = replace(move, count=2, at=time_text(host.now - 3 * HOUR))
    await host.point(1, move_metadata(ready, host.other))
    await host.pull()
    assert host.has() == "one: vulnerable"


@pytest.mark.fault("K3", "K9")
async def test_k3_a_later_key_set_does_not_undo_the_recovery(host: Host) -> None:
    """After a stolen key's move of count 2^50 its key is dropped, an honest move made, and one more key set written.

    A host that sees all of it at once follows the honest move.
    """
    await host.push("good")
    good = await TreeReader(host.bucket).channel(HEAD)
    assert good is not None
    move = read_move(good.move)
    assert move is not None
    await host.point(1, move_metadata(replace(move, count=1 << 50), host.signer))
    await host.pull()
    await host.drop(host.signer, by=host.other)
    host.now += HOUR
    await sign_generation(host.bucket, 1, host.other)
    await host.point(1, move_metadata(replace(move, count=7, at=time_text(host.now)), host.other))
    host.now += DAY
    await host.change(KeyChange(add=(Signer(generate()[0]).public,)), host.other)
    assert (await host.pull()).generation == 1
    assert host.noted()["count"] == 7


@pytest.mark.fault("K2", "K11")
async def test_k11_a_note_of_a_version_before_is_gone_on_from(host: Host) -> None:
    """The note loses counts for each key, end and step, the index is deleted, a key dropped, an old move shown.

    The pull is refused: nothing that the old note says is forgotten.
    """
    await host.push("one")
    old = await host.head()
    await host.pull()
    await host.push("two")
    await host.pull()
    fields = json.loads(host.note.read_text())
    (seen,) = fields["seen"].values()
    moved_by = list(seen.pop("moved"))
    del seen["expires"], seen["doubted"], fields["step"]
    seen["moved_by"] = moved_by
    host.state.unlink()
    host.note.write_text(json.dumps(fields))
    await host.drop(host.signer, by=host.other)
    await host.point(1, old)
    with pytest.raises(Untrusted):
        await host.pull()
    assert (host.noted()["moved"], host.noted()["doubted"]) == ({host.other.public: 2}, "")


# -- a freeze that says nothing ----------------------------------------------------------------------------------------


def freeze(host: Host, monkeypatch: pytest.MonkeyPatch, commit: Any, *, behind: int = 1) -> None:
    """The server answers for the channel as it was, from a sequence before what is known."""

    async def channel(self: TreeReader, name: str) -> Any:
        return replace(commit, seq=commit.seq - behind)

    monkeypatch.setattr(TreeReader, "channel", channel)
    monkeypatch.setattr("syncd.checkout.STALE_TRIES", ())


@pytest.mark.fault("K4")
@pytest.mark.parametrize("behind", [0, 1])
async def test_k4_an_old_sequence_is_no_way_around_the_alarm(
    host: Host, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    """From a new start on the bucket answers with the head of before (replaced), while its word of a day ends.

    It is told as stale, whether its sequence is the known one or a lower one; later as behind, too.
    """
    host.publish["expire_seconds"] = DAY
    await host.push("one")
    await host.pull()
    frozen = await TreeReader(host.bucket).channel(HEAD)
    await host.push("two: fixed")
    freeze(host, monkeypatch, frozen, behind=behind)
    host.now += 30 * DAY
    await host.pull()
    assert (host.has(), host.problems) == ("one", ["stale"])
    host.now += BEHIND_SECONDS
    await host.pull()
    assert host.problems == ["channel_behind", "stale"][1 - behind :]


@pytest.mark.fault("K4")
async def test_k4_a_channel_that_is_gone_is_no_way_around_the_alarm(host: Host) -> None:
    """The head's message is deleted from the bucket, 30 days on, where its word was good for one.

    The round fails, and the end is told with it.
    """
    host.publish["expire_seconds"] = DAY
    await host.push("one")
    await host.pull()
    host.now += 30 * DAY
    stream = host.store.stream("app")
    info = await host.bucket.get_info(CHANNELS + HEAD)
    assert info is not None
    subject = next(subject for subject, message in stream.metas.items() if message.seq == info.seq)
    del stream.metas[subject]
    with pytest.raises(NoGeneration):
        await host.pull()
    assert host.shown == ("stale",)


@pytest.mark.fault("K4", "R8")
async def test_k4_what_is_asked_for_by_its_number_does_not_end(host: Host) -> None:
    """A generation is pulled by its number, 30 days on, where the channel's word was good for one.

    There is no problem: a number is a person's word.
    """
    host.publish["expire_seconds"] = DAY
    await host.push("one")
    await host.pull()
    host.now += 30 * DAY
    await host.pull(generation=1)
    assert host.problems == []


@pytest.mark.fault("K4")
async def test_k4_a_channel_that_stays_behind_is_a_problem(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket answers with the head of before (replaced) for longer than replicas are behind, over restarts.

    It is told until the newest is shown; a clock that is set back only begins the wait anew.
    """
    await host.push("one")
    frozen = await TreeReader(host.bucket).channel(HEAD)
    await host.push("two")
    await host.pull()
    with monkeypatch.context() as patched:
        freeze(host, patched, frozen)
        for waited, told in ((0.0, []), (BEHIND_SECONDS - 1, []), (1.0, ["channel_behind"]), (DAY, ["channel_behind"])):
            host.now += waited
            await host.pull()
            assert (host.has(), host.problems) == ("two", told)
    await host.pull()
    assert host.problems == []
    with monkeypatch.context() as patched:
        freeze(host, patched, frozen)
        await host.pull()
        assert host.problems == []  # counted anew
        host.now -= DAY  # the clock is set back
        await host.pull()
        host.now += BEHIND_SECONDS
        await host.pull()
        assert host.problems == ["channel_behind"]


@pytest.mark.fault("K9", "K4")
async def test_k9_an_old_sequence_hides_no_revocation(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket answers with the head of before (replaced), while a key set drops a key.

    The key set is followed in that round all the same.
    """
    await host.push("one")
    frozen = await TreeReader(host.bucket).channel(HEAD)
    await host.push("two")
    await host.pull()
    await host.drop(host.signer, by=host.other)
    freeze(host, monkeypatch, frozen)
    await host.pull()
    assert json.loads(host.note.read_text())["trust"]["keys"] == [host.other.public]


# -- going back --------------------------------------------------------------------------------------------------------


def failing(mode: Any) -> RolloutOptions:
    return RolloutOptions(mode=mode, health=("/bin/sh", "-c", '! grep -q clean "$SYNCD_PATH/f"'), health_seconds=0)


@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.fault("K9", "R1")
async def test_k9_a_failing_hook_leads_nobody_back_to_what_a_revoked_key_signed(host: Host, mode: Any) -> None:
    """A thief's generation is in place when a key set drops his key; the next one fails its real health hook.

    The host stays at that one, repairs it and says why, until a newer one ends well.
    """
    host.rollout = failing(mode)
    await host.push("evil, by the stolen key")
    await host.pull()
    await host.drop(host.signer, by=host.other)
    host.publish["signer"] = host.other
    await host.push("clean")
    for _ in range(3):
        with pytest.raises(Held, match=r"health hook: .*generation 1, .* is not gone back to: .* 0 good signatures"):
            await host.pull()
        assert host.has() == "clean"
        assert sorted(host.problems) == ["generation_held", "not_gone_back"]
    drifted = host.mirror / "current/f" if mode == "release" else host.mirror / "f"
    drifted.write_text("drifted")
    with pytest.raises(Held):
        await host.pull()
    assert host.has() == "clean"
    await host.push("clear")  # which ends well
    await host.pull()
    assert (host.has(), host.problems) == ("clear", [])


@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.fault("K9", "R1")
async def test_k9_what_a_remaining_key_signed_as_well_is_gone_back_to(host: Host, mode: Any) -> None:
    """After the key of generation 1 was dropped, 2 fails its real health hook; then a remaining key signs 1, too.

    The host holds at 2 first, and goes back to 1 once that is signed.
    """
    host.rollout = failing(mode)
    await host.push("good, by the old key")
    await host.pull()
    await host.drop(host.signer, by=host.other)
    host.publish["signer"] = host.other
    await host.push("clean")
    with pytest.raises(Held, match="not gone back to"):
        await host.pull()
    await sign_generation(host.bucket, 1, host.other)
    with pytest.raises(Held) as held:
        await host.pull()
    assert (host.has(), host.problems) == ("good, by the old key", ["generation_held"])
    assert "not gone back to" not in held.value.message


@pytest.mark.fault("K9", "R1", "C3")
async def test_k9_a_return_that_was_only_planned_is_dropped_with_the_key(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host is cut off (exception) as it goes back from a failed generation; a key set then drops that one's key.

    At its next start it stays where it is, and says why.
    """
    host.rollout = failing("mirror")
    await host.push("evil, by the stolen key")
    await host.pull()
    await host.push("clean")

    class Crash(BaseException):
        pass

    real = Subscriber._bring_up

    async def bring_up(self: Subscriber, trip: Any) -> None:
        if self._checkout.target.number == 1:
            raise Crash
        await real(self, trip)

    with monkeypatch.context() as patched:
        patched.setattr(Subscriber, "_bring_up", bring_up)
        with pytest.raises(Crash):
            await host.pull()
    await host.sign_head(2, host.other)
    await host.drop(host.signer, by=host.other)
    with pytest.raises(Held, match="not gone back to"):
        await host.pull()
    assert host.has() == "clean"


@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.fault("K9", "R1", "C3")
async def test_k9_a_key_that_was_removed_while_the_host_was_down_is_not_gone_back_to(
    host: Host, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host is cut off (exception) as hooks begin, and a key set drops the key of the generation before; a hook fails.

    Its next start asks who is trusted before it goes anywhere, and stays.
    """
    host.rollout = failing(mode)
    await host.push("evil, by the stolen key")
    await host.pull()
    host.publish["signer"] = host.other
    await host.push("clean")

    class Crash(BaseException):
        pass

    def point(at: str) -> None:
        if at == "hooks_begun":
            raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(rollout, "crash_point", point)
        with pytest.raises(Crash):
            await host.pull()
    await host.drop(host.signer, by=host.other)
    with pytest.raises(Held, match="not gone back to"):
        await host.pull()
    assert host.has() == "clean"


@pytest.mark.fault("K11", "K4")
async def test_k11_a_damaged_note_is_told_whatever_the_channel_says(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note becomes `{`, the bucket answers with the head of before (replaced), and a mirrored file is overwritten.

    The pull says that the note cannot be read, and the mirror is kept as it was.
    """
    await host.push("one")
    frozen = await TreeReader(host.bucket).channel(HEAD)
    await host.push("two")
    await host.pull()
    host.note.write_text("{")
    freeze(host, monkeypatch, frozen)
    (host.mirror / "f").write_text("drifted")
    with pytest.raises(Untrusted, match="cannot be read"):
        await host.pull()
    assert (host.has(), host.problems) == ("two", ["generation_held"])


# -- what is lost of the memory ----------------------------------------------------------------------------------------


@pytest.mark.fault("K2", "K11", "C6")
async def test_k11_a_lost_note_is_no_first_use_while_the_index_is_there(host: Host) -> None:
    """The note is deleted, its copy in the index stays, and the old head is written back with its signed move.

    The move is refused; the loss is told once, and the note written again.
    """
    await host.push("one: vulnerable")
    old = await host.head()
    await host.pull()
    await host.push("two: fixed")
    await host.pull()
    host.note.unlink()
    await host.point(1, old)
    for told in (1, 0):
        with capture_logs() as logs, pytest.raises(Untrusted, match="rollback or replay"):
            await host.pull()
        assert host.has() == "two: fixed"
        warned = [line for line in logs if line["event"] == "trust_note_behind"]
        assert [(line["behind"], line["lost"]) for line in warned] == [("file", True)] * told
    assert host.noted()["count"] == 2


@pytest.mark.fault("K2", "K11", "C6")
@pytest.mark.parametrize("older", ["file", "index"])
async def test_k11_of_note_and_copy_the_newer_counts(host: Host, older: str) -> None:
    """The note, or the index with its copy, is put back from a backup, and the old head with its signed move, too.

    The move is refused, and which of the two is behind is told.
    """
    await host.push("one: vulnerable")
    old = await host.head()
    await host.pull()
    kept = host.note if older == "file" else host.state
    shutil.copy(kept, host.tmp / "backup")
    await host.push("two: fixed")
    await host.pull()
    shutil.copy(host.tmp / "backup", kept)
    await host.point(1, old)
    with capture_logs() as logs, pytest.raises(Untrusted, match="rollback or replay"):
        await host.pull()
    assert [line["behind"] for line in logs if line["event"] == "trust_note_behind"] == [older]
    assert host.noted()["count"] == 2


@pytest.mark.fault("K3", "K11")
async def test_k11_what_was_forgotten_does_not_come_back_from_the_copy(host: Host, tmp_path: Path) -> None:
    """The index gets back an older copy of the note, in which the count is higher.

    The newer one counts whole, with its lower count.
    """
    trust = host.trust
    assert trust is not None
    index = Index(tmp_path / "copy.db")
    note = TrustNote(tmp_path / "note", index)
    await host.push("one")
    await host.pull()
    seen = TrustNote(host.note).load()[1]
    high = {"head": replace(seen["head"], count=1 << 50, moved={host.signer.public: 1 << 50})}
    note.save(trust, high)
    backup = index.note("trust")
    note.save(trust, seen)
    index.set_note("trust", backup)
    again = TrustNote(tmp_path / "note", index)
    assert again.load() == (trust, seen)
    index.close()


@pytest.mark.fault("K11", "C6")
async def test_k11_a_damaged_copy_is_no_new_beginning(host: Host, tmp_path: Path) -> None:
    """The note's copy in the index becomes cut, wrong or deeply nested JSON; then the note is deleted, too.

    With the note it does not matter; without, a person has to decide. Nothing of both is a first use.
    """
    trust = host.trust
    assert trust is not None
    index = Index(tmp_path / "copy.db")
    note = TrustNote(tmp_path / "note", index)
    note.save(trust, {})
    for damage in ("{", "[]", '{"step": -1, "trust": {}, "seen": {}}', '{"step": true}', "[" * 100_000):
        index.set_note("trust", damage)
        assert TrustNote(tmp_path / "note", index).load() == (trust, {})
    (tmp_path / "note").unlink()
    with pytest.raises(Untrusted, match="the index's copy cannot be read"):
        TrustNote(tmp_path / "note", index).load()
    index.set_note("trust", "")
    assert TrustNote(tmp_path / "note", index).load() == (None, {})
    index.close()


# -- key sets that cannot be read --------------------------------------------------------------------------------------


async def put(host: Host, name: str, data: bytes) -> None:
    info = await host.bucket.get_info(name)
    (result,) = await host.bucket.put_many([SmallPut(ObjectMeta(name), data, None, info.seq if info else 0)])
    assert result.error is None


@pytest.mark.fault("K9")
@pytest.mark.parametrize("version", [1, 2])
async def test_k9_a_key_set_whose_content_is_gone_ends_the_chain_there(host: Host, version: int) -> None:
    """The bytes of the first or the second key set are removed from the bucket.

    The round goes on with the keys reached before, follows a new generation, and says so once.
    """
    await host.push("one")
    await host.pull()
    await host.change(KeyChange(threshold=1, why="nothing"), host.signer)
    if version == 2:
        await host.pull()
        await host.drop(host.signer, by=host.other)
    info = await host.bucket.get_info(keys_name(version))
    assert info is not None
    del host.store.stream("app").chunks[info.nuid]
    await host.push("two")
    with capture_logs() as logs:
        await host.pull()
    assert host.has() == "two"
    assert [line["version"] for line in logs if line["event"] == "key_set_refused"] == [version]


@pytest.fixture
async def thread() -> AsyncIterator[FolderThread]:
    thread = FolderThread("test")
    yield thread
    await thread.close(lambda: None)


@pytest.mark.fault("K9", "O5")
async def test_k9_a_junk_key_set_costs_one_listing(
    host: Host, thread: FolderThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """39 key sets of junk are written into the bucket, most of them longer than a record may be.

    In four rounds the bucket is listed once and each is refused once; what is new is found.
    """
    await host.push("one")
    await put(host, keys_name(1), b"junk")
    for version in range(2, 40):
        await put(host, keys_name(version), b"x" * (RECORD_MAX + 1))
    asked: list[int] = []
    infos: list[str] = []
    real_changes, real_info = MemoryBucket.changes, MemoryBucket.get_info

    def changes(self: MemoryBucket, after: int, *, at_least: int = 0) -> AsyncIterator[Any]:
        asked.append(after)
        return real_changes(self, after, at_least=at_least)

    async def get_info(self: MemoryBucket, name: str) -> Any:
        infos.append(name)
        return await real_info(self, name)

    monkeypatch.setattr(MemoryBucket, "changes", changes)
    monkeypatch.setattr(MemoryBucket, "get_info", get_info)
    guard = Guard(host.bucket, HEAD, host.trust, TrustNote(None), thread, lambda: host.now)
    with capture_logs() as logs:
        for _ in range(4):
            guard.begin(await host.bucket.state())
            await guard.follow()
            await guard.follow()
    assert asked == [0]
    assert len(infos) <= 40 + 3 * (2 + MAX_TRIED_AGAIN)
    refused = [line["version"] for line in logs if line["event"] == "key_set_refused"]
    assert len(refused) == len(set(refused)) == 39  # each once
    # what is new is found, and a bucket that is made again is read from the beginning
    asked.clear()
    await host.push("two")
    guard.begin(await host.bucket.state())
    await guard.follow()
    assert len(asked) == 1
    assert asked[0] > 0
    guard.begin(replace(await host.bucket.state(), created="another"))
    await guard.follow()
    assert asked[1:] == [0]


@pytest.mark.fault("K9")
async def test_k9_key_sets_that_come_later_are_found_where_the_first_one_leads_nowhere(
    host: Host, thread: FolderThread
) -> None:
    """The first key set is signed by a key that this host does not name; later comes one that its key has signed.

    It stays at its own keys, then follows the second one.
    """
    await host.push("one")
    late = Trust(frozenset({host.other.public}), 1)
    await host.drop(host.signer, by=host.signer)
    guard = Guard(host.bucket, HEAD, late, TrustNote(None), thread, lambda: host.now)
    new = Signer(generate()[0])
    versions = []
    for _ in range(2):
        guard.begin(await host.bucket.state())
        await guard.follow()
        assert guard._trust is not None
        versions.append(guard._trust.version)
        if len(versions) == 1:
            await KeySets(host.bucket, lambda: host.now).change(late, KeyChange(add=(new.public,)), [host.other])
    assert versions == [0, 2]


@pytest.mark.fault("K9")
@pytest.mark.parametrize("version", [1, 2])
async def test_k9_a_key_set_whose_metadata_is_junk_ends_the_chain_there(host: Host, version: int) -> None:
    """The metadata of the first or the second key set is overwritten with junk in the bucket.

    The round does not fail, and a new generation is followed.
    """
    await host.push("one")
    await host.pull()
    if version == 2:
        await host.change(KeyChange(threshold=1, add=(Signer(generate()[0]).public,)), host.signer)
        await host.pull()
    host.store.write_raw_meta("app", wire.meta_subject("app", keys_name(version)).rpartition(".")[2], b"junk")
    await host.push("two")
    await host.pull()
    assert host.has() == "two"
