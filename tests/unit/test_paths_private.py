"""The name that is syncd's own: wherever it stands in a path, and however a filesystem may read it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from syncd.errors import BadName, SyncdError
from syncd.extraneous import Extraneous
from syncd.index import LocalRow
from syncd.mirror import Mirror
from syncd.mirror.journal import encode
from syncd.model import Entry, Kind, Stat
from syncd.paths import check_path, is_private, is_usable
from syncd.plan import MirrorPlan, Place
from syncd.rules import Rules
from syncd.scan import Scanner
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.memory import MemoryStore
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.support import mirror as small
from tests.support.drift import Mirrored
from tests.support.generations import Publisher, file, folder

if TYPE_CHECKING:
    from pathlib import Path

OURS = [
    ".syncd", "a/.syncd", ".syncd/journal", "a/b/.syncd/stage/x", ".Syncd/journal", "a/.SYNCD", ".\u017fyncd/lock",
    "a/.s\u200cyncd/journal", "\ufeff.syncd", ".syncd\u2064/x", "zo\u00eb/.syncd",
]  # fmt: skip
OTHERS = [".syncdignore", "syncd", "a.syncd", ".syncd2/x", ".syncd.d", "a/.syncd~", ".s-yncd", "zo\u00eb/.syncdx"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.fault("P6")
def test_the_private_name_is_refused_wherever_it_stands(name: str) -> None:
    """`.syncd` is put anywhere into a path, in any case, with invisible or look-alike characters.

    It is refused as a path and left out by the rules: a filesystem may make no difference.
    """
    assert is_private(name)
    assert not is_usable(name)
    with pytest.raises(BadName, match="reserved"):
        check_path(name)
    assert not Rules().takes(name, is_dir=False)
    assert not Rules().may_descend(name)


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_only_look_like_it_are_anybodys(name: str) -> None:
    assert not is_private(name)
    assert check_path(name) == name


@pytest.mark.parametrize("name", ["inner/.syncd", "inner/.Syncd"])
@pytest.mark.fault("P6")
def test_a_source_keeps_the_private_directory_of_a_mirror_within_it_to_itself(tmp_path: Path, name: str) -> None:
    """Below the source lies a mirror, with a journal and a stage in its `.syncd` or `.Syncd`.

    A scan finds the mirror and its file, and nothing of the private directory.
    """
    (tmp_path / name / "stage").mkdir(parents=True)
    (tmp_path / name / "journal").write_text("secret")
    (tmp_path / "inner/f").write_text("f")
    found = Scanner(tmp_path, Rules(), symlinks="inside").scan("", lambda _: ())
    assert [item.row.path for item in found if hasattr(item, "row")] == ["inner", "inner/f"]


@pytest.mark.parametrize("name", [".syncd", ".Syncd"])
@pytest.mark.fault("P6")
async def test_nobody_writes_the_journal_of_a_mirror_within_his(tmp_path: Path, name: str) -> None:
    """A mirror lies below another one, whose publisher sends a journal with what it is to do at its next start.

    Nothing of it is written, and after its next start the inner mirror has what it had.
    """
    inner = tmp_path / "outer/app"
    with Mirror.open(inner) as mirror:
        small.Keeper(mirror).go({"f": small.file("good")})
    store = MemoryStore()
    evil = b"evil"
    entry = Entry(Kind.FILE, 0o4755, 1, len(evil), blake3(evil).hexdigest())
    journal = b"".join(encode(MirrorPlan(place=(Place("f", entry, "00000000-0", None),)), "repair"))
    stage = folder({"00000000-0": file(evil, mode=0o4755)}, mode=0o700)
    private = folder({"journal": file(journal), "stage": stage}, mode=0o700)
    await Publisher(store, "outer").commit({"app": folder({name: private})})
    status = StatusKeeper(FolderStatus("subscribe", "outer", "/"), clock=time.time, report=lambda _: None)
    options = SubscribeOptions("outer", tmp_path / "outer", Rules())
    try:
        await Subscriber(options, store, tmp_path / "outer.db", status=status).pull()
    except SyncdError as error:
        assert ".syncd" in str(error)  # noqa: PT017 - refused or left out: never written
    assert [path.name for path in inner.iterdir() if is_private(path.name)] == [".syncd"]
    assert sorted(path.name for path in (inner / ".syncd").iterdir()) == ["lock", "stage"]
    with Mirror.open(inner) as mirror:
        mirror.recover()
    assert (inner / "f").read_text() == "good"


@pytest.mark.fault("P6")
def test_a_mirror_within_this_one_stays_whatever_is_extraneous(tmp_path: Path) -> None:
    """Below a mirror lie directories that hold `.syncd` or `.Syncd`, as other mirrors do, and one that does not.

    Only the latter and its file are extraneous, and no private directory is walked.
    """
    kept = Mirrored(tmp_path / "m", {"f": small.file("f")})
    for name in ("inner/.syncd/stage", "other/.Syncd", "mine"):
        (kept.root / name).mkdir(parents=True)
    (kept.root / "inner/f").write_text("theirs")
    (kept.root / "mine/f").write_text("extraneous")
    strangers = Extraneous(kept.mirror, kept.index, Rules(), "app")
    assert [stranger.path for stranger in strangers.find()] == ["mine/f", "mine"]
    assert [path for path, _ in kept.mirror.walk()] == ["f", "inner", "inner/f", "mine", "mine/f", "other"]
    kept.close()


@pytest.mark.fault("P6")
def test_what_an_older_version_kept_under_the_name_is_forgotten(tmp_path: Path) -> None:
    """A mirror's index is given a row for `a/.syncd/journal`, as older versions did, and another file is changed.

    The row is forgotten, the journal stays on disk, and the changed file is found.
    """
    kept = Mirrored(tmp_path / "m", {"f": small.file("f"), "g": small.file("g")})
    (kept.root / "a/.syncd").mkdir(parents=True)
    (kept.root / "a/.syncd/journal").write_text("old")
    row = LocalRow("a/.syncd/journal", Entry(Kind.FILE, 0o644, 1, 3, "00" * 32), Stat(3, 1, 1, 1))
    kept.index.put_local([row])
    (kept.root / "g").write_text("changed")
    kept.drift.check()
    assert kept.index.local(row.path) is None
    assert kept.differences() == {"g"}
    assert (kept.root / "a/.syncd/journal").exists()
    kept.close()
