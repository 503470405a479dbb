"""Content-defined chunks of large files: FastCDC, and the recipes that list them.

Parameters are not part of the format: readers take any chunks up to ``BLOB_MAX``. They are fixed here so that the same
content is cut the same way by every publisher (measured in docs/decisions/0012-chunk-sizes.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from blake3 import blake3
from pyfastcdc import FastCDC

from syncd.nodes import BLOB_MAX, MAX_PIECES, Piece, Recipe, digest_of, encode_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


AVERAGE: Final = 64 * 1024
MIN_CHUNK: Final = 32 * 1024
"""The mean is near average plus minimum (FastCDC 2020, section 3.4)."""

MIN_RECIPE: Final = 128
MAX_RECIPE: Final = 4096
RECIPE_MASK: Final = 0x1FF
"""A recipe ends, after ``MIN_RECIPE`` pieces, with one whose digest has these bits zero: an insertion into a huge file
changes one or two recipes, not all."""


class Readable(Protocol):
    """What can be cut."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, ``b""`` at the end."""
        ...


class Chunks:
    """Cuts one open file. Blocking; iterate once.

    :ivar digest: BLAKE3 of everything read so far.
    """

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._hash = blake3()
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        cutter = FastCDC(AVERAGE, min_size=MIN_CHUNK, max_size=BLOB_MAX)
        for chunk in cutter.cut_stream(self._source):
            data = bytes(chunk.data)  # the cutter's buffer is used again
            self._hash.update(data)
            self.size += len(data)
            yield data

    @property
    def digest(self) -> str:
        """BLAKE3 hex of what was cut."""
        return self._hash.hexdigest()


class RecipeBuilder:
    """Lists pieces in recipes, and recipes in recipes above, holding a few thousand pieces at most.

    :param emit: gets digest and bytes of each finished recipe.
    """

    def __init__(self, emit: Callable[[str, bytes], None]) -> None:
        self._emit = emit
        self._levels: list[list[Piece]] = [[]]

    def add(self, piece: Piece, level: int = 0) -> None:
        """Take the next piece."""
        if level == len(self._levels):
            self._levels.append([])
        pieces = self._levels[level]
        pieces.append(piece)
        ends = len(pieces) >= MIN_RECIPE and int(piece.digest[:8], 16) & RECIPE_MASK == 0
        if ends or len(pieces) >= min(MAX_RECIPE, MAX_PIECES):
            self._close(level)

    def finish(self) -> str:
        """Close everything; return the digest of the recipe that lists the whole."""
        level = 0
        while True:
            pieces = self._levels[level]
            top = level == len(self._levels) - 1
            if top and level > 0 and len(pieces) == 1:
                return pieces[0].digest
            if top:
                return self._write(level)
            if pieces:
                self._close(level)
            level += 1

    def _close(self, level: int) -> None:
        size = sum(piece.length for piece in self._levels[level])
        self.add(Piece(self._write(level), size), level + 1)

    def _write(self, level: int) -> str:
        data = encode_recipe(Recipe(level, tuple(self._levels[level])))
        self._levels[level] = []
        digest = digest_of(data)
        self._emit(digest, data)
        return digest
