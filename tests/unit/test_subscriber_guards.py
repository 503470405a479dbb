"""What a subscriber does beside its rounds while it runs, and what it leaves alone while something is held."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from syncd import drift as drift_module
from syncd.checkout import Held
from syncd.drift import AUDIT_SLICE, DriftCheck
from syncd.errors import SafetyHalt, Untrusted
from syncd.index import Index
from syncd.paths import subject_token
from syncd.reread import Audited
from syncd.rollout import RolloutOptions
from syncd.rules import Rules
from syncd.signatures import Signer, generate
from syncd.status import Allowance, FolderState, FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec, ObjectMeta, SmallPut
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from syncd.trust import Trust
from tests.support.generations import Publisher, Tree, expected, file, folder, found
from tests.support.mirror import lstat
from tests.support.trees import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from pathlib import Path


TREE: Tree = {"a": file("aaaa"), "b": file("bbbb"), "d": folder({"x": file("xxxx"), "y": file("yyyy")})}


class World:
    """One bucket in memory, and one mirror of it.

    :ivar history: every status of the subscriber.
    """

    def __init__(self, tmp: Path) -> None:
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.mirror = tmp / "mirror"
        self.index = tmp / "index.db"
        self.history: list[FolderStatus] = []
        self.status = StatusKeeper(FolderStatus("subscribe", "app", "/"), clock=time.time, report=self.history.append)

    def subscriber(self, *, allowance: Allowance | None = None, **options: Any) -> Subscriber:
        chosen = SubscribeOptions("app", self.mirror, Rules(), **options)
        return Subscriber(chosen, self.store, self.index, status=self.status, allowance=allowance)

    async def pull(self, *, allow_delete: bool = False, **options: Any) -> Any:
        return await self.subscriber(**options).pull(allow_delete=allow_delete)

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[None]:
        """Run one that looks at everything once, and from then on only where it is told to."""
        running = asyncio.create_task(self.subscriber(**{"rescan_seconds": 3600.0, **options}).run())
        try:
            await eventually(lambda: running.done() or self.status.now.state is FolderState.IN_SYNC)
            yield
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def rot(self, path: str, data: bytes) -> None:
        """Change content as a failing disk does: no stat field tells. (The index is told those of the new content.)"""
        here = self.mirror / path
        before = here.stat()
        with here.open("r+b") as opened:
            opened.write(data)
        os.utime(here, ns=(before.st_atime_ns, before.st_mtime_ns))
        with closing(Index(self.index)) as index:
            row = index.local(path)
            assert row is not None
            index.put_local([row._replace(stat=lstat(here))])

    def stranger(self) -> Path:
        """A file that syncd never wrote."""
        path = self.mirror / "stranger"
        path.write_text("mine")
        return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- beside the rounds -------------------------------------------------------------------------------------------------


@pytest.fixture
def slices(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each slice of an audit was allowed; it begins when the first round has ended."""
    allowed: list[int] = []
    real = DriftCheck.audit

    def audit(self: DriftCheck, budget_bytes: int) -> Audited:
        if world.status.now.state is not FolderState.IN_SYNC:
            return Audited()
        allowed.append(budget_bytes)
        return real(self, budget_bytes)

    monkeypatch.setattr(DriftCheck, "audit", audit)
    monkeypatch.setattr(drift_module, "PAUSE_SECONDS", 0.01)
    return allowed


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The paths that single rounds were told to look at; full rounds do not count."""
    told: list[set[str]] = []
    real = DriftCheck.check

    def check(self: DriftCheck, paths: Collection[str] | None = None) -> set[str] | None:
        if paths is not None:
            told.append(set(paths))
        return real(self, paths)

    monkeypatch.setattr(DriftCheck, "check", check)
    return told


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody watches the mirror, so nothing but what a test is about makes a round."""

    async def never(self: Subscriber, agenda: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Subscriber, "_feed_drift", never)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.fault("X2")
async def test_a_running_mirror_finds_and_repairs_what_the_disk_spoiled(
    world: World, slices: list[int], checked: list[set[str]]
) -> None:
    """A byte flipped under unchanged stat fields while nobody ran: no quick check sees it, the audit of a run does."""
    await world.publisher.commit(TREE)
    await world.pull()
    world.rot("d/x", b"xxXx")
    with capture_logs() as lines:
        async with world.running(verify_rate=3_000_000):
            await eventually(lambda: found(world.mirror) == expected(TREE), 20)
    assert [line["path"] for line in lines if line["event"] == "silent_corruption"] == ["d/x"]
    assert (set(slices), checked) == ({3_000_000}, [{"d/x"}])


async def test_an_audit_keeps_to_the_rate_that_was_asked_for(world: World, slices: list[int]) -> None:
    """A slow rate is one slice a second and no more of it; a fast one is cut into slices that others can bear."""
    await world.publisher.commit({"large": file(os.urandom(200_000))})
    for rate in (100_000, 4 * AUDIT_SLICE):
        slices.clear()
        async with world.running(verify_rate=rate):
            await eventually(lambda: slices)
        assert slices == [min(rate, AUDIT_SLICE)] * len(slices)


async def test_nothing_is_audited_where_that_is_off(world: World, slices: list[int]) -> None:
    """A rate of 0 reads nothing again, however long it runs."""
    await world.publisher.commit(TREE)
    async with world.running():
        await world.publisher.commit(TREE | {"c": file("cccc")})
        await eventually((world.mirror / "c").exists)
    assert slices == []


async def test_a_running_mirror_sees_what_others_change_in_it(world: World, checked: list[set[str]]) -> None:
    """Files written over by somebody else, one by one: repaired in moments, the next full round is an hour away."""
    await world.publisher.commit(TREE)
    async with world.running():
        await eventually(lambda: world.status.now.watching)
        for path in ("d/x", "a", "d/y"):  # the first may be found by the look that begins a watch
            (world.mirror / path).write_text("mine")
            await eventually(lambda: found(world.mirror) == expected(TREE), 10)
    assert any({path} in checked for path in ("d/x", "a", "d/y"))


@pytest.mark.usefixtures("unwatched")
async def test_a_full_round_comes_by_itself(world: World) -> None:
    """What nobody hints at is found when the time of a full round has come: here a stranger's file that must go."""
    await world.publisher.commit(TREE)
    async with world.running(extraneous="delete", rescan_seconds=0.2):
        stranger = world.stranger()
        await eventually(lambda: not stranger.exists(), 10)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.fault("D1")
async def test_a_persons_word_on_a_halt_is_heard_while_it_lasts(world: World) -> None:
    """An emptied source is held until somebody says that it is meant; the next round is not waited for."""

    class Word(Allowance):
        said = False

        def given(self) -> bool:
            return self.said

        def clear(self) -> None:
            self.said = False

    word = Word()
    await world.publisher.commit(TREE)
    async with world.running(allowance=word):
        await world.publisher.commit({})
        await eventually(lambda: world.status.now.state is FolderState.HALTED)
        assert found(world.mirror) == expected(TREE)
        word.said = True
        await eventually(lambda: found(world.mirror) == {}, 10)
        await eventually(lambda: not word.said)


# -- what syncd never wrote, while something is held -------------------------------------------------------------------


@pytest.mark.fault("D5 R2")
async def test_nothing_strange_is_removed_while_a_generation_is_held_back(world: World) -> None:
    """The check refuses the newest generation, beside a stranger's file; that goes with one that is applied."""
    await world.publisher.commit(TREE)
    await world.pull()
    stranger = world.stranger()
    await world.publisher.commit(TREE | {"c": file("cccc")})
    refusing = RolloutOptions(check=("/bin/false",))
    for _ in range(2):  # when the check runs, and when it is known to have failed
        with pytest.raises(Held, match="held back"):
            await world.pull(extraneous="delete", rollout=refusing)
        assert stranger.read_text() == "mine"
    await world.publisher.commit(TREE | {"c": file("CCCC")})
    result = await world.pull(extraneous="delete")
    assert (result.removed, stranger.exists()) == (1, False)


@pytest.mark.fault("D5 K1")
async def test_nothing_strange_is_removed_while_what_is_announced_is_not_trusted(world: World) -> None:
    """A generation that nobody has signed, on a host that asks for signatures."""
    await world.publisher.commit(TREE)
    await world.pull()
    stranger = world.stranger()
    await world.publisher.commit(TREE | {"c": file("cccc")})
    with pytest.raises(Untrusted):
        await world.pull(extraneous="delete", trust=Trust(frozenset({Signer(generate()[0]).public}), 1))
    assert stranger.read_text() == "mine"


@pytest.mark.fault("D1 D5")
async def test_nothing_strange_is_removed_while_a_plan_is_halted(world: World) -> None:
    """An emptied source against a full mirror: neither what syncd wrote goes, nor what it did not."""
    await world.publisher.commit(TREE)
    await world.pull()
    stranger = world.stranger()
    await world.publisher.commit({})
    with pytest.raises(SafetyHalt, match="would remove all"):
        await world.pull(extraneous="delete")
    assert stranger.read_text() == "mine"
    assert found(world.mirror).keys() == {*expected(TREE), "stranger"}
    await world.pull(extraneous="delete", allow_delete=True)
    assert found(world.mirror) == {}


async def put(store: MemoryStore, *names: str) -> None:
    await store.create_bucket("app", BucketSpec())
    await store.bucket("app").put_many([SmallPut(ObjectMeta(name), name.encode(), None, None) for name in names])


@pytest.mark.fault("D5 N5")
async def test_nothing_strange_is_removed_while_a_bucket_is_being_filled_again(world: World) -> None:
    """Made again and half full: what looks like a stranger's file may be what is still to be announced."""
    names = [f"f{number}" for number in range(10)]
    await put(world.store, *names)
    await world.pull()
    stranger = world.stranger()
    world.store = MemoryStore()
    await put(world.store, *names[:2])
    await world.pull(extraneous="delete")
    assert stranger.read_text() == "mine"
    await put(world.store, *names[2:])
    result = await world.pull(extraneous="delete")
    assert (result.removed, stranger.exists()) == (1, False)


@pytest.mark.fault("D5 O1")
async def test_what_looks_strange_under_a_name_that_is_refused_stays(world: World) -> None:
    """An object whose metadata cannot be read: what is here under its name is nobody's, and is not removed for it."""
    await put(world.store, "a", "b", "c", "d", "e")
    await world.pull()
    stranger = world.stranger()
    other = world.mirror / "other"
    other.write_text("nobody's")
    world.store.write_raw_meta("app", subject_token("stranger"), b"no metadata")
    result = await world.pull(extraneous="delete")
    assert (result.removed, stranger.read_text(), other.exists()) == (1, "mine", False)


@pytest.mark.fault("D1 D5")
async def test_much_that_is_strange_waits_for_a_word(world: World) -> None:
    """A mirror that was pointed at a directory full of others' files: all stays until that is said to be meant."""
    await world.publisher.commit(TREE)
    await world.pull()
    for number in range(5):
        (world.mirror / f"home{number}").write_text("mine")
    with pytest.raises(SafetyHalt, match="would remove 5 paths that syncd never wrote"):
        await world.pull(extraneous="delete")
    assert len(found(world.mirror)) == len(expected(TREE)) + 5
    await world.pull(extraneous="delete", allow_delete=True)
    assert found(world.mirror).keys() == expected(TREE).keys()


async def test_what_is_strange_waits_for_a_full_round(world: World) -> None:
    """A round for one hint does not go through the whole mirror; a stranger that comes meanwhile stays till then."""
    await world.publisher.commit(TREE)
    async with world.running(extraneous="delete"):
        stranger = world.stranger()
        await world.publisher.commit(TREE | {"c": file("cccc")})
        await eventually(lambda: world.status.now.generation == 2)
        await eventually(lambda: world.status.now.state is FolderState.IN_SYNC)
        assert stranger.read_text() == "mine"
    await world.pull(extraneous="delete")
    assert not stranger.exists()
