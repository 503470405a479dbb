"""The walk of two trees at once: what it yields, in which order, and what it does not read."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import BadName, ObjectCorrupt, ObjectGone
from syncd.nodes import NodeRef, digest_of
from syncd.paths import sort_key
from syncd.treediff import LOOK_AHEAD, Mark, differences, entries
from syncd.trees import TreeReader
from tests.support.specs import Builder, Spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from syncd.errors import SyncdError


class Blobs:
    """As much of a bucket as a tree reader needs for nodes."""

    name = "app"

    def __init__(self) -> None:
        self._builder = Builder()
        self.held = self._builder.blobs
        self.tree = self._builder.tree
        self.asked: list[str] = []
        self.requests = 0

    async def get_blobs(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes | SyncdError]]:
        self.requests += 1
        self.asked.extend(digests)
        for digest in digests:
            data = self.held.get(digest)
            yield digest, ObjectGone(f"blob {digest[:12]} is gone") if data is None else data


async def changes(before: Spec | None, after: Spec | None, blobs: Blobs | None = None) -> list[str]:
    blobs = blobs or Blobs()
    roots = [blobs.tree(spec) if spec is not None else None for spec in (before, after)]
    reader = TreeReader(blobs)  # type: ignore[arg-type]
    return [f"{change.mark} {change.path}" async for change in differences(reader, *roots)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param({}, {}, [], id="two empty trees"),
        pytest.param({"a": b"x"}, {"a": b"x"}, [], id="equal trees"),
        pytest.param(None, {"d": {"f": b"1"}, "d!": b"2"}, ["A d", "A d/f", "A d!"], id="no tree before: all is added"),
        pytest.param({"d": {"f": b"1"}}, None, ["D d", "D d/f"], id="no tree after: all is removed"),
        pytest.param({"a": b"x", "b": b"x"}, {"b": b"y", "c": b"x"}, ["D a", "M b", "A c"], id="added, changed, gone"),
        pytest.param({"a": b"x"}, {"a": (b"x", 0o600, 5)}, ["m a"], id="a mode"),
        pytest.param({"a": b"x"}, {"a": (b"x", None, 6)}, ["m a"], id="a time"),
        pytest.param({"a": b"x"}, {"a": (b"y", 0o600, 6)}, ["M a"], id="content goes before mode and time"),
        pytest.param({"l": "to"}, {"l": "from"}, ["M l"], id="a link text is content"),
        pytest.param({"l": "to"}, {"l": b"to"}, ["T l"], id="a link becomes a file"),
        pytest.param({"a": {"b": b"x"}}, {"a": b"x"}, ["T a", "D a/b"], id="a directory becomes a file"),
        pytest.param({"a": b"x"}, {"a": {"b": b"x"}}, ["T a", "A a/b"], id="a file becomes a directory"),
        pytest.param({"a": {"b": b"x"}}, {"a": {"b": b"y"}}, ["M a/b"], id="a directory differs only below"),
        pytest.param({"a": {}}, {"a": ({}, None, 6)}, ["m a"], id="a directory differs only itself"),
        pytest.param({"a": {"f": b"1"}, "a.b": b"1"}, {}, ["D a", "D a/f", "D a.b"], id="a directory goes before a.b"),
        pytest.param({"é": b"", "z": b""}, {"\U0001f600": b""}, ["D z", "D é", "A \U0001f600"], id="order of bytes"),
    ],
)
async def test_what_is_not_shared(before: Spec | None, after: Spec | None, expected: list[str]) -> None:
    assert await changes(before, after) == expected


async def test_a_directory_that_was_only_touched_says_so() -> None:
    """Its time follows every change below it; its mode does not."""
    blobs = Blobs()
    before = blobs.tree({"time": {}, "mode": {}, "file": b""})
    after = blobs.tree({"time": ({}, None, 6), "mode": ({}, 0o700, 6), "file": (b"", None, 6)})
    reader = TreeReader(blobs)  # type: ignore[arg-type]
    told = {change.path: change.only_touched async for change in differences(reader, before, after)}
    assert told == {"time": True, "mode": False, "file": False}


async def test_an_identical_subtree_costs_nothing() -> None:
    """Of a tree with a hundred directories that differs in one file, three nodes a side are read."""
    wide = {f"d{number:02}": {"deep": {"f": b"%d" % number}} for number in range(100)}
    other = wide | {"d42": {"deep": {"f": b"changed"}}}
    blobs = Blobs()
    assert await changes(wide, other, blobs) == ["M d42/deep/f"]
    assert len(set(blobs.asked)) == 2 * 3


async def test_the_nodes_of_many_directories_are_fetched_together() -> None:
    blobs = Blobs()
    spec = {f"d{number:03}": {"f": b"%d" % number} for number in range(LOOK_AHEAD)}
    assert len(await changes(None, spec, blobs)) == 2 * LOOK_AHEAD
    assert blobs.requests <= 2 + LOOK_AHEAD // 2


async def test_a_branch_that_is_not_entered_is_not_read() -> None:
    blobs = Blobs()
    root = blobs.tree({"in": {"f": b"1"}, "out": {"g": b"2"}})
    reader = TreeReader(blobs)  # type: ignore[arg-type]
    paths = [path async for path, _ in entries(reader, root, enter=lambda path: path == "in")]
    assert paths == ["in", "in/f", "out"]


async def test_a_node_that_is_gone_ends_the_walk() -> None:
    """What was yielded before is true; the end is an error, never silence."""
    blobs = Blobs()
    lost = blobs.tree({"f": b"1"})
    root = blobs.tree({"a": b"x", "d": {"f": b"1"}})
    del blobs.held[lost.location.blob]
    reader = TreeReader(blobs)  # type: ignore[arg-type]
    walk = entries(reader, root)
    assert [(await anext(walk))[0] for _ in range(2)] == ["a", "d"]
    with pytest.raises(ObjectGone):
        await anext(walk)


async def test_a_forged_node_is_refused() -> None:
    blobs = Blobs()
    root = blobs.tree({"a": b"x"})
    forged = NodeRef(digest_of(b"another tree"), root.location, root.length)
    reader = TreeReader(blobs)  # type: ignore[arg-type]
    with pytest.raises(ObjectCorrupt):
        _ = [path async for path, _ in entries(reader, forged)]


async def test_a_tree_too_deep_for_a_path_ends_the_walk() -> None:
    """So does one with our private directory: no mirror may have such a path."""
    deep: Spec = {"f": b""}
    for _ in range(20):
        deep = {"d" * 200: deep}
    with pytest.raises(BadName):
        await changes(None, deep)
    with pytest.raises(BadName):
        await changes(None, {".syncd": b""})


def flat(spec: Spec, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, what in spec.items():
        found[prefix + name] = "dir" if isinstance(what, dict) else what
        if isinstance(what, dict):
            found |= flat(what, f"{prefix}{name}/")
    return found


def grown(source: random.Random, depth: int = 0) -> Spec:
    names = ["a", "a.", "a!", "b", "ü", "z"]
    return {
        name: grown(source, depth + 1) if depth < 3 and source.random() < 0.4 else b"%d" % source.randrange(3)
        for name in source.sample(names, source.randrange(len(names)))
    }


@pytest.mark.parametrize("seed", range(30))
async def test_any_two_trees_differ_as_their_paths_do(seed: int) -> None:
    """Against the plain comparison of two dictionaries, in the order of paths."""
    source = random.Random(seed)
    before, after = grown(source), grown(source)
    old, new = flat(before), flat(after)
    expected = sorted((path for path in old.keys() | new.keys() if old.get(path) != new.get(path)), key=sort_key)
    assert [line[2:] for line in await changes(before, after)] == expected


def test_every_mark_has_words() -> None:
    assert all(mark.words for mark in Mark)
