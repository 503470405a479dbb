"""Looking whether a bucket still has everything that a generation is made of.

Memory is bounded: what the bucket lists, and what was visited, is kept in a temporary database.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from syncd.errors import ObjectCorrupt, ObjectGone
from syncd.index import Index
from syncd.index.blobs import Blobs
from syncd.model import Kind
from syncd.nodes import RECIPE_LEVELS, Generation, Node, NodeRef, Where, decode_recipe
from syncd.relayout import is_blob
from syncd.service import FolderThread
from syncd.trees import TreeReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from syncd.store.base import Bucket

WALK_AT_ONCE: Final = 64
FETCH_AT_ONCE: Final = 64


async def require_whole(bucket: Bucket, generation: Generation) -> None:
    """Check that a bucket still has everything that a generation is made of, reading its nodes and recipes only.

    :raises ObjectGone: a blob was collected.
    :raises ObjectCorrupt: a node or recipe cannot be read.
    """
    walk = _Walk(bucket)
    try:
        await walk.run(generation.root)
    except ObjectGone as error:
        raise ObjectGone(
            f"blobs of generation {generation.number} were collected: {error.message}",
            hint="choose a newer one; what is kept, keep_generations and keep_days of the publisher say",
        ) from error
    except ObjectCorrupt as error:
        raise ObjectCorrupt(f"generation {generation.number} cannot be read: {error.message}") from error
    finally:
        await walk.close()


class _Walk:
    """Goes through a tree's nodes and recipes, and compares what they name with what the bucket lists."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._index = Index(None)
        self._blobs = Blobs(self._index)
        self._thread = FolderThread(f"whole-{bucket.name}")
        self._reader = TreeReader(bucket)

    async def close(self) -> None:
        """Forget everything; also while this task is being cancelled."""
        await self._thread.close(self._index.close)

    async def run(self, root: NodeRef) -> None:
        """Go through all of it.

        :raises ObjectGone, ObjectCorrupt: something cannot be had.
        """
        async for page in self._bucket.list_chunks():
            listed = [name for name in page if is_blob(name)]
            await self._thread.run(partial(self._blobs.reach, listed))  # "reached" are here those that there are
        stack = await self._thread.run(partial(self._blobs.visit, [root]))
        while stack:
            some = [stack.pop() for _ in range(min(WALK_AT_ONCE, len(stack)))]
            nodes = await self._reader.nodes(some)
            below, missing, recipes = await self._thread.run(partial(self._look, nodes))
            stack.extend(below)
            await self._confirm(missing)
            for recipe in recipes:
                await self._follow(recipe)

    def _look(self, nodes: list[Node]) -> tuple[list[NodeRef], list[str], list[NodeRef]]:
        """Return the directories and recipes below some nodes that are new, and the blobs that are not listed."""
        below: list[NodeRef] = []
        recipes: list[NodeRef] = []
        needed: set[str] = set()
        for node in nodes:
            for child in node.children():
                where = child.location.where
                if child.entry.kind is Kind.DIR:
                    below.append(NodeRef(child.tree, child.location, child.length))
                elif where is Where.RECIPE:
                    recipes.append(NodeRef(child.location.blob, child.location, child.entry.size))
                elif where is not Where.EMPTY:
                    needed.add(child.location.blob)
        return self._blobs.visit(below), self._blobs.unreached(needed), self._blobs.visit(recipes)

    async def _follow(self, recipe: NodeRef) -> None:
        """Look at the pieces of a recipe, a level at a time."""
        levels = [(recipe.location.blob, recipe.length, RECIPE_LEVELS)]
        while levels:
            digest, length, below = levels.pop()
            read = decode_recipe((await self._reader.blobs({digest}))[digest], size=length, below=below)
            if read.level:
                levels.extend((piece.digest, piece.length, read.level) for piece in read.pieces)
            else:
                pieces = {piece.digest for piece in read.pieces}
                await self._confirm(await self._thread.run(partial(self._blobs.unreached, pieces)))

    async def _confirm(self, missing: Sequence[str]) -> None:
        """Ask for blobs that were not listed: one may have been sent since the listing began.

        :raises ObjectGone, ObjectCorrupt: one cannot be had.
        """
        for start in range(0, len(missing), FETCH_AT_ONCE):
            async for _, data in self._bucket.get_blobs(missing[start : start + FETCH_AT_ONCE]):
                if not isinstance(data, bytes):
                    raise data
