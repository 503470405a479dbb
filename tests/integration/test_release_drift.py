"""Drift that is to stay, or that cannot be mended, keeps no whole tree from being built of the next generation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import Folder
from tests.support.pair import subscriber_of
from tests.support.trees import difference

if TYPE_CHECKING:
    from pathlib import Path


def spoil(path: Path, what: str) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    if what == "edited":
        path.write_text("theirs")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("b")
    elif what == "directory":
        path.mkdir()
        (path / "theirs").touch()


def another(source: Path, what: str) -> None:
    """Make the next generation."""
    if what == "removed elsewhere":
        (source / "c").unlink()
    elif what == "mode":
        (source / "a").chmod(0o600)
    else:
        (source / what).write_text("changed")


def start(tmp_path: Path, how: str, **options: object) -> Folder:
    folder = Folder(tmp_path, how, **options)  # type: ignore[arg-type]
    for name in "abc":
        (folder.source / name).write_text(name)
    return folder


@pytest.mark.fault("L3 R6")
@pytest.mark.parametrize(
    ("drift", "what", "change"),
    [
        ("report", "edited", "b"),
        ("report", "gone", "a"),
        ("report", "fifo", "mode"),
        ("keep", "link", "removed elsewhere"),
        ("keep", "directory", "b"),
        ("keep", "edited", "a"),
    ],
)
async def test_drift_that_stays_in_one_release_is_not_in_the_next(
    tmp_path: Path, drift: str, what: str, change: str
) -> None:
    """A file of the current release is replaced where drift is left; then the next generation comes."""
    folder = start(tmp_path, "release", drift=drift)
    await folder.go()
    first = folder.tree.resolve()
    spoil(first / "a", what)
    assert [problem.path for problem in (await folder.pull()).problems] == (["a"] if drift == "report" else [])
    another(folder.source, change)
    await folder.go()
    assert folder.tree.resolve() != first
    assert (first / "a").is_file() is (what in {"edited", "link"})
    await folder.rests()


@pytest.mark.fault("L3 R2")
@pytest.mark.parametrize(
    ("drift", "what", "change"),
    [
        ("report", "edited", "b"),
        ("report", "gone", "a"),
        ("report", "link", "mode"),
        ("keep", "fifo", "removed elsewhere"),
        ("keep", "edited", "a"),
    ],
)
async def test_a_check_sees_the_whole_generation_where_drift_stays(
    tmp_path: Path, drift: str, what: str, change: str
) -> None:
    """A file of a mirror with a check hook is replaced where drift is left; then the next generation comes."""
    hook = ("sh", "-c", 'cp -a "$SYNCD_STAGED" "$0"', str(tmp_path / "seen"))
    folder = start(tmp_path, "generations", drift=drift)
    await folder.go()
    spoil(folder.mirror / "a", what)
    folder.check(hook)
    another(folder.source, change)
    await folder.push()
    await folder.pull()
    assert difference(folder.source, tmp_path / "seen") == {}
    left = folder.mirror / "a"
    assert {"edited": left.is_file(), "gone": not left.exists(), "fifo": left.is_fifo(), "link": left.is_symlink()}[
        what
    ]
    left.unlink(missing_ok=True)  # else it would be read to compare
    assert difference(folder.source, folder.mirror).keys() <= {"a"}
    folder.options["drift"] = "repair"
    await folder.go()
    await folder.rests()


@pytest.mark.fault("L3 D3")
@pytest.mark.parametrize("how", ["release", "generations"])
async def test_what_is_to_be_tried_again_later_is_in_the_next_whole_tree(tmp_path: Path, how: str) -> None:
    """A directory with somebody's file takes the place of a file, which waits for a retry when a generation comes."""
    folder = start(tmp_path, how)
    if how == "generations":
        folder.check(("true",))
    await folder.go()
    spoil(folder.tree.resolve() / "a", "directory")
    subscriber = subscriber_of(folder.store, folder.mirror, index=folder.state / "index.db", **folder.options)
    await subscriber._open()
    try:
        await subscriber._round(full=True, allow_delete=True)
        assert [problem.path for problem in subscriber._problems()] == ["a"]
        for change in ("b", "c"):
            another(folder.source, change)
            await folder.push()
            await subscriber._round(full=change == "b", allow_delete=True)
            assert (folder.tree / change).read_text() == "changed"
        if how == "release":
            assert subscriber._problems() == []
            assert difference(folder.source, folder.tree) == {}
        else:
            assert [problem.path for problem in subscriber._problems()] == ["a"]
    finally:
        await subscriber._close()
