"""What the generations of a bucket need, found by walking every one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.model import Kind
from syncd.nodes import Generation, NodeRef, Where, decode_recipe
from syncd.store.base import BadMeta
from syncd.trees import TreeReader, number_of

if TYPE_CHECKING:
    from syncd.store.base import Bucket


async def reachable(bucket: Bucket) -> set[str]:
    """Names of all blobs that any generation object reaches, and the nuids of all live objects."""
    reader = TreeReader(bucket)
    found: set[str] = set()
    seen: set[NodeRef] = set()
    async for page in bucket.changes(0):
        for item in page.items:
            if isinstance(item, BadMeta) or item.deleted:
                continue
            found.add(item.nuid)
            if number_of(item.name):
                commit = await reader.generation(number_of(item.name))
                if commit is not None:
                    await _walk(reader, commit.generation, found, seen)
    return found


async def _walk(reader: TreeReader, generation: Generation, found: set[str], seen: set[NodeRef]) -> None:
    stack = [generation.root]
    while stack:
        ref = stack.pop()
        if ref in seen:
            continue
        seen.add(ref)
        if ref.location.where is Where.RECIPE:
            await _recipe(reader, ref.location.blob, ref.length, found)
        found.add(ref.location.blob)
        for child in (await reader.nodes([ref]))[0].children():
            found.add(child.location.blob)
            if child.entry.kind is Kind.DIR:
                stack.append(NodeRef(child.tree, child.location, child.length))
            elif child.location.where is Where.RECIPE:
                await _recipe(reader, child.location.blob, child.entry.size, found)


async def _recipe(reader: TreeReader, digest: str, size: int, found: set[str]) -> None:
    found.add(digest)
    recipe = decode_recipe((await reader.blobs({digest}))[digest], size=size)
    for piece in recipe.pieces:
        found.add(piece.digest)
        if recipe.level:
            await _recipe(reader, piece.digest, piece.length, found)
