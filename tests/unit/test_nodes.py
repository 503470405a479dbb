"""The bytes of the generations layout: what is written is read, one form only is read, nothing else escapes.

tests/vectors/*.json hold the same for readers in other languages; `python -m tests.unit.test_nodes` writes them anew.
"""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd import errors
from syncd.errors import FormatTooNew, ObjectCorrupt
from syncd.model import Entry, Kind
from syncd.nodes import (
    BESIDE,
    BLOB_MAX,
    EMPTY_DIGEST,
    EMPTY_LOCATION,
    MAX_GENERATION,
    MAX_PIECES,
    NODE_MAX,
    NOTE_MAX,
    RECORD_MAX,
    Child,
    Generation,
    Location,
    Node,
    NodeRef,
    Piece,
    Recipe,
    Where,
    decode_recipe,
    decode_record,
    digest_of,
    encode_node,
    encode_recipe,
    encode_record,
    identity,
    node_bound,
    tree_digest,
)

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests/vectors"

HI = digest_of(b"hi")
PACK, OTHER_PACK = digest_of(b"a pack"), digest_of(b"another pack")
RECIPE, NODE = digest_of(b"a recipe"), digest_of(b"a node")
TREE = digest_of(b"a tree")
IN_A_BLOB = Location(Where.BLOB, NODE)


def a_file(name: str, location: Location | None = None, *, size: int = 2, mode: int = 0o644, mtime: int = 1) -> Child:
    digest = HI if size else EMPTY_DIGEST
    return Child(
        name,
        Entry(Kind.FILE, mode, mtime, size, digest),
        location=location or (Location(Where.BLOB, digest) if size else EMPTY_LOCATION),
    )


def a_directory(name: str, location: Location = IN_A_BLOB, *, length: int = 100) -> Child:
    return Child(name, Entry(Kind.DIR, 0o755, 1), tree=TREE, location=location, length=length)


def a_symlink(name: str, target: str = "target") -> Child:
    return Child(name, Entry(Kind.SYMLINK, 0o777, 1, target=target))


def encoded(children: list[Child], pack: str = "") -> tuple[bytes, str]:
    """The node of some children, and its tree digest."""
    identities = [identity(child) for child in children]
    places = [
        child.location._replace(blob=BESIDE) if child.location.blob == pack else child.location for child in children
    ]
    stored = [(child.entry.kind, place, child.length) for child, place in zip(children, places, strict=True)]
    return encode_node(identities, stored), tree_digest(identities)


# -- vectors: what bytes mean ------------------------------------------------------------------------------------------

NODES: dict[str, tuple[str, list[Child]]] = {
    "an empty directory": ("", []),
    "a file whose content is a blob": ("", [a_file("a")]),
    "an empty file, stored nowhere": ("", [a_file("empty", size=0)]),
    "a directory whose node is a blob": ("", [a_directory("d")]),
    "a symlink": ("", [a_symlink("link", "../elsewhere/ünd weiter")]),
    "all kinds, sorted by name": ("", [a_directory("a"), a_file("b"), a_symlink("c")]),
    "the first and the last times, and one before 1970": (
        "",
        [a_file("a", mtime=-(1 << 63)), a_file("b", mtime=-1), a_file("c", mtime=(1 << 63) - 1)],
    ),
    "setuid, setgid, sticky, and no permission at all": ("", [a_file("a", mode=0o7777), a_file("b", mode=0)]),
    "names beyond ASCII, sorted by bytes and not by letters; nothing is normalised": (
        "",
        [
            a_file("Z"),
            a_file("a b\n\\"),
            a_file("a\u0308"),
            a_file("\u00e4"),
            a_file("\ufeff"),
            a_file("\uff5e"),
            a_file("\U0001f642"),
        ],
    ),
    "the longest name": ("", [a_file("n" * 255)]),
    "a large file by a recipe": ("", [a_file("large", Location(Where.RECIPE, RECIPE), size=(1 << 63) - 1)]),
    "a large directory by a recipe": ("", [a_directory("large", Location(Where.RECIPE, RECIPE), length=NODE_MAX)]),
    "slices of two packs, listed in the order of their use": (
        "",
        [
            a_file("a", Location(Where.PACK, OTHER_PACK, 7)),
            a_directory("b", Location(Where.PACK, PACK, 0)),
            a_file("c", Location(Where.PACK, OTHER_PACK, BLOB_MAX - 2)),
        ],
    ),
    "slices of the pack that the node itself was read from": (
        PACK,
        [
            a_file("a", Location(Where.PACK, PACK, 0)),
            a_directory("b", Location(Where.PACK, PACK, 2)),
            a_file("c", Location(Where.PACK, OTHER_PACK, 0)),
        ],
    ),
}

RECIPES = {
    "three chunks": Recipe(0, (Piece(HI, 2), Piece(NODE, BLOB_MAX), Piece(HI, 2))),
    "one piece": Recipe(0, (Piece(HI, 2),)),
    "a recipe of recipes": Recipe(1, (Piece(RECIPE, 5 * BLOB_MAX), Piece(NODE, 1))),
}

GENERATION = Generation(
    folder="app",
    number=1,
    root=NodeRef(TREE, Location(Where.PACK, PACK, 77), 1234),
    created="2026-11-21T02:02:45.600984Z",
    publisher="web-1:/srv/app",
)
RECORDS = {
    "the first generation": GENERATION,
    "everything set": replace(
        GENERATION,
        number=MAX_GENERATION,
        root=NodeRef(EMPTY_DIGEST, Location(Where.BLOB, NODE), 13),
        parent=digest_of(b"the record before"),
        files=3,
        size=(1 << 53) - 1,
        added=1,
        changed=2,
        removed=4,
        note='läuft\n\t"\\\x01\x7f\u2028🙂',
        allowed=True,
        created="2026-11-21T02:02:45Z",
        expires="2027-01-01T00:00:00.000000001Z",
    ),
    "a root of many entries": replace(GENERATION, root=NodeRef(TREE, Location(Where.RECIPE, RECIPE), NODE_MAX)),
}


def child_fields(child: Child) -> dict[str, Any]:
    entry, place = child.entry, child.location
    fields: dict[str, Any] = {
        "name": child.name,
        "kind": str(entry.kind),
        "mode": entry.mode,
        "mtime_ns": entry.mtime_ns,
    }
    if entry.kind is Kind.FILE:
        fields |= {"size": entry.size, "digest": entry.digest}
    elif entry.kind is Kind.DIR:
        fields |= {"tree": child.tree, "length": child.length}
    else:
        fields |= {"target": entry.target}
    if place.where is not Where.EMPTY:
        fields["location"] = {"where": place.where.name.lower(), "blob": place.blob, "offset": place.offset}
    return fields


def node_vectors() -> list[dict[str, Any]]:
    found = []
    for name, (pack, children) in NODES.items():
        data, tree = encoded(children, pack)
        fields = [child_fields(child) for child in children]
        found.append({"name": name, "tree": tree, "pack": pack, "bytes": data.hex(), "children": fields})
    return found


def recipe_vectors() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "bytes": encode_recipe(recipe).hex(),
            "level": recipe.level,
            "size": recipe.size,
            "pieces": [list(piece) for piece in recipe.pieces],
        }
        for name, recipe in RECIPES.items()
    ]


def record_vectors() -> list[dict[str, Any]]:
    return [
        {"name": name, "digest": digest_of(encode_record(record)), "bytes": encode_record(record).decode()}
        for name, record in RECORDS.items()
    ]


def stored(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text())


@pytest.mark.parametrize("row", stored("nodes"), ids=lambda row: row["name"])
def test_a_node_has_the_bytes_of_its_vector(row: dict[str, Any]) -> None:
    """Both ways: the children make these bytes, these bytes are the children."""
    pack, children = NODES[row["name"]]
    assert encoded(children, pack) == (bytes.fromhex(row["bytes"]), row["tree"])
    node = Node(bytes.fromhex(row["bytes"]), row["tree"], pack=row["pack"])
    assert [child_fields(child) for child in node.children()] == row["children"]
    assert list(node.children()) == children
    assert node.count == len(children)


@pytest.mark.parametrize("row", stored("recipes"), ids=lambda row: row["name"])
def test_a_recipe_has_the_bytes_of_its_vector(row: dict[str, Any]) -> None:
    """Both ways."""
    recipe = Recipe(row["level"], tuple(Piece(*piece) for piece in row["pieces"]))
    assert encode_recipe(recipe).hex() == row["bytes"]
    assert decode_recipe(bytes.fromhex(row["bytes"]), size=row["size"]) == recipe


@pytest.mark.parametrize("row", stored("records"), ids=lambda row: row["name"])
def test_a_record_has_the_bytes_of_its_vector(row: dict[str, Any]) -> None:
    """Both ways; and any JSON library finds the same in them."""
    data = row["bytes"].encode()
    assert decode_record(data) == RECORDS[row["name"]]
    assert encode_record(RECORDS[row["name"]]) == data
    assert digest_of(data) == row["digest"]


def test_the_vectors_are_complete() -> None:
    """The files hold exactly the tables of this module."""
    assert stored("nodes") == node_vectors()
    assert stored("recipes") == recipe_vectors()
    assert stored("records") == record_vectors()
    assert stored("refused") == refused_vectors()


def test_the_bytes_in_format_md_are_those_of_the_vectors() -> None:
    """Every node that the page shows is one of nodes.json."""
    text = (ROOT / "docs/format.md").read_text()
    block = re.search(r"<!-- vectors: nodes.json -->\n```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    shown = ["".join(one.split()) for one in block[1].split("\n\n")]
    assert len(shown) == 2
    assert set(shown) <= {row["bytes"] for row in stored("nodes")}


# -- refusals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Bytes that must be refused. ``given`` is what the reader knows beside them."""

    what: str
    why: str
    data: bytes
    given: dict[str, Any]
    error: str = "ObjectCorrupt"

    def read(self) -> None:
        if self.what == "node":
            list(Node(self.data, self.given["tree"], pack=self.given["pack"]).children())
        elif self.what == "recipe":
            decode_recipe(self.data, **self.given)
        else:
            decode_record(self.data)


def one(name: bytes = b"f", kind: int = 0, *, mode: int = 0o644, size: int = 2, tail: bytes | None = None) -> bytes:
    """An identity with anything in it."""
    head = struct.pack("<HBHqQ", len(name), kind, mode, 0, size)
    return head + name + (bytes.fromhex(HI) if tail is None else tail)


def link(target: bytes, *, length: int | None = None, **changes: int) -> bytes:
    told = len(target) if length is None else length
    return one(b"l", 2, **({"mode": 0o777, "size": 0} | changes), tail=struct.pack("<H", told) + target)


def forged(
    why: str,
    *identities: bytes,
    places: bytes = b"\0",
    packs: tuple[str, ...] = (),
    error: str = "ObjectCorrupt",
    **told: Any,
) -> Refusal:
    """A node whose tree digest is right and whose rest is as given."""
    body = b"".join(identities)
    version, count = told.get("version", 1), told.get("count", len(identities))
    head = struct.pack("<BIII", version, count, told.get("size", len(body)), told.get("listed", len(packs)))
    data = head + b"".join(map(bytes.fromhex, packs)) + body + places
    return Refusal("node", why, data, {"tree": told.get("tree", digest_of(body)), "pack": told.get("pack", "")}, error)


def sliced(number: int, offset: int = 0) -> bytes:
    return struct.pack("<BII", 2, number, offset)


DIR = one(b"d", 1, size=0)
U32 = struct.Struct("<I").pack
RAW = bytes.fromhex(NODE)

NODE_REFUSALS = [
    # names
    forged("the name ..", one(b"..")),
    forged("the name .", one(b".")),
    forged("a name with a slash", one(b"a/b")),
    forged("an absolute name", one(b"/a")),
    forged("a name with NUL", one(b"a\0b")),
    forged("an empty name", one(b"")),
    forged("a name of 256 bytes", one(b"n" * 256)),
    forged("a name that is not UTF-8", one(b"\xff")),
    forged("a name with a surrogate", one(b"\xed\xa0\x80")),
    forged("a name in overlong UTF-8", one(b"\xc0\xae")),
    forged("a name that ends in the middle of a character", one(b"\xe2\x82")),
    forged("a name twice", one(), one(), places=b"\0\0"),
    forged("a file and a directory of one name", one(b"d"), DIR, places=b"\0\0" + RAW + U32(100)),
    forged("names out of order", one(b"b"), one(b"a"), places=b"\0\0"),
    forged("names sorted by letters, not by bytes", one(b"a"), one(b"Z"), places=b"\0\0"),
    # kinds, modes, sizes
    forged("an unknown kind", one(kind=3)),
    forged("an unknown kind, otherwise like a directory", one(kind=3, size=0), places=b"\0" + RAW + U32(100)),
    forged("a mode beyond the permission bits", one(mode=0o10000)),
    forged("a size of 2^63", one(size=1 << 63), places=b"\1" + RAW),
    forged("a directory with a size", one(kind=1), places=b"\0" + RAW + U32(100)),
    forged("an empty file with the digest of another content", one(size=0), places=b""),
    forged("a file of two bytes with the digest of none", one(tail=bytes.fromhex(EMPTY_DIGEST))),
    forged("a symlink with a mode of its own", link(b"t", mode=0o755), places=b""),
    forged("a symlink with a size", link(b"t", size=1), places=b""),
    forged("a symlink without a target", link(b""), places=b""),
    forged("a target of 4,096 bytes", link(b"t" * 4096), places=b""),
    forged("a target with NUL", link(b"t\0"), places=b""),
    forged("a target that is not UTF-8", link(b"\xff"), places=b""),
    forged("a target that goes on behind the identities", link(b"t", length=2), places=b"t"),
    # lengths
    forged("a child less than counted", one(), count=2),
    forged("a child more than counted", one(), one(b"g"), count=1, places=b"\0\0"),
    forged("bytes behind the last identity", one() + b"\0"),
    forged("an identity that is cut off", one()[:-1], places=b"\0\0"),
    forged("a name that goes on behind the end", struct.pack("<HBHqQ", 200, 0, 0, 0, 2) + b"name", places=b""),
    forged("bytes behind the last location", one(), places=b"\0\0"),
    forged("bytes in an empty directory", places=b"\0"),
    forged("a location that is missing", one(), places=b""),
    forged("a location for an empty file", one(size=0, tail=bytes.fromhex(EMPTY_DIGEST)), places=b"\0"),
    forged("a count of 4 billion children", one(), count=0xFFFFFFFF),
    forged("a count of a million children", one(), count=1_000_000),
    forged("4 GB of identities", one(), size=0xFFFFFFFF),
    forged("4 billion packs", one(), places=sliced(0), listed=0xFFFFFFFF),
    forged("a million packs of a million children", one(), places=sliced(0), listed=1_000_000, count=1_000_000),
    Refusal("node", "nothing", b"", {"tree": EMPTY_DIGEST, "pack": ""}),
    Refusal("node", "a header that is cut off", bytes([1] + [0] * 11), {"tree": EMPTY_DIGEST, "pack": ""}),
    # locations
    forged("an unknown kind of location", one(), places=b"\4" + RAW),
    forged("a slice of its own pack in a node that is no slice", one(), places=b"\3" + U32(0)),
    forged("a pack that is not listed", one(), places=sliced(1), packs=(PACK,)),
    forged("a pack where none is listed", one(), places=sliced(0)),
    forged("a pack that is listed and not used", one(), packs=(PACK,)),
    forged("a pack that is listed twice", one(), one(b"g"), places=sliced(0) + sliced(1), packs=(PACK, PACK)),
    forged("packs out of the order of use", one(), one(b"g"), places=sliced(1) + sliced(0), packs=(PACK, OTHER_PACK)),
    forged(
        "packs out of the order of use, all of them used",
        one(),
        one(b"g"),
        one(b"h"),
        places=sliced(1) + sliced(0) + sliced(1),
        packs=(PACK, OTHER_PACK),
    ),
    forged("its own pack among those that are listed", one(), places=sliced(0), packs=(PACK,), pack=PACK),
    forged("more packs than children", one(), places=sliced(0), packs=(PACK, OTHER_PACK)),
    forged("a slice that ends behind any pack", one(), places=sliced(0, BLOB_MAX - 1), packs=(PACK,)),
    forged("a slice of its own pack that ends behind it", one(), places=b"\3" + U32(BLOB_MAX - 1), pack=PACK),
    forged("a blob of more than a blob holds", one(size=BLOB_MAX + 1)),
    forged("a recipe whose digest is cut off", one(), places=b"\1" + RAW[:-1]),
    forged("a directory's blob whose digest is cut off", DIR, places=b"\0" + RAW[:-1]),
    forged("a directory whose length is cut off", DIR, places=b"\0" + RAW + U32(100)[:-1]),
    forged("a directory of less than a header", DIR, places=b"\0" + RAW + U32(12)),
    forged("a directory of more than a node", DIR, places=b"\1" + RAW + U32(NODE_MAX + 1)),
    forged("a directory of more than a blob in a blob", DIR, places=b"\0" + RAW + U32(BLOB_MAX + 1)),
    forged("a directory behind its pack", DIR, places=sliced(0, BLOB_MAX - 99) + U32(100), packs=(PACK,)),
    # digests and versions
    forged("another tree digest", one(), tree=TREE),
    forged("format 0", one(), version=0),
    forged("format 2", one(), version=2, error="FormatTooNew"),
    forged("format 255, and nothing else that is known", version=255, tree=TREE, error="FormatTooNew", places=b"?"),
]


def lying(
    why: str, *pieces: tuple[int, int], size: int | None = None, total: int | None = None, **told: Any
) -> Refusal:
    """A recipe of (repetitions, length) with anything in it."""
    real = sum(count * length for count, length in pieces)
    size = real if size is None else size
    head = struct.pack("<BBQ", told.get("version", 1), told.get("level", 0), size if total is None else total)
    body = b"".join((RAW + struct.pack("<Q", length)) * count for count, length in pieces)
    given = {"size": size, "below": told.get("below", 4)}
    return Refusal("recipe", why, head + body + told.get("tail", b""), given, told.get("error", "ObjectCorrupt"))


RECIPE_REFUSALS = [
    lying("pieces that add up to less", (2, 100), size=201),
    lying("pieces that add up to more", (2, 100), size=199),
    lying("a size that is not the one asked for", (2, 100), total=201),
    lying("pieces whose sum overflows 64 bits to the right size", (1, (1 << 64) - 98), (1, 100), size=2, level=1),
    lying("no pieces"),
    lying("no pieces, for a size", size=10),
    lying("a piece of no bytes", (1, 100), (1, 0)),
    lying("a chunk of more than a blob holds", (1, BLOB_MAX + 1)),
    lying("a level of 4", (1, 100), level=4),
    lying("a level of 255", (1, 100), level=255),
    lying("a recipe in one of its own level", (1, 100), level=1, below=1),
    lying("a recipe in one of a lower level", (1, 100), level=2, below=1),
    lying("a piece that is cut off", (2, 100), tail=bytes(39)),
    lying("a byte behind the last piece", (2, 100), tail=b"\0"),
    lying("format 0", (1, 100), version=0),
    lying("format 2", (1, 100), version=2, error="FormatTooNew"),
    Refusal("recipe", "nothing", b"", {"size": 0, "below": 4}),
    Refusal("recipe", "a header that is cut off", b"\1" + bytes(8), {"size": 0, "below": 4}),
]


def spoiled(why: str, old: str, new: str, *, error: str = "ObjectCorrupt") -> Refusal:
    """The record of the first generation with one thing replaced."""
    text = encode_record(GENERATION).decode()
    assert text.count(old) == 1, old
    return Refusal("record", why, text.replace(old, new).encode("utf-8", "surrogatepass"), {}, error)


GOOD = encode_record(GENERATION)
RECORD_REFUSALS = [
    # form
    spoiled("a key twice", '"files":0', '"files":0,"files":0'),
    spoiled("a key twice, the second with another value", '"files":0', '"files":1,"files":0'),
    spoiled("a blank", '"files":0', '"files": 0'),
    spoiled("an escape that is not needed", "web-1", "\\u0077eb-1"),
    spoiled("a number as 1e0", '"number":1', '"number":1e0'),
    spoiled("a number as 1.0", '"number":1', '"number":1.0'),
    spoiled("a number as -0", '"files":0', '"files":-0'),
    spoiled("keys in another order", '"added":0,"allowed":false', '"allowed":false,"added":0'),
    Refusal("record", "a line end behind it", GOOD + b"\n", {}),
    Refusal("record", "a byte order mark", b"\xef\xbb\xbf" + GOOD, {}),
    Refusal("record", "UTF-16", GOOD.decode().encode("utf-16-le"), {}),
    spoiled("text that is not UTF-8", "web-1", "web-\udc80"),
    spoiled("an escaped surrogate", "web-1", "web-\\udc80"),
    # keys
    spoiled("a missing key", '"files":0,', ""),
    spoiled("a missing text", '"note":"",', ""),
    spoiled("a missing text of the root", f'"blob":"{PACK}",', ""),
    spoiled("an unknown key", '"files":0', '"files":0,"filez":0'),
    spoiled("an unknown key of the root", '"length":1234', '"length":1234,"lengths":1'),
    spoiled("a missing key of the root", ',"length":1234', ""),
    spoiled("a root that is text", '{"blob":"' + PACK + '","length":1234,"offset":77,"where":"pack"}', '"root"'),
    # numbers
    spoiled("a number of 0", '"number":1', '"number":0'),
    spoiled("a number of eleven digits", '"number":1', '"number":10000000000'),
    spoiled("a negative number", '"files":0', '"files":-1'),
    spoiled("2^53", '"bytes":0', '"bytes":9007199254740992'),
    spoiled("a number of 5,000 digits", '"bytes":0', '"bytes":' + "9" * 5000),
    spoiled("not a number", '"bytes":0', '"bytes":NaN'),
    spoiled("infinity", '"bytes":0', '"bytes":1e999'),
    spoiled("a truth as a number", '"files":0', '"files":true'),
    spoiled("nothing as a number", '"files":0', '"files":null'),
    spoiled("a number as text", '"files":0', '"files":"0"'),
    spoiled("a number as a flag", '"allowed":false', '"allowed":0'),
    # the root
    spoiled("an unknown place of the root", '"offset":77,"where":"pack"', '"offset":0,"where":"beside"'),
    spoiled("no place of the root", '"offset":77,"where":"pack"', '"offset":0,"where":""'),
    spoiled("an offset in a blob", '"where":"pack"', '"where":"blob"'),
    spoiled("a root behind its pack", '"offset":77', '"offset":523055'),
    spoiled("a root of less than a header", '"length":1234', '"length":12'),
    spoiled("a root of more than a node", '"length":1234', '"length":67108865'),
    spoiled("a digest in capitals", PACK, PACK.upper()),
    spoiled("a digest of 63 digits", TREE, TREE[1:]),
    spoiled("a digest of 65 digits", TREE, TREE + "0"),
    spoiled("no tree digest", TREE, ""),
    spoiled("a parent that is no digest", '"parent":""', '"parent":"x"'),
    # texts
    spoiled("a month 13", "2026-11-21", "2026-13-21"),
    spoiled("a 29 February where there is none", "2026-11-21", "2026-02-29"),
    spoiled("a day 0", "2026-11-21", "2026-11-00"),
    spoiled("the year 0", "2026-11-21", "0000-11-21"),
    spoiled("an hour 24", "T02:", "T24:"),
    spoiled("a time in a zone", "45.600984Z", "45.600984+00:00"),
    spoiled("ten decimals", "45.600984Z", "45.6009840000Z"),
    spoiled("a second 60", "45.600984Z", "60Z"),
    spoiled("digits of another script", "2026-11-21", "٢٠٢٦-11-21"),
    spoiled("no time", '"2026-11-21T02:02:45.600984Z"', '""'),
    spoiled("an end that is no time", '"expires":""', '"expires":"never"'),
    spoiled("a note of 1,001 characters", '"note":""', '"note":"' + "n" * (NOTE_MAX + 1) + '"'),
    spoiled("a publisher that is no text", '"publisher":"web-1:/srv/app"', '"publisher":["web-1"]'),
    # versions
    spoiled("format 0", '"format":1', '"format":0'),
    spoiled("format 2", '"format":1', '"format":2', error="FormatTooNew"),
    spoiled("a negative format", '"format":1', '"format":-1'),
    spoiled("a format as text", '"format":1', '"format":"1"'),
    spoiled("a format as 1.0", '"format":1', '"format":1.0'),
    spoiled("a format that is a truth", '"format":1', '"format":true'),
    Refusal("record", "format 2, and nothing else that is known", b'{"format":2,"x":[1.5]}', {}, "FormatTooNew"),
    Refusal("record", "nothing", b"", {}),
    Refusal("record", "no JSON", b"{", {}),
    Refusal("record", "a list", b"[]", {}),
    Refusal("record", "an empty object", b"{}", {}),
    Refusal("record", "16,000 lists, one inside the other", b"[" * 16_000, {}),
    spoiled("8,000 lists in a field", '"note":""', '"note":' + "[" * 7_000 + "]" * 7_000),
    Refusal("record", "more than 16,384 bytes", GOOD.replace(b"web-1", b"w" * RECORD_MAX), {}),
]

REFUSALS = NODE_REFUSALS + RECIPE_REFUSALS + RECORD_REFUSALS


def refused_vectors() -> list[dict[str, Any]]:
    """All rows but the few that are refused for their size alone."""
    return [
        {"what": row.what, "why": row.why, "error": row.error, **row.given, "bytes": row.data.hex()}
        for row in REFUSALS
        if len(row.data) < 5_000
    ]


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: f"{row.what}: {row.why}")
def test_it_is_refused(row: Refusal) -> None:
    """By the error of the row and no other, with a line for a person, without allocating what is claimed."""
    tracemalloc.start()
    try:
        with pytest.raises(getattr(errors, row.error)) as caught:
            row.read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(caught.value).__name__ == row.error
    assert 0 < len(caught.value.message) < 600
    assert peak < 2_000_000


def test_the_refusals_are_refused_for_one_reason_only() -> None:
    """What the rows are made of is accepted, so each row says what it is refused for."""
    plain = forged("", one(), DIR.replace(b"d", b"g"), link(b"t"), places=b"\0" + b"\0" + RAW + U32(100))
    packed = forged("", one(), one(b"g"), places=sliced(0) + sliced(1, 5), packs=(PACK, OTHER_PACK))
    beside = forged("", one(), places=b"\3" + U32(BLOB_MAX - 2), pack=PACK)
    empty = forged("", one(size=0, tail=bytes.fromhex(EMPTY_DIGEST)), places=b"")
    wide = forged("", one(b"n" * 255), one(b"o", size=BLOB_MAX), places=b"\0\0")
    long = forged("", link(b"t" * 4095), places=b"")
    edges = forged("", DIR, places=sliced(0, BLOB_MAX - 100) + U32(100), packs=(PACK,))
    for row in (plain, packed, beside, empty, wide, long, edges):
        row.read()
    lying("", (1, 100), (1, BLOB_MAX)).read()
    lying("", (1, 1 << 40), (1, 1), level=3).read()
    decode_record(GOOD)
    decode_record(encode_record(replace(GENERATION, note="n" * NOTE_MAX)))


@pytest.mark.parametrize(("count", "size", "packs"), [(1_000_001, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_a_header_that_lies_is_refused_before_any_child(count: int, size: int, packs: int) -> None:
    """More children than a node may have, more identities, packs, or packs than children, than there are."""
    tail = bytes(32) if packs > count else b""
    with pytest.raises(ObjectCorrupt, match="lengths do not fit"):
        Node(struct.pack("<BIII", 1, count, size, packs) + tail, EMPTY_DIGEST)


@pytest.mark.parametrize(
    ("cut", "places"),
    [(one()[:-1], bytes(50)), (link(b"t", length=2), b"x" * 50), (one(), b"\1" + RAW[:-1])],
    ids=["digest", "target", "location"],
)
def test_a_child_that_is_cut_off_is_not_even_yielded(cut: bytes, places: bytes) -> None:
    """What follows the identities, or the node, is never taken for a part of it."""
    row = forged("", cut, places=places)
    with pytest.raises(ObjectCorrupt):
        next(Node(row.data, row.given["tree"]).children())


def test_sizes_that_no_vector_holds_are_refused() -> None:
    """A node above 64 MiB, a recipe above a blob."""
    with pytest.raises(ObjectCorrupt, match="67108865 bytes"):
        Node(bytes(NODE_MAX + 1), EMPTY_DIGEST)
    with pytest.raises(ObjectCorrupt, match="a recipe of"):
        decode_recipe(b"\1" + bytes(BLOB_MAX), size=0)


# -- writers -----------------------------------------------------------------------------------------------------------


def test_a_writer_writes_nothing_that_readers_refuse() -> None:
    """Wrong arguments are a mistake of the caller, told at once."""
    with pytest.raises(ValueError, match="without a location"):
        encoded([a_directory("d", EMPTY_LOCATION)])
    with pytest.raises(ValueError, match="without a location"):
        encoded([a_file("f", EMPTY_LOCATION)])
    with pytest.raises(ValueError, match="an empty file"):
        encoded([a_file("f", Location(Where.BLOB, EMPTY_DIGEST), size=0)])
    with pytest.raises(ValueError, match="shorter"):
        encode_node([identity(a_file("f"))], [])
    huge = identity(a_symlink("s", "t" * 4095))
    with pytest.raises(ValueError, match="too much for a directory node"):
        encode_node([huge] * 17_000, [(Kind.SYMLINK, EMPTY_LOCATION, 0)] * 17_000)
    for pieces in ((), (Piece(HI, 2),) * (MAX_PIECES + 1)):
        with pytest.raises(ValueError, match="do not fit a recipe"):
            encode_recipe(Recipe(0, pieces))
    for changes in (
        {"number": 0},
        {"note": "n" * 1001},
        {"created": "now"},
        {"root": NodeRef(TREE, EMPTY_LOCATION, 13)},
        {"publisher": "p" * RECORD_MAX},
        {"publisher": "\udc80"},
        {"files": -1},
    ):
        with pytest.raises(ValueError, match=r"record|surrogates"):
            encode_record(replace(GENERATION, **changes))


def test_a_full_recipe_is_a_blob() -> None:
    """As many pieces as fit are read back."""
    recipe = Recipe(0, (Piece(HI, 2),) * MAX_PIECES)
    data = encode_recipe(recipe)
    assert BLOB_MAX - 40 < len(data) <= BLOB_MAX
    assert decode_recipe(data, size=recipe.size) == recipe


# -- round trips and fuzzing -------------------------------------------------------------------------------------------

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: name not in {".", ".."}
)
times = st.integers(-(1 << 63), (1 << 63) - 1)
few_packs = st.sampled_from([PACK, OTHER_PACK, RECIPE, digest_of(b"own pack")])
OWN_PACK = digest_of(b"own pack")


@st.composite
def places(draw: st.DrawFn, size: int, own: str) -> Location:
    where = draw(st.sampled_from([Where.BLOB, Where.RECIPE, Where.PACK]))
    if where is Where.RECIPE or size > BLOB_MAX:
        return Location(Where.RECIPE, draw(digests))
    if where is Where.PACK:
        return Location(where, draw(few_packs), draw(st.integers(0, BLOB_MAX - size)))
    return Location(where, own)


@st.composite
def child_values(draw: st.DrawFn, name: str) -> Child:
    kind = draw(st.sampled_from(Kind))
    mtime = draw(times)
    if kind is Kind.SYMLINK:
        target = draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
        return Child(name, Entry(kind, 0o777, mtime, target=target))
    mode = draw(st.integers(0, 0o7777))
    if kind is Kind.DIR:
        length = draw(st.integers(13, BLOB_MAX))
        return Child(name, Entry(kind, mode, mtime), draw(digests), draw(places(length, draw(digests))), length)
    size = draw(st.sampled_from([0, 1, BLOB_MAX, BLOB_MAX + 1, (1 << 63) - 1]) | st.integers(0, 1 << 40))
    digest = draw(digests) if size else EMPTY_DIGEST
    place = draw(places(size, digest)) if size else EMPTY_LOCATION
    return Child(name, Entry(kind, mode, mtime, size, digest), location=place)


@st.composite
def directories(draw: st.DrawFn) -> list[Child]:
    found = draw(st.sets(names, max_size=6))
    return [draw(child_values(name)) for name in sorted(found, key=str.encode)]


@given(directories())
def test_children_survive_a_node(children: list[Child]) -> None:
    """Encoded and read back, in a pack of its own; rows say the same; the bound holds."""
    data, tree = encoded(children, OWN_PACK)
    node = Node(data, tree, pack=OWN_PACK)
    assert list(node.children()) == children
    assert [
        Child(name, Entry(kind, mode, mtime, size, "" if kind is Kind.DIR else digest, target=target))
        for name, kind, mode, mtime, size, digest, target, *_ in node.rows()
    ] == [Child(child.name, child.entry) for child in children]
    assert [row[7:] for row in node.rows()] == [(*child.location, child.length) for child in children]
    assert len(data) <= node_bound(len(children), sum(len(identity(child)) for child in children))
    assert {hash(child.entry) for child in node.children()} == {hash(child.entry) for child in children}


@given(directories())
def test_the_tree_digest_knows_nothing_of_locations(children: list[Child]) -> None:
    """The same tree, stored elsewhere, has the same digest; another time or mode does not."""
    moved = [
        child._replace(location=Location(Where.RECIPE, RECIPE)) if child.location.where is not Where.EMPTY else child
        for child in children
    ]
    assert encoded(moved)[1] == encoded(children)[1]
    if children:
        first = children[0]
        later = first._replace(entry=first.entry._replace(mtime_ns=first.entry.mtime_ns ^ 1))
        assert encoded([later, *children[1:]])[1] != encoded(children)[1]


generations = st.builds(
    Generation,
    folder=st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True),
    number=st.integers(1, MAX_GENERATION),
    root=st.builds(
        NodeRef,
        digests,
        st.builds(Location, st.sampled_from([Where.BLOB, Where.RECIPE]), digests, st.just(0))
        | st.builds(Location, st.just(Where.PACK), digests, st.integers(0, 1000)),
        st.integers(13, BLOB_MAX - 1000),
    ),
    created=st.datetimes().map(lambda when: when.isoformat() + "Z"),
    publisher=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    parent=st.just("") | digests,
    files=st.integers(0, (1 << 53) - 1),
    size=st.integers(0, (1 << 53) - 1),
    note=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    allowed=st.booleans(),
    expires=st.just("") | st.datetimes().map(lambda when: when.isoformat() + "Z"),
)


@given(generations)
def test_a_record_survives_its_bytes(generation: Generation) -> None:
    """Encoded and read back."""
    assert decode_record(encode_record(generation)) == generation


@st.composite
def mutated(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """Valid bytes with some bytes changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = at + draw(st.integers(0, 4))
        data[at:end] = draw(st.sampled_from([b"", b"\0", b"\xff"]) | st.binary(max_size=6))
    return bytes(data)


VALID_NODES = [bytes.fromhex(row["bytes"]) for row in node_vectors()]
VALID_RECIPES = [bytes.fromhex(row["bytes"]) for row in recipe_vectors()]
VALID_RECORDS = [row["bytes"].encode() for row in record_vectors()]
REFUSED = (ObjectCorrupt, FormatTooNew)


def body_digest(data: bytes) -> str:
    """The tree digest that a forger would name."""
    if len(data) < 13:
        return EMPTY_DIGEST
    _, _, size, packs = struct.unpack_from("<BIII", data)
    return digest_of(data[13 + 32 * packs : 13 + 32 * packs + size])


@settings(max_examples=300)
@given(mutated(VALID_NODES) | st.binary(max_size=300), st.sampled_from(["", PACK]))
def test_whatever_a_node_is_read_from_it_has_one_form(data: bytes, pack: str) -> None:
    """Any bytes are refused, or written again exactly so; nothing else escapes."""
    try:
        node = Node(data, body_digest(data), pack=pack)
        children = list(node.children())
    except REFUSED:
        return
    assert encoded(children, pack or "none") == (data, body_digest(data))


@settings(max_examples=300)
@given(mutated(VALID_RECIPES) | st.binary(max_size=300), st.sampled_from([2, 4, BLOB_MAX + 4, 5 * BLOB_MAX + 1]))
def test_whatever_a_recipe_is_read_from_it_has_one_form(data: bytes, size: int) -> None:
    """Any bytes are refused, or written again exactly so; nothing else escapes."""
    try:
        recipe = decode_recipe(data, size=size)
    except REFUSED:
        return
    assert encode_recipe(recipe) == data


tokens = st.sampled_from([b"0", b"1e3", b"NaN", b"{}", b"[[", b'"', b"\\u0000", b"\\ud800", b"-1", b"null", b","])


@settings(max_examples=300)
@given(
    mutated(VALID_RECORDS)
    | st.binary(max_size=300)
    | st.builds(lambda at, token: GOOD[:at] + token + GOOD[at + 1 :], st.integers(0, len(GOOD)), tokens)
)
def test_whatever_a_record_is_read_from_it_has_one_form(data: bytes) -> None:
    """Any bytes are refused, or written again exactly so; nothing else escapes."""
    try:
        generation = decode_record(data)
    except REFUSED:
        return
    assert encode_record(generation) == data


def write_vectors() -> None:
    """Write tests/vectors anew; the format is permanent, so only additions are right."""
    for name, rows in {
        "nodes": node_vectors(),
        "recipes": recipe_vectors(),
        "records": record_vectors(),
        "refused": refused_vectors(),
    }.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
        (VECTORS / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write_vectors()
