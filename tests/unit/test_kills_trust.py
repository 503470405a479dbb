"""SIGKILL while what is trusted and was seen is written down: nothing that one of the copies says is forgotten.

The note is a file with a copy in the index. A process that does one round is killed at each passage of each of the two
points in between (:mod:`tests.support.killpoints`, role ``truster``); then others, each on a state of its own, are
shown what is older, with everything as the kill left it, or with one of the two lost.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from syncd.guard import COPY
from syncd.index import Index
from syncd.store.base import HEAD
from syncd.subscriber import TRUST_FILE
from tests.support.forks import Forks, Outcome
from tests.support.killpoints import points
from tests.support.mirror import litter
from tests.support.returns import PULL_TRUSTING, save_bucket
from tests.unit.test_guard_attacks import Host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POINTS = [point.name for point in points("truster", "generations")]
MOST_PASSAGES = 5


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    found = Forks(tmp_path / "forks")
    yield found
    found.close()


@dataclass(frozen=True)
class Noted:
    """What one of the two says.

    :ivar step: how often it was written.
    :ivar version: of the key set.
    :ivar count, highest: of the channel's moves and generations.
    """

    step: int = 0
    version: int = 0
    count: int = 0
    highest: int = 0

    @classmethod
    def read(cls, text: str) -> Noted:
        if not text:
            return cls()
        fields = json.loads(text)
        head = fields["seen"].get(HEAD, {"count": 0, "highest": 0})
        return cls(fields["step"], fields["trust"]["version"], head["count"], head["highest"])

    @property
    def says(self) -> Noted:
        return replace(self, step=0)


@dataclass(frozen=True)
class Site:
    """One host's directory: a mirror, and beside it the index with the note."""

    root: Path
    forks: Forks
    keys: list[str]

    def pull(self, bucket: Path, crash: str = "") -> Outcome:
        return self.forks.run(
            PULL_TRUSTING, crash=crash, bucket=str(bucket), mirror=str(self.root / "mirror"), index=str(self.index),
            keys=self.keys,
        )  # fmt: skip

    def twin(self, name: str) -> Site:
        """The same host, to be led elsewhere."""
        root = self.root.with_name(name)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.root, root, symlinks=True)
        return replace(self, root=root)

    @property
    def index(self) -> Path:
        return self.root / "state/index.db"

    @property
    def note(self) -> Path:
        return self.index.with_name(TRUST_FILE)

    @property
    def has(self) -> str:
        file = self.root / "mirror/f"
        return file.read_text() if file.exists() else ""

    def noted(self) -> tuple[Noted, Noted]:
        """What file and copy say."""
        text = self.note.read_text() if self.note.exists() else ""
        index = Index(self.index)
        try:
            return Noted.read(text), Noted.read(index.note(COPY))
        finally:
            index.close()

    def lose_note(self) -> None:
        self.note.unlink()

    def lose_index(self) -> None:
        for path in self.index.parent.glob(f"{self.index.name}*"):
            path.unlink()

    def drafts(self) -> list[str]:
        names = {path.name.removeprefix(self.index.name) for path in self.index.parent.iterdir()}
        return sorted(names - {"", "-wal", "-shm", TRUST_FILE})


def check_noted(site: Site, before: Noted, after: Noted) -> Noted:
    """Each of the two is there, and says what it said or what it is to say; the file is never behind."""
    note, copy = site.noted()
    assert {note.says, copy.says} <= {before.says, after}
    assert note.step >= copy.step >= before.step
    return note


def check_refused(site: Site, bucket: Path, said: str) -> None:
    """It is not followed, whichever of the two is lost; nor once, nor again."""
    for number, lose in enumerate((lambda _: None, Site.lose_note, Site.lose_index)):
        twin = site.twin(f"twin{number}")
        lose(twin)
        for _ in range(2):
            outcome = twin.pull(bucket)
            assert (outcome.error, said in outcome.text) == ("Untrusted", True), outcome
            assert twin.has == site.has


@pytest.mark.fault("K2", "K11", "C1")
@pytest.mark.parametrize("point", POINTS)
async def test_k2_killed_while_it_notes_what_it_saw_a_host_is_led_back_by_nobody(
    point: str, tmp_path: Path, forks: Forks, record_property: Any
) -> None:
    """SIGKILL before the note is replaced, and before its copy is; afterwards the head of before is shown again."""
    publisher = Host(tmp_path)
    site = Site(tmp_path / "site", forks, [publisher.signer.public, publisher.other.public])
    bucket, replayed = tmp_path / "bucket", tmp_path / "replayed"
    await publisher.push("1")
    save_bucket(publisher.store, bucket)
    before = Noted()
    for passage in (1, 2):  # of the very first starts
        assert site.pull(bucket, f"{point}:{passage}").killed
        before = check_noted(site, before, Noted(count=1, highest=1))
        assert site.has == ""
    assert site.pull(bucket) == Outcome(value=1)
    kills = 0
    for passage in range(1, MOST_PASSAGES):
        old = await publisher.head()
        number = await publisher.push(str(passage + 1))
        save_bucket(publisher.store, bucket)
        now = await publisher.head()
        await publisher.point(number - 1, old)
        save_bucket(publisher.store, replayed)
        await publisher.point(number, now)
        before, copied = site.noted()
        assert before == copied
        killed = site.pull(bucket, f"{point}:{passage}").killed
        if not killed:
            break
        kills += 1
        new = Noted(count=before.count + 1, highest=number)
        note = check_noted(site, before, new)
        assert (note.says == new) is (point == "trust_noted" and passage == kills == 2)
        assert site.has == str(number - 1), "it was followed before it was written down"
        again = site.twin("again")
        outcome = again.pull(replayed)
        if note.says == new:  # the copy is not: the newer of both counts
            assert (outcome.error, "rollback or replay" in outcome.text) == ("Untrusted", True), outcome
        else:
            assert outcome == Outcome(value=number - 1)
        if note.step == before.step:
            assert site.drafts() == [f".{TRUST_FILE}.new"]
        assert site.pull(bucket) == Outcome(value=number)
        assert site.has == str(number)
        assert site.noted()[0] == site.noted()[1]
        assert site.noted()[0].says == new
        assert (site.drafts(), litter(site.root / "mirror")) == ([], [])
        check_refused(site, replayed, "rollback or replay")
    record_property("fault_runs", 2 + kills)
    assert kills == 2, "a start notes what it found, then what it sees"


@pytest.mark.fault("K9", "K11", "C1")
@pytest.mark.parametrize("point", POINTS)
async def test_k9_killed_while_it_notes_a_key_set_a_host_trusts_no_removed_key_again(
    point: str, tmp_path: Path, forks: Forks
) -> None:
    """SIGKILL while it is noted that a key is removed; then a commit of that key is shown, and no key set."""
    publisher = Host(tmp_path)
    site = Site(tmp_path / "site", forks, [publisher.signer.public, publisher.other.public])
    bucket, forged = tmp_path / "bucket", tmp_path / "forged"
    publisher.publish["signer"] = publisher.other
    await publisher.push("good")
    save_bucket(publisher.store, bucket)
    assert site.pull(bucket) == Outcome(value=1)
    before, _ = site.noted()
    publisher.publish["signer"] = publisher.signer
    await publisher.push("evil")
    save_bucket(publisher.store, forged)
    publisher.store._streams = pickle.loads(bucket.read_bytes())
    await publisher.drop(publisher.signer, by=publisher.other)
    save_bucket(publisher.store, bucket)
    assert site.pull(bucket, point).killed
    new = replace(before.says, version=1)
    note = check_noted(site, before, new)
    assert (note.says == new) is (point == "trust_noted")
    outcome = site.twin("again").pull(forged)
    if note.says == new:  # the copy is not: the newer of both counts
        assert (outcome.error, "0 good signatures" in outcome.text) == ("Untrusted", True), outcome
    else:
        assert outcome == Outcome(value=2)
    assert site.pull(bucket) == Outcome(value=1)
    assert [one.says for one in site.noted()] == [new, new]
    assert (site.has, site.drafts(), litter(site.root / "mirror")) == ("good", [], [])
    check_refused(site, forged, "0 good signatures")
