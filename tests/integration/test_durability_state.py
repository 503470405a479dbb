"""Power cuts, and what a host remembers: notes on trust and pins, words of a person, lists of changes, seeds, indexes.

As in ``test_durability.py`` twice: small files on a model that loses whatever was not synced, after each system call;
and what SQLite keeps on real filesystems that the kernel stops, under processes that die at their named points.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from syncd.cli_channels import write_seed
from syncd.errors import ConfigError, DiskProblem
from syncd.guard import TrustNote
from syncd.hooks import changed_line, write_changed_file
from syncd.index import Index
from syncd.mirror.mirror import sync_filesystem
from syncd.signatures import generate
from syncd.statedir import StateDir
from syncd.status import FolderStatus
from syncd.store.memory import MemoryStore
from syncd.trust import Trust
from syncd.wiring import read_signer
from tests.support.forks import Forks, Outcome
from tests.support.generations import Publisher, Tree, expected, file, folder, found
from tests.support.outages import NOTE, PULL, PUSH, asked, twin
from tests.support.powercut import KINDS, LossyDisk, why_not
from tests.support.recording import Recorder, Recording
from tests.support.returns import save_bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from syncd.hooks import ChangeLetter
    from tests.support.killpoints import Mode
    from tests.support.recording import Crash

SEED = int(os.environ.pop("SYNCD_TEST_STATE_CUT_SEED", str(random.randrange(2**32))))
SAMPLES = 3


# -- small files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Something that a host writes down, once before and once under the eyes of the recorder.

    :ivar write: writes the first or the second one into a directory.
    :ivar read: what a start finds there.
    :ivar syncs: the promises that it asks the kernel for.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], Any]
    syncs: tuple[str, ...] = ("fsync", "fsync")


KEYS = [generate()[1] for _ in range(2)]


def _save_trust(where: Path, number: int) -> None:
    note = TrustNote(where / "trust.json")
    note.load()
    note.save(Trust(frozenset(KEYS), number), {})


def _load_trust(where: Path) -> Any:
    trust, _ = TrustNote(where / "trust.json").load()
    return trust and trust.threshold


CHANGES: tuple[list[tuple[ChangeLetter, str]], ...] = (
    [("A", "one"), ("A", "two"), ("M", "three")],
    [("D", f"a path of the second list {number}") for number in range(40)],
)


def _write_changes(where: Path, number: int) -> None:
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        write_changed_file(fd, "changed-paths", CHANGES[number - 1])
    finally:
        os.close(fd)


def _read_changes(where: Path) -> Any:
    file = where / "changed-paths"
    if not file.exists():
        return None
    text = file.read_text()
    lists = ["".join(changed_line(letter, path) for letter, path in lines) for lines in CHANGES]
    return lists.index(text) + 1 if text in lists else text


def _seed(where: Path, number: int) -> None:
    if number == 2:
        write_seed(where / "seed")


def _read_seed(where: Path) -> Any:
    try:
        return read_signer(where / "seed").public
    except ConfigError:  # none, or half of one, which is refused as none and not written over: make another one
        return None


def _pin(where: Path, number: int) -> None:
    state = StateDir(where)
    state.prepare()
    state.pin("app").set(number)


def _unpin(where: Path, number: int) -> None:
    _pin(where, 2 - number)


def _allow(where: Path, number: int) -> None:
    state = StateDir(where)
    state.prepare()
    allowance = state.allowance("publish", "app")
    if number == 1:
        allowance.give()
    else:
        allowance.clear()


def _deny(where: Path, number: int) -> None:
    _allow(where, 3 - number)


def _allowed(where: Path) -> bool:
    return StateDir(where).allowance("publish", "app").given()


KEPT = {
    "seed": Kept(_seed, _read_seed),
    "trust": Kept(_save_trust, _load_trust),
    "changes": Kept(_write_changes, _read_changes),
    "pin": Kept(_pin, lambda where: StateDir(where).pin("app").number()),
    "no pin": Kept(_unpin, lambda where: StateDir(where).pin("app").number(), ("fsync",)),
    "allowed": Kept(_deny, _allowed, ("fsync",)),
    "used": Kept(_allow, _allowed, ("fsync",)),
}


def recorded(kept: Kept, root: Path, *, first: bool) -> tuple[Recording, Any, Any]:
    """What it does to write the second one, with what is read before and after.

    :param first: there is no first one: the file is made.
    """
    root.mkdir()
    StateDir(root).prepare()
    if not first:
        kept.write(root, 1)
    before = kept.read(root)
    with Recorder(root) as recorder:
        kept.write(root, 2)
    assert recorder.recording.check(root) == []
    return recorder.recording, before, kept.read(root)


def found_after(crash: Crash, where: Path, read: Callable[[Path], Any]) -> Any:
    """What a start finds after a power cut; what it refuses to read is told."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    crash.disk.build(where)
    try:
        with capture_logs():
            return read(where)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no answer
        return repr(error)


def broken(recording: Recording, where: Path, kept: Kept, before: Any, after: Any) -> Iterator[str]:
    """Every power cut that leaves something else than the old or the new, or the old after the new was promised."""
    for crash in recording.crashes(seed=SEED, samples=SAMPLES):
        found = found_after(crash, where, kept.read)
        allowed = [after] if crash.position == len(recording.ops) else [before, after]
        if found not in allowed:
            yield f"SYNCD_TEST_STATE_CUT_SEED={SEED}, after call {crash.position}, {crash.how}: {found!r}"


@pytest.mark.fault("C2")
@pytest.mark.parametrize("first", [False, True], ids=["replaced", "made"])
@pytest.mark.parametrize("what", KEPT)
def test_what_is_written_down_is_the_old_or_the_new_and_the_new_once_it_was_said(
    tmp_path: Path, what: str, first: bool, record_property: Callable[[str, object], None]
) -> None:
    """What is noted is recorded while it is written, and what was not synced is dropped after each system call."""
    kept = KEPT[what]
    recording, before, after = recorded(kept, tmp_path / "recorded", first=first)
    if before != after:
        assert tuple(recording.ops[position].word for position in recording.syncs()) == kept.syncs
    assert list(broken(recording, tmp_path / "rebuilt", kept, before, after)) == []
    record_property("fault_runs", sum(1 for _ in recording.crashes(seed=SEED, samples=SAMPLES)))


@pytest.mark.fault("C2")
@pytest.mark.parametrize("what", KEPT)
def test_every_sync_of_what_is_written_down_is_needed(tmp_path: Path, what: str) -> None:
    """Each of its syncs is taken out of the recording in turn: the check finds a cut that tears or undoes it."""
    kept = KEPT[what]
    recording, before, after = recorded(kept, tmp_path / "recorded", first=False)
    for position in recording.syncs():
        other = recording.without(position)
        assert next(broken(other, tmp_path / "rebuilt", kept, before, after), ""), f"{recording.ops[position]} can go"


@pytest.mark.fault("C2")
def test_a_status_that_a_power_cut_tore_is_none_or_the_one_before(tmp_path: Path) -> None:
    """Status files are never synced: after each system call of one that is written they are cut off, and read."""

    def write(where: Path, number: int) -> None:
        StateDir(where).write_status("a.json", FolderStatus("publish", "app", "/", entries=number).to_json())

    def read(where: Path) -> Any:
        _, folders = StateDir(where).read_status()
        return folders[0].entries if folders else None

    recording, before, after = recorded(Kept(write, read), tmp_path / "recorded", first=False)
    found = {
        (crash.position, found_after(crash, tmp_path / "rebuilt", read))
        for crash in recording.crashes(seed=SEED, samples=SAMPLES)
    }
    assert {what for _, what in found} == {before, after, None}
    assert recording.syncs() == []


# -- indexes -----------------------------------------------------------------------------------------------------------

ONE: Tree = {
    "a": file("one"),
    "d": folder({"x": file("x"), "y": file("y")}),
    "gone": file("not in the next one"),
    "same": file("same"),
}
TWO: Tree = {
    "a": file("two"),
    "d": folder({"x": file("x"), "passing": file("in the second one only")}),
    "same": file("same"),
}
THREE: Tree = {"a": file("three"), "d": folder({"x": file("x")}), "same": file("same")}
CHANGED = ["A\td/passing", "D\td/y", "D\tgone", "M\ta"]
BAD: Tree = {**TWO, "bad": file("!")}

POINTS: dict[Mode, tuple[str, ...]] = {
    "mirror": ("generation_staged", "batch_applied", "hooks_begun", "hooks_done"),
    "release": ("release_built", "release_switched", "hooks_begun"),
}
CARELESS = "ext4, careless"


def settle(disk: LossyDisk) -> None:
    """Have all that was written until now on the disk."""
    fd = os.open(disk.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_filesystem(fd)
    finally:
        os.close(fd)


class Host:
    """A mirror that has generation 1, a part of it on a filesystem that can be stopped.

    :param lossy: what is on that one: the state directory, the mirror, or both; the rest is where nothing gets lost.
    """

    def __init__(
        self, directory: Path, disk: LossyDisk, forks: Forks, mode: Mode = "mirror", *, lossy: str = "state"
    ) -> None:
        self.directory, self.disk, self.forks, self.mode = directory, disk, forks, mode
        self.store = MemoryStore()
        self.publisher = Publisher(self.store)
        self.index = (disk.root if lossy != "mirror" else directory) / "state/index.db"
        self.mirror = (disk.root if lossy != "state" else directory) / "mirror"
        self.log = directory / "log"
        self.keys: list[str] | None = None
        self.hooked = True

    def publish(self, tree: Tree) -> None:
        asyncio.run(self.publisher.commit(tree))
        save_bucket(self.store, self.directory / "bucket")

    def pull(self, crash: str = "") -> Outcome:
        return self.forks.run(
            PULL, crash=crash, bucket=str(self.directory / "bucket"), mirror=str(self.mirror), index=str(self.index),
            log=str(self.log) if self.hooked else "", mode=self.mode, keys=self.keys,
        )  # fmt: skip

    def begin(self, *trees: Tree) -> None:
        """Have some generations, and all of it on the disk."""
        for tree in trees:
            self.publish(tree)
            assert self.pull().value["generation"] == self.publisher.number
        settle(self.disk)
        self.log.unlink(missing_ok=True)

    def cut(self, point: str, *, journal: bool) -> None:
        """Die at a named point, and lose what is not on the disk by then."""
        assert self.pull(point).killed, point
        self.disk.cut(journal=journal)

    def found(self) -> dict[str, tuple[Any, ...]]:
        return found((self.mirror / "current").resolve() if self.mode == "release" else self.mirror)

    def wanted(self, tree: Tree) -> dict[str, tuple[Any, ...]]:
        """A release is read-only."""
        if self.mode == "mirror":
            return expected(tree)
        return {
            path: what if what[0] == "symlink" else (what[0], what[1] & ~0o222, *what[2:])
            for path, what in expected(tree).items()
        }


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LossyDisk]:
    """A filesystem that can be stopped; of the kind that loses most, where a test does not say which."""
    kind = getattr(request, "param", CARELESS)
    reason = why_not(kind)
    if reason:
        pytest.skip(f"no filesystem to cut off: {reason}")
    disk = LossyDisk(tmp_path / "disk", kind)
    try:
        yield disk.make()
    finally:
        disk.remove()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts processes for all tests of this module."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    try:
        yield made
    finally:
        made.close()


@pytest.mark.fault("C2 C6")
@pytest.mark.parametrize("lossy", ["state", "mirror", "both"])
@pytest.mark.parametrize("mode", ["mirror", "release"])
def test_what_was_begun_before_a_power_cut_is_finished_after_it(
    tmp_path: Path,
    disk: LossyDisk,
    forks: Forks,
    mode: Mode,
    lossy: str,
    record_property: Callable[[str, object], None],
) -> None:
    """A host dies at named points, and the filesystem that its state, its mirror, or both are on is stopped."""
    one = Host(tmp_path, disk, forks, mode, lossy=lossy)
    one.begin(ONE)
    for number, point in enumerate(POINTS[mode]):
        one.publish(TWO)
        one.cut(point, journal=number % 2 == 1)
        done = one.pull()
        assert one.found() == one.wanted(TWO), point
        name, generation, changes = asked(one.log)[-1]
        assert (name, generation) == ("apply", one.publisher.number), point
        if changes is not None or mode == "mirror":  # of a release that was there already nobody knows them
            assert sorted(changes or ()) == CHANGED, point
        if lossy == "state" and point not in {"generation_staged", "release_built"}:
            assert done.value["downloaded"] == 0, point
        one.begin(ONE)
    record_property("fault_runs", len(POINTS[mode]))


@pytest.mark.fault("C2 C6")
@pytest.mark.parametrize("disk", KINDS, indirect=True)
def test_an_index_forgets_its_last_transactions_at_most_and_none_that_was_synced(disk: LossyDisk, forks: Forks) -> None:
    """A process writes into an index and dies; its filesystem is stopped, with its journal written and without."""
    index = disk.root / "state/index.db"
    for journal in (False, True):
        first = 1000 * journal + 1
        synced, last = first + 400, first + 430
        assert forks.run(NOTE, index=str(index), first=first, synced=synced, last=last).killed
        disk.cut(journal=journal)
        kept = Index(index)
        found, beside, recovered = int(kept.note("number", "0")), kept.note("twin"), kept.recovered
        kept.close()
        assert (beside, recovered) == (twin(found), "")
        assert synced <= found <= last


@pytest.mark.fault("C2 X2")
def test_an_index_that_cannot_be_made_durable_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fsync fails with EIO; one that lives in memory, or that nobody wrote to, has nothing to lose."""
    refused = OSError(errno.EIO, os.strerror(errno.EIO))
    kept = Index(tmp_path / "index.db")
    kept.set_note("number", "1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(refused))
        with pytest.raises(DiskProblem, match="Input/output error"):
            kept.sync()
        Index(None).sync()
    kept.sync()
    kept.close()
    again = Index(tmp_path / "index.db")
    (tmp_path / "index.db-wal").unlink(missing_ok=True)
    again.sync()
    again.close()


@pytest.mark.fault("C2 D5")
@pytest.mark.parametrize("lossy", ["state", "both"])
def test_what_was_placed_before_a_power_cut_is_still_ours_after_it(
    tmp_path: Path, disk: LossyDisk, forks: Forks, lossy: str
) -> None:
    """A host's power is cut when a generation is in place, and a newer one has not all of its files any more."""
    one = Host(tmp_path, disk, forks, lossy=lossy)
    one.begin(ONE)
    one.publish(TWO)
    one.cut("done", journal=True)
    one.publish(THREE)
    one.pull()
    assert one.found() == one.wanted(THREE)


@pytest.mark.fault("C2 C7")
@pytest.mark.parametrize("point", ["checked", "hook_ended:2"], ids=["check", "apply"])
@pytest.mark.parametrize("mode", ["mirror", "release"])
def test_a_generation_whose_hooks_cut_the_power_is_held_back(
    tmp_path: Path, disk: LossyDisk, forks: Forks, mode: Mode, point: str
) -> None:
    """At each start the power is cut while a hook of one generation runs, before or after it is in place."""
    one = Host(tmp_path, disk, forks, mode)
    one.begin(ONE)
    one.publish(TWO)
    for _ in range(3):
        one.cut(point, journal=False)
    one.pull(point)
    one.pull()
    counted = {name: [ask[:2] for ask in asked(one.log)].count((name, 2)) for name in ("check", "apply")}
    assert counted["check" if point == "checked" else "apply"] == 3
    assert one.found() == one.wanted(ONE)


@pytest.mark.fault("C2 R1")
@pytest.mark.parametrize("mode", ["mirror", "release"])
def test_a_refused_generation_is_refused_after_a_power_cut(
    tmp_path: Path, disk: LossyDisk, forks: Forks, mode: Mode
) -> None:
    """A hook refuses a generation, the host goes back, and its power is cut."""
    one = Host(tmp_path, disk, forks, mode)
    one.begin(ONE)
    one.publish(BAD)
    one.cut("hooks_done", journal=False)
    before = [("check", 2), ("apply", 2), ("apply", 1)]
    assert [ask[:2] for ask in asked(one.log)] == before
    one.pull()
    assert [ask[:2] for ask in asked(one.log)] == [*before, ("apply", 1)]
    assert one.found() == one.wanted(ONE)


@pytest.mark.fault("C2 R2")
@pytest.mark.parametrize("mode", ["mirror", "release"])
def test_what_the_check_refused_is_not_tried_again_after_a_power_cut(
    tmp_path: Path, disk: LossyDisk, forks: Forks, mode: Mode
) -> None:
    """The check hook refuses a generation, and before anything else happens the power is cut."""
    one = Host(tmp_path, disk, forks, mode)
    one.begin(ONE)
    one.publish({**TWO, "unfit": file("!")})
    one.cut("refused", journal=False)
    assert one.pull().error == "Held"
    assert [ask[:2] for ask in asked(one.log)] == [("check", 2)]
    assert one.found() == one.wanted(ONE)


# -- what was seen, and what was published -----------------------------------------------------------------------------


class Origin:
    """A publisher with its state directory on a filesystem that can be stopped, its source and bucket elsewhere."""

    def __init__(self, directory: Path, disk: LossyDisk, forks: Forks) -> None:
        self.directory, self.disk, self.forks = directory, disk, forks
        self.source, self.bucket = directory / "source", directory / "bucket"
        self.source.mkdir()
        self.seed, self.public = generate()

    def change(self, **files: str) -> None:
        """Have some files instead of those before."""
        for before in self.source.iterdir():
            before.unlink()
        for name, text in files.items():
            (self.source / name).write_text(text)

    def push(self, layout: str = "generations", **options: Any) -> Outcome:
        """Publish, as :func:`tests.support.outages.push`."""
        seed = self.seed if layout == "generations" else ""
        return self.forks.run(
            PUSH, bucket=str(self.bucket), source=str(self.source), index=str(self.disk.root / "origin/index.db"),
            layout=layout, seed=seed, **options,
        )  # fmt: skip


@pytest.fixture
def origin(tmp_path: Path, disk: LossyDisk, forks: Forks) -> Origin:
    return Origin(tmp_path, disk, forks)


@pytest.mark.fault("C2 K2 K11")
@pytest.mark.parametrize("journal", [False, True], ids=["undone", "torn"])
def test_what_a_host_has_seen_is_not_forgotten_in_a_power_cut(tmp_path: Path, origin: Origin, journal: bool) -> None:
    """A host's power is cut when it has seen a generation and nothing more; the server then shows an older one."""
    one = Host(tmp_path, origin.disk, origin.forks)
    one.keys = [origin.public]
    origin.change(a="one")
    assert origin.push().value["generation"] == 1
    one.pull()
    old = origin.bucket.read_bytes()
    origin.change(a="two", b="two")
    assert origin.push().value["generation"] == 2
    settle(one.disk)
    one.cut("walked", journal=journal)
    new = origin.bucket.read_bytes()
    origin.bucket.write_bytes(old)
    assert one.pull().error == "Untrusted"
    origin.bucket.write_bytes(new)
    assert one.pull().value["generation"] == 2


@pytest.mark.fault("C2 C4 C6")
def test_a_publisher_goes_on_after_a_power_cut(tmp_path: Path, origin: Origin) -> None:
    """A publisher's power is cut after generations and collections that its index then knows nothing of."""
    large = random.Random(1).randbytes(100_000).hex()
    origin.change(a=large)
    origin.push()
    one = Host(tmp_path, origin.disk, origin.forks)
    settle(one.disk)
    origin.change(b=large[::-1])
    assert origin.push(die=True).killed
    (origin.source / "c").write_text("three")
    assert origin.push(die=True).killed
    assert origin.push(collect=True, die=True).killed
    origin.disk.cut(journal=False)
    assert origin.push().value == {"generation": 3, "uploaded": 0}
    origin.change(a=large)  # the index of before the cut thought that the bucket had it
    assert origin.push().value["generation"] == 4
    assert one.pull().value["generation"] == 4
    assert (one.mirror / "a").read_text() == large


@pytest.mark.fault("C2 N5 K2")
def test_a_number_is_not_used_again_where_publisher_and_server_lose_power(tmp_path: Path, origin: Origin) -> None:
    """A whole site loses power: the publisher's index and the server's last messages; a host has seen these."""
    origin.change(a="one")
    origin.push()
    old = origin.bucket.read_bytes()
    one = Host(tmp_path, origin.disk, origin.forks)
    settle(one.disk)
    origin.change(a="two")
    assert origin.push(die=True).killed
    one.keys, one.index = [origin.public], tmp_path / "kept/index.db"
    assert one.pull().value["generation"] == 2
    origin.disk.cut(journal=False)
    origin.bucket.write_bytes(old)
    origin.change(a="three")
    assert origin.push().value["generation"] == 3
    assert one.pull().value["generation"] == 3


@pytest.mark.fault("C2 C4 O2")
def test_content_that_was_freed_before_a_power_cut_is_not_announced_after_it(tmp_path: Path, origin: Origin) -> None:
    """A publisher of objects frees replaced content, loses power, and publishes the same content anew."""
    for text in ("once", "twice"):
        origin.change(a=text * 1000)
        origin.push("objects", grace=1000.0)
    settle(origin.disk)
    assert origin.push("objects", die=True).killed
    origin.disk.cut(journal=False)
    origin.change(a="once" * 1000)
    origin.push("objects", grace=1000.0)
    one = Host(tmp_path, origin.disk, origin.forks)
    one.hooked = False
    one.pull()
    assert (one.mirror / "a").read_text() == "once" * 1000
