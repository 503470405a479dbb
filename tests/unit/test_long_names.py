"""Names and paths too long for any filesystem, from a hostile publisher: refused, told, and nothing written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import ObjectCorrupt
from syncd.modes import ModePolicy
from syncd.paths import MAX_COMPONENT_BYTES, MAX_PATH_BYTES, subject_token
from syncd.rollout import RolloutOptions
from syncd.store.base import BucketSpec
from syncd.store.memory import MemoryStore
from tests.support.generations import Item, Publisher, Tree, file, folder, link
from tests.support.mirror import litter, snapshot
from tests.support.pair import keeper, subscriber_of
from tests.support.store import raw_meta

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.upstream import PullResult

LONG_NAME = "n" * (MAX_COMPONENT_BYTES + 1)
WIDE_NAME = "é" * (MAX_COMPONENT_BYTES // 2 + 1)
"""More bytes than characters: 128 of them."""
KINDS: dict[str, Item] = {"file": file("evil"), "directory": folder({"f": file("evil")}), "link": link("keep")}


def nested(names: list[str], leaf: Item) -> Tree:
    """A tree of one path."""
    for name in reversed(names[1:]):
        leaf = folder({name: leaf})
    return {names[0]: leaf}


def path_of(size: int) -> list[str]:
    """The components of a path of so many bytes, each of which is fine by itself."""
    names = ["p" * 200] * (size // 201)
    rest = size - 201 * len(names)
    return [*names, "q" * rest] if rest else [*names[:-1], "p" * 199]


class Mirror:
    """A mirror that has a generation of a hostile publisher's."""

    def __init__(self, directory: Path, mode: Any = "mirror") -> None:
        self.directory, self.mode = directory, mode
        self.root = directory / "mirror"
        self.store = MemoryStore()
        self.status = keeper("subscribe")

    @property
    def tree(self) -> Path:
        return (self.root / "current").resolve() if self.mode == "release" else self.root

    async def pull(self) -> PullResult:
        index = self.directory / "state/index.db"
        rollout = RolloutOptions(mode=self.mode, modes=ModePolicy(read_only=self.mode == "release"))
        return await subscriber_of(self.store, self.root, index=index, status=self.status, rollout=rollout).pull()

    async def refuses(self, publisher: Publisher, evil: Tree, reason: str) -> None:
        """Nothing of a generation is taken; the next one is."""
        good: Tree = {"keep": file("k"), "d": folder({"keep": file("k")})}
        await publisher.commit(good)
        assert (await self.pull()).problems == []
        before = snapshot(self.tree)
        await publisher.commit(good | {"new": file("new")} | evil)
        with pytest.raises(ObjectCorrupt, match=reason):
            await self.pull()
        assert snapshot(self.tree) == before
        assert [problem.code for problem in self.status.now.problems] == ["bad_tree"]
        assert self.status.now.generation == 1
        assert not [path for path in self.directory.rglob("*") if path.name.startswith(("nn", "é", "pp", "new"))]
        if self.mode == "mirror":
            assert litter(self.root) == []
        await publisher.commit(good | {"new": file("new")})
        assert (await self.pull()).generation == 3
        assert (self.tree / "new").read_text() == "new"


@pytest.mark.fault("P1")
@pytest.mark.parametrize("where", ["root", "directory", "large directory"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_component_that_is_too_long_refuses_the_generation(tmp_path: Path, kind: str, where: str) -> None:
    """A node names a child with 256 bytes: in the root, below it, or in one so large that it comes in pieces."""
    mirror = Mirror(tmp_path)
    evil: Tree = {LONG_NAME: KINDS[kind]}
    if where != "root":
        many = {f"{number:04}" + "x" * 200: file("") for number in range(2400 if where == "large directory" else 1)}
        evil = {"evil": folder({**many, **evil})}
    await mirror.refuses(Publisher(mirror.store), evil, "a name of 256 bytes")


@pytest.mark.fault("P1")
@pytest.mark.parametrize("mode", ["mirror", "release"])
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["d2", WIDE_NAME], "a name of 256 bytes"),
        (["d2", "n" * 4096], "a name of 4096 bytes"),
        (path_of(MAX_PATH_BYTES + 1), "longer than"),
        (path_of(4097), "longer than"),
        (path_of(20_000), "longer than"),
    ],
    ids=["256 bytes", "4096 bytes", "path of 2801", "path of 4097", "path of 20000"],
)
async def test_a_name_or_path_that_is_too_long_refuses_the_generation(
    tmp_path: Path, mode: str, names: list[str], reason: str
) -> None:
    """Forged into the nodes of a generation, for a mirror of either mode."""
    mirror = Mirror(tmp_path, mode)
    await mirror.refuses(Publisher(mirror.store), nested(names, file("evil")), reason)


@pytest.mark.fault("P1")
@pytest.mark.parametrize("mode", ["mirror", "release"])
async def test_the_longest_names_and_paths_are_had(tmp_path: Path, mode: str) -> None:
    """255 bytes of a name and 2,800 of a path are no reason to refuse anything."""
    mirror = Mirror(tmp_path, mode)
    publisher = Publisher(mirror.store)
    longest = path_of(MAX_PATH_BYTES)
    assert len("/".join(longest)) == MAX_PATH_BYTES
    await publisher.commit(nested(longest, file("x")) | {LONG_NAME[1:]: file("y")})
    assert (await mirror.pull()).problems == []
    assert (mirror.tree / "/".join(longest)).read_text() == "x"
    assert (mirror.tree / LONG_NAME[1:]).read_text() == "y"


@pytest.mark.fault("P1")
@pytest.mark.parametrize(
    "name",
    [LONG_NAME, f"d/{LONG_NAME}/f", WIDE_NAME, "/".join(path_of(MAX_PATH_BYTES + 1)), "/".join(path_of(4097))],
    ids=["256 bytes", "256 bytes in a directory", "128 wide characters", "path of 2801", "path of 4097"],
)
async def test_an_object_whose_name_is_too_long_is_told_and_the_rest_goes_on(tmp_path: Path, name: str) -> None:
    """The metadata of an object in another client's bucket names such a path; objects beside it are fine."""
    mirror = Mirror(tmp_path)
    await mirror.store.create_bucket("app", BucketSpec())
    for number, (one, data) in enumerate([("before", b"b"), (name, b"evil"), ("d/good", b"g")]):
        mirror.store.write_raw_meta("app", subject_token(one), raw_meta(one, data, f"n{number}", bucket="app"))
        mirror.store.write_raw_chunks("app", f"n{number}", [data])
    result = await mirror.pull()
    assert [(problem.path, problem.code) for problem in result.problems] == [(name, "bad_name")]
    found = {path: what[0] for path, what in snapshot(mirror.root).items()}
    assert found == {"before": "file", "d": "dir", "d/good": "file"}
    assert litter(mirror.root) == []
